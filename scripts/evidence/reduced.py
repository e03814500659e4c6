"""Teachers reduced to the student's width: what they say becomes the student's own features, without a head between.

A probe, a nearest neighbour and a language model see the student's features, not the head's. A head that is thrown away
after training may hold the whole resemblance: after 1,600 images through a head the student's neighbours were worse
than before (docs/results.md). So targets are taken in the student's width: the teachers' last hidden states, centred,
brought to equal total variance, put side by side, and turned to their principal directions. Angles and distances stay,
up to what the left-out directions held.

    python scripts/evidence/reduced.py recipe.yaml --images 256

fits the directions that the recipe's `reduced.ReducedTeachers` names as `basis`, on training images.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, cast

import torch
import yaml
from rich.progress import track
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from distill.checkpoint import build_encoder
from distill.data.fetch import RowDataset
from distill.data.index import build_index
from distill.encoder import Encoder, Layer

BATCH = 8


class ReducedTeachers(nn.Module):
    """One or several teachers as one, whose only hidden state has a width of choice.

    Args:
        teachers: by name; grids are averaged to the coarsest.
        dims: width of the hidden state: the student's, for `head: none`.
        basis: safetensors file with `mean` [D], `scale` [D] and `directions` [D, dims], D being all widths together.
    """

    mean: Tensor
    scale: Tensor
    directions: Tensor

    def __init__(self, teachers: dict[str, Encoder], dims: int, basis: str) -> None:
        super().__init__()
        self.parts = nn.ModuleDict(cast(dict[str, nn.Module], dict(teachers)))
        self.basis, self.embed_dim, self.depth, self.layer_dims = basis, dims, 1, (dims,)
        self.patch_size = max(encoder.patch_size for encoder in teachers.values())
        self.num_prefix_tokens = 0
        first = next(iter(teachers.values()))
        self.image_mean, self.image_std = first.image_mean, first.image_std
        width = sum(encoder.embed_dim for encoder in teachers.values())
        for name, shape in (("mean", (width,)), ("scale", (width,)), ("directions", (width, dims))):
            self.register_buffer(name, torch.empty(shape, device="meta"))

    def load_weights(self) -> None:
        """Read the teachers' weights and the directions.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: the directions are of other teachers or another width.
        """
        if not Path(self.basis).is_file():
            raise FileNotFoundError(f"basis {self.basis!r} does not exist; scripts/evidence/reduced.py fits it.")
        stored = load_file(self.basis)
        for name, own in list(self.named_buffers(recurse=False)):
            if name not in stored or stored[name].shape != own.shape:
                raise ValueError(f"basis {self.basis!r} is of other teachers or dims; fit it again.")
            self.register_buffer(name, stored[name])
        for part in self.parts.values():
            cast(Encoder, part).load_weights()
        self.requires_grad_(False).eval()

    @torch.no_grad()
    def joined(self, images: Tensor) -> Tensor:
        """Return the teachers' last hidden states side by side, `[B, H, W, D]`, float32."""
        maps = [cast(Encoder, part).forward_hidden_states(images, 1)[-1][1] for part in self.parts.values()]
        height, width = (min(part.shape[axis] for part in maps) for axis in (1, 2))
        pooled = [F.adaptive_avg_pool2d(part.float().permute(0, 3, 1, 2), (height, width)) for part in maps]
        return torch.cat(pooled, dim=1).permute(0, 2, 3, 1)

    @torch.no_grad()
    def forward_hidden_states(self, images: Tensor, num_layers: int) -> list[Layer]:
        """Return the one hidden state; see `distill.encoder.Encoder`."""
        if num_layers != 1:
            raise ValueError(f"num_layers is {num_layers}; reduced teachers have one hidden state.")
        patches = ((self.joined(images) - self.mean) * self.scale) @ self.directions
        return [(patches.new_zeros(len(patches), 0, self.embed_dim), patches)]


def fit_directions(tokens: Tensor, widths: list[int], dims: int) -> dict[str, Tensor]:
    """Return mean, scale and principal directions of tokens.

    Args:
        tokens: `[N, D]`, of several teachers side by side.
        widths: of each teacher.
        dims: how many directions are kept.

    Returns:
        What `ReducedTeachers` reads. Each teacher has a total variance of 1 over their number, and the tokens that come
        out have a mean variance of 1 a channel.
    """
    mean = tokens.mean(0)
    centred = tokens - mean
    totals = [part.square().sum(1).mean() for part in centred.split(widths, dim=1)]
    scale = torch.cat([total.rsqrt().expand(width) for total, width in zip(totals, widths, strict=True)])
    covariance = torch.cov((centred * scale).T)
    values, vectors = torch.linalg.eigh(covariance.double())
    directions = vectors[:, -dims:].flip(1) / values[-dims:].mean().sqrt()
    return {"mean": mean, "scale": scale, "directions": directions.float().contiguous()}


def fit(recipe: dict[str, Any], num_images: int) -> None:
    """Fit and write the directions of a recipe's reduced teachers, on training images spread over all."""
    (spec,) = recipe["model"]["teachers"].values()
    target = Path(spec["init_args"]["basis"])
    module = cast(ReducedTeachers, build_encoder(spec))
    for part in module.parts.values():
        cast(Encoder, part).load_weights()
    rows = RowDataset(build_index(recipe["data"]["train"], key="data.train"), recipe["data"]["img_size_px"])
    chosen = torch.linspace(0, len(rows) - 1, min(num_images, len(rows))).long().tolist()
    found: list[Tensor] = []
    for start in track(range(0, len(chosen), BATCH), description="Teachers' directions"):
        images = torch.stack([rows[row]["image"] for row in chosen[start : start + BATCH]])
        found.append(module.joined(images).flatten(0, 2))
    widths = [cast(Encoder, part).embed_dim for part in module.parts.values()]
    target.parent.mkdir(parents=True, exist_ok=True)
    part_file = target.with_suffix(".part")
    save_file(fit_directions(torch.cat(found), widths, spec["init_args"]["dims"]), part_file)
    part_file.replace(target)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--images", type=int, default=256)
    asked = parser.parse_args()
    fit(yaml.safe_load(asked.recipe.read_text("utf-8")), asked.images)
