"""Shards to batches: index (what is there), plan (which sample when), fetch (its bytes), decode and view."""
