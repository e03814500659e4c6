"""`--data`: folders, tables, clip_benchmark's layout and torchvision's sets become one kind of probe set, or errors."""

from __future__ import annotations

import csv
import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from distill.errors import ConfigError, DataError
from distill.probe.cohort import choose_cohort
from distill.probe.feature_records import Features
from distill.probe.probe_set import ProbeSet, open_probe_set

SIZE = 16


def png(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((20, 24, 3), value, dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def write(root: Path, *names: str) -> None:
    for value, name in enumerate(names):
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(png(value))


def labels_of(data: ProbeSet) -> list[str]:
    return [data.label_names[label] if label >= 0 else "" for label in data.labels.tolist()]


def test_an_image_folder_has_the_classes_of_its_folders(tmp_path: Path) -> None:
    write(tmp_path, "cat/a.png", "cat/deep/b.png", "dog/c.png", "dog/.hidden/notes.txt")
    data = open_probe_set(str(tmp_path), SIZE)
    assert (labels_of(data), data.is_test, data.domains) == (["cat", "cat", "dog"], None, (tmp_path.name,))
    item = data[2]
    assert (item["image"].shape, item["image"].dtype, item["row"]) == ((3, SIZE, SIZE), torch.uint8, 2)
    assert int(item["image"].max()) == 2


def test_train_and_test_folders_are_a_fixed_split_that_is_respected(tmp_path: Path) -> None:
    write(tmp_path, *(f"train/{name}/{at}.png" for name in ("cat", "dog") for at in range(6)))
    write(tmp_path, *(f"val/{name}/{at}.png" for name in ("cat", "dog") for at in range(3)))
    data = open_probe_set(str(tmp_path), SIZE)
    assert data.is_test is not None
    rows = torch.arange(len(data))
    labels, domains = torch.from_numpy(data.labels), torch.from_numpy(data.domain_ids)
    features = Features(labels, domains, rows, {-1: torch.zeros(len(data), 1)}, {-1: {}})
    from rich.console import Console

    for seed in range(3):
        split = choose_cohort(features, data, seed, Console(quiet=True)).split
        assert split.test.tolist() == np.flatnonzero(data.is_test).tolist()
        assert sorted([*split.fit, *split.select]) == np.flatnonzero(~data.is_test).tolist()
        assert set(data.labels[split.select]) == set(data.labels[split.fit]) == {0, 1}


def test_the_fingerprint_follows_content_and_labels_but_not_the_place(tmp_path: Path) -> None:
    prints = []
    for name in ("one", "two"):
        write(tmp_path / name, "cat/a.png", "dog/b.png")
        prints.append(open_probe_set(str(tmp_path / name), SIZE).fingerprint)
    assert prints[0] == prints[1]
    (tmp_path / "two" / "dog" / "b.png").write_bytes(png(9))
    assert open_probe_set(str(tmp_path / "two"), SIZE).fingerprint != prints[0]
    (tmp_path / "one" / "dog").rename(tmp_path / "one" / "fox")
    assert open_probe_set(str(tmp_path / "one"), SIZE).fingerprint != prints[0]


def table(path: Path, fields: list[str], rows: list[list[str]]) -> str:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([fields, *rows])
    return str(path)


def test_a_csv_names_labels_groups_domains_and_a_split(tmp_path: Path) -> None:
    write(tmp_path, "a.png", "b.png", "c.png")
    rows = [["a.png", "10", "p", "x", "train"], ["b.png", "9", "q", "y", "train"], ["c.png", "", "", "x", "test"]]
    data = open_probe_set(table(tmp_path / "t.csv", ["path", "label", "group", "domain", "split"], rows), SIZE)
    assert labels_of(data) == ["10", "9", ""]
    assert data.label_names == ("9", "10")
    assert (data.groups, data.domains, data.domain_ids.tolist()) == (("p", "q", ""), ("x", "y"), [0, 1, 0])
    assert data.is_test is not None
    assert data.is_test.tolist() == [False, False, True]
    assert data.rows_of(["x"]) == [0, 2]
    with pytest.raises(ConfigError, match="--domains z not in the data; it has x, y"):
        data.rows_of(["z"])


@pytest.mark.parametrize(
    ("fields", "rows", "message"),
    [
        (["path", "class"], [["a.png", "x"]], "lacks the column\\(s\\) label; it has path, class"),
        (["path", "label"], [["gone.png", "x"]], "line 2: there is no file 'gone.png'"),
        (["path", "label"], [["a.png", "x"], ["a.png", "y"]], "twice"),
        (["path", "label", "split"], [["a.png", "x", "train"], ["b.png", "x", ""]], "some images have a split"),
        (["path", "label", "split"], [["a.png", "x", "dev"]], "split is 'dev'"),
        (["path", "label", "split"], [["a.png", "x", "test"]], "its train part is empty"),
        (
            ["path", "label", "group", "split"],
            [["a.png", "x", "g", "train"], ["b.png", "x", "g", "test"]],
            "the group 'g' is in the train and in the test part",
        ),
        (["path", "label"], [], "holds no image"),
    ],
)
def test_a_table_that_cannot_be_used_is_refused_by_its_line(
    tmp_path: Path, fields: list[str], rows: list[list[str]], message: str
) -> None:
    write(tmp_path, "a.png", "b.png")
    with pytest.raises(DataError, match=message):
        open_probe_set(table(tmp_path / "t.csv", fields, rows), SIZE)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda root: (root / "owl").mkdir(), "class folder owl holds no image"),
        (lambda root: write(root, "loose.png"), "loose.png and 0 more image\\(s\\) lie beside class folders"),
        (
            lambda root: write(root, "train/cat/a.png", "train/dog/b.png", "test/cat/c.png"),
            "'dog' is in one only",
        ),
    ],
)
def test_a_folder_that_cannot_be_used_is_refused(tmp_path: Path, spoil: Callable[[Path], None], message: str) -> None:
    if "one only" not in message:
        write(tmp_path, "cat/a.png", "dog/b.png")
    spoil(tmp_path)
    with pytest.raises(DataError, match=message):
        open_probe_set(str(tmp_path), SIZE)


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    write(tmp_path, "cat/a.png", "dog/b.png")
    (tmp_path / "dog" / "b.png").write_bytes(png(1)[:40])
    data = open_probe_set(str(tmp_path), SIZE)
    with pytest.raises(DataError, match=r"b\.png"):
        data[1]


