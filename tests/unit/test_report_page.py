"""The page of a real, tiny run: complete, self-contained, escaped, and readable with any part missing."""

from __future__ import annotations

import base64
import hashlib
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
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import save_file

from distill.checkpoint import RunDir, build_encoder
from distill.data.fetch import RowDataset
from distill.data.index import build_index
from distill.errors import ConfigError, DataError
from distill.report.gallery import choose_images
from distill.report.html import script_json
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


METRICS = {
    "linear_top1": {"title": "Linear probe, top-1", "kind": "accuracy", "lower_is_better": False},
    "knn_top1": {"title": "kNN, top-1", "kind": "accuracy", "lower_is_better": False},
    "cosine_centred": {"title": "Fidelity, centred cosine", "kind": "cosine", "lower_is_better": False},
    "ocr_cer": {"title": "Character error rate", "kind": "error_rate", "lower_is_better": True},
}
SEED = 17


def curve(value: float) -> list[dict[str, Any]]:
    entry = {"metric": "ocr_cer", "scope": "overall", "low": value / 2, "high": value, "n": 33, "seed": SEED}
    return [{**entry, "at": ["font_px", x], "value": value, "settings": {}} for x in (8.0, 16.0)]


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
            "scores": curve(value),
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
    ceiling = {"metric": "cosine_centred", "scope": "overall", "at": None, "value": 0.987, "low": 0.98, "high": 0.99}
    ceiling |= {"n": 40, "seed": 0, "settings": {}}
    return {
        "format": "distill-probe/2",
        "data": data,
        "seed": 0,
        "metrics": METRICS,
        "encoders": encoders,
        "paired": paired,
        "fidelity_ceiling": {"teacher": "tea", "augmentation": "JPEG quality 75 to 100", "scores": [ceiling]},
        "leaks": {"train": "train", "checked": 40, "exact": 2, "near": 1, "rows": [1, 2, 3], "excluded": True},
    }


def write_probe(run: Path, shards: Path) -> None:
    """Scores, and the fidelity of every image: that of row r is r / 100, a tenth of it before distillation."""
    content, tensors, listing = probe_content(), {}, []
    for number, (name, factor) in enumerate((("stu (initial)", 0.1), (HOSTILE, 1.0))):
        prefix = f"E{number}/M0"
        listing.append({"encoder": name, "metric": "cosine_centred", "at": None, "prefix": prefix})
        tensors[f"{prefix}/rows"] = np.arange(16)
        tensors[f"{prefix}/numerator"] = factor * np.arange(16.0)[:, None] / 100
        tensors[f"{prefix}/denominator"] = np.ones((16, 1))
        tensors[f"{prefix}/groups"] = np.arange(16)
    content["data"] |= {"path": str(shards), "fingerprint": build_index(str(shards)).fingerprint}
    content |= {"per_image": "probe.safetensors", "tensors": listing}
    save_arrays(tensors, run / "probe.safetensors")
    (run / "probe.json").write_text(json.dumps(content))


def write_ledger(run: Path) -> None:
    (run / "ledger").mkdir()
    counts = {"planned": 1200, "seen": 1199, "quarantined": 1}
    summary = {**counts, "domains": {"natural": counts}}
    (run / "ledger" / "summary.json").write_text(json.dumps(summary))
    bad = {"index": 5, "attempt": 0, "row": 1, "domain": "natural", "shard": "s", "key": "k", "reason": "no JPEG"}
    lines = [
        bad,
        bad,
        {**bad, "index": 7, "attempt": 1, "reason": "also bad"},
    ]  # a step that was done again, and a substitute
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (run / "ledger" / "rank-00000.jsonl").write_text(text + '{"index": 6, "att')


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
    write_probe(run, shards)
    write_ledger(run)
    (run / "exports" / "timm" / "manifest.json").write_text('{"target": "timm"}')
    (run / "exports" / "timm" / "model.safetensors").write_bytes(b"0" * 2_000_000)
    return run


