"""Shards are found, checked and indexed; whatever is damaged or unsafe is refused by name."""

from __future__ import annotations

import gzip
import io
import json
import os
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds
from PIL import Image

from distill.cli import main
from distill.data.index import build_index, find_shards
from distill.data.index_file import index_file
from distill.data.summary import index as index_verb
from distill.errors import ConfigError, DataError


def encoded(color: int = 0, size: tuple[int, int] = (20, 12), kind: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (color % 256, 100, 200)).save(buffer, kind)
    return buffer.getvalue()


def write_shard(path: Path, count: int = 4, **fields: Callable[[int], object]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with wds.TarWriter(str(path)) as writer:
        for number in range(count):
            extra = {name: make(number) for name, make in fields.items()}
            writer.write({"__key__": f"{number:06d}", "jpg": encoded(number), **extra})
    return path


def add_member(archive: tarfile.TarFile, name: str, data: bytes = b"", **attributes: object) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for attribute, value in attributes.items():
        setattr(info, attribute, value)
    archive.addfile(info, io.BytesIO(data))


def test_a_folder_gives_domains_by_file_name(tmp_path: Path) -> None:
    for name in ("ocr-000001", "ocr-000000", "natural-000000", "cc3m-train-000000"):
        write_shard(tmp_path / f"{name}.tar")
    found = find_shards(tmp_path)
    assert list(found) == ["cc3m-train", "natural", "ocr"]
    assert [Path(path).name for path in found["ocr"]] == ["ocr-000000.tar", "ocr-000001.tar"]
    assert find_shards(str(tmp_path / "*.tar")) == found


def test_braces_and_mappings_name_shards(tmp_path: Path) -> None:
    for number in range(3):
        write_shard(tmp_path / f"ocr-{number:06d}.tar")
    write_shard(tmp_path / "other" / "00000.tar")
    assert len(find_shards(str(tmp_path / "ocr-{000000..000001}.tar"))["ocr"]) == 2
    found = find_shards({"web": str(tmp_path / "other"), "text": [str(tmp_path / "ocr-*.tar")]})
    assert {domain: len(paths) for domain, paths in found.items()} == {"text": 3, "web": 1}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("{folder}/nothing-*.tar", "data.train: no shard matches"),
        ("{folder}/ocr-{{000000..000009}}.tar", "ocr-000001.tar does not exist"),
        ("{folder}/missing.tar", "missing.tar does not exist"),
        ("{folder}/empty", "has no \\*.tar file"),
        ("{folder}/unnamed", "does not say its domain"),
        ("{folder}/packed", "looks compressed"),
    ],
)
def test_shards_that_are_not_there_are_named(tmp_path: Path, spec: str, message: str) -> None:
    write_shard(tmp_path / "ocr-000000.tar")
    write_shard(tmp_path / "unnamed" / "00000.tar")
    (tmp_path / "empty").mkdir()
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed" / "ocr-0.tar.gz").touch()
    with pytest.raises(DataError, match=message):
        find_shards(spec.format(folder=tmp_path), key="data.train")


