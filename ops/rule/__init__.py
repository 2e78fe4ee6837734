"""Formulas that the implementations share, each in torch operations."""
