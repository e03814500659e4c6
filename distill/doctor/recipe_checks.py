"""Checks of what a recipe names: shards and weight files."""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path
from typing import Any

from distill.accelerators import GIB
from distill.doctor.verdict import Verdict
from distill.planner.recipe import Recipe

HASHED_GIB = 4.0
_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
_PACKAGE = "package:"


def check_shards(recipe: Recipe) -> Verdict:
    """Index the recipe's shards, which reads every one that is not indexed yet, and print their fingerprint.

    Raises:
        DataError: a shard is missing or damaged.
    """
    data = recipe.data
    data.setup("validate")
    index = data.train_index
    domains = ", ".join(f"{domain} {len(index.range_of(domain)):,}" for domain in recipe_domains(index))
    found = (
        f"{len(index.shards)} training shards, {len(index):,} images ({domains}), fingerprint {index.fingerprint[:12]}"
    )
    if len(index) < data.global_batch_size:
        return Verdict("shards", "failed", found, f"data.global_batch_size {data.global_batch_size} needs more images.")
    return Verdict("shards", "ok", found)


def recipe_domains(index: Any) -> list[str]:
    """Return the domains that have training shards, in order."""
    return list(dict.fromkeys(shard.domain for shard in index.shards))


def check_weights(role: str, arguments: dict[str, Any], *, hash_all: bool) -> Verdict:
    """Look for an encoder's weight files and take their checksums.

    Args:
        role: for example "teacher internvit_6b".
        arguments: its `init_args`.
        hash_all: take the checksum of files above 4 GiB too.
    """
    name, weights = f"weights of {role}", str(arguments.get("weights") or "")
    if weights in ("", "random"):
        return Verdict(name, "ok", "untrained, as the recipe says" if weights else "the recipe names none")
    if weights.startswith("pretrained"):
        return Verdict(
            name, "warning", f"{weights}: fetched when training begins", "Fetch them first where no network is."
        )
    path = find_weights(weights.removeprefix("local-dir:"))
    if path is None:
        return Verdict(name, "failed", f"{weights} does not exist", "Download the release, or correct `weights`.")
    files = [path] if path.is_file() else sorted(p for p in path.iterdir() if p.suffix in _SUFFIXES)
    total = sum(file.stat().st_size for file in files)
    if not files or total == 0:
        return Verdict(name, "failed", f"{weights} has no weight file", f"Expected one of {', '.join(_SUFFIXES)}.")
    found = f"{len(files)} file{'s' if len(files) > 1 else ''}, {total / GIB:.2f} GiB"
    if total > HASHED_GIB * GIB and not hash_all:
        return Verdict(name, "ok", f"{found}; checksum not taken (--hash_weights true takes it)")
    digest = combined_sha256(files)
    expected = arguments.get("sha256")
    if expected and path.is_file() and digest != str(expected).lower():
        way_out = "The file is damaged or another one; fetch it again, or correct `sha256`."
        return Verdict(name, "failed", f"{found}, sha256 {digest}, expected {expected}", way_out)
    return Verdict(name, "ok", f"{found}, sha256 {digest[:16]}")


def find_weights(weights: str) -> Path | None:
    """Return the file or directory that a recipe's `weights` names, in an installed package too; None if absent."""
    if not weights.startswith(_PACKAGE):
        path = Path(weights).expanduser()
        return path if path.exists() else None
    package, _, inner = weights.removeprefix(_PACKAGE).partition("/")
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    roots = list(spec.submodule_search_locations or []) if spec else []
    return next((Path(root) / inner for root in roots if (Path(root) / inner).exists()), None)


def combined_sha256(files: list[Path]) -> str:
    """Return one file's SHA-256, hex, or that of the lines `<sha256>  <name>` of several."""
    digests: list[str] = []
    for file in files:
        with file.open("rb") as stream:
            digests.append(hashlib.file_digest(stream, "sha256").hexdigest())
    if len(files) == 1:
        return digests[0]
    lines = "".join(f"{digest}  {file.name}\n" for digest, file in zip(digests, files, strict=True))
    return hashlib.sha256(lines.encode()).hexdigest()
