"""A folder of image files, with a sub-folder for each class or without."""

from __future__ import annotations

import mimetypes
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from distill.data.pack.roots import UnusableError, check_file, is_utf8, printable
from distill.data.pack.rows import SourceRow, WholeFile

# Without the machine's own tables: the same folder must give the same rows everywhere.
_TYPES = mimetypes.MimeTypes(filenames=())


class ImageFolder:
    """All image files under a folder, in the order of their names.

    A file counts as an image when its ending says so or says nothing; its header decides later. Hidden files, and files
    whose ending says they are something else (.txt, .json, .csv), are passed over and counted.

    Args:
        root: the folder.
        has_labels: the first sub-folder on the way to an image is its label.
    """

    def __init__(self, root: Path, *, has_labels: bool) -> None:
        self.root = root.resolve()
        self.has_labels = has_labels
        self.may_name_domains = False
        self.passed_over = 0

    def rows(self) -> Iterator[SourceRow]:
        """Yield a row for each image file, without reading any."""
        self.passed_over = 0
        yield from self._of_folder("")

    def _of_folder(self, folder: str) -> Iterator[SourceRow]:
        with os.scandir(self.root / folder) as entries:
            # Names are sorted one folder at a time, so that memory holds one folder's names.
            found = sorted((entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries)
        for name, is_folder in found:
            relative = f"{folder}/{name}" if folder else name
            if name.startswith("."):
                self.passed_over += 1
            elif is_folder:
                yield from self._of_folder(relative)
            elif self._is_other(name):
                self.passed_over += 1
            else:
                yield self._row(relative)

    def _is_other(self, name: str) -> bool:
        kind, packing = _TYPES.guess_type(f"file:{name}") if is_utf8(name) else (None, None)
        return kind is not None and (packing is not None or not kind.startswith("image/"))

    def _row(self, relative: str) -> SourceRow:
        if not is_utf8(relative):
            shown = printable(relative)
            return SourceRow(shown, shown, None, problem="its name is not UTF-8; rename the file")
        path = PurePosixPath(relative)
        label = path.parts[0] if self.has_labels and len(path.parts) > 1 else None
        key = str(path.with_suffix(""))
        try:
            status = check_file(self.root, relative)
        except UnusableError as error:
            return SourceRow(relative, key, None, label, problem=str(error))
        return SourceRow(relative, key, WholeFile(relative), label, size=status.st_size, mtime_ns=status.st_mtime_ns)
