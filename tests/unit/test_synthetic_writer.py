"""Generated shards: bytes that repeat, labels that balance, folders that are never overwritten."""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import io
import json
import os
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from distill.data.synthetic import ocr, synthesize, writer
from distill.data.synthetic.writer import label_names
from distill.errors import ConfigError, DataError

SMALL = {"img_size_px": 64}


def members(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as archive:
        found: dict[str, bytes] = {}
        for info in archive:
            file = archive.extractfile(info)
            assert file is not None
            found[info.name] = file.read()
        return found


def test_the_same_request_gives_the_same_bytes_for_any_worker_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "_CHUNK", 2)
    for name, workers in (("one", 1), ("two", 2)):
        synthesize(tmp_path / name, images_per_domain=5, seed=3, num_workers=workers, **SMALL)
    shards = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert shards == sorted(
        ["manifest.json", *(f"{domain}-000000.tar" for domain in ("natural", "ocr", "chart", "multidisciplinary"))]
    )
    for shard in shards:
        assert (tmp_path / "one" / shard).read_bytes() == (tmp_path / "two" / shard).read_bytes()


def test_a_smaller_request_gives_the_first_images_of_a_larger_one(tmp_path: Path) -> None:
    synthesize(tmp_path / "small", images_per_domain=3, domains=["multidisciplinary"], num_workers=1, **SMALL)
    synthesize(tmp_path / "large", images_per_domain=7, domains=["multidisciplinary"], num_workers=1, **SMALL)
    small = members(tmp_path / "small" / "multidisciplinary-000000.tar")
    large = members(tmp_path / "large" / "multidisciplinary-000000.tar")
    assert len(large) == 21
    assert all(large[name] == content for name, content in small.items())


def test_another_seed_or_split_gives_other_images(tmp_path: Path) -> None:
    digests: set[str] = set()
    for number, (seed, split) in enumerate(((0, "train"), (1, "train"), (0, "heldout"))):
        out = tmp_path / str(number)
        synthesize(out, split, 4, seed=seed, domains=("ocr",), num_workers=1, **SMALL)  # pyright: ignore
        images = [content for name, content in members(out / "ocr-000000.tar").items() if name.endswith(".jpg")]
        digests |= {hashlib.sha256(content).hexdigest() for content in images}
    assert len(digests) == 12


def test_samples_have_image_class_and_json_that_agree_and_labels_take_turns(tmp_path: Path) -> None:
    kinds = ocr.kinds("train")
    count = 2 * len(kinds)
    synthesize(tmp_path, images_per_domain=count, domains=["ocr"], num_workers=1, img_size_px=64)
    found = members(tmp_path / "ocr-000000.tar")
    labels: Counter[str] = Counter()
    for index in range(count):
        key = f"ocr-train-{index:06d}"
        with Image.open(io.BytesIO(found[key + ".jpg"])) as image:
            assert (image.format, image.size, image.mode) == ("JPEG", (64, 64), "RGB")
        facts = json.loads(found[key + ".json"])
        assert label_names()[int(found[key + ".cls"])] == facts["label"]
        labels[facts["label"]] += 1
    assert labels == {f"ocr/{kind}": 2 for kind in kinds}


def test_members_carry_no_time_and_no_owner(tmp_path: Path) -> None:
    synthesize(tmp_path, images_per_domain=1, domains=["natural"], num_workers=1, **SMALL)
    with tarfile.open(tmp_path / "natural-000000.tar") as archive:
        for info in archive:
            assert (info.mtime, info.uid, info.gid, info.uname, info.gname) == (0, 0, 0, "", "")


