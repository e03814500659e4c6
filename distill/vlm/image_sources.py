"""Where the image of a record comes from: a file, memory, or a shard; read within the limits of data/decode.py."""

from __future__ import annotations

import stat
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Protocol

from PIL import Image

from distill.data.decode import decode_image
from distill.data.image_header import ImageError, open_image
from distill.data.shard_reader import ShardReader
from distill.errors import DataError

MAX_IMAGE_BYTES = 256 << 20
"""As for a member of a shard."""


class ImageSource(Protocol):
    """One image of a record."""

    @property
    def name(self) -> str:
        """By which a person finds it."""
        ...

    def read(self) -> Image.Image:
        """Return its pixels as RGB.

        Raises:
            DataError: it is missing, damaged, of a format that is not allowed, or too large.
        """
        ...

    def size(self) -> tuple[int, int]:
        """Return width and height in pixels, from its header alone.

        Raises:
            DataError: as for `read`.
        """
        ...


class _Encoded:
    """An image given as encoded bytes; a subclass says which."""

    name: str

    def encoded(self) -> bytes:
        """Return the encoded image."""
        raise NotImplementedError

    def read(self) -> Image.Image:
        try:
            pixels = decode_image(self.encoded())
        except ImageError as error:
            raise DataError(f"{self.name}: {error}; mend the image or leave its record out.") from error
        return Image.fromarray(pixels.permute(1, 2, 0).numpy())

    def size(self) -> tuple[int, int]:
        try:
            with open_image(self.encoded()) as image:
                return image.size
        except ImageError as error:
            raise DataError(f"{self.name}: {error}; mend the image or leave its record out.") from error


@dataclass(frozen=True)
class FileImage(_Encoded):
    """An image file.

    Attributes:
        path: the file.
        name: what messages call it.
    """

    path: Path
    name: str = ""

    def __post_init__(self) -> None:
        if not self.name:
            object.__setattr__(self, "name", str(self.path))

    def encoded(self) -> bytes:
        """Return the file's bytes.

        Raises:
            DataError: there is no regular file of that name, or it is too large.
        """
        try:
            status = self.path.stat()
            # Opening a named pipe would wait for ever, and a device never ends.
            if not stat.S_ISREG(status.st_mode):
                raise DataError(f"{self.name} is no regular file; name an image file.")
            if status.st_size > MAX_IMAGE_BYTES:
                raise DataError(f"{self.name} has {status.st_size:,} bytes; {MAX_IMAGE_BYTES:,} are allowed.")
            return self.path.read_bytes()
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise DataError(f"{self.name} cannot be read ({reason}); check image_folder and the record.") from error


@dataclass(frozen=True)
class EncodedImage(_Encoded):
    """An image in memory.

    Attributes:
        data: encoded as PNG, JPEG or WebP.
        name: what messages call it.
    """

    data: bytes = field(repr=False)
    name: str

    def encoded(self) -> bytes:
        """Return the encoded image."""
        return self.data


@dataclass(frozen=True)
class ShardImage(_Encoded):
    """An image that is a member of a shard.

    Attributes:
        reader: of the shards.
        shard: number of the shard in `reader.shards`.
        offset: where the image begins.
        num_bytes: how long it is.
        name: what messages call it.
    """

    reader: ShardReader = field(repr=False, compare=False)
    shard: int
    offset: int
    num_bytes: int
    name: str

    def encoded(self) -> bytes:
        """Return the member's bytes."""
        return self.reader.read(self.shard, self.offset, self.num_bytes)


def file_in(folder: Path, name: str, where: str) -> FileImage:
    """Return an image file that a record names.

    Args:
        folder: the image folder.
        name: the file's name relative to it, as the record has it.
        where: file and record, for messages.

    Raises:
        DataError: the name leads out of the folder.
    """
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name or not path.parts:
        raise DataError(
            f"{where}: the image name {name!r} is unsafe; give a name relative to image_folder, without '..' or '\\'."
        )
    return FileImage(folder / path, f"{where}: {folder / path}")
