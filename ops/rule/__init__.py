"""The rules that all implementations share, each in torch operations."""
