"""InternViT, as published: the 6B teacher, the 300M, and any smaller one of the same make.

Source: InternVL (arXiv 2312.14238), InternVL 1.5 and 2.5 (arXiv 2404.16821, 2412.05271), and the release's
`modeling_intern_vit.py`. A plain pre-norm ViT with four peculiarities: no norm before the first block and none after
the last; LayerScale on both branches; in the 6B, RMS norm throughout and on queries and keys over their full width;
position embedding resampled by plain bicubic interpolation. Parameters are named as in the release's files.

Legend: N tokens (class token first), h heads, d width of a head, g side of the patch grid.
"""

from __future__ import annotations

from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from teachers.attention import AttentionKernel, attend
from teachers.frozen import WEIGHTS_PRETRAINED, WEIGHTS_RANDOM, Dtype, FrozenEncoder, freeze
from teachers.images import IMAGENET_MEAN, IMAGENET_STD
from teachers.internvit_config import InternViTConfig, resolve_release
from teachers.sources import resolve_path
from teachers.weights import SafetensorsCheckpoint, assign_parameter, check_names

_INIT_STD = 0.02
_VLM_PREFIX = "vision_model."


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension; the mean square is computed in float32."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `[..., D]`; the scale is applied after the cast back, as the release does."""
        wide = x.to(torch.float32)
        wide = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


