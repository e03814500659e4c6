"""Every kind of source gives its rows, and what cannot be used is named."""

from __future__ import annotations

import csv
import errno
import json
import os
import tarfile
from collections import Counter
from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from distill.data.index import build_index
from distill.data.pack import pack
from distill.data.tar_members import read_members
from distill.errors import ConfigError, DataError

FIXTURES = Path(__file__).resolve().parents[1] / "data"


def encoded(color: int = 0, kind: str = "JPEG", size: tuple[int, int] = (20, 12)) -> bytes:
    buffer = BytesIO()
    Image.new("RGB", size, (color % 256, 100, 200)).save(buffer, kind)
    return buffer.getvalue()


def write_images(folder: Path, names: Sequence[str]) -> Path:
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(encoded(20 * number, "PNG" if name.endswith("png") else "JPEG"))
    return folder


def write_csv(path: Path, header: Sequence[str], *rows: Sequence[str]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def packed(source: Path, out: Path, **options: Any) -> dict[str, dict[str, Any]]:
    """Pack in this process and return what each sample's JSON says, with its image's bytes and domain, by key."""
    pack(str(source), out, num_workers=1, **{"domain": "d", **options})
    samples: dict[str, dict[str, Any]] = {}
    for shard in sorted(out.glob("*.tar")):
        data = shard.read_bytes()
        with shard.open("rb") as file:
            for member in read_members(file, str(shard)):
                content = data[member.offset : member.offset + member.size]
                sample = samples.setdefault(member.key, {"domain": shard.name.rpartition("-")[0]})
                sample.update(json.loads(content) if member.extension == "json" else {member.extension: content})
    return samples


def reasons(out: Path) -> dict[str, str]:
    lines = (out / "quarantine.jsonl").read_text().splitlines()
    return {entry["source"]: entry["reason"] for entry in map(json.loads, lines)}


def test_a_folder_gives_its_images_with_the_first_sub_folder_as_label(tmp_path: Path) -> None:
    source = write_images(tmp_path / "in", ["cat/b.jpg", "cat/deep/a.png", "dog/a.jpg", "loose.jpg"])
    samples = packed(source, tmp_path / "out")
    assert list(samples) == ["cat/b", "cat/deep/a", "dog/a", "loose"]
    assert [sample.get("label") for sample in samples.values()] == ["cat", "cat", "dog", None]
    assert samples["cat/deep/a"]["png"] == (source / "cat/deep/a.png").read_bytes()
    assert samples["loose"]["source"] == "loose.jpg"
    unlabelled = packed(source, tmp_path / "unlabelled", folder_labels=False)
    assert not any("label" in sample for sample in unlabelled.values())


def test_files_that_are_no_images_are_passed_over_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_images(tmp_path / "in", ["a.jpg", "no_ending"])
    for name in ("notes.txt", "labels.csv", ".hidden.jpg"):
        (source / name).write_bytes(b"x")
    assert set(packed(source, tmp_path / "out")) == {"a", "no_ending"}
    assert "planned 2 = packed 2" in capsys.readouterr().out


def test_a_csv_list_names_label_group_and_domain(tmp_path: Path) -> None:
    write_images(tmp_path, ["x/1.jpg", "x/2.jpg", "x/3.jpg"])
    listed = write_csv(
        tmp_path / "list.csv",
        ("path", "label", "group", "domain"),
        ("x/1.jpg", "007", "doc 1", "ocr"),
        ("x/2.jpg", "", "", ""),
        ("x/3.jpg", "b", "doc 1", "chart"),
    )
    samples = packed(listed, tmp_path / "out", domain="natural")
    facts = {key: (s["domain"], s.get("label"), s.get("group")) for key, s in samples.items()}
    assert facts == {"x/1": ("ocr", "007", "doc 1"), "x/2": ("natural", None, None), "x/3": ("chart", "b", "doc 1")}


def test_a_list_of_paths_starts_from_the_root_given(tmp_path: Path) -> None:
    write_images(tmp_path / "photos", ["1.jpg"])
    listed = write_csv(tmp_path / "list.csv", ("path",), ("1.jpg",))
    assert list(packed(listed, tmp_path / "out", root=tmp_path / "photos")) == ["1"]


@pytest.mark.parametrize("as_structure", [False, True])
def test_a_parquet_list_holds_bytes(tmp_path: Path, as_structure: bool) -> None:
    images = [encoded(9 * number) for number in range(7)]
    cells = [{"bytes": image, "path": "x.jpg"} for image in images] if as_structure else images
    table = pa.table({"bytes": cells, "label": list(range(7)), "key": [f"k{number}" for number in range(7)]})
    pq.write_table(table, tmp_path / "list.parquet", row_group_size=3)
    samples = packed(tmp_path / "list.parquet", tmp_path / "out")
    assert [sample["jpg"] for sample in samples.values()] == images
    assert [(key, sample["label"]) for key, sample in samples.items()] == [(f"k{n}", str(n)) for n in range(7)]


def test_whole_numbers_that_pandas_made_floats_are_class_numbers_again(tmp_path: Path) -> None:
    write_images(tmp_path, ["1.jpg", "2.jpg"])
    pq.write_table(pa.table({"path": ["1.jpg", "2.jpg"], "label": [3.0, None]}), tmp_path / "list.parquet")
    assert [sample.get("label") for sample in packed(tmp_path / "list.parquet", tmp_path / "out").values()] == [
        "3",
        None,
    ]


@pytest.mark.parametrize("form", ["arrow", "parquet"])
def test_a_hugging_face_dataset_gives_its_class_names(tmp_path: Path, form: str) -> None:
    samples = packed(FIXTURES / "huggingface" / form, tmp_path / "out", columns={"group": "writer"})
    assert [(s["label"], s["group"]) for s in samples.values()] == [
        ("cat", "w0"), ("dog", "w0"), ("cat", "w1"), ("dog", "w1"), ("cat", "w2"), ("dog", "w2")
    ]  # fmt: skip
    assert len({sample["sha256"] for sample in samples.values()}) == 6


def test_both_forms_of_a_hugging_face_dataset_hold_the_same_images(tmp_path: Path) -> None:
    forms = [packed(FIXTURES / "huggingface" / form, tmp_path / form) for form in ("arrow", "parquet")]
    first, second = ([sample["jpg"] for sample in form.values()] for form in forms)
    assert first == second


def test_an_image_kept_as_a_path_alone_is_quarantined(tmp_path: Path) -> None:
    images = [{"bytes": encoded(1), "path": None}, {"bytes": None, "path": "/etc/hostname"}]
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table({"image": images}), tmp_path / "in" / "train.parquet")
    assert len(packed(tmp_path / "in", tmp_path / "out")) == 1
    assert reasons(tmp_path / "out") == {
        "train.parquet: row 1": "the row holds no bytes (a path alone is not followed)"
    }


