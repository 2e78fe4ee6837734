"""The Triton implementation: one kernel a module, `launch` runs them in order."""