class Attention(nn.Module):
    """Multi-head self-attention with a joint q/k/v projection."""

    def __init__(self, config: InternViTConfig, kernel: AttentionKernel) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.head_dim = config.embed_dim // config.num_heads
        self.kernel: AttentionKernel = kernel
        self.has_free_kernel = kernel == "auto"
        self.qkv = nn.Linear(config.embed_dim, 3 * config.embed_dim, bias=config.qkv_bias)
        self.q_norm = RMSNorm(config.embed_dim, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(config.embed_dim, config.norm_eps) if config.qk_norm else nn.Identity()
        self.proj = nn.Linear(config.embed_dim, config.embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        """Attend over `[B, N, D]`."""
        query, key, value = self.qkv(x).chunk(3, dim=-1)
        # Over the full width, before the split into heads: a norm per head would be another function.
        query, key = self.q_norm(query), self.k_norm(key)
        query, key, value = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in (query, key, value))
        return self.proj(attend(query, key, value, self.kernel).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Two linear layers with the exact (erf) GELU between them."""

    def __init__(self, config: InternViTConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.embed_dim, config.mlp_dim)
        self.fc2 = nn.Linear(config.mlp_dim, config.embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, N, D]` to `[B, N, D]`."""
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """One pre-norm transformer block with LayerScale on both branches."""

    def __init__(self, config: InternViTConfig, kernel: AttentionKernel) -> None:
        super().__init__()
        norm = RMSNorm if config.norm_type == "rms_norm" else nn.LayerNorm
        self.norm1 = norm(config.embed_dim, eps=config.norm_eps)
        self.attn = Attention(config, kernel)
        self.ls1 = nn.Parameter(torch.full((config.embed_dim,), config.init_values))
        self.norm2 = norm(config.embed_dim, eps=config.norm_eps)
        self.mlp = Mlp(config)
        self.ls2 = nn.Parameter(torch.full((config.embed_dim,), config.init_values))

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, N, D]` to `[B, N, D]`."""
        x = x + self.attn(self.norm1(x)) * self.ls1
        return x + self.mlp(self.norm2(x)) * self.ls2


class Embeddings(nn.Module):
    """Patch, class and position embedding."""

    def __init__(self, config: InternViTConfig) -> None:
        super().__init__()
        self.grid_size = config.grid_size
        self.class_embedding = nn.Parameter(torch.empty(1, 1, config.embed_dim))
        self.position_embedding = nn.Parameter(torch.empty(1, config.grid_size**2 + 1, config.embed_dim))
        self.patch_embedding = nn.Conv2d(3, config.embed_dim, kernel_size=config.patch_size, stride=config.patch_size)

    def forward(self, images: Tensor) -> Tensor:
        """Turn normalised images `[B, 3, H, W]` into `[B, 1 + N, D]`, class token first."""
        patches = self.patch_embedding(images)
        height, width = patches.shape[-2:]
        tokens = torch.cat([self.class_embedding.expand(len(images), -1, -1), patches.flatten(2).mT], dim=1)
        return tokens + self.resized_positions(height, width)

    def resized_positions(self, height: int, width: int) -> Tensor:
        """Return positions `[1, 1 + height * width, D]` for a grid that may differ from the stored one.

        Bicubic without antialiasing, computed in float32, as the release does on every forward; at the stored size
        that is the identity, so it is left out there.
        """
        if (height, width) == (self.grid_size, self.grid_size):
            return self.position_embedding
        first, grid = self.position_embedding[:, :1], self.position_embedding[:, 1:]
        grid = grid.mT.unflatten(2, (self.grid_size, self.grid_size)).to(torch.float32)
        grid = F.interpolate(grid, size=(height, width), mode="bicubic", align_corners=False)
        return torch.cat([first, grid.flatten(2).mT.to(first.dtype)], dim=1)


class Blocks(nn.Module):
    """The blocks, under the name that the release's files give them."""

    def __init__(self, config: InternViTConfig, num_blocks: int, kernel: AttentionKernel) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(config, kernel) for _ in range(num_blocks))


class InternViT(FrozenEncoder):
    """A frozen InternViT that loads the releases' own files: 6B (45 or 48 blocks), 300M, or any smaller one.

    Construction allocates nothing and opens no file. Only the blocks up to the selected layer exist: with
    `select_layer` -4, three of 48 blocks are neither built nor read.

    Args:
        weights: a directory with config.json and `model.safetensors` or shards with their index, or one
            `.safetensors` file; names bare, or under `vision_model.` as in a whole InternVL model. `"random"` draws
            untrained weights.
        architecture: name of a release (see `INTERNVIT_RELEASES`), or the fields of an `InternViTConfig`.
        select_layer: which hidden state counts as the last, from -1 (the last block) to -depth. None takes what the
            release's model card says: -4 for the two with 48 blocks, else -1.
        dtype: what the encoder computes in; also the dtype of its hidden states. "auto" is bfloat16 where that is fast.
        attention: the kernel; `auto` is PyTorch's fused attention, except for bfloat16 on a CPU.
        seed: of untrained weights.
        sha256: expected `weights_sha256` of the weights; None does not check.

    Raises:
        ValueError: an argument has no valid meaning.

    Example:
        >>> tiny = InternViTConfig(embed_dim=32, depth=2, num_heads=2, mlp_dim=64, img_size=28)
        >>> teacher = InternViT("random", architecture=tiny, dtype="float32")
        >>> teacher.load_weights()
        >>> prefix, patches = teacher.forward_hidden_states(torch.zeros(1, 3, 28, 28), num_layers=2)[-1]
        >>> prefix.shape, patches.shape
        (torch.Size([1, 1, 32]), torch.Size([1, 2, 2, 32]))
    """

    def __init__(
        self,
        weights: str,
        architecture: str | InternViTConfig = "InternViT-6B-448px-V1-5",
        select_layer: int | None = None,
        dtype: Dtype = "bfloat16",
        attention: AttentionKernel = "auto",
        seed: int = 0,
        sha256: str | None = None,
    ) -> None:
        super().__init__(weights=weights, dtype=dtype, sha256=sha256)
        if weights.partition(":")[0] == WEIGHTS_PRETRAINED:
            raise ValueError(
                f"weights is {weights!r}, but InternViT downloads nothing itself; fetch the release with "
                "`hf download OpenGVLab/<release> --local-dir <directory>` and give that directory."
            )
        release = resolve_release(architecture)
        self.config = release.config
        self.select_layer = release.select_layer if select_layer is None else select_layer
        self.seed = seed
        if not -self.config.depth <= self.select_layer <= -1:
            raise ValueError(
                f"select_layer is {self.select_layer}; it counts from the end, from -1 (the last block) to "
                f"-{self.config.depth} (the first)."
            )
        num_blocks = self.config.depth + self.select_layer + 1
        with torch.device("meta"):
            self.embeddings = Embeddings(self.config)
            self.encoder = Blocks(self.config, num_blocks, attention)
        self.image_mean, self.image_std = IMAGENET_MEAN, IMAGENET_STD
        self._describe((self.config.embed_dim,) * num_blocks, self.config.patch_size, num_prefix_tokens=1)
        freeze(self)

    def shard(self, mesh: DeviceMesh) -> None:
        """Spread the parameters over the ranks of a mesh, block by block; `load_weights` then reads this rank's rows.

        Args:
            mesh: one-dimensional, of all ranks. All have to call this, and to run the encoder equally often.

        Raises:
            RuntimeError: the weights have been read already.
        """
        if self.is_loaded:
            raise RuntimeError("InternViT has its weights already; call shard() before load_weights().")
        # FSDP2 is imported where it is used: it costs a second, and few runs need it.
        from teachers.sharding import shard_blocks

        shard_blocks(self, self.encoder.layers, mesh)

    def _place(self, name: str, value: Tensor, device: torch.device) -> None:
        """Put a copy of `value`, or this rank's rows of it, in the place of a parameter."""
        # A copy, as the tensor may be a view of the mapped file, which must be free to change afterwards.
        parameter = self.get_parameter(name)
        if hasattr(parameter, "device_mesh"):
            from teachers.sharding import own_part

            assign_parameter(self, name, own_part(value, parameter, self.dtype))
        else:
            assign_parameter(self, name, value.to(device=device, dtype=self.dtype, copy=True))

    @classmethod
    def from_directory(
        cls,
        directory: str | Path,
        select_layer: int | None = None,
        dtype: Dtype = "bfloat16",
        attention: AttentionKernel = "auto",
    ) -> InternViT:
        """Return the encoder whose architecture stands in `directory/config.json`; its weights are not yet loaded.

        Raises:
            FileNotFoundError: there is no config.json.
            ValueError: it describes no InternViT.
        """
        config = InternViTConfig.from_directory(Path(directory))
        return cls(str(directory), config, select_layer=select_layer, dtype=dtype, attention=attention)

    def _load(self, device: torch.device) -> None:
        if self.weights == WEIGHTS_RANDOM:
            self._initialise(device)
            return
        path = resolve_path(self.weights)
        if path.is_dir():
            self.config.check_equals(InternViTConfig.from_directory(path), path / "config.json")
        checkpoint = SafetensorsCheckpoint(path, prefix=_VLM_PREFIX)
        expected = {name: parameter.shape for name, parameter in self.named_parameters()}
        check_names((n for n in checkpoint.files if not self._is_dropped(n)), expected, checkpoint.source)
        checkpoint.check_shapes(expected)
        for name, tensor in checkpoint.tensors(expected):
            self._place(name, tensor, device)

    def _is_dropped(self, name: str) -> bool:
        """Whether `name` is a tensor of a block after the selected layer."""
        start, _, rest = name.partition("encoder.layers.")
        index, _, leaf = rest.partition(".")
        if start or not index.isdecimal() or not len(self.encoder.layers) <= int(index) < self.config.depth:
            return False
        return leaf in self.encoder.layers[0].state_dict()

    def _initialise(self, device: torch.device) -> None:
        """Draw untrained weights: truncated normal, biases 0, norms 1, LayerScale as the config says.

        Not the releases' `initializer_range`, which is 1e-10 and would leave every matrix at zero.
        """
        generator = torch.Generator().manual_seed(self.seed)
        for name, parameter in list(self.named_parameters()):
            leaf = name.rpartition(".")[2]
            value = torch.empty(parameter.shape)
            if leaf in ("ls1", "ls2"):
                value.fill_(self.config.init_values)
            elif leaf == "bias":
                value.zero_()
            elif "norm" in name:
                value.fill_(1.0)
            else:
                nn.init.trunc_normal_(value, std=_INIT_STD, generator=generator)
            self._place(name, value, device)

    def _hidden_states(self, images: Tensor, num_layers: int) -> list[tuple[Tensor, Tensor]]:
        grid = [side // self.patch_size for side in images.shape[-2:]]
        tokens = cast(Tensor, self.embeddings(images))
        hidden_states: list[tuple[Tensor, Tensor]] = []
        for index, block in enumerate(self.encoder.layers):
            tokens = cast(Tensor, block(tokens))
            if index >= self.depth - num_layers:
                hidden_states.append((tokens[:, :1], tokens[:, 1:].unflatten(1, grid)))
        return hidden_states
