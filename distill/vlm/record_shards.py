"""Records in WebDataset shards: `key.json` (or a caption as `key.txt`) and the images it names.

A record without a name of an image has the image of its own key. One that names images (`"image": "key-2"`, or a list)
means images of those keys in the same shard, so that a document with several images needs no new format.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast, overload

from distill.data.index import Shard
from distill.data.shard_index import MAX_JSON_BYTES
from distill.data.shard_reader import ShardReader
from distill.data.shards import find_shards
from distill.data.stores import is_remote
from distill.data.tar_members import IMAGE_EXTENSIONS, Member, read_members
from distill.errors import ConfigError, DataError
from distill.vlm.conversation import Conversation, Kind
from distill.vlm.image_sources import ImageSource, ShardImage
from distill.vlm.record_parsing import parse_record


def read_shards(shards: str, kind: Kind, *, caption_prompt: str = "") -> Sequence[Conversation]:
    """Return the records of local shards, checked whole.

    Args:
        shards: a `.tar`, a folder of them, a glob or a brace pattern.
        kind: what the records are.
        caption_prompt: what is asked of a captioned image.

    Raises:
        ConfigError: the shards lie behind a URL.
        DataError: a shard is missing or damaged, or a record is not as it must be; shard and record are named.
    """
    if is_remote(shards):
        raise ConfigError(f"{shards} lies behind a URL; records are read from local shards: copy or mount them.")
    # Under one name, since shards of records need not be called after a domain.
    found = find_shards({"records": shards}, key="records")["records"]
    records = ShardRecords(found, kind, caption_prompt=caption_prompt)
    for number in range(len(records)):
        _ = records[number]
    return records


class ShardRecords(Sequence[Conversation]):
    """The records of local tars, in the order of shards and members.

    Args:
        paths: the tars.
        kind: what their records are.
        caption_prompt: what is asked of a captioned image.

    Raises:
        DataError: a shard is missing or damaged, or there is no record.
    """

    def __init__(self, paths: Sequence[str], kind: Kind, *, caption_prompt: str = "") -> None:
        self.kind: Kind = kind
        self.caption_prompt = caption_prompt
        self._images: list[dict[str, Member]] = []
        self._records: list[tuple[int, Member]] = []
        shards: list[Shard] = []
        for number, path in enumerate(paths):
            with Path(path).open("rb") as file:
                members = list(read_members(file, path))
            shards.append(Shard("records", path, Path(path).stat().st_size, "", 0))
            self._images.append({m.key: m for m in members if m.extension in IMAGE_EXTENSIONS})
            described = {member.key for member in members if member.extension == "json"}
            self._records += [
                (number, m)
                for m in members
                if m.extension == "json" or (m.extension == "txt" and m.key not in described)
            ]
        if not self._records:
            raise DataError(
                f"{', '.join(paths)}: no record; a record is a member <key>.json, or <key>.txt for a caption."
            )
        self._reader = ShardReader(shards)

    def __len__(self) -> int:
        return len(self._records)

    @overload
    def __getitem__(self, number: int) -> Conversation: ...
    @overload
    def __getitem__(self, number: slice) -> list[Conversation]: ...
    def __getitem__(self, number: int | slice) -> Conversation | list[Conversation]:
        """Return one record, or several.

        Raises:
            IndexError: there is no such record.
            DataError: the shard changed since it was opened.
        """
        if isinstance(number, slice):
            return [self[at] for at in range(*number.indices(len(self)))]
        shard, member = self._records[number]
        where = f"{self._reader.shards[shard].shown}: {member.key}.{member.extension}"
        record = self._record(shard, member, where)
        resolve = partial(self._image, shard, where=where)
        return parse_record(self.kind, record, where, resolve, caption_prompt=self.caption_prompt)

    def _record(self, shard: int, member: Member, where: str) -> object:
        if member.size > MAX_JSON_BYTES:
            raise DataError(f"{where} has {member.size:,} bytes; {MAX_JSON_BYTES:,} are allowed.")
        data = self._reader.read(shard, member.offset, member.size)
        field = "image" if self.kind in ("instruction", "caption") else "images"
        try:
            if member.extension == "txt":
                named = "caption" if self.kind == "caption" else "text"
                record: Any = {named: data.decode().strip()}
            else:
                record = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where} is no valid JSON or UTF-8 text ({error}); mend it or leave it out.") from error
        if not isinstance(record, dict) or self.kind == "text":
            return cast(object, record)
        values = cast(dict[str, Any], record)
        has_own = member.key in self._images[shard] and not {field, "video", "texts"} & values.keys()
        return {**values, field: member.key if field == "image" else [member.key]} if has_own else values

    def _image(self, shard: int, name: str, where: str) -> ImageSource:
        member = self._images[shard].get(name)
        if member is None:
            raise DataError(f"{where}: the shard has no image of the key {name!r}; name keys of the same shard.")
        shown = f"{self._reader.shards[shard].shown}: {member.key}.{member.extension}"
        return ShardImage(self._reader, shard, member.offset, member.size, shown)
