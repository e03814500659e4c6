"""A short checksum of a module's weights, to notice that a run is continued with another teacher."""

from __future__ import annotations

import hashlib

import torch
from torch import nn

MAX_VALUES = 4096
"""Values of each tensor that enter: other weights differ nearly everywhere, and all 12 GB of a 6B teacher take long."""


@torch.no_grad()
def weights_fingerprint(module: nn.Module) -> str:
    """Return a SHA-256, hex, over names, shapes and evenly spread values of a module's parameters and buffers.

    Values enter as bfloat16, so that a teacher has the same fingerprint in float32 and in bfloat16, on any device. A
    module that is sharded over ranks has that of the whole one; all ranks have to call this then.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
        whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        values = whole.detach().flatten()
        values = values[:: max(1, len(values) // MAX_VALUES)][:MAX_VALUES]
        digest.update(values.to("cpu", torch.bfloat16).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
