"""From how much work on sparse attention pays on a device: measured, and kept in a file that the operator reads."""
