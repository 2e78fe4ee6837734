"""What Triton compiles one binary of a kernel for, and what it compiles another one for."""

from __future__ import annotations

import triton

SIZES = (
    "queries", "keys", "offset", "window", "near_keys",
    "kv_heads", "heads", "per_head", "guides_per_head", "rows", "guide_rows", "key_rows",
    "first_segment", "first_of_list", "segments", "all_segments", "ranked_segments", "tiles", "runs",
    "step", "guide_step", "key_step", "sample",
    "requests", "keys_per_split", "left", "right", "size",
)  # fmt: skip
"""Integers whose values make no variants of a kernel; among them all that follow from the lengths of a call.

Triton compiles a kernel anew for an integer that is 1, and for one that is a multiple of 16, as far as a kernel does
not say otherwise. What that tells the compiler is where vectors of a load or store begin and end, so these still make
variants: strides of tensors, whatever they go over, for each is part of the address of a row; `capacity`, which is that
for lists; and `chunk`, at whose multiples vectors of importance begin. A length is no part of such an address, but may
be the end of what is read or written in vectors: there, kernels go on to the end of a block.
"""

kernel = triton.jit(do_not_specialize=SIZES)
"""`triton.jit` for what is launched; without variants for `SIZES`."""
