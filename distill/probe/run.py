"""The verb `distill probe`: one encoder beside its baselines, on the same images, with intervals."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
from rich.console import Console

from distill.encoder import Encoder
from distill.errors import ConfigError
from distill.probe.encoders import NamedEncoder, RunRole, comparison_pairs, resolve_encoders
from distill.probe.extraction import Extraction, Pool, PrecisionChoice, choose_device, choose_dtype
from distill.probe.feature_cache import FeatureCache
from distill.probe.ladder import Rung
from distill.probe.leaks import LeakAction, LeakCheck, LeakSearch, check_leaks, training_data, without_leaks
from distill.probe.probe_file import FORMAT, write_probe
from distill.probe.probe_set import ProbeSet, open_probe_set
from distill.probe.ranks import alone, is_first, mask_from_first, process_group
from distill.probe.scores import compare, metrics_of
from distill.probe.session import Judged, Plan, judge
from distill.probe.tables import print_tables
from distill.probe.text_lines import TextPages, read_text_pages


def probe(
    encoder: str,
    *,
    data: str,
    out: Path | None = None,
    beside: list[str] | None = None,
    roles: list[RunRole] | None = None,
    domains: list[str] | None = None,
    rungs: list[Rung] | None = None,
    layers: str = "-1",
    text_lines: Path | None = None,
    text_pages: int = 200,
    train: str | None = None,
    leaks: LeakAction = "report",
    cache: Path | None = None,
    seed: int = 0,
    img_size_px: int = 448,
    batch_size: int = 32,
    pool: Pool = "mean",
    precision: PrecisionChoice = "float32",
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto",
    num_workers: int = 0,
) -> Path:
    """Judge a frozen encoder by a ladder of probes and by fidelity to its teacher, beside its baselines.

    Images are split by group into fit (50 %), select (20 %) and test (30 %); where the data has a fixed test part, that
    is the test, and the rest is split. Everything is chosen on the select part; every figure is of the test part, with
    a 95 % interval, and "better" is said only when the interval of the paired difference leaves out zero. Under
    torchrun each process extracts features of a share of the images.

    Args:
        encoder: a run directory, an export, a timm, open_clip or transformers directory, or a YAML file with
            class_path and init_args. A run brings its initial student and its teacher along.
        data: images to probe on, best none that were trained on. Shards (a directory or a pattern); a directory of
            class folders; a CSV file with the columns path, label and, if wanted, group, domain and split; a directory
            in clip_benchmark's WebDataset layout; torchvision:NAME:ROOT; or hf:PATH, a Hugging Face data set on disk.
        out: file to write; probe.json in the run directory, or else in the current one, when left out.
        beside: further encoders to compare with, each as for `encoder`.
        roles: which of a run's encoders to judge, of initial, student and teacher; all when left out.
        domains: domains to use; all when left out.
        rungs: which probes, of linear, knn, fidelity, effective_rank, sgd, attentive, few_shot, calibration,
            segmentation, ocr, chart and robustness; all that the data allows when left out.
        layers: hidden states to judge, counted from the end, for example --layers=-2,-1.
        text_lines: a manifest of JSON lines with pages of text (path, lines: [x0, y0, x1, y1, text]; group, if wanted)
            that the rung ocr reads beside the drawn ones.
        text_pages: at most this many of them, in the manifest's order.
        train: shards that were trained on, to find probed images among them; a run's own data.train when left out.
        leaks: report says how many there are, exclude leaves them out, off does not look.
        cache: folder to keep features in, under a key of all they depend on; none are kept when left out.
        seed: of the split, of the token places and of everything else that is drawn.
        img_size_px: side of the square images, in pixels.
        batch_size: images a forward pass on a GPU; a CPU takes no more than four of 448 px.
        pool: mean over patch tokens, the class token (prefix), or both side by side.
        precision: bfloat16 runs the encoders under autocast (one that fixes its own dtype keeps it); auto does so where
            the device computes it fast.
        device: where encoders run; auto takes a GPU when there is one.
        num_workers: processes that decode images; 0 decodes in this one.

    Returns:
        The file that was written, in the format "distill-probe/2"; the parts of each figure by image lie beside it.

    Raises:
        ConfigError: an encoder, domain or option cannot be used.
        DataError: the images cannot be decoded, split or classified.
        WeightsError: an encoder's weights do not load.
    """
    if batch_size < 1 or img_size_px < 1:
        raise ConfigError(f"--batch_size {batch_size} and --img_size_px {img_size_px} must be at least 1.")
    if seed < 0:
        raise ConfigError(f"--seed {seed} must be 0 or more.")
    target, wanted = _target(encoder, out), _layers(layers)
    pages = _pages(text_lines, text_pages, rungs, img_size_px)
    with process_group():
        start = time.perf_counter()
        console = Console(quiet=not is_first())
        probed = open_probe_set(data, img_size_px)
        kept = None if cache is None else FeatureCache(cache)
        asked = [train] if train is not None else training_data(encoder)
        look = LeakSearch(asked, leaks, train is not None, num_workers, kept)
        rows, check = _rows(probed, domains, look, console)
        encoders = resolve_encoders(encoder, beside or (), roles)
        _announce(encoders, console, as_asked=roles is not None)
        place = choose_device(device)
        how = Extraction(batch_size, place, choose_dtype(precision, place), num_workers, pool, img_size_px, seed)
        judged = judge(encoders, probed, rows, how, Plan(wanted, rungs, kept, pages), console)
        if judged is not None:
            result = _result(encoders, judged, probed, check, how)
            result["wall_s"] = round(time.perf_counter() - start, 1)
            print_tables(result, console)
            write_probe(result, judged.scores, target)
    return target


def _target(encoder: str, out: Path | None) -> Path:
    """The file to write, checked before hours are spent."""
    if out is None:
        out = Path(encoder) / "probe.json" if (Path(encoder) / "config.yaml").is_file() else Path("probe.json")
    target = out / "probe.json" if out.is_dir() else out
    if not target.parent.is_dir():
        raise ConfigError(f"--out {target}: the folder {target.parent} does not exist; create it or name another.")
    return target


def _layers(text: str) -> tuple[int, ...]:
    """Layers by number, ascending, the last one always among them."""
    try:
        numbers = {int(part) for part in text.strip("[] ").split(",")}
    except ValueError as error:
        raise ConfigError(f"--layers {text}: give numbers from the end, for example --layers=-2,-1.") from error
    if max(numbers) > -1:
        raise ConfigError(f"--layers {text}: layers are counted from the end, -1 being the last.")
    return tuple(sorted({-1, *numbers}))


def _pages(manifest: Path | None, max_pages: int, rungs: Sequence[Rung] | None, img_size_px: int) -> TextPages | None:
    """The pages of `--text_lines`, read before hours are spent."""
    if manifest is None:
        return None
    if rungs is not None and "ocr" not in rungs:
        raise ConfigError(f"--text_lines {manifest} is for the rung ocr, which --rungs {', '.join(rungs)} leaves out.")
    if max_pages < 1:
        raise ConfigError(f"--text_pages {max_pages} must be at least 1.")
    return read_text_pages(manifest, img_size_px=img_size_px, max_pages=max_pages)


def _rows(
    probed: ProbeSet, domains: Sequence[str] | None, look: LeakSearch, console: Console
) -> tuple[list[int], LeakCheck | None]:
    """The rows to probe on; the first process alone looks for leaks, and tells the others what is left."""
    rows, check = probed.rows_of(domains), None
    if is_first():
        with alone():
            check = check_leaks(probed, rows, look, console)
    mask = np.zeros(len(probed), dtype=np.bool_)
    mask[without_leaks(rows, check)] = True
    return np.flatnonzero(mask_from_first(mask)).tolist(), check


def _announce(encoders: Sequence[NamedEncoder], console: Console, *, as_asked: bool) -> None:
    for entry in encoders:
        console.print(f"{entry.role:>8}  {entry.name}  ({entry.source})", highlight=False, markup=False)
    absent = [role for role in ("initial", "teacher") if all(entry.role != role for entry in encoders)]
    if absent and not as_asked:
        console.print(
            f"No {' and no '.join(absent)} to compare with: {encoders[0].source} names no run. "
            + ("Fidelity is left out. " if "teacher" in absent else "")
            + "Probe the run directory instead, or add encoders with --beside.",
            markup=False,
        )


def _result(
    encoders: Sequence[NamedEncoder], judged: Judged, probed: ProbeSet, check: LeakCheck | None, how: Extraction
) -> dict[str, Any]:
    cohort, scores = judged.cohort, judged.scores
    return {
        "format": FORMAT,
        "data": {
            "path": probed.source,
            "fingerprint": probed.fingerprint,
            "split": "drawn by group" if probed.is_test is None else "fixed test part",
            "n_fit": len(cohort.split.fit),
            "n_select": len(cohort.split.select),
            "n_test": len(cohort.split.test),
            "num_classes": len(cohort.class_names),
            "label_names": list(cohort.class_names),
            "domains": cohort.used_domains,
        },
        "seed": how.seed,
        "pool": how.pool,
        "img_size_px": how.img_size_px,
        "precision": how.precision,
        "rungs": list(judged.rungs),
        "layers": list(judged.layers),
        "leaks": None if check is None else check.block,
        "metrics": metrics_of(scores),
        "encoders": [
            {
                "name": entry.name,
                "role": entry.role,
                "source": entry.source,
                "embed_dim": cast(Encoder, entry.module).embed_dim,
                "num_params": sum(parameter.numel() for parameter in entry.module.parameters()),
                "seconds": judged.seconds[entry.name],
                **scores[entry.name].entry,
            }
            for entry in encoders
        ],
        "paired": compare(scores, comparison_pairs(encoders), how.seed),
        "fidelity_ceiling": judged.ceiling,
    }
