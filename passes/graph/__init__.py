"""The nodes of a graph: their tensors, operations and dimensions, and in-place writes."""
