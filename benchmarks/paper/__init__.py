"""The claims of S2O's paper (arXiv 2602.22575), measured again with this project's operator.

    python -m benchmarks.paper captures/layer10.safetensors captures/layer20.safetensors

Two claims are about a single operator against PBS-Attn, and are judged on captured layers; two are about time against
FlashAttention-2 at 131,072 tokens, and need a GPU. Each is measured with the published rule, with the fastest settings,
and with those that keep lookups.
"""