@pytest.mark.parametrize("spec", ["", {}, {"ocr": []}, "pipe:cat x.tar", "ftp://host/ocr-0.tar", "ocr-{0..9999}.tar"])
def test_specs_that_cannot_work_name_the_key(spec: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distill.data.shards.MAX_SHARDS", 1000)
    with pytest.raises(ConfigError, match="data.val"):
        find_shards(spec, key="data.val")  # type: ignore[arg-type]


def test_two_shards_of_one_name_in_a_domain_are_refused(tmp_path: Path) -> None:
    first, second = (str(write_shard(tmp_path / folder / "x-0.tar")) for folder in "ab")
    with pytest.raises(DataError, match="two shards called x-0.tar"):
        find_shards({"x": [first, second]})


def test_an_index_holds_labels_groups_sizes_and_places(tmp_path: Path) -> None:
    label = {"json": lambda n: {"label": "bar" if n % 2 else "pie", "group": f"g{n // 2}", "other": [1]}}
    write_shard(tmp_path / "chart-0.tar", 4, **label)
    write_shard(tmp_path / "natural-0.tar", 12, cls=lambda n: n)
    index = build_index(tmp_path)
    assert index.domains == ("chart", "natural")
    assert len(index) == 16
    assert index.rows_of("natural").tolist() == list(range(4, 16))
    assert index.domain_ids.tolist() == [0] * 4 + [1] * 12
    assert index.label_names == (*(str(n) for n in range(12)), "bar", "pie")
    assert [index.label_names[label] for label in index.labels[:6]] == ["pie", "bar", "pie", "bar", "0", "1"]
    assert index.groups[:5] == ["g0", "g0", "g1", "g1", ""]
    assert index.keys[4:6] == ["000000", "000001"]
    assert (index.widths[0], index.heights[0]) == (20, 12)
    shard = Path(index.shards[1].location).read_bytes()
    start = int(index.offsets[5])
    assert shard[start : start + int(index.sizes[5])] == encoded(1)


def test_an_unlabelled_sample_has_label_minus_one(tmp_path: Path) -> None:
    write_shard(tmp_path / "x-0.tar", 2)
    index = build_index(tmp_path)
    assert index.labels.tolist() == [-1, -1]
    assert index.label_names == ()


def test_labels_beyond_the_first_shard_keep_their_names(tmp_path: Path) -> None:
    write_shard(tmp_path / "x-0.tar", 2, json=lambda n: {"label": "zebra"})
    write_shard(tmp_path / "x-1.tar", 2, json=lambda n: {"label": "ant"})
    index = build_index(tmp_path)
    assert [index.label_names[label] for label in index.labels] == ["zebra", "zebra", "ant", "ant"]


def test_the_fingerprint_changes_with_one_byte_and_not_with_the_place(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "a" / "x-0.tar")
    before = build_index(tmp_path / "a").fingerprint
    (tmp_path / "b").mkdir()
    moved = tmp_path / "b" / "x-0.tar"
    moved.write_bytes(shard.read_bytes())
    assert build_index(tmp_path / "b").fingerprint == before
    content = bytearray(shard.read_bytes())
    content[700] ^= 1
    shard.write_bytes(content)
    assert build_index(tmp_path / "a").fingerprint != before
    assert build_index({"y": str(tmp_path / "b")}).fingerprint != before


def test_an_index_file_is_reused_until_the_shard_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scanned: list[str] = []
    import distill.data.index_file as module

    real = module.scan_shard
    monkeypatch.setattr(module, "scan_shard", lambda path: scanned.append(path.name) or real(path))
    shard = write_shard(tmp_path / "x-0.tar")
    first = build_index(tmp_path)
    again = build_index(tmp_path)
    assert scanned == ["x-0.tar"]
    assert again.fingerprint == first.fingerprint
    assert again.keys == first.keys
    assert np.array_equal(again.offsets, first.offsets)
    os.utime(shard, ns=(1, 1))
    build_index(tmp_path)
    build_index(tmp_path, reuse=False)
    assert len(scanned) == 3


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04 no zip", None])
def test_a_damaged_index_file_is_made_again(tmp_path: Path, damage: bytes | None) -> None:
    shard = write_shard(tmp_path / "x-0.tar")
    before = build_index(tmp_path).fingerprint
    target = index_file(shard, None)
    target.write_bytes(target.read_bytes()[:-200] if damage is None else damage)
    assert build_index(tmp_path).fingerprint == before
    assert target.stat().st_size > 500


def test_no_flipped_bit_of_an_index_file_is_more_than_a_reason_to_make_it_again(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "x-0.tar")
    before = build_index(tmp_path).fingerprint
    target = index_file(shard, None)
    sound = target.read_bytes()
    for place in range(0, len(sound), 41):
        damaged = bytearray(sound)
        damaged[place] ^= 1 << place % 8
        target.write_bytes(damaged)
        assert build_index(tmp_path).fingerprint == before


def test_an_index_file_that_points_outside_the_shard_is_made_again(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "x-0.tar")
    good = build_index(tmp_path)
    target = index_file(shard, None)
    with np.load(target) as archive:
        arrays = dict(archive)
    arrays["offsets"] = arrays["offsets"] + 10**9
    np.savez(target, **arrays)
    assert np.array_equal(build_index(tmp_path).offsets, good.offsets)


def test_an_index_file_with_a_pickle_is_not_unpickled(tmp_path: Path) -> None:
    marker = tmp_path / "executed"

    class Hostile:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (os.mkdir, (str(marker),))

    shard = write_shard(tmp_path / "x-0.tar")
    build_index(tmp_path)
    target = index_file(shard, None)
    np.savez(target, manifest=np.array([Hostile()], dtype=object))
    assert len(build_index(tmp_path)) == 4
    assert not marker.exists()


def test_index_dir_keeps_shards_of_two_folders_apart(tmp_path: Path) -> None:
    write_shard(tmp_path / "train" / "x-0.tar", 3)
    write_shard(tmp_path / "val" / "x-0.tar", 5)
    kept = tmp_path / "kept"
    assert len(build_index(tmp_path / "train", index_dir=kept)) == 3
    assert len(build_index(tmp_path / "val", index_dir=kept)) == 5
    assert len(list(kept.iterdir())) == 2
    assert not (tmp_path / "train" / ".distill-index").exists()


def test_a_folder_that_cannot_be_written_names_index_dir(tmp_path: Path) -> None:
    write_shard(tmp_path / "x-0.tar")
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="index_dir"):
        build_index(tmp_path, index_dir=tmp_path / "file" / "below")