def test_splits_of_a_saved_dataset_must_be_named(tmp_path: Path) -> None:
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(DataError, match="holds the splits train, test; name one"):
        packed(tmp_path, tmp_path.parent / "out")


def test_splits_of_a_hub_folder_are_not_mixed(tmp_path: Path) -> None:
    data = (FIXTURES / "huggingface" / "parquet" / "train-00000-of-00001.parquet").read_bytes()
    (tmp_path / "in" / "data").mkdir(parents=True)
    for split in ("test", "train"):
        (tmp_path / "in" / "data" / f"{split}-00000-of-00001.parquet").write_bytes(data)
    with pytest.raises(DataError, match=r"several splits: data/test, data/train; name one by a pattern"):
        packed(tmp_path / "in", tmp_path / "out")
    samples = packed(tmp_path / "in" / "data" / "train-*.parquet", tmp_path / "out")
    assert [sample["label"] for sample in samples.values()] == ["cat", "dog"] * 3
    assert all(sample["source"].startswith("train-") for sample in samples.values())


def test_a_column_missing_from_a_later_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    image = [{"bytes": encoded(1), "path": "x"}]
    pq.write_table(pa.table({"image": image, "label": ["a"]}), tmp_path / "in" / "a.parquet")
    pq.write_table(pa.table({"image": image}), tmp_path / "in" / "b.parquet")
    with pytest.raises(DataError, match=r"b\.parquet cannot be read"):
        packed(tmp_path / "in", tmp_path / "out")


def test_storage_that_fails_is_no_bad_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_images(tmp_path / "in", ["a.jpg", "b.jpg"])
    read_bytes = Path.read_bytes

    def fail(path: Path) -> bytes:
        if path.name == "b.jpg":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read_bytes(path)

    # A failing disk cannot be had here.
    monkeypatch.setattr(Path, "read_bytes", fail)
    with pytest.raises(DataError, match=r"b\.jpg cannot be read: Input/output error"):
        packed(source, tmp_path / "out")


