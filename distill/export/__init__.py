"""Encoders written in other programs' formats, published only after those programs reproduced their features.

One file per target (`internvl_hf`, `clip_hf`, `timm_dir`); `run` is the verb, `verify` the check in a fresh process,
`card` the model card. Nothing is imported here: the fresh process must stay light.
"""
