"""Encoders written in other programs' formats, published only after those programs reproduced their features.

One file per target, listed in `targets` and written to `contract`; `run` is the verb, `verify` the check in a fresh
process, `reshape` what can be changed on the way, `card` the model card. Nothing is imported here: the fresh
process must stay light.
"""
