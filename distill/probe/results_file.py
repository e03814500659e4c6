"""Reads a `probe.json`, checked and typed, so that no reader of it meets a surprise halfway down."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from distill.errors import DataError
from distill.probe.results import (
    KNOWN_METRICS,
    OVERALL,
    At,
    EncoderScores,
    MetricInfo,
    Paired,
    ProbeResults,
    Score,
    TensorEntry,
)

FORMATS = ("distill-probe/1", "distill-probe/2")


def read_probe(file: Path) -> ProbeResults:
    """Return the scores in a `probe.json` of either format.

    Raises:
        DataError: the file is no JSON, of another format, or lacks what the format promises.
    """
    try:
        loaded: Any = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{file} cannot be read as JSON: {error}. Run `distill probe` again.") from error
    found: Any = cast(dict[str, Any], loaded).get("format") if isinstance(loaded, dict) else None
    if found not in FORMATS:
        raise DataError(
            f"{file} has the format {found!r}; this version reads {' and '.join(map(repr, FORMATS))}. "
            "Run `distill probe` again."
        )
    try:
        return _results(cast(dict[str, Any], loaded), file.parent)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(
            f"{file} does not hold what {found} promises ({type(error).__name__}: {error}). Run `distill probe` again."
        ) from error


def _results(loaded: dict[str, Any], folder: Path) -> ProbeResults:
    settings = {
        key: value
        for key, value in loaded.items()
        if key not in ("format", "per_image") and isinstance(value, str | int | float | None)
    }
    settings |= {key: ", ".join(map(str, loaded[key])) for key in ("rungs", "layers") if loaded.get(key)}
    metrics = dict(KNOWN_METRICS)
    for name, entry in dict(loaded.get("metrics") or {}).items():
        blind = entry.get("blind")
        metrics[name] = MetricInfo(
            str(entry["title"]),
            str(entry["kind"]),
            bool(entry["lower_is_better"]),
            None if blind is None else float(blind),
        )
    data = dict(loaded["data"])
    per_image: Any = loaded.get("per_image")
    return ProbeResults(
        data,
        settings,
        tuple(_encoder(entry) for entry in loaded["encoders"]),
        tuple(_paired(entry) for entry in loaded.get("paired") or ()),
        metrics,
        None if per_image is None else folder / str(per_image),
        tuple(_tensor(entry, data) for entry in loaded.get("tensors") or ()),
        loaded.get("leaks"),
        _ceiling(loaded.get("fidelity_ceiling")),
    )


def _ceiling(block: Mapping[str, Any] | None) -> EncoderScores | None:
    if not block:
        return None
    name = f"{block['teacher']} to itself, {block['augmentation']}"
    return _encoder({"name": name, "role": "ceiling", "scores": block["scores"]})


def _encoder(entry: Mapping[str, Any]) -> EncoderScores:
    fidelity: Mapping[str, Any] | None = entry.get("fidelity")
    blocks = {
        "linear_top1": _block(entry.get("linear"), None, "top1"),
        "knn_top1": _block(entry.get("knn"), None, "top1"),
        "cosine_centred": _block(fidelity, "cosine_centred", "mean"),
        "cka": _block(fidelity, "cka", "value"),
    }
    scores = {metric: found for metric, found in blocks.items() if found}
    curves: dict[tuple[str, str], dict[str, list[tuple[float, Score]]]] = {}
    for item in entry.get("scores") or ():
        metric, scope, at = str(item["metric"]), str(item["scope"]), _at(item.get("at"))
        if at is None:
            scores.setdefault(metric, {})[scope] = _score(item)
        else:
            curves.setdefault((metric, at[0]), {}).setdefault(scope, []).append((at[1], _score(item)))
    for by_scope in curves.values():
        for points in by_scope.values():
            points.sort(key=lambda point: point[0])
    return EncoderScores(
        str(entry["name"]),
        str(entry["role"]),
        _integer(entry.get("embed_dim")),
        _integer(entry.get("num_params")),
        scores,
        curves,
    )


def _score(item: Mapping[str, Any]) -> Score:
    return Score(
        float(item["value"]),
        _float(item.get("low")),
        _float(item.get("high")),
        _integer(item.get("n")),
        _integer(item.get("seed")),
        dict(item.get("settings") or {}),
    )


def _block(block: Mapping[str, Any] | None, inner: str | None, value: str) -> dict[str, Score]:
    """The figures of a block of format 1, by scope."""
    if not block:
        return {}
    scopes: dict[str, Any] = {OVERALL: block.get(OVERALL), **(block.get("domains") or {})}
    found: dict[str, Score] = {}
    for scope, content in scopes.items():
        figures: Mapping[str, Any] | None = content if inner is None or content is None else content.get(inner)
        if figures and figures.get(value) is not None:
            found[scope] = Score(
                float(figures[value]),
                _float(figures.get("low")),
                _float(figures.get("high")),
                _integer(figures.get("n")),
            )
    return found


def _paired(entry: Mapping[str, Any]) -> Paired:
    return Paired(
        str(entry["metric"]),
        str(entry["scope"]),
        str(entry["a"]),
        str(entry["b"]),
        float(entry["difference"]),
        _float(entry.get("low")),
        _float(entry.get("high")),
        _integer(entry.get("n")),
        str(entry["verdict"]),
        _at(entry.get("at")),
    )


def _tensor(entry: Mapping[str, Any], data: Mapping[str, Any]) -> TensorEntry:
    return TensorEntry(
        str(entry["encoder"]),
        str(entry["metric"]),
        _at(entry.get("at")),
        str(entry["prefix"]),
        str(entry.get("data") or data.get("fingerprint", "")),
        tuple(str(name) for name in entry.get("domain_names") or data.get("domains") or ()),
    )


def _at(value: Any) -> At | None:
    if value is None:
        return None
    axis, x = value
    return str(axis), float(x)


def _float(value: Any) -> float | None:
    return None if value is None else float(value)


def _integer(value: Any) -> int | None:
    return None if value is None else int(value)
