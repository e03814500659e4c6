"""The student before the first step, so that everything later can be compared with it."""

from __future__ import annotations

import shutil
from pathlib import Path

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from safetensors.torch import save_file
from torch import nn


class SaveInitialWeights(Callback):
    """Writes `initial/<student>.safetensors` into the run directory when a new run starts."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write each student once. A resumed run keeps what is there, or takes it from the run it continues."""
        if not trainer.is_global_zero:
            return
        students = pl_module.students
        assert isinstance(students, nn.ModuleDict)
        folder = Path(trainer.default_root_dir) / "initial"
        folder.mkdir(parents=True, exist_ok=True)
        for name, student in students.items():
            target, temporary = folder / f"{name}.safetensors", folder / f".{name}.safetensors.tmp"
            if trainer.global_step == 0:
                save_file(
                    {key: value.detach().cpu().contiguous() for key, value in student.state_dict().items()}, temporary
                )
                temporary.replace(target)
            elif not target.is_file():
                self._take_over(trainer, target, temporary)

    def _take_over(self, trainer: Trainer, target: Path, temporary: Path) -> None:
        source = Path(str(trainer.ckpt_path)).parent.parent / "initial" / target.name
        if source.is_file():
            shutil.copyfile(source, temporary)
            temporary.replace(target)
        else:
            rank_zero_warn(
                f"{source} is missing, so this run cannot compare its student with its initialisation: `distill probe` "
                f"will ask for {target}. Copy it there from the run that was resumed."
            )
