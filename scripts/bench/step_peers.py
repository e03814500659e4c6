"""One side of scripts/bench/step.py: a training step of another tool, in the environment of scripts/bench/peers.sh.

    python scripts/bench/step_peers.py SIDE --images FOLDER --size PX --batch N --precision P --channel READ,WRITE

All sides have a ViT-S/14 teacher and a ViT-Ti/14 student of timm (`transformers`: Dinov2 of the same shapes), random
weights, AdamW, and no worker processes. Losses are the tools' own; the plain loops have a linear head from 192 to 384
channels and the negative cosine of the last layer's patch tokens.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from PIL import Image
from sides import Gate
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

PATCH_PX = 14
NUM_CLASSES = 10
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def vit(name: str, size: int, num_classes: int = 0) -> nn.Module:
    """Return one of timm's ViTs at patch size 14."""
    model = timm.create_model(name, patch_size=PATCH_PX, img_size=size, num_classes=num_classes)
    assert isinstance(model, nn.Module)
    return model


class Files(Dataset[tuple[Tensor, int]]):
    """Images of a folder, decoded and resized by Pillow as torchvision's reference scripts do."""

    def __init__(self, folder: Path, transform: Callable[[Image.Image], Tensor]) -> None:
        self.files, self.transform = sorted(folder.iterdir()), transform

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = Image.open(self.files[index]).convert("RGB")
        return self.transform(image), index % NUM_CLASSES


def batches(options: argparse.Namespace) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches without end."""
    bicubic = transforms.InterpolationMode.BICUBIC
    steps = [
        transforms.Resize((options.size, options.size), bicubic),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize(MEAN, STD),
    ]
    data = Files(options.images, transforms.Compose(steps))
    loader = DataLoader(data, options.batch, shuffle=True, drop_last=True)
    return itertools.chain.from_iterable(loader for _ in itertools.count())


def autocast(options: argparse.Namespace) -> contextlib.AbstractContextManager[Any]:
    """Return the autocast that the precision asks for."""
    return torch.autocast("cpu", torch.bfloat16, enabled=options.precision == "bf16-mixed")


def loop(options: argparse.Namespace, gate: Gate, parameters: list[nn.Parameter], loss_of: Any) -> None:
    """Train without end: the loop that everybody writes."""
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.05)
    data = batches(options)
    while True:
        gate.step()
        images, labels = next(data)
        with autocast(options):
            loss = loss_of(images, labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()


def negative_cosine(head: nn.Module, student: Tensor, teacher: Tensor) -> Tensor:
    """Return minus the mean token cosine after the head."""
    return -F.cosine_similarity(head(student).float(), teacher.float(), dim=-1).mean()


def plain(options: argparse.Namespace, gate: Gate) -> None:
    """A plain PyTorch loop over timm models."""
    teacher, student = vit("vit_small_patch16_224", options.size), vit("vit_tiny_patch16_224", options.size)
    teacher.eval().requires_grad_(False)
    head = nn.Linear(192, 384)

    def last_layer(model: Any, images: Tensor) -> Tensor:
        return model.forward_intermediates(images, indices=1, output_fmt="NLC", intermediates_only=True)[0]

    def loss_of(images: Tensor, labels: Tensor) -> Tensor:
        with torch.no_grad():
            target = last_layer(teacher, images)
        return negative_cosine(head, last_layer(student, images), target)

    loop(options, gate, [*student.parameters(), *head.parameters()], loss_of)


def transformers(options: argparse.Namespace, gate: Gate) -> None:
    """A loop over transformers models with `output_hidden_states`."""
    from transformers import Dinov2Config, Dinov2Model

    def model(width: int, heads: int) -> Any:
        config = Dinov2Config(
            hidden_size=width, num_hidden_layers=12, num_attention_heads=heads, patch_size=14, image_size=options.size
        )
        return Dinov2Model(config)

    teacher, student = model(384, 6).eval().requires_grad_(False), model(192, 3)
    head = nn.Linear(192, 384)

    def last_layer(encoder: Any, images: Tensor) -> Tensor:
        return encoder(images, output_hidden_states=True).hidden_states[-1][:, 1:]

    def loss_of(images: Tensor, labels: Tensor) -> Tensor:
        with torch.no_grad():
            target = last_layer(teacher, images)
        return negative_cosine(head, last_layer(student, images), target)

    loop(options, gate, [*student.parameters(), *head.parameters()], loss_of)


def timm_task(options: argparse.Namespace, gate: Gate) -> None:
    """The distillation task of timm itself: mean squared error of pooled features, and a classification loss."""
    from timm.task import FeatureDistillationTask

    task = FeatureDistillationTask(
        student_model=vit("vit_tiny_patch16_224", options.size, NUM_CLASSES),
        teacher_model=vit("vit_small_patch16_224", options.size, NUM_CLASSES),
        criterion=nn.CrossEntropyLoss(),
        distill_loss_weight=1.0,
        task_loss_weight=1.0,
        device=torch.device("cpu"),
        verbose=False,
    )
    task.train()
    trained = [parameter for parameter in task.parameters() if parameter.requires_grad]
    loop(options, gate, trained, lambda images, labels: task(images, labels)["loss"])


def lightly_train(options: argparse.Namespace, gate: Gate) -> None:
    """LightlyTrain's `pretrain(method="distillation")`, as its documentation has it."""
    import lightly_train as library
    from lightly_train._methods.distillationv3.distillationv3 import DistillationV3

    own_step = DistillationV3.training_step_impl

    def gated(self: Any, batch: Any, batch_idx: int) -> Any:
        gate.step()
        return own_step(self, batch, batch_idx)

    DistillationV3.training_step_impl = gated
    with tempfile.TemporaryDirectory() as folder:
        library.pretrain(
            out=Path(folder) / "out",
            data=options.images,
            model=vit("vit_tiny_patch16_224", options.size),
            method="distillation",
            method_args={"teacher": vit("vit_small_patch16_224", options.size)},
            epochs=100_000,
            batch_size=options.batch,
            num_workers=0,
            devices=1,
            accelerator="cpu",
            precision=options.precision,
            transform_args={"image_size": (options.size, options.size)},
        )


SIDES = {"plain": plain, "transformers": transformers, "timm": timm_task, "lightly_train": lightly_train}


def main() -> None:
    """Run a side until the parent closes the channel."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("side", choices=sorted(SIDES))
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--precision", choices=("32-true", "bf16-mixed"), default="32-true")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--channel", required=True)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    SIDES[options.side](options, Gate(options.channel))


if __name__ == "__main__":
    main()
