"""Thresholds that keep an error budget, found for each attention site of a model, and the file they are kept in."""
