"""The sweep over transformers' model families: tiny random models, eager attention against fastattn's.

registry    which families there are, read from transformers' auto classes
shrink      a tiny config from a default one, by rules
overrides   what the rules cannot know of a family
models      a model from a config: every parameter random, the same for each attention
inputs      what to feed it, found by trying
checks      what is run: plain, padded, cached, generated, differentiated
compare     when two results are the same
family      all of it for one family
runner      a process per family, with a time limit
page        docs/families.md
"""
