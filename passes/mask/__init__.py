"""Masks: read as predicates, proven to be terms of the operator, and written back into the graph."""
