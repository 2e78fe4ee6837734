"""Which nodes of a graph are attention: calls of SDPA and flex_attention, and attention that is written out."""
