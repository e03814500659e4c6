"""The verb `distill probe`: one encoder beside its baselines, on the same images, with intervals."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import torch
from rich.console import Console
from torch.utils.data import Subset

from distill.encoder import Encoder
from distill.errors import ConfigError, DataError
from distill.probe.encoders import NamedEncoder, comparison_pairs, resolve_encoders
from distill.probe.features import (
    Features,
    Grid,
    Pool,
    Precision,
    PrecisionChoice,
    Samples,
    choose_device,
    choose_dtype,
    extract,
    grid_of,
)
from distill.probe.protocol import UNLABELLED, group_ids, split_for_probe, usable_classes
from distill.probe.scores import Cohort, Scores, compare, score_encoder
from distill.probe.tables import print_tables

if TYPE_CHECKING:
    from distill.data.index import DatasetIndex

FORMAT = "distill-probe/1"

TOKEN_BYTES = 1 << 30
"""Memory for one encoder's sampled patch tokens; fewer tokens an image are kept when it does not suffice."""

TOKENS_PER_IMAGE = 16


@dataclass(frozen=True)
class _Extraction:
    """How features are taken, the same for every encoder."""

    batch_size: int
    device: str
    precision: Precision
    num_workers: int
    pool: Pool
    tokens_per_image: int
    seed: int