def flip_header(data: bytearray) -> bytearray:
    """Damage the header of a member in the middle of the archive."""
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        header = archive.getmembers()[2].offset
    data[header + 10] ^= 0xFF
    return data


def cut_at_member(data: bytearray) -> bytearray:
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        return data[: archive.getmembers()[2].offset]


def cut_in_header(data: bytearray) -> bytearray:
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        return data[: archive.getmembers()[2].offset + 100]


def cut_in_payload(data: bytearray) -> bytearray:
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        return data[: archive.getmembers()[2].offset_data + 100]


def zero_header(data: bytearray) -> bytearray:
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        header = archive.getmembers()[2].offset
    data[header : header + 512] = bytes(512)
    return data


def append_garbage(data: bytearray) -> bytearray:
    return data + b"hidden"


def one_end_block(data: bytearray) -> bytearray:
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        archive.getmembers()
        return data[: archive.offset + 512]


@pytest.mark.parametrize(
    "fault", [flip_header, cut_at_member, cut_in_header, cut_in_payload, zero_header, append_garbage, one_end_block]
)
def test_a_damaged_tar_is_an_error_and_never_a_short_shard(
    tmp_path: Path, fault: Callable[[bytearray], bytearray]
) -> None:
    shard = write_shard(tmp_path / "x-0.tar", 6)
    shard.write_bytes(fault(bytearray(shard.read_bytes())))
    with pytest.raises(DataError, match=r"x-0\.tar is (truncated|damaged)"):
        build_index(tmp_path)
    assert not list((tmp_path / ".distill-index").iterdir())


@pytest.mark.parametrize("at", [0, 100, 300])
def test_a_damaged_first_header_is_an_error(tmp_path: Path, at: int) -> None:
    shard = write_shard(tmp_path / "x-0.tar")
    data = bytearray(shard.read_bytes())
    data[at] ^= 0xFF
    shard.write_bytes(data)
    with pytest.raises(DataError, match="x-0.tar"):
        build_index(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"short", "is truncated"),
        (b"no tar at all" * 200, "no tar"),
        (bytes(10240), "holds no sample"),
        (gzip.compress(bytes(10**7)), "gzip-compressed"),
        (b"PK\x03\x04" + bytes(2000), "zip-compressed"),
    ],
)
def test_a_file_that_is_no_plain_tar_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "x-0.tar").write_bytes(content)
    with pytest.raises(DataError, match=message):
        build_index(tmp_path)