def clip_benchmark_set(root: Path, *, classes: str = "cat\ndog\n", numbers: tuple[int, ...] = (0, 1)) -> Path:
    root.mkdir()
    (root / "classnames.txt").write_text(classes)
    value = 0
    for part, shards in (("train", 2), ("test", 1)):
        (root / part).mkdir()
        (root / part / "nshards.txt").write_text(str(shards))
        for shard in range(shards):
            with tarfile.open(root / part / f"{shard}.tar", "w") as tar:
                for number in numbers:
                    value += 1
                    for name, content in ((f"s{number}.png", png(value)), (f"s{number}.cls", str(number).encode())):
                        entry = tarfile.TarInfo(name)
                        entry.size = len(content)
                        tar.addfile(entry, io.BytesIO(content))
    return root


def test_clip_benchmarks_layout_keeps_its_test_part_and_class_names(tmp_path: Path) -> None:
    data = open_probe_set(str(clip_benchmark_set(tmp_path / "wds")), SIZE)
    assert data.is_test is not None
    assert (len(data), int(data.is_test.sum()), data.domains) == (6, 2, ("wds",))
    assert sorted(set(labels_of(data))) == ["cat", "dog"]
    row = int(np.flatnonzero(data.is_test)[0])
    assert int(data[row]["image"].max()) == 5  # the fifth image that was written is the first of the test shard
    assert labels_of(data)[row] == "cat"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda root: (root / "test" / "nshards.txt").write_text("3"), "holds 1 shard\\(s\\), but .* says 3"),
        (lambda root: (root / "classnames.txt").unlink(), "no classnames.txt"),
        (lambda root: (root / "classnames.txt").write_text("cat\ndog\nowl\n"), "1 class\\(es\\) have no image.*'owl'"),
        (lambda root: (root / "classnames.txt").write_text("cat\n"), "names 1 class"),
    ],
)
def test_a_layout_whose_files_disagree_is_refused(
    tmp_path: Path, spoil: Callable[[Path], object], message: str
) -> None:
    root = clip_benchmark_set(tmp_path / "wds")
    spoil(root)
    with pytest.raises(DataError, match=message):
        open_probe_set(str(root), SIZE)


