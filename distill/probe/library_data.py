"""Data sets of other libraries to probe on: torchvision's, and Hugging Face's on disk. Nothing is ever downloaded."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from distill.data.decode import decode_image
from distill.data.image_header import MAX_PIXELS, ImageError
from distill.errors import ConfigError, DataError
from distill.probe.image_files import read_bounded
from distill.probe.probe_set import TEST_PARTS, TRAIN_PART, ProbeSet, number, require_every_class, sort_names

_CHUNK_BYTES = 1 << 22


class LibraryImages:
    """Images of another library's data sets, one after the other, as `distill.probe.probe_set.Images`.

    Args:
        source: what was opened, for messages.
        parts: name and length of each data set, in row order.
        read: pixels of an image by part and position in it.
    """

    def __init__(
        self, source: str, parts: Sequence[tuple[str, int]], read: Callable[[int, int], Tensor | bytes]
    ) -> None:
        self.source, self.read = source, read
        self.names = [name for name, _ in parts]
        self.ends = np.cumsum([length for _, length in parts])

    def pixels(self, row: int) -> Tensor:
        """Return one image, `[3, H, W]` uint8.

        Raises:
            DataError: it cannot be read or decoded.
        """
        try:
            found = self.read(*self._place(row))
            return decode_image(found) if isinstance(found, bytes) else found
        except ImageError as error:
            raise DataError(f"{self.name_of(row)}: {error}; mend the image or leave it out.") from error

    def name_of(self, row: int) -> str:
        """Return "source, part, position"."""
        part, position = self._place(row)
        return f"{self.source}, {self.names[part]}, image {position}"

    def _place(self, row: int) -> tuple[int, int]:
        part = int(np.searchsorted(self.ends, row, side="right"))
        return part, row - (int(self.ends[part - 1]) if part else 0)


def open_torchvision(source: str, rest: str, img_size_px: int) -> ProbeSet:
    """Open a data set of torchvision that is on disk.

    Args:
        source: the whole value, for messages.
        rest: `NAME:ROOT`, for example `CIFAR10:data`.
        img_size_px: side of the square views.

    Raises:
        ConfigError: torchvision has no such data set, or it cannot be built from its root alone.
        DataError: the data is not there, or is none for classification.
    """
    import torchvision.datasets

    name, colon, root = rest.partition(":")
    if not colon or not root or name not in torchvision.datasets.__all__:
        raise ConfigError(
            f"--data {source}: write torchvision:NAME:ROOT, NAME being a class of torchvision.datasets, for example "
            f"torchvision:CIFAR10:data. {name!r} with the root {root!r} is not that."
        )
    make = getattr(torchvision.datasets, name)
    parts = dict(_torchvision_parts(make, source, root))
    built_parts = list(parts.values())
    images = LibraryImages(
        source,
        [(part, len(built)) for part, built in parts.items()],
        lambda part, position: _pixels_of(built_parts[part][position][0], source),
    )
    digest = hashlib.sha256(f"torchvision {name}".encode())
    labels: list[int] = []
    for part, built in parts.items():
        for position in range(len(built)):
            image, label = _item(built, position, source)
            labels.append(label)
            digest.update(f"{part} {label} {tuple(image.shape)}".encode())
            digest.update(image.contiguous().numpy().tobytes())
    numbers = np.array(labels, dtype=np.int64)
    given = [str(entry) for entry in getattr(built_parts[0], "classes", ())]
    names = (
        tuple(given) if len(given) > int(numbers.max(initial=-1)) else tuple(map(str, range(int(numbers.max()) + 1)))
    )
    require_every_class(numbers, names, source)
    return _joined(
        source, digest.hexdigest(), images, img_size_px, numbers, _distinct(names), list(parts.items()), name
    )


def _torchvision_parts(make: Any, source: str, root: str) -> list[tuple[str, Any]]:
    parameters = inspect.signature(make.__init__).parameters
    options: dict[str, Any] = {"download": False} if "download" in parameters else {}
    needed = [
        name
        for name, parameter in list(parameters.items())[1:]
        if parameter.default is parameter.empty
        and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        and name not in ("root", "train", "split")
    ]
    if needed:
        raise ConfigError(f"--data {source}: this data set also needs {', '.join(needed)}; export it to a CSV instead.")
    if "train" in parameters:
        variants = [(TRAIN_PART, {"train": True}), ("test", {"train": False})]
    elif "split" in parameters:
        variants = [(part, {"split": part}) for part in (TRAIN_PART, *TEST_PARTS)]
    else:
        variants = [("all", dict[str, Any]())]
    found: list[tuple[str, Any]] = []
    for part, chosen in variants:
        try:
            found.append((part, make(root=root, **options, **chosen)))
        except ValueError:
            continue  # a part that this data set has not
        except (RuntimeError, OSError) as error:
            raise DataError(
                f"--data {source} cannot be opened: {error} Nothing is downloaded: fetch it first."
            ) from error
        if len(found) == 2:
            break
    if not found:
        raise ConfigError(f"--data {source}: this data set has none of the splits train, {', '.join(TEST_PARTS)}.")
    return found


def _item(built: Any, position: int, source: str) -> tuple[Tensor, int]:
    item = built[position]
    if not isinstance(item, tuple) or len(cast(tuple[Any, ...], item)) != 2 or isinstance(item[1], bool):
        raise DataError(f"--data {source} gives no (image, class) pairs; it is no data set for classification.")
    image, label = cast(tuple[Any, Any], item)
    if not isinstance(label, int | np.integer) or int(label) < 0:
        raise DataError(
            f"--data {source}: image {position} has the target {str(label)[:80]!r}, which is no class number; it is no "
            "data set for classification."
        )
    return _pixels_of(image, source), int(label)


def _pixels_of(image: Any, source: str) -> Tensor:
    """Pixels `[3, H, W]` uint8 of the PIL image that a torchvision data set gives."""
    if not hasattr(image, "convert"):
        raise DataError(f"--data {source} gives {type(image).__name__} instead of images; export it to a CSV instead.")
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ImageError(f"the image is {width} x {height}; at most {MAX_PIXELS:,} pixels are allowed")
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def open_hugging_face(source: str, path: str, img_size_px: int) -> ProbeSet:
    """Open a data set that `datasets` saved to disk (`save_to_disk`), with an image column and a label column.

    Parts train and test (or validation) are kept; columns `group` and `domain` are used where they are.

    Raises:
        ConfigError: the package `datasets` is not installed.
        DataError: the directory holds no such data set, or it lacks an image or a label.
    """
    try:
        import datasets  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ConfigError(f"--data {source} needs the package datasets: pip install datasets.") from error
    library: Any = datasets
    try:
        loaded = library.load_from_disk(path)
    except (OSError, ValueError) as error:
        raise DataError(
            f"--data {source} is no data set on disk ({error}). Save one by `datasets`' save_to_disk, "
            "and name its folder."
        ) from error
    parts = _hugging_face_parts(loaded)
    features = parts[0][1].features
    image_column = next((name for name, kind in features.items() if isinstance(kind, library.Image)), None)
    if image_column is None or "label" not in features:
        raise DataError(f"--data {source} needs an image column and a column label; it has {', '.join(features)}.")
    encoded = [part.cast_column(image_column, library.Image(decode=False)) for _, part in parts]
    images = LibraryImages(
        source,
        [(name, len(part)) for name, part in parts],
        lambda part, position: _encoded_bytes(encoded[part][position][image_column]),
    )
    numbers, names = _hugging_face_labels(parts, features["label"], source)
    return _joined(source, _files_fingerprint(Path(path)), images, img_size_px, numbers, names, parts, Path(path).name)


def _hugging_face_parts(loaded: Any) -> list[tuple[str, Any]]:
    if not hasattr(loaded, "keys"):
        return [("all", loaded)]
    test = next((name for name in TEST_PARTS if name in loaded), None)
    chosen = [name for name in (TRAIN_PART, test) if name is not None and name in loaded]
    return [(name, loaded[name]) for name in chosen or list(loaded)[:1]]


def _hugging_face_labels(parts: Sequence[tuple[str, Any]], kind: Any, source: str) -> tuple[Any, tuple[str, ...]]:
    column = [value for _, part in parts for value in part["label"]]
    names = getattr(kind, "names", None)
    if names is None:
        text = ["" if value is None else str(value) for value in column]
        known = sort_names(name for name in text if name)
        return number(text, known), known
    numbers = np.array([-1 if value is None else int(value) for value in column], dtype=np.int64)
    require_every_class(numbers, names, source)
    return numbers, _distinct(tuple(map(str, names)))


def _encoded_bytes(entry: Any) -> bytes:
    return entry["bytes"] if entry["bytes"] is not None else read_bounded(Path(entry["path"]))


def _files_fingerprint(folder: Path) -> str:
    listing: list[tuple[str, str]] = []
    for file in sorted(folder.rglob("*.arrow")):
        digest = hashlib.sha256()
        with file.open("rb") as stream:
            while chunk := stream.read(_CHUNK_BYTES):
                digest.update(chunk)
        listing.append((file.relative_to(folder).as_posix(), digest.hexdigest()))
    return hashlib.sha256(json.dumps(listing).encode()).hexdigest()


def _distinct(names: tuple[str, ...]) -> tuple[str, ...]:
    """Tell apart classes of one name by their number."""
    return tuple(name if names.count(name) == 1 else f"{name} ({at})" for at, name in enumerate(names))


def _joined(
    source: str,
    fingerprint: str,
    images: LibraryImages,
    img_size_px: int,
    labels: Any,
    names: tuple[str, ...],
    parts: Sequence[tuple[str, Any]],
    domain: str,
) -> ProbeSet:
    shared = [getattr(part, "column_names", None) or () for _, part in parts]
    columns = {name for name in ("group", "domain") if all(name in names_of for names_of in shared)}

    def column(name: str) -> list[str]:
        return [str(value or "") for _, part in parts for value in part[name]]

    domain_of = column("domain") if "domain" in columns else [domain] * len(labels)
    domains = sort_names(entry or domain for entry in domain_of)
    fixed = np.concatenate([np.full(len(part), name != TRAIN_PART) for name, part in parts])
    return ProbeSet(
        source,
        fingerprint,
        images,
        img_size_px,
        labels,
        names,
        number([entry or domain for entry in domain_of], domains),
        domains,
        tuple(column("group")) if "group" in columns else ("",) * len(labels),
        fixed if len(parts) > 1 else None,
    )
