"""What runs a model on a document: the ground that the demo, the commands and the benchmarks share."""
