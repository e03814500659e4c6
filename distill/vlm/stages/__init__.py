"""The stages that train a small VLM, as Lightning runs; the only part of `distill.vlm` that knows Lightning."""