def test_a_class_number_past_the_list_is_refused(tmp_path: Path) -> None:
    root = clip_benchmark_set(tmp_path / "wds", numbers=(0, 1, 7))
    with pytest.raises(DataError, match="the class '7'"):
        open_probe_set(str(root), SIZE)


def describable_textures(root: Path) -> str:
    """The files that torchvision's DTD reads, with two classes."""
    base = root / "dtd" / "dtd"
    (base / "labels").mkdir(parents=True)
    for part, numbers in (("train", range(3)), ("val", range(3, 4)), ("test", range(4, 6))):
        names = [f"{kind}/{kind}_{number}.jpg" for kind in ("banded", "dotted") for number in numbers]
        write(base / "images", *names)
        (base / "labels" / f"{part}1.txt").write_text("\n".join(names) + "\n")
    return f"torchvision:DTD:{root}"


def test_a_torchvision_set_keeps_its_parts_and_class_names(tmp_path: Path) -> None:
    spec = describable_textures(tmp_path)
    data = open_probe_set(spec, SIZE)
    assert data.is_test is not None
    assert (len(data), int(data.is_test.sum()), data.label_names) == (10, 4, ("banded", "dotted"))
    assert data.images.name_of(7) == f"{spec}, test, image 1"
    assert data[0]["image"].shape == (3, SIZE, SIZE)
    assert open_probe_set(spec, SIZE).fingerprint == data.fingerprint


def test_torchvision_sets_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    for spec in ("torchvision:Nothing:x", "torchvision:CIFAR10", "torchvision:CIFAR10:"):
        with pytest.raises(ConfigError, match="write torchvision:NAME:ROOT"):
            open_probe_set(spec, SIZE)
    with pytest.raises(DataError, match="Nothing is downloaded"):
        open_probe_set(f"torchvision:CIFAR10:{tmp_path}", SIZE)


def test_a_hugging_face_set_without_its_package_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(ConfigError, match="pip install datasets"):
        open_probe_set(f"hf:{tmp_path}", SIZE)


def test_a_hugging_face_set_on_disk_keeps_its_parts_groups_and_names(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="the package datasets is not installed")
    names = datasets.ClassLabel(names=["cat", "dog"])
    columns = datasets.Features({"image": datasets.Image(), "label": names, "group": datasets.Value("string")})

    def part(count: int, first: int) -> object:
        content = [{"bytes": png(first + at), "path": None} for at in range(count)]
        values = {"image": content, "label": [at % 2 for at in range(count)], "group": [f"g{first}"] * count}
        return datasets.Dataset.from_dict(values, features=columns)

    datasets.DatasetDict({"train": part(4, 0), "test": part(2, 10)}).save_to_disk(str(tmp_path / "set"))
    data = open_probe_set(f"hf:{tmp_path / 'set'}", SIZE)
    assert data.is_test is not None
    assert data.is_test.tolist() == [False] * 4 + [True] * 2
    assert labels_of(data) == ["cat", "dog"] * 3
    assert data.groups == ("g0",) * 4 + ("g10",) * 2
    assert int(data[5]["image"].max()) == 11
    with pytest.raises(DataError, match="is no data set on disk"):
        open_probe_set(f"hf:{tmp_path}", SIZE)
