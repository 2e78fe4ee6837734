"""Time, density, error and memory of one call of attention: the operator beside dense attention."""
