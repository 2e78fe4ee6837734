"""Training-free sparse prefill attention by others, each as the rule by which queries visit keys.

A rule is causal and yields what is visited for every setting of its dial. Most are functions of one query head: its
query [L, D], key [L, D], the scale and the settings, to a `Visit` each. Those that choose for the query heads of a KV
head together, or look at values, are functions of a `Group` and the settings, to a `Visit` a head each; `by_head` makes
one of these of the former.
"""
