"""What a mask says: read as a predicate, proven to be terms of the operator, and written back into the graph."""