@pytest.fixture(scope="module")
def complete_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    run = make_run(tmp_path_factory.mktemp("report"))
    report([run], price_per_hour=36.0, device="cpu")
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
        "similar",
        "neighbours",
        "worst",
        "training",
        "recipe",
        "next",
    ]
    for text in (
        "beats its initialisation in fidelity in every domain",
        "60.0",
        "[55.0,\u00a065.0]",
        "n\u00a0=\u00a040",
        "n\u00a0=\u00a033",
        "seed 17",
        "tea to itself, JPEG quality 75 to 100",
        "ceiling 0.987",
        "2 probed images exactly and 1 nearly of 40 looked at; they were left out",
        "2.0 MB",
        "timm.create_model",
        "median 31.0 images/s",
        "distill fit --config",
        "1,199",
        "no JPEG (1)",
        "0 min 39 s, without start and validation",
        "0.39 at 36.00 an hour",
    ):
        assert text in page.text
    assert not [a for tag, a in page.elements if a.get("class") == "absent"]
    assert sum(tag == "svg" for tag, _ in page.elements) == 4 + 1 + 1 + 2


def test_the_page_refers_to_nothing_outside_itself(complete_run: Path) -> None:
    page = read_page(complete_run / "report.html")
    for tag, attributes in page.elements:
        assert tag not in {"iframe", "object", "embed", "base", "form"}
        for name in ("src", "href", "srcset", "action", "data", "poster"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:", "#")), (tag, name, value)
        assert not [name for name in attributes if name.startswith("on")]
    text = (complete_run / "report.html").read_text(encoding="utf-8")
    assert "://" not in text
    assert "@import" not in text
    policy = next(a["content"] or "" for tag, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-")
    scripts = [a for tag, a in page.elements if tag == "script"]
    assert scripts == [{"type": "application/json", "id": "patches"}, {}]
    script = text.rsplit("<script>", 1)[1].split("</script>")[0]
    assert f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'" in policy
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
    assert [a["alt"] for a in images[: len(expected)]] == expected
    similar = [text if text.startswith("image") else f"similarity by {text}" for text in expected]
    assert [a["alt"] for a in images[len(expected) :]] == similar
    assert all((a["src"] or "").startswith("data:image/webp;base64,") for a in images)


def test_bad_substitutes_are_no_reasons_for_quarantine(complete_run: Path) -> None:
    assert "also bad" not in read_page(complete_run / "report.html").text


def test_the_worst_images_are_those_of_lowest_fidelity_in_their_domain(complete_run: Path) -> None:
    page = read_page(complete_run / "report.html")
    section = page.text[page.text.index("Worst images by fidelity") :]
    for value, before in (("0.000", "0.000"), ("0.010", "0.001"), ("0.080", "0.008"), ("0.100", "0.010")):
        assert f"{value}{before}kind" in section
    assert "0.030" not in section.split("Training")[0]


def test_each_query_has_neighbours_by_every_encoder_none_of_them_itself(complete_run: Path) -> None:
    page = read_page(complete_run / "report.html")
    assert page.text.count("of 5 shared") == 2 * len(DOMAINS) * 2  # two students' rows for each of four queries
    thumbs = [a for tag, a in page.elements if (a.get("class") or "").startswith("thumb t")]
    queries = [a for a in thumbs if (a["aria-label"] or "").startswith("query")]
    assert len(queries) == 2 * len(DOMAINS)
    assert len(thumbs) == len(queries) * (1 + 3 * 5)
    text = (complete_run / "report.html").read_text(encoding="utf-8")
    for a in thumbs:
        assert text.count(f".{(a['class'] or '').split()[1]}{{background-image:url(data:image/webp;base64,") == 1


def test_several_runs_stand_on_one_page_with_their_differences(complete_run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(complete_run, other, ignore=shutil.ignore_patterns("figures", "report.html"))
    page = read_page(report([complete_run, other], tmp_path, images_per_domain=0))
    assert "Runs compared" in page.text
    assert "not distinguishable" in page.text
    assert f"other / {HOSTILE}" in page.text
    assert page.text.count("beats its initialisation") >= 2
    assert page.text.count("licence: ") >= 4
    with pytest.raises(ConfigError, match="given twice"):
        report([other, other])
    with pytest.raises(ConfigError, match="no run"):
        report([])


def test_probed_images_that_changed_are_not_shown_as_the_worst(complete_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(complete_run, run, ignore=shutil.ignore_patterns("figures", "report.html"))
    content = json.loads((run / "probe.json").read_text())
    content["data"]["fingerprint"] = "f" * 64
    (run / "probe.json").write_text(json.dumps(content))
    page = read_page(report([run], images_per_domain=0))
    assert "The probed images are not to be found" in page.text
    assert "worst-images.png" not in {path.name for path in (run / "figures").iterdir()}


def test_data_inside_a_script_element_cannot_end_it() -> None:
    assert "<" not in script_json({"key": "</script><b>"})


def test_every_figure_is_also_a_png(complete_run: Path) -> None:
    names = {path.name for path in (complete_run / "figures").iterdir()}
    assert names == {
        "probe-linear-top1.png",
        "probe-knn-top1.png",
        "probe-cosine-centred.png",
        "probe-cka.png",
        "probe-ocr-cer-by-font-px.png",
        "cosine-natural.png",
        "loss.png",
        "throughput-images-per-s.png",
        "feature-maps.png",
        "similarity-maps.png",
        "nearest-neighbours.png",
        "worst-images.png",
    }
    for name in names:
        with Image.open(complete_run / "figures" / name) as image:
            assert image.format == "PNG"
            assert image.width > 600


def test_a_bare_recipe_still_makes_a_page_that_says_what_is_missing(bare_run: Path) -> None:
    page = read_page(report([bare_run], device="cpu"))
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
    page = read_page(report([bare_run], device="cpu"))
    assert "The scores could not be read." in page.text
    assert "The curves could not be read." in page.text
    assert "The feature maps could not be made." in page.text
    assert "no/such/place" in page.text


def test_missing_student_weights_cost_the_maps_only(complete_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(complete_run, run, ignore=shutil.ignore_patterns("last.ckpt", "report.html"))
    page = read_page(report([run], device="cpu"))
    assert "The feature maps could not be made." in page.text
    assert "last.ckpt is missing" in page.text
    assert "beats its initialisation" in page.text
    # The sheet of the earlier report would contradict the page.
    assert not (run / "figures" / "feature-maps.png").exists()


def test_figures_of_others_are_left_alone(bare_run: Path) -> None:
    own = bare_run / "figures" / "mine.png"
    own.parent.mkdir()
    Image.new("RGB", (4, 4)).save(own)
    report([bare_run], device="cpu")
    assert own.exists()


def test_data_named_by_the_user_that_is_not_there_is_an_error(bare_run: Path) -> None:
    with pytest.raises((DataError, ConfigError), match="nowhere"):
        report([bare_run], data=str(bare_run / "nowhere"), device="cpu")
    assert not (bare_run / "report.html").exists()


def test_zero_images_leave_the_maps_out_without_loading_an_encoder(bare_run: Path) -> None:
    assert "left out on request" in read_page(report([bare_run], images_per_domain=0)).text
    with pytest.raises(ConfigError, match="-1 is negative"):
        report([bare_run], images_per_domain=-1)
    with pytest.raises(ConfigError, match=r"--price_per_hour -0\.5 is negative"):
        report([bare_run], price_per_hour=-0.5)


def test_the_page_goes_where_out_says_and_a_missing_folder_is_refused(bare_run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    assert report([bare_run], folder, images_per_domain=0) == folder / "report.html"
    assert report([bare_run], folder / "my.html", images_per_domain=0).is_file()
    assert not list(folder.glob("tmp*"))
    with pytest.raises(ConfigError, match="does not exist"):
        report([bare_run], tmp_path / "no" / "my.html", images_per_domain=0)


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not a run directory"):
        report([tmp_path])


def test_without_matplotlib_the_extra_is_named(bare_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find_spec(name))
    with pytest.raises(ConfigError, match=r"pip install 'encoder-distill\[report\]'"):
        report([bare_run])


def test_images_are_chosen_by_seed_from_different_groups_and_bad_ones_passed_over(tmp_path: Path) -> None:
    write_shard(tmp_path / "ocr-000000.tar", 12, 0, bad=(0, 5, 7), per_group=3)
    index = build_index(str(tmp_path))
    dataset = RowDataset(index, 32)
    chosen = choose_images(index, dataset, 2)
    again = choose_images(index, dataset, 2)
    assert torch.equal(chosen.images, again.images)
    assert chosen.captions == (("ocr", f"kind {HOSTILE}"),) * len(chosen.images)
    assert chosen.num_shown == 2
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
