"""`distill pack`: folders, lists, Hugging Face datasets and img2dataset output to shards.

Source -> listing (a row an image, no bytes read) -> scan (hash and header of each image) -> plan (which image goes into
which shard; duplicates and unusable images left out, and listed) -> shards, each an idempotent unit.
"""

from __future__ import annotations

from distill.data.pack.run import pack

__all__ = ["pack"]
