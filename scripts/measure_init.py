"""Measure how near an InternViT student's first features are to those of the CLIP it comes from.

    python scripts/measure_init.py                                   # tiny, synthetic weights, seconds
    python scripts/measure_init.py --size large --weights DIR_OR_FILE --images PHOTOS   # the real CLIP-ViT-L/14-336

For every variant of the transfer, and every layer, it prints the mean cosine between the patch tokens of the student
and of the CLIP source on the same images: `raw`, and `centred`, after each encoder's mean token has been taken away
(a constant shared by all tokens makes raw cosines look good whatever the student knows). Once on the grid of the
source, and once at 448 px, where source and student have the same resized positions.

Without `--weights` the source is synthetic: random weights made to resemble a trained CLIP in the ways listed in
`synthetic_clip`. Such figures rank variants at most; they say nothing about the real checkpoint.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from students import CLIPViT, InternViT
from students.calibration import read_images, synthetic_images
from students.images import CLIP_MEAN, CLIP_STD
from students.init import PRE_NORM_EPS, clip_to_internvit, linearise_pre_norm
from students.timm_encoder import TimmEncoder

SIZES: dict[str, dict[str, int]] = {
    "tiny": {"embed_dim": 192, "depth": 6, "num_heads": 3},
    "large": {"embed_dim": 1024, "depth": 24, "num_heads": 16},
}
PATCH = 14
SOURCE_GRID = 24
STUDENT_SIZE_PX = 448
BUNDLED = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "motorcycle_left.png", "page.png")
"""Photographs and a page of text that the scikit-image package installs."""


@dataclass(frozen=True)
class Variant:
    """One way to begin: a title and the student's arguments."""

    title: str
    args: dict[str, Any] = field(default_factory=dict[str, Any])
    has_lost_layer_scale: bool = False


VARIANTS = (
    Variant("copy blocks, LayerScale left at 0.1", {"pre_norm": "drop", "fold_normalisation": False}, True),
    Variant("copy blocks, LayerScale 1", {"pre_norm": "drop", "fold_normalisation": False}),
    Variant("+ folded normalisation", {"pre_norm": "drop"}),
    Variant("+ linearised pre-norm (default)", {}),
    Variant("default, LayerScale rescaled", {"layer_scale": "rescaled"}),
    Variant("default, without the fold", {"fold_normalisation": False}),
    Variant("default, quick_gelu", {"act": "quick_gelu"}),
)