def test_img2dataset_output_is_packed_and_its_failures_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    samples = packed(FIXTURES / "img2dataset", tmp_path / "out")
    assert Counter(sample["label"] for sample in samples.values()) == {"even": 5, "odd": 5}
    assert "planned 12 = packed 10 + duplicates 1 + quarantined 1" in capsys.readouterr().out
    missing = {"http://127.0.0.1:8765/missing.jpg": "img2dataset, failed_to_download: HTTP Error 404: File not found"}
    assert reasons(tmp_path / "out") == missing


def test_img2dataset_output_is_indexed_as_it_is(tmp_path: Path) -> None:
    index = build_index({"web": str(FIXTURES / "img2dataset")}, index_dir=tmp_path)
    assert (index.domains, len(index), index.label_names) == (("web",), 11, ("even", "odd"))


def test_a_sample_that_the_metadata_promises_and_the_tar_lacks_is_told(tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    (source / "00000.tar").write_bytes((FIXTURES / "img2dataset" / "00000.tar").read_bytes())
    (source / "00000.parquet").write_bytes((FIXTURES / "img2dataset" / "00001.parquet").read_bytes())
    packed(source, tmp_path / "out")
    assert Counter("the tar does not hold it" in reason for reason in reasons(tmp_path / "out").values())[True] == 5


def test_a_damaged_tar_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    original = FIXTURES / "img2dataset" / "00000.tar"
    with tarfile.open(original) as archive:
        header = archive.getmembers()[4].offset_data - 512
    data = bytearray(original.read_bytes())
    data[header] ^= 0xFF
    (source / "00000.tar").write_bytes(data)
    with pytest.raises(DataError, match=r"00000\.tar"):
        packed(source, tmp_path / "out")


def test_an_unknown_column_is_refused_and_the_way_out_works(tmp_path: Path) -> None:
    write_images(tmp_path, ["1.jpg"])
    listed = write_csv(tmp_path / "list.csv", ("file", "lable", "url"), ("1.jpg", "cat", "u"))
    with pytest.raises(ConfigError, match="unknown column.* file, lable, url; known are path, bytes"):
        packed(listed, tmp_path / "out")
    samples = packed(listed, tmp_path / "out", columns={"path": "file", "label": "lable"})
    assert samples["1"]["label"] == "cat"


@pytest.mark.parametrize(
    ("header", "columns", "message"),
    [
        (("label",), None, "exactly one of path and bytes"),
        (("path", "path"), None, "names the column 'path' twice"),
        (("bytes",), None, "holds no bytes"),
        (("file",), {"path": "name"}, "--columns.path is 'name', and .* has no such column: file"),
        (("file",), {"image": "file"}, "--columns.image is unknown here; known are path"),
    ],
)
def test_columns_that_do_not_fit_are_named(
    tmp_path: Path, header: Sequence[str], columns: dict[str, str] | None, message: str
) -> None:
    listed = write_csv(tmp_path / "list.csv", header, ["x"] * len(header))
    with pytest.raises(ConfigError, match=message):
        packed(listed, tmp_path / "out", columns=columns)


def _no_file(root: Path) -> str:
    return "gone.jpg"


def _url(root: Path) -> str:
    return "https://example.org/a.jpg"


def _outside(root: Path) -> str:
    return "../outside.jpg"


def _absolute(root: Path) -> str:
    return str(root.parent / "outside.jpg")


def _link_outside(root: Path) -> str:
    (root / "link.jpg").symlink_to(root.parent / "outside.jpg")
    return "link.jpg"


def _folder_link_outside(root: Path) -> str:
    (root / "folder").symlink_to(root.parent)
    return "folder/outside.jpg"


def _pipe(root: Path) -> str:
    os.mkfifo(root / "pipe.jpg")
    return "pipe.jpg"


def _loop(root: Path) -> str:
    (root / "loop.jpg").symlink_to(root / "loop.jpg")
    return "loop.jpg"


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (_no_file, "does not exist"),
        (_url, "is a URL"),
        (_outside, "leads out of the source folder"),
        (_absolute, "leads out of the source folder"),
        (_link_outside, "leads out of the source folder"),
        (_folder_link_outside, "leads out of the source folder"),
        (_pipe, "no regular file"),
        (_loop, "cannot be re"),
    ],
)
def test_a_path_that_must_not_be_read_is_quarantined_by_name(
    tmp_path: Path, make: Callable[[Path], str], reason: str
) -> None:
    root = write_images(tmp_path / "in", ["good.jpg"])
    (tmp_path / "outside.jpg").write_bytes(encoded(77))
    name = make(root)
    listed = write_csv(root / "list.csv", ("path",), ("good.jpg",), (name,))
    assert list(packed(listed, tmp_path / "out")) == ["good"]
    assert list(reasons(tmp_path / "out")) == [name]
    assert reason in reasons(tmp_path / "out")[name]


