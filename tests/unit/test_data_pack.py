"""Packing copies bytes, keeps the first of equal images, and gives the same result however often it was stopped."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import struct
import tarfile
import zlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from distill.data.index import build_index
from distill.data.pack import engines, pack, passes
from distill.data.pack.keys import MAX_KEY_BYTES, UniqueKeys, safe_key
from distill.data.pack.listing import ROWS_PER_SCAN
from distill.data.tar_members import read_members
from distill.errors import ConfigError, DataError


def encoded(color: int = 0, kind: str = "JPEG", size: tuple[int, int] = (20, 12)) -> bytes:
    buffer = BytesIO()
    Image.new("RGB", size, (color % 256, color // 256, 200)).save(buffer, kind)
    return buffer.getvalue()


def png_bomb() -> bytes:
    """Return a PNG of 20000 x 20000 pixels in a few hundred bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 20000, 20000, 8, 0, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(20001))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Return a folder of 30 images in two classes; 6 are copies of earlier ones, and one is damaged."""
    folder = tmp_path / "photos"
    for number in range(30):
        path = folder / ("cat" if number < 15 else "dog") / f"{number:02d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(8 * (number % 24)))
    (folder / "dog" / "20.jpg").write_bytes(b"\xff\xd8 no image")
    return folder


def contents(out: Path) -> dict[str, bytes]:
    """Return every file but the lock, by name."""
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*.*") if path.is_file()}


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_images_are_copied_byte_for_byte_with_their_hash_and_source(photos: Path, tmp_path: Path) -> None:
    pack(str(photos), tmp_path / "out", "natural", num_workers=1)
    with tarfile.open(tmp_path / "out" / "natural-000000.tar") as archive:
        members = archive.getmembers()
        files = {member.name: archive.extractfile(member) for member in members}
        image, facts = files["cat/03.jpg"], files["cat/03.json"]
        assert image is not None
        assert facts is not None
        data, known = image.read(), json.load(facts)
    assert data == (photos / "cat" / "03.jpg").read_bytes()
    assert known == {"label": "cat", "sha256": hashlib.sha256(data).hexdigest(), "source": "cat/03.jpg"}
    assert all((m.mtime, m.uid, m.gid, m.uname, m.gname) == (0, 0, 0, "", "") for m in members)
    names = [member.name for member in members]
    assert names == sorted(names)


def test_the_first_of_equal_images_stays_and_all_rows_are_accounted_for(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    pack(str(photos), out, "natural", num_workers=1)
    # 24 to 29 are copies of 0 to 5; 20 is damaged.
    assert "planned 30 = packed 23 + duplicates 6 + quarantined 1" in capsys.readouterr().out
    duplicates = {entry["source"]: entry["first"] for entry in lines(out / "duplicates.jsonl")}
    assert duplicates == {f"dog/{24 + n}.jpg": f"cat/{n:02d}.jpg" for n in range(6)}
    assert [entry["source"] for entry in lines(out / "quarantine.jsonl")] == ["dog/20.jpg"]
    index = build_index(out)
    assert (len(index), index.label_names) == (23, ("cat", "dog"))


@pytest.mark.slow
def test_any_number_of_workers_gives_the_same_bytes(tmp_path: Path) -> None:
    photos = tmp_path / "many"
    photos.mkdir()
    for number in range(2 * ROWS_PER_SCAN + 9):
        # The copies lie in other scan units than their originals.
        (photos / f"{number:05d}.png").write_bytes(encoded(number % (ROWS_PER_SCAN + 3), "PNG"))
    results: list[dict[str, bytes]] = []
    for workers in (1, 2):
        pack(str(photos), tmp_path / str(workers), "natural", images_per_shard=100, num_workers=workers)
        results.append(contents(tmp_path / str(workers)))
    assert results[0] == results[1]
    assert len(lines(tmp_path / "1" / "manifest.jsonl")) == 6
    assert lines(tmp_path / "1" / "duplicates.jsonl")[0]["first"] == "00000.png"


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "no readable JPEG, PNG or WebP header"),
        (encoded(1, "GIF"), "no readable JPEG, PNG or WebP header"),
        (encoded(1)[:10], "no readable JPEG, PNG or WebP header"),
        (png_bomb(), "larger than 64,000,000 pixels"),
    ],
    ids=["empty", "gif", "cut", "bomb"],
)
def test_what_has_no_allowed_header_is_quarantined(tmp_path: Path, data: bytes, reason: str) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "bad.jpg").write_bytes(data)
    (tmp_path / "in" / "good.jpg").write_bytes(encoded(2))
    pack(str(tmp_path / "in"), tmp_path / "out", "d", num_workers=1)
    (entry,) = lines(tmp_path / "out" / "quarantine.jsonl")
    assert (entry["source"], entry["domain"]) == ("bad.jpg", "d")
    assert reason in entry["reason"]


def test_a_file_larger_than_a_member_may_be_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "good.jpg").write_bytes(encoded(2))
    with (tmp_path / "in" / "huge.jpg").open("wb") as file:
        file.truncate(1 << 40)
    pack(str(tmp_path / "in"), tmp_path / "out", "d", num_workers=1)
    assert (
        "1,099,511,627,776 bytes; 268,435,456 are allowed" in lines(tmp_path / "out" / "quarantine.jsonl")[0]["reason"]
    )


def test_the_ending_follows_the_header(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for number, kind in enumerate(("PNG", "WEBP", "JPEG")):
        (tmp_path / "in" / f"{number}.jpg").write_bytes(encoded(number, kind))
    pack(str(tmp_path / "in"), tmp_path / "out", "d", num_workers=1)
    with tarfile.open(tmp_path / "out" / "d-000000.tar") as archive:
        assert [name for name in archive.getnames() if not name.endswith("json")] == ["0.png", "1.webp", "2.jpg"]


def test_equal_keys_are_both_kept(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for number, kind in enumerate(("JPEG", "PNG")):
        (tmp_path / "in" / f"a.{kind.lower()}").write_bytes(encoded(number, kind))
    pack(str(tmp_path / "in"), tmp_path / "out", "d", num_workers=1)
    digest = hashlib.sha256((tmp_path / "in" / "a.png").read_bytes()).hexdigest()
    assert build_index(tmp_path / "out").keys == ["a", f"a-{digest[:8]}"]
    assert json.loads((tmp_path / "out" / "pack.json").read_text())["counts"]["renamed"] == 1


@settings(max_examples=50, deadline=None)
@given(st.text(max_size=120))
@example("x" * 200)
@example("größe/" * 40)
@example("a/../b.c/.hidden\\x")
def test_a_safe_key_is_taken_by_the_index_and_by_tar(key: str) -> None:
    name = safe_key(key)
    assert len(name.encode()) <= MAX_KEY_BYTES
    file = BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT, encoding="utf-8") as archive:
        longest = UniqueKeys()
        longest.claim(name, "0" * 64)
        archive.addfile(tarfile.TarInfo(f"{longest.claim(name, '1' * 64)}.jpeg"))
        archive.addfile(tarfile.TarInfo(f"{name}.json"))
    file.seek(0)
    assert [member.key for member in read_members(file, "keys.tar")][1] == name


def test_long_keys_with_one_beginning_stay_apart(tmp_path: Path) -> None:
    assert safe_key("x" * 200 + "1") != safe_key("x" * 200 + "2")


def test_running_again_writes_nothing_new(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    pack(str(photos), out, "natural", images_per_shard=5, num_workers=1)
    times = {path: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    pack(str(photos), out, "natural", images_per_shard=5, num_workers=1)
    assert {path: path.stat().st_mtime_ns for path in out.glob("*.tar")} == times
    assert "5 shards, 0 of them new" in capsys.readouterr().out


def test_a_shard_that_is_gone_or_cut_is_written_again(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    pack(str(photos), out, "natural", images_per_shard=5, num_workers=1)
    before = contents(out)
    (out / "natural-000001.tar").unlink()
    os.truncate(out / "natural-000003.tar", 1024)
    with (out / "manifest.jsonl").open("ab") as file:
        file.write(b'{"name":"natural-0000')
    pack(str(photos), out, "natural", images_per_shard=5, num_workers=1)
    assert contents(out) == before


@pytest.mark.parametrize("stage", ["scan_rows", "write_shard"])
def test_stopped_at_any_stage_it_goes_on_to_the_same_bytes(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    pack(str(photos), tmp_path / "whole", "natural", images_per_shard=5, num_workers=1)
    function, calls = getattr(passes, stage), list[object]()

    def stop(unit: object) -> object:
        calls.append(unit)
        if len(calls) == (1 if stage == "scan_rows" else 3):
            raise KeyboardInterrupt
        return function(unit)

    with monkeypatch.context() as patch:
        patch.setattr(passes, stage, stop)
        with pytest.raises(KeyboardInterrupt):
            pack(str(photos), tmp_path / "out", "natural", images_per_shard=5, num_workers=1)
    assert not list((tmp_path / "out").rglob("*.part"))
    pack(str(photos), tmp_path / "out", "natural", images_per_shard=5, num_workers=1)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_what_a_killed_process_left_is_swept(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    pack(str(photos), out, "natural", num_workers=1)
    (out / ".natural-000000.tar.abc.part").write_bytes(b"half")
    (out / ".pack" / ".samples.jsonl.abc.part").write_bytes(b"half")
    pack(str(photos), out, "natural", num_workers=1)
    assert not list(out.rglob(".*.part"))


def test_other_options_in_the_same_folder_are_refused_by_name(photos: Path, tmp_path: Path) -> None:
    pack(str(photos), tmp_path / "out", "natural", num_workers=1)
    before = contents(tmp_path / "out")
    with pytest.raises(ConfigError, match="images_per_shard is 7, and was 1000"):
        pack(str(photos), tmp_path / "out", "natural", images_per_shard=7, num_workers=1)
    assert contents(tmp_path / "out") == before


def _new_file(folder: Path) -> None:
    (folder / "zebra.jpg").write_bytes(encoded(3))


def _lost_file(folder: Path) -> None:
    (folder / "dog" / "29.jpg").unlink()


def _other_size(folder: Path) -> None:
    (folder / "dog" / "29.jpg").write_bytes(encoded(3, size=(300, 300)))


def _other_bytes_of_one_size(folder: Path) -> None:
    path = folder / "dog" / "29.jpg"
    old = path.stat()
    path.write_bytes(bytes(old.st_size))
    os.utime(path, ns=(old.st_atime_ns, old.st_mtime_ns + 1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_new_file, r"zebra.jpg is new \(31 images, and there were 30\)"),
        (_lost_file, "dog/29.jpg is no longer there"),
        (_other_size, "dog/29.jpg has size"),
        (_other_bytes_of_one_size, "dog/29.jpg has mtime_ns"),
    ],
)
def test_another_source_in_the_same_folder_is_refused_with_the_first_difference(
    photos: Path, tmp_path: Path, change: Callable[[Path], None], message: str
) -> None:
    pack(str(photos), tmp_path / "out", "natural", num_workers=1)
    change(photos)
    with pytest.raises(ConfigError, match=message):
        pack(str(photos), tmp_path / "out", "natural", num_workers=1)


def test_an_image_that_changes_after_the_plan_stops_the_run(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    function = passes.write_shard

    def change_first(unit: Any) -> dict[str, Any]:
        (photos / "cat" / "00.jpg").write_bytes(encoded(999))
        return function(unit)

    monkeypatch.setattr(passes, "write_shard", change_first)
    with pytest.raises(DataError, match=r"cat/00\.jpg changed after the plan was made"):
        pack(str(photos), tmp_path / "out", "natural", num_workers=1)
    assert not list((tmp_path / "out").glob("*.tar"))


def test_a_damaged_plan_is_refused(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    pack(str(photos), out, "natural", num_workers=1)
    (out / "natural-000000.tar").unlink()
    samples = out / ".pack" / "samples.jsonl"
    samples.write_bytes(b"".join(samples.read_bytes().splitlines(keepends=True)[:3]))
    with pytest.raises(DataError, match=r"samples\.jsonl is damaged"):
        pack(str(photos), out, "natural", num_workers=1)
    (out / "pack.json").write_text("{")
    with pytest.raises(DataError, match=r"pack\.json cannot be read"):
        pack(str(photos), out, "natural", num_workers=1)


def test_a_folder_that_is_not_ours_is_left_alone(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(ConfigError, match="holds nothing of distill pack"):
        pack(str(photos), tmp_path / "mine", "natural", num_workers=1)
    with pytest.raises(ConfigError, match="lies in the source"):
        pack(str(photos), photos / "shards", "natural", num_workers=1)
    with pytest.raises(ConfigError, match="is a file"):
        pack(str(photos), tmp_path / "mine" / "thesis.txt", "natural", num_workers=1)


def test_a_second_process_on_the_same_folder_is_refused(photos: Path, tmp_path: Path) -> None:
    work = tmp_path / "out" / ".pack"
    work.mkdir(parents=True)
    with (work / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="Another distill pack is at work"):
            pack(str(photos), tmp_path / "out", "natural", num_workers=1)


def test_an_empty_folder_and_one_without_usable_images_are_told(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no image"):
        pack(str(tmp_path / "empty"), tmp_path / "out", "d", num_workers=1)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "x.jpg").write_bytes(b"x")
    with pytest.raises(DataError, match=r"None of the 1 images can be used; .*quarantine\.jsonl"):
        pack(str(tmp_path / "bad"), tmp_path / "out", "d", num_workers=1)
    assert lines(tmp_path / "out" / "quarantine.jsonl")[0]["source"] == "x.jpg"


def test_a_bad_domain_in_a_list_is_quarantined(photos: Path, tmp_path: Path) -> None:
    (photos / "list.csv").write_text("path,domain\ncat/01.jpg,natural\ncat/02.jpg,../../etc\ncat/03.jpg,\n")
    pack(str(photos / "list.csv"), tmp_path / "out", num_workers=1)
    assert [entry["source"] for entry in lines(tmp_path / "out" / "quarantine.jsonl")] == ["cat/02.jpg", "cat/03.jpg"]


def _end_without_a_word(unit: int) -> int:
    os._exit(unit)


def _refuse(unit: int) -> int:
    raise DataError(f"unit {unit} is bad")


@pytest.mark.slow
def test_a_worker_that_dies_or_fails_ends_the_run_with_the_cause() -> None:
    workers = engines.Workers("local", 2)
    with pytest.raises(DataError, match="2 worker processes ended without a word"):
        list(workers.run(_end_without_a_word, [3, 3]))
    with pytest.raises(DataError, match="unit 1 is bad"):
        list(workers.run(_refuse, [1, 2]))
