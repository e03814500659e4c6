"""Frozen encoders to distil from: InternViT, and any model of timm or open_clip.

Each class is named in a YAML recipe by its `class_path` and normalises images for itself. This package knows
nothing of distillation and imports neither of its neighbours.
"""

from teachers.internvit import InternViT
from teachers.internvit_config import INTERNVIT_RELEASES, InternViTConfig, InternViTRelease
from teachers.openclip_teacher import OpenClipTeacher
from teachers.timm_teacher import TimmTeacher
from teachers.weights import weights_sha256

__all__ = [
    "INTERNVIT_RELEASES",
    "InternViT",
    "InternViTConfig",
    "InternViTRelease",
    "OpenClipTeacher",
    "TimmTeacher",
    "weights_sha256",
]
