"""The file that tells what a folder of generated shards was asked for, and whether it is complete."""

from __future__ import annotations

import json
from pathlib import Path
from typing import cast

from distill.errors import ConfigError

FILE_NAME = "manifest.json"
FORMAT = "distill-synthetic/1"


def is_already_there(out: Path, request: dict[str, object]) -> bool:
    """Returns whether `out` holds the complete result of exactly this request.

    Raises:
        ConfigError: `out` is a file, or holds anything but this request's own unfinished result.
    """
    if not out.exists():
        return False
    if not out.is_dir():
        raise ConfigError(f"Cannot write shards to {out}: it is a file. Give --out a new or empty directory.")
    content = read_manifest(out)
    if content is None:
        if any(out.iterdir()):
            raise ConfigError(
                f"Cannot write shards to {out}: the directory is not empty and holds no {FILE_NAME} of an earlier run. "
                "Nothing is ever overwritten; give --out a new or empty directory."
            )
        return False
    if content.get("request") != request:
        raise ConfigError(
            f"Cannot write shards to {out}: it holds the images of another request, {content.get('request')}, and "
            f"this one is {request}. Nothing is ever overwritten; give --out another directory or repeat the earlier "
            "request."
        )
    shards = cast("dict[str, dict[str, int]]", content.get("shards", {}))
    return bool(content.get("is_complete")) and all(
        (out / name).is_file() and (out / name).stat().st_size == facts["bytes"] for name, facts in shards.items()
    )


def read_manifest(out: Path) -> dict[str, object] | None:
    """Returns the manifest's content, or None if the folder has none of this format."""
    try:
        content: object = json.loads((out / FILE_NAME).read_text(encoding="utf-8"))
    except (FileNotFoundError, UnicodeDecodeError, json.JSONDecodeError):
        return None
    if not isinstance(content, dict):
        return None
    known = cast("dict[str, object]", content)
    return known if known.get("format") == FORMAT else None


def write_manifest(
    out: Path, request: dict[str, object], shards: dict[str, dict[str, object]], labels: list[str], is_complete: bool
) -> None:
    """Writes the manifest through a temporary file, so that a reader never meets half of it.

    Args:
        out: the folder of the shards.
        request: the arguments that determine every byte.
        shards: file name -> number of samples, bytes and sha256.
        labels: label names in the order of the class numbers.
        is_complete: False while the shards are being written.
    """
    content = {"format": FORMAT, "request": request, "is_complete": is_complete, "shards": shards, "labels": labels}
    draft = out / (FILE_NAME + ".part")
    draft.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    draft.replace(out / FILE_NAME)
