"""Where a small VLM's run keeps things, and how its trained tensors come back.

RUN/config.yaml is the recipe as it runs; RUN/stages/1-NAME/ has each stage's checkpoints/, metrics.csv and, once it is
finished, stage.json; RUN/probe.json and RUN/predictions/ come from `distill vlm score`. A checkpoint holds the
connector and whatever was trained so far; parts that were never trained come from their own files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import yaml
from torch import Tensor, nn

from distill.checkpoint import read_checkpoint
from distill.checkpoint_files import LAST_NAME
from distill.data.pack.durable import durable_file
from distill.errors import ConfigError, DataError, WeightsError
from distill.vlm.recipe import Part, VLMRecipe, build_recipe

FINISHED = "stage.json"
STAGE_FORMAT = "distill-vlm-stage/1"
PARTS: tuple[Part, ...] = ("vision", "connector", "language")
MODEL_PREFIX = "model."
PARTS_KEY = "vlm_parts"
FREE_KEYS = ("run_dir", "trainer", "max_new_tokens")
"""Keys of a recipe that may change when a run goes on: they do not change what is trained."""


class VLMRun:
    """The files of one run of `distill vlm fit`.

    Args:
        path: the run's folder, `run_dir` of its recipe.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)

    @property
    def config_file(self) -> Path:
        """The recipe as it runs."""
        return self.path / "config.yaml"

    def stage_dir(self, number: int, name: str) -> Path:
        """Return the folder of a stage, counted from 1."""
        return self.path / "stages" / f"{number}-{name}"

    def begin(self, content: Mapping[str, Any], *, resume: str) -> None:
        """Prepare the folder for a run of a recipe, and keep the recipe there.

        Args:
            content: the recipe as a plain mapping.
            resume: "auto" goes on with the run that lies there; "no" moves it to earlier-N/.

        Raises:
            ConfigError: `resume` is unknown, the run that lies there trains something else, or the folder cannot be
                written.
        """
        if resume not in ("auto", "no"):
            raise ConfigError(f"--resume {resume!r} is unknown; give auto to go on, or no to begin anew.")
        if resume == "no":
            self._set_aside()
        elif self.config_file.is_file():
            refuse_other_recipe(self.content(), content, self.path)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with durable_file(self.config_file) as file:
                file.write(yaml.safe_dump(plain(content), sort_keys=False, allow_unicode=True).encode())
        except OSError as error:
            raise ConfigError(
                f"run_dir {self.path} cannot be written: {error}. Set it to a folder that can."
            ) from error

    def _set_aside(self) -> None:
        names = ("stages", "predictions", "probe.json", "probe.per_image.safetensors", "config.yaml")
        found = [self.path / name for name in names if (self.path / name).exists()]
        if not (self.path / "stages").exists():
            return
        number = 1
        while (self.path / f"earlier-{number}").exists():
            number += 1
        folder = self.path / f"earlier-{number}"
        folder.mkdir()
        for path in found:
            path.replace(folder / path.name)

    def content(self) -> dict[str, Any]:
        """Return the recipe as a plain mapping.

        Raises:
            ConfigError: the folder is no run of `distill vlm fit`.
        """
        try:
            loaded: object = yaml.safe_load(self.config_file.read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError) as error:
            raise ConfigError(
                f"{self.path} is no run of `distill vlm fit`: config.yaml cannot be read ({error}). Give the folder "
                "that run_dir names."
            ) from error
        if not isinstance(loaded, dict) or "stages" not in loaded:
            raise ConfigError(
                f"{self.config_file} has no key `stages`: it is not the recipe of a small VLM. Give the folder that "
                "`distill vlm fit` wrote."
            )
        return cast(dict[str, Any], loaded)

    def recipe(self) -> VLMRecipe:
        """Return the run's recipe.

        Raises:
            ConfigError: there is none, or this version refuses it.
        """
        return build_recipe({**self.content(), "run_dir": str(self.path)})

    def stage_dirs(self) -> list[Path]:
        """Return the folders of all stages of the recipe, in order."""
        return [self.stage_dir(number, name) for number, name in enumerate(self.content()["stages"], start=1)]

    def stage_summaries(self) -> list[dict[str, Any]]:
        """Return what each finished stage did, in order.

        Raises:
            DataError: a summary is damaged.
        """
        found: list[dict[str, Any]] = []
        for folder in self.stage_dirs():
            file = folder / FINISHED
            if file.is_file():
                try:
                    found.append(json.loads(file.read_text(encoding="utf-8")))
                except ValueError as error:
                    raise DataError(f"{file} is damaged: {error}. Remove it, and run the stage again.") from error
        return found

    def final_stage(self) -> Path:
        """Return the folder of the last stage.

        Raises:
            ConfigError: a stage is not finished.
        """
        folders = self.stage_dirs()
        unfinished = [folder.name for folder in folders if not (folder / FINISHED).is_file()]
        if unfinished:
            raise ConfigError(
                f"The run {self.path} is not finished: stage {unfinished[0]} has no {FINISHED}. Run `distill vlm fit` "
                "again with --resume auto."
            )
        return folders[-1]