def test_a_domain_is_cut_into_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "SAMPLES_PER_SHARD", 4)
    synthesize(tmp_path, images_per_domain=10, domains=["natural"], num_workers=1, **SMALL)
    counts = [len(members(tmp_path / f"natural-{n:06d}.tar")) // 3 for n in range(3)]
    assert counts == [4, 4, 2]


def test_a_complete_folder_is_left_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    synthesize(tmp_path, images_per_domain=2, domains=["natural", "chart"], num_workers=1, **SMALL)
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    capsys.readouterr()
    synthesize(tmp_path, images_per_domain=2, domains=("chart", "natural"), num_workers=1, **SMALL)
    assert "already there" in " ".join(capsys.readouterr().out.split())  # a long path breaks the line
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


def test_an_unfinished_folder_of_the_same_request_is_finished(tmp_path: Path) -> None:
    def make(out: Path) -> None:
        synthesize(out, images_per_domain=2, domains=["natural"], num_workers=1, **SMALL)

    make(tmp_path / "whole")
    make(tmp_path / "cut")
    shard = tmp_path / "cut" / "natural-000000.tar"
    shard.write_bytes(shard.read_bytes()[:1000])
    make(tmp_path / "cut")
    assert shard.read_bytes() == (tmp_path / "whole" / "natural-000000.tar").read_bytes()


def test_an_interrupted_run_says_so_in_its_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(writer, "_draw_chunk", stop)
    with pytest.raises(KeyboardInterrupt):
        synthesize(tmp_path, images_per_domain=2, domains=["natural"], num_workers=1, **SMALL)
    assert json.loads((tmp_path / "manifest.json").read_text())["is_complete"] is False
    monkeypatch.undo()
    synthesize(tmp_path, images_per_domain=2, domains=["natural"], num_workers=1, **SMALL)
    assert json.loads((tmp_path / "manifest.json").read_text())["is_complete"] is True


def test_a_full_disk_is_reported_with_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(writer, "_add_member", full)
    with pytest.raises(DataError, match=r"No space left on device.*starts over"):
        synthesize(tmp_path, images_per_domain=1, domains=["natural"], num_workers=1, **SMALL)


def test_a_killed_drawing_process_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # `os._exit` stands in for the kernel's out-of-memory killer: the worker vanishes while it loads its work.
    monkeypatch.setattr(writer, "_Chunk", _Deadly)
    with pytest.raises(DataError, match="num_workers 1"):
        synthesize(tmp_path, images_per_domain=20, domains=["natural"], num_workers=2, **SMALL)


class _Deadly:
    def __init__(self, domain: str, split: str, start: int, stop: int, seed: int, size_px: int) -> None:
        self.domain, self.start, self.stop = domain, start, stop

    def __reduce__(self) -> tuple[object, tuple[int]]:
        return os._exit, (9,)


def test_a_folder_of_another_request_is_refused(tmp_path: Path) -> None:
    synthesize(tmp_path, images_per_domain=2, domains=["natural"], num_workers=1, **SMALL)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ConfigError, match="another request"):
        synthesize(tmp_path, images_per_domain=3, domains=["natural"], num_workers=1, **SMALL)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(ConfigError, match="not empty"):
        synthesize(tmp_path, images_per_domain=1, num_workers=1, **SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_file_as_out_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is a file"):
        synthesize(tmp_path / "file", images_per_domain=1, num_workers=1, **SMALL)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"split": "test"}, "train, heldout"),
        ({"images_per_domain": 0}, "at least 1"),
        ({"seed": -1}, "zero or positive"),
        ({"img_size_px": 8}, "64 to 2048"),
        ({"domains": ["charts"]}, "natural, ocr, chart, multidisciplinary"),
        ({"domains": []}, "natural, ocr, chart, multidisciplinary"),
        ({"domains": ["ocr", "ocr"]}, "at most once"),
        ({"num_workers": 0}, "num_workers"),
    ],
)
def test_an_impossible_argument_is_named_before_anything_is_written(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        synthesize(tmp_path / "out", **change)  # pyright: ignore
    assert not (tmp_path / "out").exists()


def test_a_missing_package_is_named_with_the_command_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(writer, "find_spec", lambda name: None if name == "matplotlib" else real(name))
    with pytest.raises(ConfigError, match=r"matplotlib.*pip install 'encoder-distill\[demo\]'"):
        synthesize(tmp_path, images_per_domain=1, domains=["chart"])


def test_importing_the_verb_loads_neither_matplotlib_nor_torch() -> None:
    code = (
        "import sys, distill.data.synthetic; "
        "print([m for m in ('matplotlib', 'skimage', 'sklearn', 'torch', 'lightning') if m in sys.modules])"
    )
    root = Path(writer.__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout.strip() == "[]"
