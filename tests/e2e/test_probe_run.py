"""`distill probe` on toy shards: a run whose student equals its teacher, beside an untrained initialisation."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

from distill import cli
from distill.checkpoint import build_encoder, read_weights
from distill.errors import ConfigError, DataError
from distill.probe.run import probe
from distill.probe.rung import ratio_of_sums

SIZE = 64
CLASSES = {"natural": ("wide", "narrow", "dots"), "chart": ("bars", "grid", "line")}
GROUPS, VIEWS = 12, 2
RUNGS = ["--rungs", "[linear,knn,fidelity]"]


def picture(kind: int, generator: np.random.Generator) -> bytes:
    """A stripe pattern whose period and direction depend on the class, in random colours, with noise."""
    y, x = np.mgrid[:SIZE, :SIZE]
    period, slope = (4, 6, 9, 13, 19, 27, 38)[kind], (0.0, 0.5, 1.0)[kind % 3]
    wave = np.sin(2 * np.pi * (x + slope * y) / period + generator.random() * 6)[..., None]
    colour = generator.uniform(40, 60, size=3)
    pixels = 128 + wave * colour + generator.normal(0, 10, size=(SIZE, SIZE, 3))
    buffer = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def add(tar: tarfile.TarFile, name: str, payload: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(payload)
    tar.addfile(entry, io.BytesIO(payload))


def write_shards(folder: Path, *, labelled: bool = True, damaged: int = 0, damaged_domain: str = "chart") -> Path:
    folder.mkdir()
    generator = np.random.default_rng(0)
    kind = 0
    for domain, names in CLASSES.items():
        with tarfile.open(folder / f"{domain}-000000.tar", "w") as tar:
            for number, name in enumerate(names):
                for view in range(GROUPS * VIEWS):
                    key = f"{name}{view:03d}"
                    image = picture(kind, generator)
                    add(
                        tar,
                        f"{key}.png",
                        image[:100] if domain == damaged_domain and number == 0 and view < damaged else image,
                    )
                    if labelled:
                        add(tar, f"{key}.cls", str(number).encode())
                        meta = {"label": name, "group": f"{name}-{view // VIEWS}"}
                        add(tar, f"{key}.json", json.dumps(meta).encode())
                kind += 1
    with tarfile.open(folder / "ocr-000000.tar", "w") as tar:
        for view in range(24):
            add(tar, f"page{view:03d}.png", picture(6, generator))
    return folder


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("data") / "shards")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs") / "toy"
    (root / "checkpoints").mkdir(parents=True)
    (root / "initial").mkdir()
    torch.manual_seed(1)
    weights = {key: value.contiguous() for key, value in timm.create_model("test_resnet").state_dict().items()}
    save_file(weights, root / "teacher.safetensors")
    teacher = {"model_name": "test_resnet", "weights": str(root / "teacher.safetensors")}
    student = {"model_name": "test_vit", "weights": "random", "img_size": SIZE}
    config = {
        "model": {
            "students": {
                "copy": {"class_path": "students.TimmStudent", "init_args": teacher},
                "vit": {"class_path": "students.TimmStudent", "init_args": student},
            },
            "teachers": {"big": {"class_path": "teachers.TimmTeacher", "init_args": teacher}},
        }
    }
    (root / "config.yaml").write_text(yaml.safe_dump(config))
    last: dict[str, torch.Tensor] = {}
    for seed, (name, spec) in enumerate(config["model"]["students"].items()):
        untrained = {**spec, "init_args": {**spec["init_args"], "weights": "random", "seed": seed}}
        for built, target in ((untrained, "initial"), (spec, "last")):
            encoder = build_encoder(built)
            read_weights(encoder, name)
            state = {key: value.contiguous() for key, value in encoder.state_dict().items()}
            if target == "initial":
                save_file(state, root / "initial" / f"{name}.safetensors")
            last.update({f"students.{name}.{key}": value for key, value in state.items()})
    torch.save({"state_dict": last}, root / "checkpoints" / "last.ckpt")
    return root


@pytest.fixture(scope="module")
def lone_encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("encoder") / "random.yaml"
    spec = {"class_path": "teachers.TimmTeacher", "init_args": {"model_name": "test_resnet", "weights": "random"}}
    file.write_text(yaml.safe_dump(spec))
    return str(file)


def result_of(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def judged(run: Path, shards: Path) -> tuple[dict[str, Any], str]:
    """The content of probe.json and what was printed, by the command line."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        cli.main(["probe", str(run), "--data", str(shards), "--img_size_px", str(SIZE), "--device", "cpu", *RUNGS])
    return result_of(run / "probe.json"), printed.getvalue()


