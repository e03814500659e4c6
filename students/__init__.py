"""Compact encoders to be trained; they know nothing of distillation.

Each offers the members of `distill.encoder.TimmLayoutEncoder` by shape, without inheriting from it: a YAML file
names the class by `class_path`. Weights are read by `load_weights` only, and never replaced by a silent random
initialisation.
"""

from students.clip import CLIPViT
from students.compact import TimmStudent
from students.internvit import InternViT

__all__ = ["CLIPViT", "InternViT", "TimmStudent"]