def refuse_other_recipe(present: Mapping[str, Any], wanted: Mapping[str, Any], path: Path) -> None:
    """Refuse to go on with a run that trains something else; further stages may be added behind its own.

    Raises:
        ConfigError: naming the keys.
    """
    mine, theirs = (plain({k: v for k, v in side.items() if k not in FREE_KEYS}) for side in (present, wanted))
    begun, stages = list(mine.pop("stages").items()), list(theirs.pop("stages").items())
    differing = sorted(key for key in {*mine, *theirs} if mine.get(key) != theirs.get(key))
    differing += [
        f"stages.{name}" for number, (name, stage) in enumerate(begun) if [(name, stage)] != stages[number:][:1]
    ]
    if differing:
        raise ConfigError(
            f"The run in {path} has another recipe: {', '.join(differing)} differ(s) from its config.yaml. Set run_dir "
            "to another folder, or begin anew with --resume no, which moves it to earlier-N/."
        )


def plain(value: Any) -> Any:
    """Return a value as YAML gives it back: paths as text, tuples as lists."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in cast(Mapping[Any, Any], value).items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in cast(list[Any], value)]
    return str(value) if isinstance(value, Path) else value


def trained_state(folder: Path, fingerprints: Mapping[str, str]) -> dict[str, Tensor]:
    """Return what a stage's last checkpoint holds, by the model's names.

    Args:
        folder: of the stage.
        fingerprints: of the parts as their files hold them now.

    Raises:
        WeightsError: the checkpoint is missing or damaged, or began with other parts.
    """
    file = folder / "checkpoints" / LAST_NAME
    checkpoint = read_checkpoint(file)
    check_parts(checkpoint.get(PARTS_KEY, {}), fingerprints, str(file))
    return {key.removeprefix(MODEL_PREFIX): value for key, value in checkpoint["state_dict"].items()}


def check_parts(saved: Mapping[str, str], present: Mapping[str, str], source: str) -> None:
    """Refuse to lay trained tensors over another encoder or language model than they were trained with.

    Raises:
        WeightsError: naming the part.
    """
    for part, fingerprint in present.items():
        if saved.get(part, fingerprint) != fingerprint:
            raise WeightsError(
                f"{source} was trained with other weights under {part}.path than lie there now. Restore them, or begin "
                "a new run."
            )


def load_kept(model: nn.Module, state: Mapping[str, Tensor], kept: frozenset[str], source: str) -> None:
    """Lay trained tensors over a model; those that were never trained stay as they are.

    Raises:
        WeightsError: a tensor is missing, left over or of another shape.
    """
    missing, extra = sorted(kept - set(state)), sorted(set(state) - kept)
    if missing or extra:
        raise WeightsError(
            f"{source} does not fit the recipe: missing {', '.join(missing[:3]) or 'nothing'}, left over "
            f"{', '.join(extra[:3]) or 'nothing'}. Use the recipe that it was trained with."
        )
    try:
        # A private copy: the source may be a memory-mapped file that a later save replaces.
        found = model.load_state_dict({key: value.clone() for key, value in state.items()}, strict=False)
    except RuntimeError as error:
        raise WeightsError(f"{source} does not fit the recipe: {error}") from error
    if found.unexpected_keys:
        raise WeightsError(f"{source} holds {found.unexpected_keys[0]}, which the recipe's model lacks.")