def by_name(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {encoder["name"]: encoder for encoder in result["encoders"]}


def test_a_run_is_judged_beside_its_initialisation_and_its_teacher(judged: tuple[dict[str, Any], str]) -> None:
    result, printed = judged
    assert result["format"] == "distill-probe/2"
    assert {name: encoder["role"] for name, encoder in by_name(result).items()} == {
        "copy (initial)": "initial",
        "vit (initial)": "initial",
        "copy": "student",
        "vit": "student",
        "big": "teacher",
    }
    for text in ("Linear probe", "kNN", "Fidelity of patch tokens", "Paired differences", "copy (initial)", "better"):
        assert text in printed


def test_the_data_set_and_its_split_are_recorded(judged: tuple[dict[str, Any], str]) -> None:
    data = judged[0]["data"]
    assert data["n_fit"] + data["n_select"] + data["n_test"] == 6 * GROUPS * VIEWS + 24
    assert len(data["fingerprint"]) == 64
    assert sorted(data["domains"]) == ["chart", "natural", "ocr"]
    assert sorted(data["label_names"]) == sorted(name for names in CLASSES.values() for name in names)
    assert data["num_classes"] == 6


def test_accuracies_have_intervals_in_every_labelled_domain(judged: tuple[dict[str, Any], str]) -> None:
    encoders = by_name(judged[0])
    for encoder in encoders.values():
        for head in (encoder["linear"], encoder["knn"]):
            assert set(head["domains"]) == {"chart", "natural"}
            for score in (head["overall"], *head["domains"].values()):
                assert 0 <= score["low"] <= score["top1"] <= score["high"] <= 1
            assert head["overall"]["n"] == sum(score["n"] for score in head["domains"].values())
            hits = sum(score["top1"] * score["n"] for score in head["domains"].values())
            assert hits == pytest.approx(head["overall"]["top1"] * head["overall"]["n"], abs=1e-3)
    for part in ("overall", "domains"):
        assert encoders["copy"]["linear"][part] == encoders["big"]["linear"][part]
    assert encoders["big"]["linear"]["overall"]["top1"] > 0.5  # six classes: chance is 0.17


def test_a_student_that_equals_its_teacher_has_fidelity_one_in_every_domain(
    judged: tuple[dict[str, Any], str],
) -> None:
    encoders = by_name(judged[0])
    assert encoders["big"]["fidelity"] is None
    fidelity = encoders["copy"]["fidelity"]
    assert fidelity["teacher"] == "big"
    assert set(fidelity["domains"]) == {"chart", "natural", "ocr"}
    for score in (fidelity["overall"], *fidelity["domains"].values()):
        assert score["cosine_centred"]["mean"] > 0.999
        assert score["cka"]["value"] == pytest.approx(1.0, abs=1e-6)
    untrained = encoders["copy (initial)"]["fidelity"]["overall"]["cosine_centred"]
    assert untrained["low"] <= untrained["mean"] <= untrained["high"] < 0.99


def test_the_paired_verdicts_are_against_each_students_own_initialisation(
    judged: tuple[dict[str, Any], str],
) -> None:
    paired = judged[0]["paired"]
    pairs = {(entry["a"], entry["b"]) for entry in paired}
    assert pairs == {("copy", "copy (initial)"), ("vit", "vit (initial)"), ("big", "copy (initial)")}
    cosines = [entry for entry in paired if entry["metric"] == "cosine_centred" and entry["a"] == "copy"]
    assert {entry["scope"] for entry in cosines} == {"overall", "chart", "natural", "ocr"}
    assert {entry["verdict"] for entry in cosines} == {"better"}
    for entry in paired:
        excludes_zero = entry["low"] > 0 or entry["high"] < 0
        assert (entry["verdict"] != "not distinguishable") == excludes_zero


def test_the_same_seed_gives_the_same_figures_and_another_seed_others(
    lone_encoder: str, shards: Path, tmp_path: Path
) -> None:
    common: dict[str, Any] = {"data": str(shards), "img_size_px": SIZE, "device": "cpu", "rungs": ["linear", "knn"]}
    options = ({}, {"batch_size": 3}, {"seed": 1})
    files = [
        probe(lone_encoder, out=tmp_path / f"{number}.json", **common, **extra) for number, extra in enumerate(options)
    ]
    first, again, other = (result_of(file) for file in files)
    assert first["encoders"][0]["linear"]["overall"] == again["encoders"][0]["linear"]["overall"]
    assert first["encoders"][0]["knn"] == again["encoders"][0]["knn"]
    assert first["data"] == again["data"] == other["data"]
    assert first["encoders"][0]["linear"] != other["encoders"][0]["linear"]


def test_a_lone_encoder_is_scored_without_fidelity_and_says_so(
    lone_encoder: str, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    path = probe(lone_encoder, data=str(shards), domains=["chart"], img_size_px=SIZE, device="cpu", rungs=["linear"])
    assert path == Path("probe.json")
    result = result_of(path)
    assert result["data"]["domains"] == ["chart"]
    assert result["data"]["num_classes"] == 3
    assert result["encoders"][0]["fidelity"] is None
    assert result["paired"] == []
    assert "no teacher" in capsys.readouterr().out


def test_shards_without_labels_still_give_fidelity(run: Path, lone_encoder: str, tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "bare", labelled=False)
    result = result_of(
        probe(str(run), data=str(shards), img_size_px=SIZE, out=tmp_path, device="cpu", rungs=["fidelity"])
    )
    student = next(encoder for encoder in result["encoders"] if encoder["name"] == "copy")
    assert student["linear"] is None
    assert student["fidelity"]["overall"]["cosine_centred"]["mean"] > 0.999
    with pytest.raises(DataError, match="No image has a label and there is no teacher"):
        probe(lone_encoder, data=str(shards), img_size_px=SIZE, out=tmp_path, device="cpu")


def test_damaged_images_are_counted_or_stop_the_probe(
    lone_encoder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = write_shards(tmp_path / "one", damaged=1, damaged_domain="natural")
    options: dict[str, Any] = {"img_size_px": SIZE, "out": tmp_path, "device": "cpu", "rungs": ["knn"]}
    result = result_of(probe(lone_encoder, data=str(one), domains=["natural", "ocr"], **options))
    assert "1 image(s) could not be decoded" in capsys.readouterr().out
    assert sum(result["data"][f"n_{part}"] for part in ("fit", "select", "test")) == 3 * GROUPS * VIEWS + 24 - 1
    many = write_shards(tmp_path / "many", damaged=5)
    with pytest.raises(DataError, match=r"cannot be decoded.*chart-000000\.tar"):
        probe(lone_encoder, data=str(many), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"domains": ["charts"]}, "--domains charts not in the data; it has chart"),
        ({"img_size_px": 0}, "must be at least 1"),
        ({"seed": -1}, "--seed -1 must be 0 or more"),
        ({"out": Path("nowhere/at/all.json")}, "does not exist; create it"),
        ({"pool": "prefix"}, "needs a class token"),
        ({"layers": "-1,0"}, "layers are counted from the end"),
        ({"layers": "last"}, "--layers last: give numbers from the end"),
        ({"layers": "-99"}, "this encoder has -1 to -"),
        ({"rungs": ["dense"]}, "--rungs dense: the rungs are linear"),
    ],
)
def test_options_that_cannot_work_are_refused_by_name(
    run: Path, shards: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        probe(str(run), **{"data": str(shards), "img_size_px": SIZE, "device": "cpu", **options})


def test_a_file_that_cannot_be_written_leaves_no_part_behind(
    lone_encoder: str, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "results"
    out.mkdir()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("distill.probe.probe_file.os.fsync", full)
    with pytest.raises(ConfigError, match="No space left on device"):
        probe(lone_encoder, data=str(shards), img_size_px=SIZE, out=out, device="cpu", rungs=["knn"])
    assert list(out.iterdir()) == []


@pytest.fixture(scope="module")
def laddered(lone_encoder: str, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """probe.json of the classifiers on two layers, and the folder of cached features."""
    root = tmp_path_factory.mktemp("ladder")
    words = ["probe", lone_encoder, "--data", str(shards), "--out", str(root), "--img_size_px", str(SIZE)]
    words += ["--layers=-2,-1", "--rungs", "[linear,knn,sgd,attentive,few_shot,calibration]", "--device", "cpu"]
    with contextlib.redirect_stdout(io.StringIO()):
        cli.main([*words, "--cache", str(root / "cache"), "--train", str(shards)])
    return root / "probe.json", root / "cache"


def test_every_figure_of_the_ladder_can_be_taken_again_from_the_parts_by_image(laddered: tuple[Path, Path]) -> None:
    result = result_of(laddered[0])
    scores = result["encoders"][0]["scores"]
    overall = {(entry["metric"], tuple(entry["at"] or ())): entry for entry in scores if entry["scope"] == "overall"}
    parts = load_file(laddered[0].parent / result["per_image"])
    assert len(result["tensors"]) == len(overall) > 10
    for listed in result["tensors"]:
        numerator, denominator = (parts[f"{listed['prefix']}/{part}"].numpy() for part in ("numerator", "denominator"))
        entry = overall[listed["metric"], tuple(listed["at"] or ())]
        kind = result["metrics"][listed["metric"]]["kind"]
        assert ratio_of_sums(numerator, denominator, kind) == pytest.approx(entry["value"])
        assert len(parts[f"{listed['prefix']}/rows"]) == entry["n"] == len(parts[f"{listed['prefix']}/domains"])
        assert entry["low"] <= entry["value"] <= entry["high"]
        assert entry["seed"] == 0
    assert {entry["at"][1] for entry in scores if entry["at"] and entry["at"][0] == "layer"} == {-2, -1}
    assert {entry["at"][1] for entry in scores if entry["at"] and entry["at"][0] == "shots"} >= {1, 5}


def test_probing_on_the_training_images_is_reported_as_a_leak(laddered: tuple[Path, Path], shards: Path) -> None:
    leaks = result_of(laddered[0])["leaks"]
    n = 6 * GROUPS * VIEWS + 24
    assert (leaks["train"], leaks["exact"], leaks["near"]) == (str(shards), n, 0)
    assert (leaks["checked"], leaks["excluded"], len(leaks["rows"])) == (n, 0, n)


def test_features_of_the_cache_give_the_same_figures(
    lone_encoder: str, shards: Path, laddered: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options: dict[str, Any] = {"img_size_px": SIZE, "device": "cpu", "layers": "-2,-1", "cache": tmp_path / "cache"}
    shutil.copytree(laddered[1], tmp_path / "cache")
    again = probe(lone_encoder, data=str(shards), out=tmp_path, rungs=["linear", "knn", "attentive"], **options)
    assert "features of random from" in capsys.readouterr().out.replace("\n", " ")
    first = result_of(laddered[0])["encoders"][0]
    assert result_of(again)["encoders"][0]["linear"] == first["linear"]
    assert result_of(again)["encoders"][0]["knn"] == first["knn"]


def test_a_table_with_a_fixed_test_part_is_judged_on_that_part(lone_encoder: str, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    lines = ["path,label,split"]
    for number in range(36):
        (tmp_path / f"{number}.png").write_bytes(picture(number % 2 * 4, generator))
        lines.append(f"{number}.png,{'ab'[number % 2]},{'test' if number >= 24 else 'train'}")
    (tmp_path / "table.csv").write_text("\n".join(lines))
    file = probe(lone_encoder, data=str(tmp_path / "table.csv"), img_size_px=SIZE, out=tmp_path, rungs=["linear"])
    data = result_of(file)["data"]
    assert (data["n_test"], data["n_fit"] + data["n_select"], data["split"]) == (12, 24, "fixed test part")
    assert result_of(file)["encoders"][0]["linear"]["overall"]["n"] == 12
