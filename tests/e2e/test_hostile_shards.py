"""Hostile and damaged shards through `distill fit` on the demo recipe: refused with their cause, and nothing runs."""

from __future__ import annotations

import gzip
import io
import pickle
import shutil
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distill.cli import main

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:LightningCLI.s args:UserWarning")]

BLOCK = 512


class Trap:
    """Unpickling this makes a file: the mark that code from data has run."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.target,))


def add(archive: tarfile.TarFile, name: str, content: bytes, **attributes: Any) -> None:
    info = tarfile.TarInfo(name)
    info.size = 0 if attributes else len(content)
    for key, value in attributes.items():
        setattr(info, key, value)
    archive.addfile(info, None if attributes else io.BytesIO(content))


def with_members(*extra: Callable[[tarfile.TarFile], None]) -> Callable[[Path], None]:
    """Return what appends members to a sound shard."""

    def change(shard: Path) -> None:
        with tarfile.open(shard, "a") as archive:
            for one in extra:
                one(archive)

    return change


def damaged_header(shard: Path) -> None:
    with tarfile.open(shard) as archive:
        middle = archive.getmembers()[20].offset
    data = bytearray(shard.read_bytes())
    data[middle + 10] ^= 0xFF
    shard.write_bytes(data)


def truncated_at_a_member(shard: Path) -> None:
    with tarfile.open(shard) as archive:
        cut = archive.getmembers()[20].offset
    shard.write_bytes(shard.read_bytes()[:cut])


def zero_blocks_inside(shard: Path) -> None:
    with tarfile.open(shard) as archive:
        middle = archive.getmembers()[20].offset
    data = shard.read_bytes()
    shard.write_bytes(data[:middle] + bytes(2 * BLOCK) + data[middle:])


def gzip_bomb(shard: Path) -> None:
    shard.write_bytes(gzip.compress(bytes(200 << 20)))


def zip_file(shard: Path) -> None:
    with zipfile.ZipFile(shard, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("0.jpg", bytes(50 << 20))


def pickle_member(shard: Path, extension: str) -> None:
    content = pickle.dumps(Trap(shard.parent / "executed"))
    with tarfile.open(shard, "a") as archive:
        add(archive, f"trap.{extension}", content)


FAULTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "header damaged": (damaged_header, "is damaged|is truncated"),
    "truncated": (truncated_at_a_member, "is truncated"),
    "zero blocks inside": (zero_blocks_inside, "is damaged"),
    "gzip bomb": (gzip_bomb, "gzip-compressed"),
    "zip": (zip_file, "zip-compressed"),
    "pickle .pyd": (lambda shard: pickle_member(shard, "pyd"), "allowed extension"),
    "pickle .pth": (lambda shard: pickle_member(shard, "pth"), "allowed extension"),
    "pickle .npy": (lambda shard: pickle_member(shard, "npy"), "allowed extension"),
    "symlink": (
        with_members(lambda a: add(a, "link.jpg", b"", type=tarfile.SYMTYPE, linkname="/etc/hostname")),
        "no regular file",
    ),
    "path out of the folder": (with_members(lambda a: add(a, "../../up.jpg", b"x")), "unsafe name"),
    "name that is not UTF-8": (with_members(lambda a: add(a, "bad\udcff.jpg", b"x")), "not UTF-8"),
    "duplicate key": (
        with_members(lambda a: add(a, "twice.jpg", b"x"), lambda a: add(a, "twice.jpg", b"x")),
        "occurs twice",
    ),
}


@pytest.fixture
def shards(demo_images: Path, tmp_path: Path) -> Path:
    """Return a copy of the training shards that a test may damage."""
    folder = tmp_path / "shards"
    shutil.copytree(demo_images / "train", folder, ignore=shutil.ignore_patterns(".distill-index"))
    return folder


@pytest.mark.parametrize("fault", FAULTS)
def test_fit_refuses_a_hostile_shard_with_its_name_and_cause(
    demo_recipe: Any, shards: Path, tmp_path: Path, fault: str, capsys: pytest.CaptureFixture[str]
) -> None:
    change, cause = FAULTS[fault]
    victim = sorted(shards.glob("*.tar"))[1]
    change(victim)
    with pytest.raises(SystemExit) as stop:
        main(demo_recipe.words(tmp_path / "run", f"--data.train={shards}"))
    message = capsys.readouterr().err
    assert stop.value.code == 1
    assert victim.name in message
    assert any(part in message for part in cause.split("|")), message
    assert not list(shards.glob("executed"))
    assert not list((tmp_path / "run").glob("checkpoints/*.ckpt"))


def png_bomb(side_px: int) -> bytes:
    """Return a valid PNG of some kilobytes that announces `side_px` squared pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        body = kind + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", side_px, side_px, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(10**6)))
        + chunk(b"IEND", b"")
    )


def test_fit_replaces_a_pixel_bomb_and_writes_it_in_the_ledger(demo_recipe: Any, shards: Path, tmp_path: Path) -> None:
    victim = sorted(shards.glob("*.tar"))[1]
    with tarfile.open(victim, "a") as archive:
        add(archive, "bomb.png", png_bomb(13_000))
    run = tmp_path / "run"
    main(demo_recipe.words(run, f"--data.train={shards}", "--trainer.max_epochs=2", "--data.max_bad_fraction=0.5"))
    lines = "".join(file.read_text() for file in (run / "ledger").glob("rank-*.jsonl"))
    assert "bomb" in lines
    assert "64,000,000 pixels" in lines
