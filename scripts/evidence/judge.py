"""Judge one run of the evidence study by the project's ladder, and by reading receipts.

    python scripts/evidence/judge.py RUN --data runs/evidence/data --out RUN/judge --size 224 \
        --datasets trashnet,dtd10 --rungs knn,linear --cache runs/evidence/features

RUN is a folder of `distill fit`, whose initial student and teachers are judged with it, or a YAML file that names an
encoder. Writes `<data set>.json` (see docs/evaluation.md) for each data set, and `receipts.json`; what is there already
is kept.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

from rich.console import Console

from distill.heap import keep_freed_memory
from distill.probe.encoders import resolve_encoders
from distill.probe.extraction import Extraction
from distill.probe.ocr import ocr_scores
from distill.probe.run import probe
from distill.probe.text_lines import read_text_pages

RECEIPT_PX = 448
SEED = 0


def judge_receipts(encoder: str, lines: Path, roles: list[Any] | None) -> dict[str, Any]:
    """Return each encoder's character errors on held-out receipt crops: edits and characters of every test line."""
    console, pages = Console(), read_text_pages(lines, img_size_px=RECEIPT_PX)
    how = Extraction(batch_size=4, img_size_px=RECEIPT_PX, seed=SEED)
    found: dict[str, Any] = {}
    for entry in resolve_encoders(encoder, roles=roles):
        console.print(f"Reading receipts with {entry.name}", markup=False)
        score = next(score for score in ocr_scores(entry.module, how, SEED, console, pages) if score.at is None)
        parts = score.per_image
        found[entry.name] = {
            "role": entry.role,
            "data": hashlib.sha256(lines.read_bytes()).hexdigest(),
            "rows": parts.rows.tolist(),
            "edits": parts.numerator[:, 0].tolist(),
            "characters": parts.denominator[:, 0].tolist(),
            "groups": parts.groups.tolist(),
        }
    return found


def judge(
    encoder: str,
    data: Path,
    out: Path,
    *,
    size: int,
    datasets: list[str],
    rungs: list[Any],
    cache: Path,
    receipts: bool,
    roles: list[Any] | None,
) -> None:
    """Judge an encoder on every data set that has not been judged yet."""
    out.mkdir(parents=True, exist_ok=True)
    for dataset in datasets:
        target = out / f"{dataset}.json"
        if not target.is_file():
            table = str(data / "probe" / f"{dataset}.csv")
            probe(
                encoder,
                data=table,
                out=target,
                roles=roles,
                rungs=rungs,
                img_size_px=size,
                cache=cache,
                leaks="off",
                seed=SEED,
            )
    target = out / "receipts.json"
    if receipts and not target.is_file():
        part = target.with_suffix(".part")
        part.write_text(json.dumps(judge_receipts(encoder, data / "probe" / "lines.jsonl", roles)), encoding="utf-8")
        part.replace(target)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("encoder")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--size", type=int, required=True)
    parser.add_argument("--datasets", required=True)
    parser.add_argument("--rungs", required=True)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--receipts", action="store_true")
    parser.add_argument("--role", help="of a run, the encoders of one role: initial, student or teacher")
    asked = parser.parse_args()
    keep_freed_memory()
    judge(
        asked.encoder,
        asked.data,
        asked.out,
        size=asked.size,
        datasets=asked.datasets.split(","),
        rungs=asked.rungs.split(","),
        cache=asked.cache,
        receipts=asked.receipts,
        roles=[asked.role] if asked.role else None,
    )


if __name__ == "__main__":
    main()
