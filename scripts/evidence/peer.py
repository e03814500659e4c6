"""Distil with LightlyTrain, as its user would: same student, same teacher, same images, as many of them seen.

    LIGHTLY_TRAIN_EVENTS_DISABLED=1 PYTHON scripts/evidence/peer.py recipe.yaml --out RUN --images DATA/train-files

PYTHON is that of LightlyTrain's own environment (scripts/evidence/lightly_train.txt): nothing of this project is
imported. What LightlyTrain decides is left to it: loss, augmentation, optimiser, learning rate, schedule, unless the
recipe's `arguments` say otherwise. Batch size, image size and the number of images seen are the recipe's. It begins
anew after an interruption. Writes `encoder.yaml`, which `distill probe` opens.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import timm
import torch
import yaml
from safetensors.torch import load_file
from torch import nn

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
FIRST_LAYERS = {"tf_efficientnet_lite2": "conv_stem", "resnet50": "conv1"}


class OwnNormalisation:
    """Turns images in ImageNet's normalisation, which LightlyTrain gives to both, into those the teacher knows."""

    def __init__(self, mean: list[float], std: list[float], channel_order: str) -> None:
        def column(values: Any) -> torch.Tensor:
            return torch.tensor(values).view(1, 3, 1, 1)

        self.scale = column(IMAGENET_STD) / column(std)
        self.shift = (column(IMAGENET_MEAN) - column(mean)) / column(std)
        self.is_bgr = channel_order == "bgr"

    def __call__(self, module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        """Return the first layer's input."""
        images = inputs[0] * self.scale.to(inputs[0]) + self.shift.to(inputs[0])
        return (images.flip(1) if self.is_bgr else images,)


def build(spec: dict[str, Any]) -> nn.Module:
    """Return a recipe's student or teacher as the plain timm model that it is."""
    arguments = spec["init_args"]
    model = timm.create_model(arguments["model_name"], num_classes=0)
    for path, stride in (arguments.get("strides") or {}).items():
        model.get_submodule(path).stride = (stride, stride)
    for module in model.modules():
        if hasattr(module, "drop_prob") and arguments.get("drop_path_rate") == 0.0:
            module.drop_prob = 0.0
    if arguments["weights"] != "random":
        state = {name: tensor.float() for name, tensor in load_file(arguments["weights"]).items()}
        left = model.load_state_dict(state, strict=False)
        # The asset's TinyViT has no final norm, which no hidden state depends on.
        wrong = [name for name in (*left.missing_keys, *left.unexpected_keys) if not name.startswith("head.")]
        if wrong:
            raise ValueError(f"{arguments['weights']} does not fit {arguments['model_name']}: {wrong[:3]}")
    return model


def distil(recipe: dict[str, Any], out: Path, images: Path, seed: int) -> None:
    """Train, and write the student with a file that says how to open it."""
    import lightly_train

    torch.manual_seed(seed)
    (student_spec,) = recipe["model"]["students"].values()
    (teacher_spec,) = recipe["model"]["teachers"].values()
    student, teacher = build(student_spec), build(teacher_spec)
    if hasattr(teacher, "conv_head"):
        # LightlyTrain reads the last blocks' features and takes them for as wide as the layer after them.
        teacher.num_features = int(teacher.feature_info[-1]["num_chs"])
    of_teacher = teacher_spec["init_args"]
    normalise = OwnNormalisation(
        of_teacher["image_mean"], of_teacher["image_std"], of_teacher.get("channel_order", "rgb")
    )
    teacher.get_submodule(FIRST_LAYERS[of_teacher["model_name"]]).register_forward_pre_hook(normalise)
    data, size = recipe["data"], recipe["data"]["img_size_px"]
    files = [path for path in sorted(images.rglob("*")) if path.is_symlink() or path.is_file()]
    images_seen = data["samples_per_epoch"] * recipe["trainer"]["max_epochs"]
    steps = math.ceil(images_seen / data["global_batch_size"])
    steps_per_epoch = len(files) // data["global_batch_size"]
    lightly_train.pretrain(
        out=out / "lightly",
        data=[str(path.resolve()) for path in files],
        model=student,
        method="distillation",
        method_args={"teacher": teacher},
        epochs=math.ceil(steps / steps_per_epoch),
        batch_size=data["global_batch_size"],
        num_workers=0,
        accelerator="cpu",
        precision="32-true",
        seed=seed,
        overwrite=True,
        transform_args={"image_size": (size, size)},
        trainer_args={"max_steps": steps},
        **recipe["arguments"],
    )
    exported = out / "lightly" / "exported_models" / "exported_last.pt"
    arguments = {**student_spec["init_args"], "weights": str(exported.resolve())}
    encoder = {"class_path": student_spec["class_path"], "init_args": arguments}
    (out / "encoder.yaml").write_text(yaml.safe_dump(encoder), encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    distil(yaml.safe_load(asked.recipe.read_text("utf-8")), asked.out, asked.images, asked.seed)
