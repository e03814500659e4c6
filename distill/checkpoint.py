"""Where a run keeps things, and how its encoders come back: student-only, strict, no code executed.

A run directory holds `config.yaml` (the recipe as it ran), `checkpoints/last.ckpt`, `initial/<student>.safetensors`
(the student before the first step), `metrics.csv`, and whatever export, probe and report add. A checkpoint holds
students and heads, never a teacher: teachers are rebuilt from the recipe and their own weight files.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal, cast

import torch
import yaml
from jsonargparse import ArgumentParser
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from distill.checkpoint_files import LAST_NAME, claimed_step, manifest_path, verify
from distill.encoder import Encoder
from distill.errors import ConfigError, DistillError, WeightsError

Which = Literal["last", "initial"]


class RunDir:
    """The files of one run.

    Args:
        path: the run's folder, `trainer.default_root_dir` of its recipe.

    Raises:
        ConfigError: the folder or its config.yaml is missing or unreadable.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        file = self.path / "config.yaml"
        if not file.is_file():
            raise ConfigError(
                f"{self.path} is not a run directory: config.yaml is missing. "
                "Give the folder that `distill fit` wrote (trainer.default_root_dir of the recipe)."
            )
        try:
            loaded: object = yaml.safe_load(file.read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise ConfigError(
                f"{file} is not valid YAML: {error}. Restore the file that `distill fit` wrote."
            ) from error
        if not isinstance(loaded, dict) or "model" not in loaded:
            raise ConfigError(f"{file} has no key `model`: it is not the config of a distillation run.")
        self.config = cast(dict[str, Any], loaded)

    def _model(self) -> dict[str, Any]:
        model = self.config["model"]
        return cast(dict[str, Any], model.get("init_args", model))

    @property
    def student_names(self) -> list[str]:
        """Names of the students, in the recipe's order."""
        return list(self._model()["students"])

    @property
    def teacher_names(self) -> list[str]:
        """Names of the teachers, in the recipe's order."""
        return list(self._model()["teachers"])

    def spec(self, kind: Literal["students", "teachers"], name: str | None) -> tuple[str, dict[str, Any]]:
        """Return the name and `{class_path, init_args}` of one encoder; None means the only one.

        Raises:
            ConfigError: the name is unknown, or None where the run has several.
        """
        specs = cast(dict[str, dict[str, Any]], self._model()[kind])
        if name is None:
            if len(specs) != 1:
                raise ConfigError(f"The run {self.path} has several {kind}: name one of {', '.join(specs)}.")
            name = next(iter(specs))
        if name not in specs:
            raise ConfigError(f"The run {self.path} has no {kind[:-1]} named {name!r}; it has {', '.join(specs)}.")
        return name, specs[name]

    @property
    def last_checkpoint(self) -> Path:
        """The newest checkpoint, `checkpoints/last.ckpt`."""
        return self.path / "checkpoints" / LAST_NAME

    @property
    def metrics_files(self) -> list[Path]:
        """The logs of the run, oldest first: `metrics-1.csv`, ... of runs that were resumed, then `metrics.csv`."""
        earlier = sorted(self.path.glob("metrics-*.csv"), key=lambda file: (len(file.name), file.name))
        return [file for file in [*earlier, self.path / "metrics.csv"] if file.is_file()]

    def initial_weights(self, name: str) -> Path:
        """The student's weights before the first step."""
        return self.path / "initial" / f"{name}.safetensors"


def build_encoder(spec: dict[str, Any]) -> nn.Module:
    """Build the encoder that a `{class_path, init_args}` mapping names; its weights are not read yet.

    Returns:
        A module that offers `distill.encoder.Encoder`.

    Raises:
        ConfigError: the class is unknown, lacks a member of `Encoder`, or refuses an argument.
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--encoder", type=Encoder)
    try:
        module = parser.instantiate(parser.parse_object({"encoder": spec}))["encoder"]
    except Exception as error:  # jsonargparse raises what the named class raises
        raise ConfigError(f"The encoder {spec.get('class_path')!r} could not be built: {error}") from error
    if not isinstance(module, nn.Module):
        raise ConfigError(f"The encoder {spec.get('class_path')!r} is no torch.nn.Module; every encoder must be one.")
    return module


def read_weights(encoder: nn.Module, role: str) -> None:
    """Call an encoder's `load_weights`, turning its errors into one that names the encoder.

    Args:
        encoder: offers `distill.encoder.Encoder`.
        role: how a message names it, for example `teacher 'internvit_6b'`.

    Raises:
        WeightsError: a file is missing or damaged, or does not fit.
    """
    try:
        cast(Encoder, encoder).load_weights()
    except (FileNotFoundError, ValueError, RuntimeError, OSError) as error:
        if isinstance(error, DistillError):
            raise
        raise WeightsError(f"The weights of {role} could not be loaded. {error}") from error


def load_student(run: Path, *, name: str | None = None, which: Which = "last") -> tuple[str, nn.Module]:
    """Return a run's student with its weights, in eval mode, on the CPU.

    Args:
        run: the run directory.
        name: which student; None means the only one.
        which: "last" is the newest checkpoint, "initial" the student before the first step.

    Returns:
        The student's name and the module, which offers `distill.encoder.Encoder`.

    Raises:
        ConfigError: `run` is no run directory, or the name does not say one student.
        WeightsError: the weights are missing or damaged, or a tensor is missing, left over or of another shape.
    """
    directory = RunDir(run)
    name, spec = directory.spec("students", name)
    if which == "initial":
        file = directory.initial_weights(name)
        state = _read_safetensors(file)
    else:
        file = directory.last_checkpoint
        prefix = f"students.{name}."
        tensors = read_checkpoint(file)["state_dict"]
        state = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    encoder = build_encoder(spec)
    assign_strictly(encoder, state, file)
    return name, encoder.eval()


def load_teacher(run: Path, *, name: str | None = None) -> tuple[str, nn.Module]:
    """Return a run's teacher with the weights its recipe names, on the CPU.

    Args:
        run: the run directory.
        name: which teacher; None means the only one.

    Raises:
        ConfigError: `run` is no run directory, or the name does not say one teacher.
        WeightsError: the teacher's weights are missing, damaged or do not fit.
    """
    name, spec = RunDir(run).spec("teachers", name)
    encoder = build_encoder(spec)
    read_weights(encoder, f"teacher {name!r}")
    return name, encoder.eval()


def read_checkpoint(file: Path) -> dict[str, Any]:
    """Return a Lightning checkpoint, read with `weights_only=True` and nothing else.

    Where it has a manifest, its bytes are checked first.

    Raises:
        WeightsError: the file is missing, damaged, or holds anything but tensors and plain values; names an older one
            beside it that can be read.
    """
    if not file.is_file():
        raise WeightsError(
            f"{file} is missing. Train first with `distill fit`, or name another run.{_instead_of(file)}"
        )
    try:
        if manifest_path(file).is_file():
            verify(file)
        return _load(file)
    except WeightsError as error:
        raise WeightsError(f"{error}{_instead_of(file)}") from error


def _load(file: Path) -> dict[str, Any]:
    try:
        checkpoint = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises several kinds for damaged archives
        raise WeightsError(f"{file} cannot be read as a checkpoint: {error}") from error
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise WeightsError(f"{file} has no `state_dict`: it is not a checkpoint of a distillation run.")
    return cast(dict[str, Any], checkpoint)


TRAINING_STATE = ("optimizer_states", "loops")
"""What a checkpoint needs for training to go on from it; `ModelCheckpoint(save_weights_only=True)` leaves it out."""


def newest_verified(folder: Path, *, needed: Collection[str] = ()) -> tuple[Path | None, list[str]]:
    """Return the checkpoint of the latest step that verifies and loads, and why others were passed over.

    Args:
        folder: a run's `checkpoints/`.
        needed: keys that it must hold, for example `TRAINING_STATE`.

    Returns:
        The file, or None where there is none or none can be used; and a line for each file that was tried before it.
    """
    # A manifest may speak of a save that was cut short: the step it claims is checked before the file is taken.
    claims = {file: claimed_step(file) for file in folder.glob("*.ckpt")}
    passed_over: list[str] = []
    while claims:
        # Those without a manifest first: they cost nothing, and their reason is told.
        file = max(claims, key=lambda file: (claims[file] < 0, claims[file], file.name == LAST_NAME, file.name))
        try:
            step = verify(file).global_step
            if step >= claims[file]:
                _check_holds(_load(file), needed, file)
                return file, passed_over
            claims[file] = step
        except WeightsError as error:
            passed_over.append(str(error))
            del claims[file]
    return None, passed_over


def _check_holds(checkpoint: Mapping[str, Any], needed: Collection[str], file: Path) -> None:
    missing = [key for key in needed if key not in checkpoint]
    if missing:
        raise WeightsError(f"{file} holds weights only (no {', '.join(missing)}): training cannot go on from it.")


def _instead_of(file: Path) -> str:
    older, _ = newest_verified(file.parent)
    if older is None or older == file:
        return ""
    return f" Use {older} instead, which verifies (step {verify(older).global_step})."


def assign_strictly(encoder: nn.Module, state: dict[str, Tensor], file: Path) -> None:
    """Put every tensor of `state` into `encoder`, which may still be on the meta device.

    Args:
        encoder: the module to fill.
        state: tensors under the module's own names.
        file: where they come from, for messages.

    Raises:
        WeightsError: a tensor is missing, left over, or of another shape.
    """
    own = encoder.state_dict()
    missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    wrong = [key for key in own.keys() & state.keys() if own[key].shape != state[key].shape]
    if missing or unexpected or wrong:
        detail = "; ".join(
            f"{len(keys)} {kind} (first: {keys[0]})"
            for kind, keys in (("missing", missing), ("unexpected", unexpected), ("of another shape", sorted(wrong)))
            if keys
        )
        raise WeightsError(f"{file} does not hold this student: tensors {detail}. The recipe and the file must match.")
    flags = {key: parameter.requires_grad for key, parameter in encoder.named_parameters()}
    # A private, contiguous copy: the source may be a memory-mapped file that a later save replaces.
    encoder.load_state_dict({key: value.clone() for key, value in state.items()}, strict=True, assign=True)
    for key, parameter in encoder.named_parameters():
        parameter.requires_grad_(flags[key])


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    if not file.is_file():
        raise WeightsError(f"{file} is missing: the run did not save its student before the first step.")
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{file} cannot be read: {error}.") from error
