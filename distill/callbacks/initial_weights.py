"""The student before the first step, so that everything later can be compared with it."""

from __future__ import annotations

from pathlib import Path

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from safetensors.torch import save_file
from torch import nn


class SaveInitialWeights(Callback):
    """Writes `initial/<student>.safetensors` into the run directory when a new run starts."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write each student once; a resumed run keeps what is there."""
        if not trainer.is_global_zero or trainer.global_step > 0:
            return
        students = pl_module.students
        assert isinstance(students, nn.ModuleDict)
        folder = Path(trainer.default_root_dir) / "initial"
        folder.mkdir(parents=True, exist_ok=True)
        for name, student in students.items():
            state = {key: value.detach().cpu().contiguous() for key, value in student.state_dict().items()}
            temporary = folder / f".{name}.safetensors.tmp"
            save_file(state, temporary)
            temporary.replace(folder / f"{name}.safetensors")