def synthetic_clip(embed_dim: int, depth: int, *, seed: int = 0) -> dict[str, Tensor]:
    """Return random weights in open_clip's layout that resemble a trained CLIP more than a fresh one does.

    Assumed, not measured on the real checkpoint: smooth patch filters of very different strength, smooth positions as
    strong as the patches they are added to, a strong class token, gains and biases of every LayerNorm spread around
    their usual value, two channels that stand out, and branches twice as strong as at open_clip's own start.
    """
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        return std * torch.randn(*shape, generator=g)

    def smooth(count: int, channels: int, side: int) -> Tensor:
        coarse = normal(count, channels, max(side // 4, 2), max(side // 4, 2))
        return torch.nn.functional.interpolate(coarse, size=(side, side), mode="bicubic", align_corners=False)

    strength = torch.exp(normal(embed_dim, 1, 1, 1, std=0.5))
    grey = smooth(embed_dim, 1, PATCH) + 0.3 * smooth(embed_dim, 3, PATCH)
    positions = smooth(1, embed_dim, SOURCE_GRID).flatten(2)[0].T + normal(SOURCE_GRID**2, embed_dim, std=0.3)
    outliers = torch.ones(embed_dim)
    outliers[:2] = 5.0
    state = {
        "class_embedding": normal(embed_dim, std=0.5),
        "positional_embedding": 0.3 * outliers * torch.cat([normal(1, embed_dim), positions]),
        "proj": normal(embed_dim, embed_dim // 2, std=embed_dim**-0.5),
        "conv1.weight": strength * grey / PATCH / 4,
        **_layer_norm("ln_pre", embed_dim, 0.5, normal),
        **_layer_norm("ln_post", embed_dim, 1.0, normal),
    }
    branch = 2.0 * embed_dim**-0.5 * (2 * depth) ** -0.5
    for i in range(depth):
        block = {
            **_layer_norm("ln_1", embed_dim, 1.0, normal),
            **_layer_norm("ln_2", embed_dim, 1.0, normal),
            "attn.in_proj_weight": normal(3 * embed_dim, embed_dim, std=1.5 * embed_dim**-0.5),
            "attn.in_proj_bias": normal(3 * embed_dim, std=0.1),
            "attn.out_proj.weight": normal(embed_dim, embed_dim, std=branch),
            "attn.out_proj.bias": normal(embed_dim, std=0.05),
            "mlp.c_fc.weight": normal(4 * embed_dim, embed_dim, std=embed_dim**-0.5),
            "mlp.c_fc.bias": normal(4 * embed_dim, std=0.3) - 0.3,
            "mlp.c_proj.weight": normal(embed_dim, 4 * embed_dim, std=branch),
            "mlp.c_proj.bias": normal(embed_dim, std=0.05),
        }
        state |= {f"transformer.resblocks.{i}.{key}": value for key, value in block.items()}
    return {f"visual.{key}": value.contiguous() for key, value in state.items()}


def _layer_norm(name: str, dim: int, gain: float, normal: Any) -> dict[str, Tensor]:
    return {f"{name}.weight": gain * torch.exp(normal(dim, std=0.3)), f"{name}.bias": normal(dim, std=0.1)}


def evaluation_images(directory: str | None, img_size: int) -> tuple[Tensor, str]:
    """Return images `[B, 3, S, S]` in [0, 1] and what they are."""
    if directory is not None:
        images = read_images(directory, img_size)
        return images, f"{len(images)} images of {directory}"
    try:
        import skimage
    except ImportError:
        return synthetic_images(img_size, num_images=6, seed=1), "6 images of 1/f noise, seed 1"
    with tempfile.TemporaryDirectory() as folder:
        for name in BUNDLED:
            source = Path(skimage.__file__).parent / "data" / name
            (Path(folder) / name).write_bytes(source.read_bytes())
        return read_images(folder, img_size), f"{len(BUNDLED)} images of scikit-image"


@torch.no_grad()
def hidden_states(encoder: TimmEncoder, images: Tensor) -> Iterator[Tensor]:
    """Yield the patch tokens `[B * N, D]` of every layer, first layer first."""
    layers: list[list[Tensor]] = [[] for _ in range(encoder.depth)]
    for image in images.split(1):
        for tokens, (_, patches) in zip(layers, encoder.forward_hidden_states(image, encoder.depth), strict=True):
            tokens.append(patches.flatten(0, 2))
    yield from (torch.cat(tokens) for tokens in layers)


def cosines(student: TimmEncoder, source: list[Tensor], images: Tensor) -> list[tuple[float, float]]:
    """Return raw and centred mean cosine for every layer."""
    result: list[tuple[float, float]] = []
    for ours, theirs in zip(hidden_states(student, images), source, strict=True):
        raw = torch.cosine_similarity(ours, theirs, dim=-1).mean()
        centred = torch.cosine_similarity(ours - ours.mean(dim=0), theirs - theirs.mean(dim=0), dim=-1).mean()
        result.append((float(raw), float(centred)))
    return result


def scale_choices(state: dict[str, Tensor], images: Tensor) -> dict[str, float]:
    """Return candidates for the number that stands in for `1 / std` in the linearised LayerNorm."""
    mean, std = (torch.tensor(v).reshape(1, 3, 1, 1) for v in (CLIP_MEAN, CLIP_STD))
    kernels = state["patch_embed.proj.weight"]
    inverse_std: list[Tensor] = []
    energy: list[Tensor] = []
    for image in images.split(1):
        patches = torch.nn.functional.conv2d((image - mean) / std, kernels, stride=PATCH).flatten(2).mT
        tokens = patches + state["pos_embed"][:, 1:]
        centred = tokens - tokens.mean(dim=-1, keepdim=True)
        inverse_std.append((centred.pow(2).mean(dim=-1) + PRE_NORM_EPS).rsqrt())
        energy.append((centred * state["norm_pre.weight"]).pow(2).sum(dim=-1))
    values, weights = torch.cat(inverse_std), torch.cat(energy)
    return {
        "geometric mean of 1/std (default)": float(values.log().mean().exp()),
        "arithmetic mean of 1/std": float(values.mean()),
        "least squares on the tokens": float((weights * values).sum() / weights.sum()),
    }


def measure_scales(weights: str, size: dict[str, int], images_dir: str | None, calibration: str | None) -> None:
    img_size = SOURCE_GRID * PATCH
    images, what = evaluation_images(images_dir, img_size)
    calibrations = {"noise": synthetic_images(img_size)}
    if calibration is not None:
        calibrations[calibration] = read_images(calibration, img_size)
    source = CLIPViT(weights, img_size, **size)
    source.load_weights()
    reference = list(hidden_states(source.eval(), images))
    state = source.timm_state_dict()
    print(f"\nScale of the linearised pre-norm, {img_size} px, {what}: mean of all layers, raw / centred")
    print("| calibrated on | choice | scale | cosine |\n|---|---|---|---|")
    for name, calibration_images in calibrations.items():
        for choice, scale in scale_choices(state, calibration_images).items():
            first = clip_to_internvit(
                linearise_pre_norm(state, scale),
                grid=SOURCE_GRID,
                layer_scale="one",
                should_fold_normalisation=True,
                pre_norm="drop",
                calibration_images=None,
            )
            student = InternViT("random", img_size, **size)
            student.model.load_state_dict(first, strict=True, assign=True)
            columns = zip(*cosines(student.eval(), reference, images), strict=True)
            raw, centred = (sum(column) / size["depth"] for column in columns)
            print(f"| {name} | {choice} | {scale:.3f} | {raw:.3f} / {centred:.3f} |", flush=True)


def build(variant: Variant, weights: str, size: dict[str, int], img_size: int, calibration: str | None) -> InternViT:
    student = InternViT(weights, img_size, **size, calibration_images=calibration, **variant.args)
    student.load_weights()
    if variant.has_lost_layer_scale:
        with torch.no_grad():
            for name, parameter in student.named_parameters():
                if name.endswith(".gamma"):
                    parameter.fill_(0.1)
    return student.eval()


def measure(weights: str, size: dict[str, int], images_dir: str | None, calibration: str | None) -> None:
    depth = size["depth"]
    shown = sorted({1, math.ceil(depth / 2), depth})
    for img_size in (SOURCE_GRID * PATCH, STUDENT_SIZE_PX):
        images, what = evaluation_images(images_dir, img_size)
        source = CLIPViT(weights, img_size, **size)
        source.load_weights()
        reference = list(hidden_states(source.eval(), images))
        print(f"\n{img_size} px, {what}: mean cosine with CLIP's patch tokens, raw / centred")
        print(f"| variant | {' | '.join(f'layer {i}' for i in shown)} | mean of all layers |")
        print("|---" * (len(shown) + 2) + "|")
        rows = [*VARIANTS, Variant("random weights", {})]
        for variant in rows:
            named = "random" if variant.title == "random weights" else weights
            values = cosines(build(variant, named, size, img_size, calibration), reference, images)
            cells = [f"{values[i - 1][0]:.3f} / {values[i - 1][1]:.3f}" for i in shown]
            means = [sum(column) / depth for column in zip(*values, strict=True)]
            print(f"| {variant.title} | {' | '.join(cells)} | {means[0]:.3f} / {means[1]:.3f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", help="CLIP weights, file or directory; none: synthetic")
    parser.add_argument("--size", choices=sorted(SIZES), default="tiny", help="geometry of source and student")
    parser.add_argument("--images", help="directory of images to measure on; none: those scikit-image installs")
    parser.add_argument("--calibration-images", help="directory to calibrate on; none: 1/f noise")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    size = SIZES[args.size]
    if args.weights is not None:
        measure(args.weights, size, args.images, args.calibration_images)
        measure_scales(args.weights, size, args.images, args.calibration_images)
        return
    print("Synthetic weights: these figures rank variants at most, they say nothing about the real CLIP.")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "clip.safetensors"
        save_file(synthetic_clip(size["embed_dim"], size["depth"]), file)
        measure(str(file), size, args.images, args.calibration_images)
        measure_scales(str(file), size, args.images, args.calibration_images)


if __name__ == "__main__":
    main()
