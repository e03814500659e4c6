"""Segmentation probe: one linear layer on standardised patch tokens, upsampled to the mask; mean IoU.

The layer's logits are upsampled bilinearly, as in DINOv2's linear segmentation (Oquab et al. 2023, arXiv 2304.07193,
section 7.4), and trained by cross-entropy against the share of each class in the cells of a grid that is finer than
any patch grid; IoU is measured at every pixel of the mask. The epoch with the highest mean IoU on the select part is
tested.

Legend: B images, S the side of images and masks in pixels, G the side of the training grid, h x w patches, D the width
of a token, C classes.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from torch.nn import functional as F

from distill.errors import ConfigError, DataError
from distill.probe.drawn import all_maps, drawn_split, fingerprint, unit_scale
from distill.probe.drawn_shapes import CLASSES, Scenes, ShapeSettings, draw_scenes
from distill.probe.extraction import Extraction
from distill.probe.intervals import FloatArray
from distill.probe.protocol import Split
from distill.probe.rung import PerImage, RungScore, ratio_of_sums

METRIC = "segmentation_miou"
TRAIN_GRID = 56
"""Side of the grid that the layer is trained on: 8 px cells at 448 px, finer than patches of 14 px."""


@dataclass(frozen=True)
class Segmenting:
    """How the layer is trained; the same for every encoder of a comparison.

    Attributes:
        epochs: passes over the fit images, 1 at least.
        batch_images: images an optimiser step.
        lr: highest learning rate (AdamW, one cycle).
        weight_decay: of AdamW.
        epochs_per_check: the layer is tried on the select images this often.
    """

    epochs: int = 30
    batch_images: int = 8
    lr: float = 5e-3
    weight_decay: float = 0.05
    epochs_per_check: int = 5

    def __post_init__(self) -> None:
        if min(self.epochs, self.batch_images, self.epochs_per_check) < 1 or self.lr <= 0:
            raise ConfigError(
                f"epochs {self.epochs}, batch_images {self.batch_images} and epochs_per_check "
                f"{self.epochs_per_check} must be 1 or more, and lr {self.lr} above 0."
            )


def segmentation_scores(
    encoder: nn.Module,
    how: Extraction,
    seed: int,
    console: Console,
    drawing: ShapeSettings | None = None,
    segmenting: Segmenting | None = None,
) -> list[RungScore]:
    """Return the mean IoU over the classes, background included, of a linear layer on patch tokens.

    Args:
        encoder: offers `distill.encoder.Encoder`.
        how: features are taken.
        seed: of the drawn scenes and of the order of training.
        console: for progress.
        drawing: what is drawn; the defaults at `how.img_size_px` when left out.
        segmenting: how the layer is trained.

    Raises:
        ConfigError: the encoder refuses images of that size.
        DataError: a feature is not finite, or fewer than two classes are drawn.
    """
    drawing = drawing or ShapeSettings(img_size_px=how.img_size_px, seed=seed)
    segmenting = segmenting or Segmenting()
    scenes, split = draw_scenes(drawing), drawn_split(drawing.num_images)
    tokens = all_maps(encoder, how, scenes.images, console, "Segmentation: scenes")
    areas, chosen = segment(tokens, scenes, split, segmenting, seed, how.device, console)
    settings = {**chosen, "scenes": drawing.num_images, "grid": list(tokens.shape[1:3]), "classes": list(CLASSES)}
    parts = PerImage(split.test, areas[0], areas[1], split.test)
    data = fingerprint("shapes", drawing)
    title = "Linear segmentation, mean IoU"
    return [RungScore(METRIC, title, "iou", parts, settings, data=data, blind=_background_iou(scenes.masks, split))]


def _background_iou(masks: Tensor, split: Split) -> float:
    """Return the mean IoU of giving every pixel the class that is commonest in the fit masks."""
    commonest = int(masks[torch.from_numpy(split.fit)].flatten().long().bincount().argmax())
    true = masks[torch.from_numpy(split.test)].long()
    return ratio_of_sums(*intersections_and_unions(torch.full_like(true, commonest), true, len(CLASSES)))


def segment(
    tokens: Tensor, scenes: Scenes, split: Split, segmenting: Segmenting, seed: int, device: str, console: Console
) -> tuple[tuple[FloatArray, FloatArray], dict[str, Any]]:
    """Train on the fit part, choose the epoch on the select part, and segment the test part once.

    Args:
        tokens: `[N, h, w, D]`, float32.
        scenes: masks of the same images.
        split: positions of the images.
        segmenting: how the layer is trained.
        seed: of the order of training.
        device: where it is trained.
        console: for progress.

    Returns:
        Intersections and unions of the test images, `[n_test, C]` each, and what was chosen.

    Raises:
        DataError: the fit masks hold fewer than two classes.
    """
    fit, select, test = (torch.from_numpy(part) for part in (split.fit, split.select, split.test))
    if len(scenes.masks[fit].unique()) < 2:
        raise DataError("The fit masks hold one class only; segmentation needs two. Draw or add other scenes.")
    mean, std = unit_scale(tokens[fit])
    tokens = ((tokens - mean) / std).permute(0, 3, 1, 2)
    side = max(TRAIN_GRID, *tokens.shape[2:])
    layer = _zero_layer(tokens.shape[1]).to(device)
    shares = class_shares(scenes.masks[fit], side)
    step = _Step(layer, segmenting, len(fit))
    shuffler = torch.Generator().manual_seed(seed)
    best, best_epoch, best_state = -1.0, 0, copy.deepcopy(layer.state_dict())
    epochs = range(1, segmenting.epochs + 1)
    for epoch in track(epochs, description="Segmentation: training", console=console, transient=True):
        for batch in torch.randperm(len(fit), generator=shuffler).split(segmenting.batch_images):
            step(tokens[fit[batch]].to(device), shares[batch].to(device))
        if epoch % segmenting.epochs_per_check and epoch != segmenting.epochs:
            continue
        found = ratio_of_sums(*_areas(layer, tokens, scenes.masks, select, side, device))
        if found > best:
            best, best_epoch, best_state = found, epoch, copy.deepcopy(layer.state_dict())
    layer.load_state_dict(best_state)
    areas = _areas(layer, tokens, scenes.masks, test, scenes.masks.shape[-1], device)
    return areas, {"epoch": best_epoch, "select_miou": best}


def _zero_layer(width: int) -> nn.Conv2d:
    """Return a 1 x 1 convolution of zeros: the problem is convex, and no start has to be drawn."""
    layer = nn.Conv2d(width, len(CLASSES), 1, device="meta").to_empty(device="cpu")  # draws no random weights
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


class _Step:
    """One optimiser step of the layer."""

    def __init__(self, layer: nn.Module, segmenting: Segmenting, num_images: int) -> None:
        self.layer = layer
        self.optimizer = torch.optim.AdamW(
            layer.parameters(), segmenting.lr, weight_decay=segmenting.weight_decay, fused=True
        )
        total = -(-num_images // segmenting.batch_images) * segmenting.epochs
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, segmenting.lr, total_steps=total)

    def __call__(self, tokens: Tensor, shares: Tensor) -> None:
        logits = upsample(self.layer(tokens), shares.shape[-1])
        loss = F.cross_entropy(logits, shares)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.schedule.step()


def upsample(logits: Tensor, side: int) -> Tensor:
    """Return logits `[B, C, h, w]` at `[B, C, side, side]`: bilinear, cells and pixels aligned by their areas."""
    return F.interpolate(logits, (side, side), mode="bilinear", align_corners=False)


def class_shares(masks: Tensor, side: int) -> Tensor:
    """Return the share of each class in the cells of a grid, `[B, C, side, side]`, of masks `[B, S, S]`."""
    return torch.cat([
        F.adaptive_avg_pool2d(F.one_hot(mask.long(), len(CLASSES)).permute(2, 0, 1).float(), side)[None]
        for mask in masks
    ])  # fmt: skip


@torch.no_grad()
def _areas(
    layer: nn.Module, tokens: Tensor, masks: Tensor, rows: Tensor, side: int, device: str
) -> tuple[FloatArray, FloatArray]:
    """Return intersections and unions `[n, C]` at a resolution; a coarser one reads every k-th pixel."""
    found: list[tuple[FloatArray, FloatArray]] = []
    for batch in rows.split(8):
        predicted = upsample(layer(tokens[batch].to(device)), side).argmax(1).cpu()
        true = F.interpolate(masks[batch].unsqueeze(1).float(), (side, side), mode="nearest-exact").squeeze(1).long()
        found.append(intersections_and_unions(predicted, true, len(CLASSES)))
    intersections, unions = (np.concatenate([areas[which] for areas in found]) for which in (0, 1))
    return intersections, unions


def intersections_and_unions(predicted: Tensor, true: Tensor, num_classes: int) -> tuple[FloatArray, FloatArray]:
    """Return each image's intersection and union with the mask, in pixels, by class.

    Summed over images, the mean of their ratios is torchmetrics' `MulticlassJaccardIndex` ("macro").

    Args:
        predicted: `[B, S, S]`, int64 classes.
        true: `[B, S, S]`, int64 classes.
        num_classes: C.

    Returns:
        `[B, C]` and `[B, C]`, float64.
    """
    pairs = (true * num_classes + predicted).flatten(1)
    confusion = torch.stack([row.bincount(minlength=num_classes**2) for row in pairs]).unflatten(1, (num_classes, -1))
    both = confusion.diagonal(dim1=1, dim2=2)
    union = confusion.sum(1) + confusion.sum(2) - both
    return both.double().numpy(), union.double().numpy()
