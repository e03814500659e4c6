"""The table of export targets: a plain mapping from the name users give to the module that offers it."""

from __future__ import annotations

from distill.errors import ConfigError
from distill.export import clip_hf, internvl_hf, timm_dir
from distill.export.contract import ExportTarget

TARGETS: dict[str, ExportTarget] = {
    internvl_hf.FORMAT: internvl_hf,
    clip_hf.FORMAT: clip_hf,
    timm_dir.FORMAT: timm_dir,
}


def find_target(name: str) -> ExportTarget:
    """Return the target of that name.

    Raises:
        ConfigError: there is none; the message lists all.
    """
    if name not in TARGETS:
        raise ConfigError(f"There is no export format {name!r}; choose from {', '.join(TARGETS)}, or all.")
    return TARGETS[name]
