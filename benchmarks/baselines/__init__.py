"""Training-free sparse prefill attention by others, each as the rule by which one query head visits keys.

Each module has one function of a head's query [L, D], key [L, D], the scale and the settings of its dial, which
yields a `Visit` for every setting. Rules are causal and see no values.
"""
