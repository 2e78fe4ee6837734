"""Long prompts beside requests that decode: in transformers' engine, and in batches as vLLM packs them."""