@pytest.mark.parametrize(
    ("name", "attributes", "message"),
    [
        ("/etc/passwd.txt", {}, "unsafe name"),
        ("../up.jpg", {}, "unsafe name"),
        ("a\\b.jpg", {}, "unsafe name"),
        ("new\nline.jpg", {}, "unsafe name"),
        ("code.pyd", {}, "allowed extension"),
        ("code.pth", {}, "allowed extension"),
        ("array.npy", {}, "allowed extension"),
        ("two.seg.png", {}, "allowed extension"),
        (".jpg", {}, "allowed extension"),
        ("link.jpg", {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}, "no regular file"),
        ("link.jpg", {"type": tarfile.LNKTYPE, "linkname": "000.jpg"}, "no regular file"),
        ("device.jpg", {"type": tarfile.CHRTYPE}, "no regular file"),
        ("000.jpg", {}, "occurs twice"),
        ("000.png", {}, "has 2 images"),
        ("alone.txt", {}, "has 0 images"),
        ("bad\udcff.jpg", {}, "not UTF-8"),
    ],
)
def test_members_that_are_not_allowed_are_named(
    tmp_path: Path, name: str, attributes: dict[str, object], message: str
) -> None:
    with tarfile.open(tmp_path / "x-0.tar", "w", format=tarfile.GNU_FORMAT) as archive:
        add_member(archive, "000.jpg", encoded())
        add_member(archive, name, **attributes)
    with pytest.raises(DataError, match=message):
        build_index(tmp_path)


def test_a_member_that_announces_too_much_is_refused_unread(tmp_path: Path) -> None:
    shard = tmp_path / "x-0.tar"
    with shard.open("wb") as file:
        info = tarfile.TarInfo("big.jpg")
        info.size = 300 << 20
        file.write(info.tobuf())
        file.truncate(512 + info.size + 1024)
    with pytest.raises(DataError, match="314,572,800 bytes"):
        build_index(tmp_path)


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.XGLTYPE])
def test_a_header_that_announces_too_much_is_refused_unread(tmp_path: Path, kind: bytes) -> None:
    with (tmp_path / "x-0.tar").open("wb") as file:
        info = tarfile.TarInfo("header")
        info.size, info.type = 1 << 30, kind
        file.write(info.tobuf())
        file.truncate((1 << 30) + 2048)
    with pytest.raises(DataError, match="a header of 1,073,74"):
        build_index(tmp_path)


def test_long_and_foreign_names_are_read(tmp_path: Path) -> None:
    names = ["k" * 200, "größe-数据", "a/" * 60 + "z"]
    for number, kind in enumerate((tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)):
        with tarfile.open(tmp_path / f"x-{number}.tar", "w", format=kind) as archive:
            for name in names:
                add_member(archive, f"{name}.jpg", encoded())
    assert build_index(tmp_path).keys == names * 2


def test_a_class_name_of_thousands_of_digits_is_a_name(tmp_path: Path) -> None:
    write_shard(tmp_path / "x-0.tar", 2, json=lambda n: {"label": "9" * 5000 if n else "cat"})
    assert build_index(tmp_path).label_names == ("9" * 5000, "cat")


def test_shards_whose_names_tell_no_domain_in_common_are_refused(tmp_path: Path) -> None:
    for number in range(1001):
        (tmp_path / f"{number}-x.tar").touch()
    with pytest.raises(DataError, match="1,001 domains"):
        find_shards(tmp_path)


