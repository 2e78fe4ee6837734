"""Whole prefills, compiled with Inductor alone and with sparse attention."""
