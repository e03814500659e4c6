"""The page of a real, tiny run: complete, self-contained, escaped, and readable with any part missing."""

from __future__ import annotations

import importlib.util
import io
import json
import re
import shutil
import tarfile
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

from distill.checkpoint import RunDir, build_encoder
from distill.data.fetch import RowDataset
from distill.data.index import build_index
from distill.errors import ConfigError, DataError
from distill.report.feature_maps import choose_images
from distill.report.recipe import next_commands, read_exports, read_versions
from distill.report.run import report

DOMAINS = ("natural", "ocr")
IMG_SIZE_PX = 64
HOSTILE = "<script>alert(1)</script>"
VOID_TAGS = {"meta", "link", "img"}


def write_shard(path: Path, images: int, seed: int, *, bad: tuple[int, ...] = (), per_group: int = 1) -> None:
    rng = np.random.default_rng(seed)
    with tarfile.open(path, "w") as tar:
        for i in range(images):
            buffer = io.BytesIO()
            pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).resize((IMG_SIZE_PX, IMG_SIZE_PX)).save(buffer, "PNG")
            content = buffer.getvalue()[:60] if i in bad else buffer.getvalue()
            fields = json.dumps({"label": f"kind {HOSTILE}", "group": f"g{i // per_group}"}).encode()
            for suffix, data in (("png", content), ("json", fields)):
                member = tarfile.TarInfo(f"{i:04d}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def scores(value: float, key: str) -> dict[str, float]:
    return {key: value, "low": value - 0.05, "high": value + 0.05, "n": 40}


def probe_content() -> dict[str, Any]:
    def encoder(name: str, role: str, value: float) -> dict[str, Any]:
        accuracy = {"overall": scores(value, "top1"), "domains": {d: scores(value, "top1") for d in DOMAINS}}
        own = {"cosine_centred": scores(value, "mean"), "cka": {"value": value, "n": 40}}
        fidelity = {"teacher": "tea", "overall": own, "domains": dict.fromkeys(DOMAINS, own)}
        return {
            "name": name,
            "role": role,
            "source": "",
            "embed_dim": 64,
            "num_params": 1000,
            "linear": {"C": 1.0, **accuracy},
            "knn": {"k": 10, **accuracy},
            "fidelity": None if role == "teacher" else fidelity,
        }

    paired = [
        {
            "metric": metric,
            "scope": scope,
            "a": HOSTILE,
            "b": "stu (initial)",
            "difference": 0.2,
            "low": 0.1,
            "high": 0.3,
            "n": 40,
            "verdict": "better",
        }
        for metric in ("linear_top1", "knn_top1", "cosine_centred")
        for scope in ("overall", *DOMAINS)
    ]
    encoders = [
        encoder("stu (initial)", "initial", 0.4),
        encoder(HOSTILE, "student", 0.6),
        encoder("tea", "teacher", 0.9),
    ]
    data = {"path": "val", "fingerprint": "ab" * 32, "n_fit": 1, "n_select": 2, "n_test": 40, "domains": list(DOMAINS)}
    return {"format": "distill-probe/1", "data": data, "seed": 0, "encoders": encoders, "paired": paired}


def make_run(root: Path) -> Path:
    """A run directory with a real teacher, a real student before and after, shards, log, scores and an export."""
    run, shards = root / "run & <b>name</b>", root / "val"
    for folder in (run / "checkpoints", run / "initial", run / "exports" / "timm", shards):
        folder.mkdir(parents=True)
    for number, domain in enumerate(DOMAINS):
        write_shard(shards / f"{domain}-000000.tar", 8, number)
    student = {"model_name": "test_vit", "weights": "random", "img_size": IMG_SIZE_PX}
    config = {
        "seed_everything": 0,
        "note": HOSTILE,
        "trainer": {"default_root_dir": str(run)},
        "model": {
            "teachers": {
                "tea": {
                    "class_path": "teachers.TimmTeacher",
                    "init_args": {"model_name": "test_convnext", "weights": "random"},
                }
            },
            "students": {"stu": {"class_path": "students.TimmStudent", "init_args": student}},
        },
        "data": {"val": str(shards), "img_size_px": IMG_SIZE_PX},
    }
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    encoder: Any = build_encoder(RunDir(run).spec("students", "stu")[1])
    encoder.load_weights()
    state = {key: value.detach().clone().contiguous() for key, value in encoder.state_dict().items()}
    save_file(state, run / "initial" / "stu.safetensors")
    trained = {f"students.stu.{key}": value + 0.05 * torch.randn_like(value) for key, value in state.items()}
    torch.save({"state_dict": trained}, run / "checkpoints" / "last.ckpt")
    lines = ["step,loss/total,val/cosine/natural,val/baseline/natural,throughput/images_per_s"]
    lines += ["0,,0.3,0.2,", *(f"{i},{2 - i / 50},,,{30 + i % 3}" for i in range(50)), "49,,0.6,0.2,"]
    (run / "metrics.csv").write_text("\n".join(lines) + "\n")
    (run / "probe.json").write_text(json.dumps(probe_content()))
    (run / "exports" / "timm" / "manifest.json").write_text('{"target": "timm"}')
    (run / "exports" / "timm" / "model.safetensors").write_bytes(b"0" * 2_000_000)
    return run


@pytest.fixture(scope="module")
def complete_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    run = make_run(tmp_path_factory.mktemp("report"))
    report(run, device="cpu")
    return run


@pytest.fixture
def bare_run(complete_run: Path, tmp_path: Path) -> Path:
    """The recipe alone: no log, scores, weights, exports or held-out images."""
    run = tmp_path / "bare"
    run.mkdir()
    config = yaml.safe_load((complete_run / "config.yaml").read_text())
    config["data"] = {}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    return run


class Reader(HTMLParser):
    """Collects tags and attributes, and checks that every element is closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID_TAGS:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def read_page(file: Path) -> Reader:
    reader = Reader()
    reader.feed(file.read_text(encoding="utf-8"))
    assert reader.open == []
    return reader


def test_the_page_has_every_section_with_its_content(complete_run: Path) -> None:
    page = read_page(complete_run / "report.html")
    assert [a["id"] for tag, a in page.elements if tag == "section"] == [
        "scores",
        "validation",
        "maps",
        "training",
        "recipe",
        "next",
    ]
    for text in (
        "beats its initialisation in fidelity in every domain",
        "60.0",
        "[55.0,\u00a065.0]",
        "ab" * 32,
        "2.0 MB",
        "timm.create_model",
        "median 31.0 images/s",
        "distill fit --config",
    ):
        assert text in page.text
    assert not [a for tag, a in page.elements if a.get("class") == "absent"]
    assert sum(tag == "svg" for tag, _ in page.elements) == 3 + 1 + 2


def test_the_page_refers_to_nothing_outside_itself(complete_run: Path) -> None:
    page = read_page(complete_run / "report.html")
    for tag, attributes in page.elements:
        assert tag not in {"script", "iframe", "object", "embed", "base", "form"}
        for name in ("src", "href", "srcset", "action", "data", "poster"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:", "#")), (tag, name, value)
        assert not [name for name in attributes if name.startswith("on")]
    text = (complete_run / "report.html").read_text(encoding="utf-8")
    assert "://" not in text
    assert "@import" not in text
    assert "default-src 'none'" in text
    targets = {a["href"] for tag, a in page.elements if tag == "a"}
    ids = {f"#{a['id']}" for tag, a in page.elements if "id" in a}
    assert targets <= ids


def test_hostile_names_are_text_and_nothing_else(complete_run: Path) -> None:
    text = (complete_run / "report.html").read_text(encoding="utf-8")
    assert HOSTILE not in text
    assert "<b>name</b>" not in text
    page = read_page(complete_run / "report.html")
    # The label of the images, the student's name, and a value of the recipe.
    assert f"kind {HOSTILE}" in page.text
    assert page.text.count(HOSTILE) > 3
    assert "run & <b>name</b>" in page.text


def test_maps_stand_side_by_side_with_the_image_of_each_domain(complete_run: Path) -> None:
    page = read_page(complete_run / "report.html")
    headings = ("image", "teacher tea", "initial student", "distilled student")
    expected = [f"{heading}, {domain}" for domain in DOMAINS for _ in range(2) for heading in headings]
    images = [a for tag, a in page.elements if tag == "img"]
    assert [a["alt"] for a in images] == expected
    assert all((a["src"] or "").startswith("data:image/webp;base64,") for a in images)


def test_every_figure_is_also_a_png(complete_run: Path) -> None:
    names = {path.name for path in (complete_run / "figures").iterdir()}
    assert names == {
        "probe-linear-top1.png",
        "probe-knn-top1.png",
        "probe-cosine-centred.png",
        "cosine-natural.png",
        "loss.png",
        "throughput-images-per-s.png",
        "feature-maps.png",
    }
    for name in names:
        with Image.open(complete_run / "figures" / name) as image:
            assert image.format == "PNG"
            assert image.width > 600


def test_a_bare_recipe_still_makes_a_page_that_says_what_is_missing(bare_run: Path) -> None:
    page = read_page(report(bare_run, device="cpu"))
    for sentence in (
        "There are no scores yet: the run has no probe.json.",
        "The run has no metrics.csv, so there are no curves.",
        "The recipe names no held-out data (data.val), so there are no feature maps.",
        "The run has no exports yet.",
    ):
        assert sentence in page.text
    assert sum(tag == "svg" for tag, _ in page.elements) == 0
    assert page.text.index("distill probe") < page.text.index("distill fit")


def test_damaged_inputs_are_named_and_the_rest_is_written(bare_run: Path) -> None:
    (bare_run / "probe.json").write_text("{")
    (bare_run / "metrics.csv").write_bytes(b"\xff\xfe")
    config = yaml.safe_load((bare_run / "config.yaml").read_text())
    (bare_run / "config.yaml").write_text(yaml.safe_dump({**config, "data": {"init_args": {"val": "no/such/place"}}}))
    page = read_page(report(bare_run, device="cpu"))
    assert "The scores could not be read." in page.text
    assert "The curves could not be read." in page.text
    assert "The feature maps could not be made." in page.text
    assert "no/such/place" in page.text


def test_missing_student_weights_cost_the_maps_only(complete_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(complete_run, run, ignore=shutil.ignore_patterns("last.ckpt", "report.html"))
    page = read_page(report(run, device="cpu"))
    assert "The feature maps could not be made." in page.text
    assert "last.ckpt is missing" in page.text
    assert "beats its initialisation" in page.text
    # The sheet of the earlier report would contradict the page.
    assert not (run / "figures" / "feature-maps.png").exists()


def test_figures_of_others_are_left_alone(bare_run: Path) -> None:
    own = bare_run / "figures" / "mine.png"
    own.parent.mkdir()
    Image.new("RGB", (4, 4)).save(own)
    report(bare_run, device="cpu")
    assert own.exists()


def test_data_named_by_the_user_that_is_not_there_is_an_error(bare_run: Path) -> None:
    with pytest.raises((DataError, ConfigError), match="nowhere"):
        report(bare_run, data=str(bare_run / "nowhere"), device="cpu")
    assert not (bare_run / "report.html").exists()


def test_zero_images_leave_the_maps_out_without_loading_an_encoder(bare_run: Path) -> None:
    assert "left out on request" in read_page(report(bare_run, images_per_domain=0)).text
    with pytest.raises(ConfigError, match="-1 is negative"):
        report(bare_run, images_per_domain=-1)


def test_the_page_goes_where_out_says_and_a_missing_folder_is_refused(bare_run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    assert report(bare_run, folder, images_per_domain=0) == folder / "report.html"
    assert report(bare_run, folder / "my.html", images_per_domain=0).is_file()
    assert not list(folder.glob("tmp*"))
    with pytest.raises(ConfigError, match="does not exist"):
        report(bare_run, tmp_path / "no" / "my.html", images_per_domain=0)


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not a run directory"):
        report(tmp_path)


def test_without_matplotlib_the_extra_is_named(bare_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find_spec(name))
    with pytest.raises(ConfigError, match=r"pip install 'encoder-distill\[report\]'"):
        report(bare_run)


def test_images_are_chosen_by_seed_from_different_groups_and_bad_ones_passed_over(tmp_path: Path) -> None:
    write_shard(tmp_path / "ocr-000000.tar", 12, 0, bad=(0, 5, 7), per_group=3)
    index = build_index(str(tmp_path))
    dataset = RowDataset(index, 32)
    chosen = choose_images(index, dataset, 2)
    again = choose_images(index, dataset, 2)
    assert torch.equal(chosen.images, again.images)
    assert chosen.captions == (("ocr", f"kind {HOSTILE}"),) * 2
    good = {row: dataset[row]["image"] for row in range(12) if row not in (0, 5, 7)}
    rows = [next(row for row, image in good.items() if torch.equal(image, own)) for own in chosen.images]
    assert len(set(rows)) == len(rows)
    shown, fitted = {row // 3 for row in rows[:2]}, {row // 3 for row in rows[2:]}
    assert len(shown) == 2
    assert fitted == {0, 1, 2, 3} - shown


def test_a_domain_of_undecodable_images_is_named(tmp_path: Path) -> None:
    write_shard(tmp_path / "ocr-000000.tar", 20, 0, bad=tuple(range(20)))
    index = build_index(str(tmp_path))
    with pytest.raises(DataError, match="17 images of the domain 'ocr'"):
        choose_images(index, RowDataset(index, 32), 2)


def test_exports_without_a_manifest_are_listed_without_code(tmp_path: Path) -> None:
    (tmp_path / "exports" / "odd").mkdir(parents=True)
    (tmp_path / "exports" / ".partial").mkdir()
    (entry,) = read_exports(tmp_path)
    assert (entry.name, entry.size, entry.verified, entry.code) == ("odd", "0 bytes", "", "")


def test_commands_quote_paths_and_put_the_missing_first() -> None:
    commands = next_commands(Path("my run"), "a b", has_probe=True, has_exports=False)
    assert commands[0][1] == "distill export 'my run'"
    assert any(command == "distill probe 'my run' --data 'a b'" for _, command in commands)


def test_versions_name_python_and_torch() -> None:
    found = dict(read_versions())
    assert re.match(r"3\.\d+", found["python"])
    assert found["torch"].split("+")[0] == torch.__version__.split("+")[0]
