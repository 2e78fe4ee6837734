"""Tiny random models of many transformers architectures: which attention is found, rewritten, refused, and is right.

python -m benchmarks.zoo --only llama
"""
