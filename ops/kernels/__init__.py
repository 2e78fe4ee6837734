"""The Triton implementation: a kernel and its launcher a module; `pipeline` runs them in order, `lists` says what
they hand on."""
