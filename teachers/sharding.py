"""A teacher too large for each device: its parameters spread over the ranks of a run, gathered block by block (FSDP2).

Built on the meta device, sharded there, and then filled: each rank reads its own rows of each tensor and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor


def shard_blocks(teacher: nn.Module, blocks: Iterable[nn.Module], mesh: DeviceMesh) -> None:
    """Spread a teacher's parameters over the ranks of a one-dimensional mesh, in place.

    A block's parameters are gathered while it runs and let go afterwards, the next block's meanwhile; what stands
    outside the blocks is gathered when the forward pass begins.

    Args:
        teacher: its parameters may be on the meta device; `forward_hidden_states` is what runs it.
        blocks: its parts that are gathered one at a time.
        mesh: of all ranks; all of them have to call this, and later to run the teacher equally often.
    """
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(teacher, mesh=mesh, reshard_after_forward=True)
    register_fsdp_forward_method(teacher, "forward_hidden_states")


def own_part(value: Tensor, parameter: Tensor, dtype: torch.dtype) -> DTensor:
    """Return `value` spread as `parameter` is; of `value` this rank's rows alone are read.

    Args:
        value: the whole tensor, for example a view of a mapped file; the same on all ranks.
        parameter: a sharded one of that shape, which may be on the meta device.
        dtype: of the result.

    Returns:
        A copy, on the mesh's device.
    """
    if not isinstance(parameter, DTensor):
        raise TypeError("own_part needs a parameter that shard_blocks has spread.")
    mesh = parameter.device_mesh
    parts, rank = value.chunk(mesh.size()), mesh.get_local_rank()
    rows = parts[rank] if rank < len(parts) else value[:0]
    is_gpu = mesh.device_type == "cuda"
    device = torch.device("cuda", torch.cuda.current_device()) if is_gpu else torch.device(mesh.device_type)
    own = rows.to(device=device, dtype=dtype, copy=True)
    return DTensor.from_local(
        own, mesh, parameter.placements, run_check=False, shape=value.shape, stride=value.contiguous().stride()
    )