def test_links_in_a_folder_do_not_lead_out_of_it(tmp_path: Path) -> None:
    root = write_images(tmp_path / "in", ["a/good.jpg"])
    write_images(tmp_path / "secret", ["s.jpg"])
    _link_outside(root)
    (root / "folder.jpg").symlink_to(tmp_path / "secret")
    (root / "inside.jpg").symlink_to("a/good.jpg")
    (tmp_path / "outside.jpg").write_bytes(encoded(78))
    samples = packed(root, tmp_path / "out")
    assert list(samples) == ["a/good"]
    assert set(reasons(tmp_path / "out")) == {"link.jpg", "folder.jpg"}
    # A link that stays inside is a file like any other; here, a duplicate.
    assert "inside.jpg" in (tmp_path / "out" / "duplicates.jsonl").read_text()


def test_a_tar_that_is_a_link_out_of_the_source_is_refused(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "00000.tar").symlink_to(FIXTURES / "img2dataset" / "00000.tar")
    with pytest.raises(DataError, match="leads out of the source folder"):
        packed(tmp_path / "in", tmp_path / "out")


def test_a_name_that_is_not_utf8_is_quarantined(tmp_path: Path) -> None:
    root = write_images(tmp_path / "in", ["good.jpg", "größe.jpg"])
    Path(os.fsdecode(os.fsencode(root) + b"/bad\xff.jpg")).write_bytes(encoded(5))
    assert list(packed(root, tmp_path / "out")) == ["good", "größe"]
    assert reasons(tmp_path / "out") == {"bad\\xff.jpg": "its name is not UTF-8; rename the file"}


def test_a_list_that_is_not_utf8_or_has_ragged_lines_is_told(tmp_path: Path) -> None:
    write_images(tmp_path, ["1.jpg"])
    (tmp_path / "list.csv").write_bytes(b"path,label\n1.jpg,cat\n2.jpg\n")
    assert len(packed(tmp_path / "list.csv", tmp_path / "out")) == 1
    assert "the line has 1 fields; the first line names 2" in str(reasons(tmp_path / "out"))
    (tmp_path / "latin.csv").write_bytes(b"path\n\xff.jpg\n")
    with pytest.raises(DataError, match="CSV in UTF-8"):
        packed(tmp_path / "latin.csv", tmp_path / "out2")


def test_a_damaged_table_is_refused(tmp_path: Path) -> None:
    (tmp_path / "list.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(DataError, match=r"list\.parquet cannot be read"):
        packed(tmp_path / "list.parquet", tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("s3://bucket/x", {}, ConfigError, "must be a local or mounted path"),
        ("in", {"domain": None}, ConfigError, "does not say its images' domain"),
        ("in", {"domain": "a/b"}, ConfigError, "--domain is 'a/b'"),
        ("in", {"root": Path()}, ConfigError, "--root goes with a list"),
        ("in", {"columns": {"label": "x"}}, ConfigError, "--columns goes with"),
        ("in", {"images_per_shard": 0}, ConfigError, "--images_per_shard is 0"),
        ("nothing", {}, DataError, "There is no"),
        ("in/a.txt", {}, DataError, "is no folder"),
    ],
)
def test_wrong_words_are_refused(
    tmp_path: Path, name: str, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    write_images(tmp_path / "in", ["a.jpg"])
    (tmp_path / "in" / "a.txt").write_text("x")
    source = name if "://" in name else str(tmp_path / name)
    with pytest.raises(error, match=message):
        pack(source, tmp_path / "out", **{"domain": "d", "num_workers": 1, **options})
