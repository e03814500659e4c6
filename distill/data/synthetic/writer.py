"""Draws labelled images in worker processes and writes them as WebDataset shards whose bytes repeat exactly."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Protocol, cast

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from distill.data.synthetic.manifest import is_already_there, write_manifest
from distill.data.synthetic.rendered import SPLITS, Rendered, Split, sample_rng
from distill.errors import ConfigError, DataError

# The order fixes each domain's random stream and its class numbers: append only.
DOMAINS: tuple[str, ...] = ("natural", "ocr", "chart", "multidisciplinary")
# Raised whenever the same request would give other pixels, so that old folders are not taken for new ones.
GENERATOR_VERSION = 1
SAMPLES_PER_SHARD = 1000
JPEG_QUALITY = 90
_CHUNK = 10
_NEEDED_PACKAGES = {"natural": ("skimage", "sklearn"), "ocr": ("matplotlib", "skimage"), "chart": ("matplotlib",)}


class _Domain(Protocol):
    def kinds(self, split: Split) -> tuple[str, ...]: ...

    def render(self, kind: str, rng: np.random.Generator, split: Split, size_px: int, variant: int) -> Rendered: ...


@dataclass(frozen=True)
class _Chunk:
    """Consecutive samples of one domain, the unit of work of a process."""

    domain: str
    split: Split
    start: int
    stop: int
    seed: int
    size_px: int


Sample = tuple[str, dict[str, bytes]]


def _domain(name: str) -> _Domain:
    return cast("_Domain", import_module(f"distill.data.synthetic.{name}"))


def label_names() -> list[str]:
    """Returns every label, `<domain>/<kind>`, in the order of the class numbers; both splits share this list."""
    names = (f"{name}/{kind}" for name in DOMAINS for split in SPLITS for kind in _domain(name).kinds(split))
    return list(dict.fromkeys(names))


def draw_sample(
    domain: str, split: Split, index: int, *, seed: int, size_px: int
) -> tuple[Rendered, dict[str, object]]:
    """Returns sample `index` of a domain as an image and as the content of its json member.

    The result depends on the arguments only. Labels go round in turn: sample i has kind i mod the number of kinds.

    Args:
        domain: one of `DOMAINS`.
        split: "train" or "heldout".
        index: number of the sample within its domain and split.
        seed: the request's seed.
        size_px: side of the image.
    """
    module = _domain(domain)
    kinds = module.kinds(split)
    kind = kinds[index % len(kinds)]
    rng = sample_rng(seed, split, DOMAINS.index(domain), index)
    rendered = module.render(kind, rng, split, size_px, index // len(kinds))
    facts: dict[str, object] = {
        "label": f"{domain}/{kind}",
        "group": f"{domain}/{rendered.group}" if rendered.group else f"{domain}/{split}/{seed}/{index}",
        "domain": domain,
        "split": split,
        "seed": seed,
        "index": index,
        **rendered.annotations,
    }
    return rendered, facts


def _draw_chunk(chunk: _Chunk) -> list[Sample]:
    classes = {name: number for number, name in enumerate(label_names())}
    samples: list[Sample] = []
    for index in range(chunk.start, chunk.stop):
        rendered, facts = draw_sample(chunk.domain, chunk.split, index, seed=chunk.seed, size_px=chunk.size_px)
        buffer = io.BytesIO()
        # Full colour resolution: thin coloured lines and text suffer from the default's halved one.
        rendered.image.save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0)
        members = {
            "jpg": buffer.getvalue(),
            "cls": str(classes[str(facts["label"])]).encode("ascii"),
            "json": json.dumps(facts, ensure_ascii=False, separators=(",", ":")).encode("utf-8"),
        }
        samples.append((f"{chunk.domain}-{chunk.split}-{index:06d}", members))
    return samples


def _check(split: str, images_per_domain: int, seed: int, img_size_px: int, domains: Sequence[str]) -> None:
    if split not in SPLITS:
        raise ConfigError(f"Unknown split {split!r}; choose one of {', '.join(SPLITS)}.")
    if images_per_domain < 1:
        raise ConfigError(f"images_per_domain is {images_per_domain}; it must be at least 1.")
    if seed < 0:
        raise ConfigError(f"seed is {seed}; it must be zero or positive.")
    if not 64 <= img_size_px <= 2048:
        raise ConfigError(f"img_size_px is {img_size_px}; it must lie from 64 to 2048. The encoders here take 448.")
    unknown = [name for name in domains if name not in DOMAINS]
    if unknown or not domains or len(set(domains)) != len(domains):
        raise ConfigError(f"domains is {list(domains)}; name each at most once, out of: {', '.join(DOMAINS)}.")
    missing = {p for name in domains for p in _NEEDED_PACKAGES.get(name, ("matplotlib",)) if find_spec(p) is None}
    if missing:
        raise ConfigError(
            f"Drawing {', '.join(domains)} needs the package(s) {', '.join(sorted(missing))}, which are not installed. "
            "Run: pip install 'encoder-distill[demo]'."
        )


def _finished_chunks(chunks: Sequence[_Chunk], num_workers: int) -> Iterator[list[Sample]]:
    """Yields the chunks' samples in order; only a few chunks are in flight, so memory stays small."""
    if num_workers == 1:
        yield from map(_draw_chunk, chunks)
        return
    # Spawned, not forked: a parent that has run torch or matplotlib threads must not be forked.
    with ProcessPoolExecutor(num_workers, mp_context=get_context("spawn")) as pool:
        waiting: deque[Future[list[Sample]]] = deque()
        for chunk in chunks:
            waiting.append(pool.submit(_draw_chunk, chunk))
            if len(waiting) > 4 * num_workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _add_member(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    # tarfile leaves owner and time at zero; only size and mode remain to be set.
    info.size, info.mode = len(content), 0o644
    archive.addfile(info, io.BytesIO(content))


class _ShardWriter:
    """Writes samples to `<domain>-<number>.tar`, a new file after every `SAMPLES_PER_SHARD` of a domain."""

    def __init__(self, out: Path) -> None:
        self._out = out
        self.shards: dict[str, dict[str, object]] = {}
        self._archive: tarfile.TarFile | None = None
        self._name = ""
        self._count = 0

    def add(self, domain: str, index: int, sample: Sample) -> None:
        name = f"{domain}-{index // SAMPLES_PER_SHARD:06d}.tar"
        if name != self._name:
            self.close()
            self._name, self._count = name, 0
            # Stays open from one sample to the next; `close` ends it.
            self._archive = tarfile.open(self._out / name, "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115
        key, members = sample
        assert self._archive is not None
        for ending, content in members.items():
            _add_member(self._archive, f"{key}.{ending}", content)
        self._count += 1

    def close(self) -> None:
        if self._archive is None:
            return
        self._archive.close()
        self._archive = None
        path = self._out / self._name
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        self.shards[self._name] = {"samples": self._count, "bytes": path.stat().st_size, "sha256": digest}


def _write(out: Path, chunks: Sequence[_Chunk], num_workers: int, console: Console) -> dict[str, dict[str, object]]:
    columns = (
        TextColumn("drawing {task.fields[domain]:<17}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    writer = _ShardWriter(out)
    try:
        with Progress(*columns, console=console) as progress:
            task = progress.add_task("", total=sum(c.stop - c.start for c in chunks), domain=chunks[0].domain)
            for chunk, samples in zip(chunks, _finished_chunks(chunks, num_workers), strict=True):
                for index, sample in enumerate(samples, chunk.start):
                    writer.add(chunk.domain, index, sample)
                progress.update(task, advance=len(samples), domain=chunk.domain)
    finally:
        writer.close()
    return writer.shards


def synthesize(
    out: Path,
    split: Split = "train",
    images_per_domain: int = 400,
    seed: int = 0,
    img_size_px: int = 448,
    domains: tuple[str, ...] | list[str] | None = None,
    num_workers: int | None = None,
) -> None:
    """Writes labelled images of four domains as WebDataset shards, drawn on this machine.

    natural: views of the photographs that scikit-image and scikit-learn ship. ocr: documents, receipts, signs,
    handwriting and more on textured ground. chart: twenty types. multidisciplinary: geometry, circuits, molecules,
    maps and other diagrams. Nothing is downloaded. The splits share no photograph, word list, text font or palette.
    Each sample has an image `.jpg`, a class number `.cls` and a `.json` with label, group and what was drawn. A folder
    that already holds the result is left as it is. Equal arguments give equal bytes on the same machine and package
    versions.

    Args:
        out: directory for `<domain>-000000.tar` and `manifest.json`; it must be new, empty, or hold the result of the
            same request.
        split: "train", or "heldout" for images from other photographs, words, fonts and palettes.
        images_per_domain: number of images in each domain; the kinds of a domain take turns.
        seed: zero or positive; another seed gives other images.
        img_size_px: side of the square images in pixels.
        domains: which of natural, ocr, chart, multidisciplinary to draw; all four when left out.
        num_workers: number of drawing processes, which does not change a byte; 1 draws in this process; all usable
            processor cores when left out.

    Raises:
        ConfigError: an argument is out of range, a package is missing, or `out` holds something else.
        DataError: an installed package does not ship a photograph, the disk is full, or a drawing process was killed.

    Example:
        >>> synthesize(Path("shards/train"), images_per_domain=4, domains=["chart"])  # doctest: +SKIP
    """
    chosen = DOMAINS if domains is None else tuple(domains)
    _check(split, images_per_domain, seed, img_size_px, chosen)
    if num_workers is not None and num_workers < 1:
        raise ConfigError(f"num_workers is {num_workers}; it must be at least 1, or left out for one per core.")
    out, console = Path(out), Console()
    # Two requests are equal if every byte of their results is: worker count and the order of domains do not matter.
    ordered = [name for name in DOMAINS if name in chosen]
    request: dict[str, object] = {
        "generator_version": GENERATOR_VERSION,
        "split": split,
        "images_per_domain": images_per_domain,
        "seed": seed,
        "img_size_px": img_size_px,
        "domains": ordered,
    }
    if is_already_there(out, request):
        console.print(f"{out}: already there, {images_per_domain} images in each of {len(ordered)} domains")
        return
    out.mkdir(parents=True, exist_ok=True)
    labels = label_names()
    write_manifest(out, request, {}, labels, is_complete=False)
    chunks = [
        _Chunk(name, split, start, min(start + _CHUNK, images_per_domain), seed, img_size_px)
        for name in ordered
        for start in range(0, images_per_domain, _CHUNK)
    ]
    workers = min(num_workers or _usable_cores(), len(chunks))
    try:
        shards = _write(out, chunks, workers, console)
    except OSError as error:
        raise DataError(
            f"Cannot write shards to {out}: {error}. The unfinished folder is marked so in its manifest; make room or "
            "choose another --out, then repeat the command: it starts over."
        ) from error
    except BrokenProcessPool as error:
        raise DataError(
            f"A drawing process ended without a word while {workers} were at work on {out}, most often for lack of "
            "memory. Repeat the command with fewer, for example --num_workers 1: it starts over."
        ) from error
    write_manifest(out, request, shards, labels, is_complete=True)
    console.print(f"{out}: {images_per_domain * len(ordered)} images in {len(shards)} shards")


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
