"""One sequence over several GPUs: the operator and whole prefills, beside one GPU."""
