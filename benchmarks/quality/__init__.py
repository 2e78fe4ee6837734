"""What sparse attention loses end to end: perplexity and retrieval of a real model, against dense attention.

    python -m benchmarks.quality --length 2048 --length 4096 --output quality

Every method attends in place of each layer's SDPA while the model reads documents, teacher-forced; a value is found
where all its tokens are the most likely ones. Work is counted as `benchmarks.frontier` does: density, the visited pairs
over those of a dense kernel, plus the products of the ranking as a share of dense attention's FLOPs, whatever their
precision.
"""
