"""The table of export targets: a plain mapping from the name users give to the module that offers it."""

from __future__ import annotations

from distill.errors import ConfigError
from distill.export import (
    clip_hf,
    dinov2_hf,
    executorch_file,
    gguf_file,
    internvl,
    internvl_hf,
    onnx_graph,
    open_clip_dir,
    timm_dir,
    torch_export,
)
from distill.export.contract import ExportTarget

TARGETS: dict[str, ExportTarget] = {
    internvl.FORMAT: internvl,
    internvl_hf.FORMAT: internvl_hf,
    dinov2_hf.FORMAT: dinov2_hf,
    clip_hf.FORMAT: clip_hf,
    timm_dir.FORMAT: timm_dir,
    open_clip_dir.FORMAT: open_clip_dir.TARGET,
    onnx_graph.FORMAT: onnx_graph,
    gguf_file.FORMAT: gguf_file.GGUF,
    torch_export.FORMAT: torch_export,
    executorch_file.FORMAT: executorch_file,
}


def find_target(name: str) -> ExportTarget:
    """Return the target of that name.

    Raises:
        ConfigError: there is none; the message lists all.
    """
    if name not in TARGETS:
        raise ConfigError(f"There is no export format {name!r}; choose from {', '.join(TARGETS)}, or all.")
    return TARGETS[name]
