"""A progress bar over weight files."""

from __future__ import annotations

import torch
from rich.console import Console
from rich.progress import Progress

_FEW_FILES = 3


def file_progress(num_files: int) -> Progress:
    """Return a bar over files, shown on a terminal when they are more than a few, by one process of a run."""
    is_first = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    console = Console(stderr=True)
    is_shown = num_files > _FEW_FILES and is_first and console.is_terminal
    return Progress(*Progress.get_default_columns(), console=console, transient=True, disable=not is_shown)