def probe(
    encoder: str,
    *,
    data: str,
    out: Path | None = None,
    beside: list[str] | None = None,
    domains: list[str] | None = None,
    seed: int = 0,
    img_size_px: int = 448,
    batch_size: int = 32,
    pool: Pool = "mean",
    precision: PrecisionChoice = "float32",
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto",
    num_workers: int = 0,
) -> Path:
    """Judge a frozen encoder by linear probe, kNN and fidelity to its teacher, beside its baselines.

    Images are split by group into fit (50 %), select (20 %) and test (30 %). Regularisation, k and ridge strength are
    chosen on the select part; every figure is of the test part, with a 95 % interval, and "better" is said only when
    the interval of the paired difference leaves out zero.

    Args:
        encoder: a run directory, an export, a timm, open_clip or transformers directory, or a YAML file with
            class_path and init_args. A run brings its initial student and its teacher along.
        data: shards to probe on: a directory or a pattern. They should not be shards that were trained on.
        out: file to write; probe.json in the run directory, or else in the current one, when left out.
        beside: further encoders to compare with, each as for `encoder`.
        domains: domains to use; all when left out.
        seed: of the split, of the token places and of the bootstrap.
        img_size_px: side of the square images, in pixels.
        batch_size: images a forward pass on a GPU; a CPU is fastest with four, and never takes more.
        pool: mean over patch tokens, the class token (prefix), or both side by side.
        precision: bfloat16 runs the encoders under autocast (one that fixes its own dtype keeps it); auto does so where
            the device computes it fast.
        device: where encoders run; auto takes a GPU when there is one.
        num_workers: processes that decode images; 0 decodes in this one.

    Returns:
        The file that was written, in the format "distill-probe/1".

    Raises:
        ConfigError: an encoder, domain or option cannot be used.
        DataError: the images cannot be decoded, split or classified.
        WeightsError: an encoder's weights do not load.
    """
    from distill.data.fetch import RowDataset
    from distill.data.index import build_index

    if batch_size < 1 or img_size_px < 1:
        raise ConfigError(f"--batch_size {batch_size} and --img_size_px {img_size_px} must be at least 1.")
    if seed < 0:
        raise ConfigError(f"--seed {seed} must be 0 or more.")
    target = _target(encoder, out)
    console = Console()
    index = build_index(data, key="--data")
    rows = _rows(index, domains)
    encoders = resolve_encoders(encoder, beside or ())
    _announce(encoders, console)
    widest = max(cast(Encoder, entry.module).embed_dim for entry in encoders)
    tokens = max(1, min(TOKENS_PER_IMAGE, TOKEN_BYTES // (4 * widest * len(rows))))
    place = choose_device(device)
    how = _Extraction(batch_size, place, choose_dtype(precision, place), num_workers, pool, tokens, seed)
    dataset: Any = Subset(RowDataset(index, img_size_px), rows)
    cohort, scores = _score(encoders, dataset, index, img_size_px, how, console)
    result = _result(encoders, scores, cohort, index, data, how, img_size_px)
    print_tables(result, console)
    _write(result, target)
    return target


def _target(encoder: str, out: Path | None) -> Path:
    """The file to write, checked before hours are spent."""
    if out is None:
        out = Path(encoder) / "probe.json" if (Path(encoder) / "config.yaml").is_file() else Path("probe.json")
    target = out / "probe.json" if out.is_dir() else out
    if not target.parent.is_dir():
        raise ConfigError(f"--out {target}: the folder {target.parent} does not exist; create it or name another.")
    return target


def _rows(index: DatasetIndex, domains: Sequence[str] | None) -> list[int]:
    unknown = sorted(set(domains or ()) - set(index.domains))
    if unknown:
        raise ConfigError(f"--domains {', '.join(unknown)} not in the data; it has {', '.join(index.domains)}.")
    return np.sort(np.concatenate([index.rows_of(domain) for domain in (domains or index.domains)])).tolist()


def _announce(encoders: Sequence[NamedEncoder], console: Console) -> None:
    for entry in encoders:
        console.print(f"{entry.role:>8}  {entry.name}  ({entry.source})", highlight=False, markup=False)
    absent = [role for role in ("initial", "teacher") if all(entry.role != role for entry in encoders)]
    if absent:
        console.print(
            f"No {' and no '.join(absent)} to compare with: {encoders[0].source} names no run. "
            + ("Fidelity is left out. " if "teacher" in absent else "")
            + "Probe the run directory instead, or add encoders with --beside.",
            markup=False,
        )


def _score(
    encoders: Sequence[NamedEncoder],
    dataset: Samples,
    index: DatasetIndex,
    img_size_px: int,
    how: _Extraction,
    console: Console,
) -> tuple[Cohort, dict[str, Scores]]:
    """Extract and score the teacher first, because the others are compared with its tokens."""
    teacher = next((entry for entry in encoders if entry.role == "teacher"), None)
    grids = {} if teacher is None else _common_grids(encoders, teacher, img_size_px, how.device)
    ordered = sorted(encoders, key=lambda entry: entry is not teacher)
    scores: dict[str, Scores] = {}
    cohort, reference, rows = None, None, None
    for entry in ordered:
        wanted = sorted(set(grids.values())) if entry is teacher else [grids[entry.name]] if entry.name in grids else []
        features = _extract(entry, dataset, wanted, how, console)
        if cohort is None:
            rows = features.rows
            cohort = _cohort(features, index, how.seed, console)
            if not cohort.class_names and teacher is None:
                raise DataError("No image has a label and there is no teacher: nothing can be measured. Add labels.")
        if rows is None or not torch.equal(features.rows, rows):
            raise DataError(f"{entry.name} could read other images than the encoders before it; check the storage.")
        if entry is teacher:
            reference = features
        mine = None
        if teacher is not None and reference is not None and entry.name in grids:
            mine = (teacher.name, reference, grids[entry.name])
        scores[entry.name] = score_encoder(features, cohort, mine)
    if cohort is None:
        raise DataError("There is no encoder to score.")
    return cohort, scores


def _common_grids(
    encoders: Sequence[NamedEncoder], teacher: NamedEncoder, img_size_px: int, device: str
) -> dict[str, Grid]:
    """For each encoder but teachers, the coarser of its grid and the teacher's, along each axis."""
    rows, columns = grid_of(teacher.module, img_size_px, device=device)
    grids: dict[str, Grid] = {}
    for entry in encoders:
        if entry.role != "teacher":
            mine = grid_of(entry.module, img_size_px, device=device)
            grids[entry.name] = (min(rows, mine[0]), min(columns, mine[1]))
        entry.module.to("cpu")
    return grids


def _extract(
    entry: NamedEncoder, dataset: Samples, grids: Sequence[Grid], how: _Extraction, console: Console
) -> Features:
    features = extract(
        entry.module,
        dataset,
        batch_size=how.batch_size,
        device=how.device,
        precision=how.precision,
        num_workers=how.num_workers,
        pool=how.pool,
        token_grids=grids,
        tokens_per_image=how.tokens_per_image,
        seed=how.seed,
        name=entry.name,
        console=console,
    )
    entry.module.to("cpu")  # a GPU need hold one encoder at a time
    return features


def _cohort(features: Features, index: DatasetIndex, seed: int, console: Console) -> Cohort:
    """Decide, from the images that could be decoded, what is in which split and which classes count."""
    if features.num_bad:
        console.print(f"{features.num_bad} image(s) could not be decoded and are left out.")
    all_groups = index.groups
    groups = [all_groups[row] for row in features.rows.tolist()]
    labels = features.labels.numpy()
    present = np.unique(labels[labels >= 0])
    renumbered = np.where(labels >= 0, np.searchsorted(present, labels), UNLABELLED)
    classes = usable_classes(renumbered, [index.label_names[label] for label in present.tolist()], groups)
    if classes.dropped:
        listing = ", ".join(f"{name} ({count})" for name, count in classes.dropped.items())
        console.print(f"Left out of accuracy, fewer than three groups of images: {listing}.", markup=False)
    domains = features.domains.numpy()
    split = split_for_probe(classes, domains, groups, seed=seed)
    return Cohort(classes.targets, classes.names, domains, index.domains, group_ids(groups), split, seed)


def _result(
    encoders: Sequence[NamedEncoder],
    scores: dict[str, Scores],
    cohort: Cohort,
    index: DatasetIndex,
    data: str,
    how: _Extraction,
    img_size_px: int,
) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "data": {
            "path": data,
            "fingerprint": index.fingerprint,
            "n_fit": len(cohort.split.fit),
            "n_select": len(cohort.split.select),
            "n_test": len(cohort.split.test),
            "num_classes": len(cohort.class_names),
            "label_names": list(cohort.class_names),
            "domains": [cohort.domain_names[number] for number in np.unique(cohort.domains).tolist()],
        },
        "seed": how.seed,
        "pool": how.pool,
        "img_size_px": img_size_px,
        "precision": how.precision,
        "encoders": [
            {
                "name": entry.name,
                "role": entry.role,
                "source": entry.source,
                "embed_dim": cast(Encoder, entry.module).embed_dim,
                "num_params": sum(parameter.numel() for parameter in entry.module.parameters()),
                **scores[entry.name].entry,
            }
            for entry in encoders
        ],
        "paired": compare(scores, comparison_pairs(encoders), cohort),
    }


def _write(result: dict[str, Any], target: Path) -> None:
    """Write atomically: a reader sees the old file or the new one, never a part."""
    text = json.dumps(result, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    try:
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=target.parent, delete=False) as file:
            temporary = Path(file.name)
            try:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
                temporary.chmod(0o644)  # temporary files are private; results are not
                temporary.replace(target)
            except OSError:
                temporary.unlink(missing_ok=True)
                raise
    except OSError as error:
        raise ConfigError(f"--out {target} cannot be written: {error.strerror}. Free space or name another.") from error