def test_folders_in_a_tar_are_part_of_the_key(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x-0.tar", "w") as archive:
        add_member(archive, "a", type=tarfile.DIRTYPE)
        for folder in "ab":
            add_member(archive, f"{folder}/0.JPG", encoded())
    assert build_index(tmp_path).keys == ["a/0", "b/0"]


@pytest.mark.parametrize(
    ("extension", "content", "message"),
    [
        ("cls", b"-1", "no class number"),
        ("cls", b"cat", "no class number"),
        ("cls", b"1" * 40, "no class number"),
        ("json", b"{", "no valid JSON"),
        ("json", b"[1]", "must be an object"),
        ("json", b"[" * 100_000, "no valid JSON"),
        ("json", b'{"label": 3}', "must be text"),
        ("json", b'{"label": "\xff"}', "no valid JSON"),
        ("json", b" " * (5 << 20), "bytes; 4,194,304 are allowed"),
    ],
)
def test_labels_that_cannot_be_read_are_named(tmp_path: Path, extension: str, content: bytes, message: str) -> None:
    with tarfile.open(tmp_path / "x-0.tar", "w") as archive:
        add_member(archive, "000.jpg", encoded())
        add_member(archive, f"000.{extension}", content)
    with pytest.raises(DataError, match=message):
        build_index(tmp_path)


def test_an_image_without_a_readable_header_is_indexed_as_unreadable(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with tarfile.open(tmp_path / "x-0.tar", "w") as archive:
        add_member(archive, "000.jpg", encoded())
        add_member(archive, "001.jpg", b"no image")
    index = build_index(tmp_path)
    assert index.widths.tolist() == [20, 0]
    index_verb(str(tmp_path))
    printed = capsys.readouterr().out
    assert index.fingerprint in printed
    assert printed.splitlines()[3].split()[:4] == ["x", "1", "2", "1"]


def test_domain_ids_follow_another_list_of_names(tmp_path: Path) -> None:
    write_shard(tmp_path / "b-0.tar", 2)
    write_shard(tmp_path / "a-0.tar", 1)
    index = build_index(tmp_path).with_domains(("b", "z", "a"))
    assert index.domain_ids.tolist() == [2, 0, 0]
    assert index.rows_of("b").tolist() == [1, 2]
    with pytest.raises(DataError, match="no domain 'z'"):
        index.rows_of("z")
    with pytest.raises(DataError, match="not among"):
        index.with_domains(("a",))


@pytest.mark.slow
def test_indexing_needs_neither_torch_nor_lightning(tmp_path: Path) -> None:
    write_shard(tmp_path / "x-0.tar")
    code = (
        "import sys; from distill.data.index import build_index; build_index(sys.argv[1]);"
        "sys.exit(any(name in sys.modules for name in ('torch', 'lightning', 'grain')))"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False).returncode == 0


def break_shard(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:600])


def test_bad_shards_do_not_keep_the_others_from_being_indexed_and_are_all_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(5):
        write_shard(tmp_path / f"x-{number}.tar")
    for number in (1, 3):
        break_shard(tmp_path / f"x-{number}.tar")
    with pytest.raises(SystemExit) as ended:
        main(["index", str(tmp_path), f"--json={tmp_path / 'out' / 'summary.json'}"])
    assert ended.value.code == 1
    printed = capsys.readouterr()
    assert "2 of 5 shards cannot be used" in printed.err
    assert "x-1.tar is truncated" in printed.err
    assert "x-3.tar is truncated" in printed.err
    assert "fingerprint" not in printed.out
    assert len(list((tmp_path / ".distill-index").iterdir())) == 3
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["all"]["samples"] == 12
    assert [Path(entry["shard"]).name for entry in summary["bad_shards"]] == ["x-1.tar", "x-3.tar"]
    assert summary["fingerprint"] is None
    with pytest.raises(DataError, match="2 of 5 shards cannot be used"):
        build_index(tmp_path)


def test_a_dataset_of_bad_shards_only_is_an_error(tmp_path: Path) -> None:
    break_shard(write_shard(tmp_path / "x-0.tar"))
    with pytest.raises(DataError, match="x-0.tar is truncated"):
        index_verb(str(tmp_path))


def test_the_summary_tells_sizes_ratios_labels_and_bad_headers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with tarfile.open(tmp_path / "a-0.tar", "w") as archive:
        for number, size in enumerate([(10, 20), (20, 20), (40, 20)]):
            add_member(archive, f"{number}.jpg", encoded(size=size))
        add_member(archive, "3.jpg", b"no image")
    write_shard(tmp_path / "b-0.tar", 4, cls=lambda n: n % 2)
    index_verb(str(tmp_path), json=tmp_path / "summary.json")
    summary = json.loads((tmp_path / "summary.json").read_text())
    first, second = summary["domains"]["a"], summary["domains"]["b"]
    assert (first["samples"], first["bad_headers"], first["labelled"]) == (4, 1, 0)
    assert (first["median_px"], first["width_px"], first["height_px"]) == ([20, 20], [10, 40], [20, 20])
    assert first["aspect_ratio"]["q50"] == 1.0
    assert first["aspect_ratio"]["q05"] < 0.6 < 1.8 < first["aspect_ratio"]["q95"]
    assert (second["labelled"], second["classes"]) == (4, 2)
    assert summary["all"]["samples"] == 8
    assert summary["fingerprint"] == build_index(tmp_path).fingerprint
    printed = capsys.readouterr().out
    assert "10 to 40" in printed
    assert "aspect ratio" in printed


@pytest.mark.slow
def test_shards_are_indexed_by_several_processes_to_the_same_index(tmp_path: Path) -> None:
    for number in range(6):
        write_shard(tmp_path / "a" / f"x-{number}.tar", 3, cls=lambda n: n)
    break_shard(write_shard(tmp_path / "b" / "x-6.tar"))
    alone = build_index(tmp_path / "a", index_dir=tmp_path / "alone", num_workers=0)
    together = build_index(tmp_path / "a", index_dir=tmp_path / "together", num_workers=2)
    assert together.fingerprint == alone.fingerprint
    assert together.keys == alone.keys
    spec = {"x": [str(tmp_path / "a"), str(tmp_path / "b")]}
    with pytest.raises(DataError, match="x-6.tar is truncated"):
        build_index(spec, index_dir=tmp_path / "third", num_workers=2)
    assert len(list((tmp_path / "third").iterdir())) == 6


def test_the_index_verb_takes_a_mapping_from_domain_to_pattern(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(2):
        write_shard(tmp_path / f"0000{number}.tar")
    main(["index", '{web: "' + str(tmp_path / "*.tar") + '"}'])
    assert capsys.readouterr().out.splitlines()[3].split()[:3] == ["web", "2", "8"]
    main(["index", '{web: ["' + str(tmp_path / "00000.tar") + '"]}'])
    assert capsys.readouterr().out.splitlines()[3].split()[:3] == ["web", "1", "4"]


def test_a_number_of_workers_below_zero_is_refused(tmp_path: Path) -> None:
    write_shard(tmp_path / "x-0.tar")
    with pytest.raises(ConfigError, match="num_workers is -1"):
        build_index(tmp_path, num_workers=-1)


@pytest.mark.slow
def test_an_indexing_that_was_killed_goes_on_where_it_was_and_leaves_no_process(tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    for number in range(60):
        write_shard(shards / f"x-{number:02d}.tar", 100)
    command = [sys.executable, "-m", "distill", "index", str(shards), "--num_workers=2"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    folder = shards / ".distill-index"
    wait_until(lambda: folder.exists() and len(list(folder.glob("x-*.npz"))) >= 3)
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(workers) >= 2
    process.kill()
    process.wait()
    wait_until(lambda: not any(is_running(worker) for worker in workers))
    made = {path: path.stat().st_mtime_ns for path in folder.glob("x-*.npz")}
    assert 3 <= len(made) < 60
    assert len(build_index(shards, num_workers=0)) == 6000
    assert {path: path.stat().st_mtime_ns for path in made} == made


def is_running(process: str) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition: Callable[[], bool], limit_s: float = 120) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
