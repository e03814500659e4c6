"""The parts of the evidence study: splits, variants, intervals, tables, and steps that are done once."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from rich.console import Console
from safetensors.numpy import save_file

from students import TimmStudent
from teachers import TimmTeacher

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "scripts" / "evidence"
CONFIGS = ROOT / "configs" / "evidence"
sys.path.insert(0, str(SCRIPTS))

import collect  # noqa: E402
import intervals  # noqa: E402
import peer  # noqa: E402
import pooled  # noqa: E402
import prepare  # noqa: E402
import steps  # noqa: E402
import study  # noqa: E402
import tables  # noqa: E402
import variants  # noqa: E402

KEY = ("trashnet", "knn_top1")
QUIET = Console(quiet=True)


def arm(name: str, seeds: dict[int, list[int]], groups: list[int] | None = None) -> collect.Arm:
    """An arm whose answers are right (1) or wrong (0)."""
    figures = {}
    for seed, right in seeds.items():
        count = len(right)
        own_groups = np.asarray(groups if groups is not None else range(count), dtype=np.int64)
        figures[seed] = collect.Parts(
            "images", np.arange(count), np.asarray(right, dtype=np.float64), np.ones(count), own_groups
        )
    return collect.Arm(name, "variant", {KEY: figures})


def test_a_receipt_and_its_crops_are_one_group_and_so_are_pictures_of_one_question() -> None:
    page = prepare.group_of("images/sroie_page/SHOP/172.jpg", "sroie_page")
    assert page == prepare.group_of("images/sroie_crops/172_3.jpg", "sroie_crops")
    assert page != prepare.group_of("images/sroie_crops/17_2.jpg", "sroie_crops")
    one, other, third = (f"images/gaokao_mm/Math/2010_MCQs_{name}.jpg" for name in ("4_0", "4_1", "5_0"))
    assert prepare.group_of(one, "gaokao_mm") == prepare.group_of(other, "gaokao_mm")
    assert prepare.group_of(one, "gaokao_mm") != prepare.group_of(third, "gaokao_mm")


def noise(file: Path, seed: int) -> None:
    """Write an image that looks like no other: 8 x 8 random blocks."""
    file.parent.mkdir(parents=True, exist_ok=True)
    blocks = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(blocks).resize((48, 48), Image.Resampling.NEAREST).save(file, quality=95)


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like that of the study's images, with a manifest."""
    assets = tmp_path_factory.mktemp("assets")
    rows = []
    for number in range(40):
        label = "ab"[number % 2]
        rows.append((f"images/trashnet/{label}/{number}.jpg", "trashnet", "natural", label))
    for receipt in range(12):
        rows.append((f"images/sroie_page/S{receipt % 2}/{receipt:03d}.jpg", "sroie_page", "ocr", f"S{receipt % 2}"))
        for crop in range(2):
            rows.append((f"images/sroie_crops/{receipt:03d}_{crop}.jpg", "sroie_crops", "ocr", None))
    for at, (path, *_rest) in enumerate(rows):
        noise(assets / path, seed=at)
    # Number 1 is held out below; number 0's twin under another name would be a leak.
    noise(assets / "images/imagenet_samples/twin.jpg", seed=0)
    rows.append(("images/imagenet_samples/twin.jpg", "imagenet_samples", "natural", None))
    lines = [
        json.dumps(
            {"path": path, "dataset": dataset, "domain": domain, "label": label}
            | ({"lines": [[1, 1, 40, 12, "total"]]} if dataset == "sroie_crops" else {})
        )
        for path, dataset, domain, label in rows
    ]
    (assets / "manifest.jsonl").write_text("\n".join(lines) + "\n")
    return assets


@pytest.fixture(scope="module")
def prepared(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("data")
    prepare.prepare(assets, out, seed=0)
    return out


def rows_of(table: Path) -> list[dict[str, str]]:
    """The rows of a CSV file."""
    head, *lines = table.read_text().splitlines()
    return [dict(zip(head.split(","), line.split(","), strict=True)) for line in lines]


def test_no_group_is_trained_on_and_held_out(prepared: Path) -> None:
    trained = rows_of(prepared / "train.csv")
    tested = [
        row for table in sorted((prepared / "probe").glob("*.csv")) for row in rows_of(table) if row["split"] == "test"
    ]
    assert len(tested) > 10
    assert not {row["group"] for row in trained} & {row["group"] for row in tested}
    assert not {row["path"] for row in trained} & {row["path"] for row in tested}
    lines = [json.loads(line) for line in (prepared / "probe" / "lines.jsonl").read_text().splitlines()]
    assert lines
    assert not {row["group"] for row in trained} & {line["group"] for line in lines}
    assert len(list((prepared / "train-files").rglob("*.jpg"))) == len(trained)


def test_a_held_out_image_that_looks_like_a_training_image_is_left_out(assets: Path) -> None:
    entries = prepare.read_manifest(assets / "manifest.jsonl")
    twins = [entry for entry in entries if entry.path.endswith(("/0.jpg", "twin.jpg"))]
    others = [entry for entry in entries if entry.path.endswith("/2.jpg")]
    kept = prepare.without_copies(assets, [twins[0], *others], [twins[1]], console=study.Console(quiet=True))
    assert kept == others


def test_a_change_replaces_one_value_and_leaves_the_recipe_alone() -> None:
    recipe = {"model": {"alignments": [{"head": "linear"}], "teachers": {"a": 1}}}
    changed = variants.with_changes(recipe, {"model.alignments.0.head": "mlp", "model.teachers.a": None})
    assert changed == {"model": {"alignments": [{"head": "mlp"}], "teachers": {}}}
    assert recipe["model"]["alignments"][0]["head"] == "linear"
    with pytest.raises(ValueError, match="leads nowhere"):
        variants.with_changes(recipe, {"model.optimiser.lr": 1})


def test_an_unknown_setting_is_refused_with_the_known_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["study.py", "tiny", "--work", str(tmp_path)])
    monkeypatch.setattr(study.signal, "signal", lambda *_: None)
    assert study.main() == 1
    assert "no setting 'tiny'; it has quick, full" in " ".join(capsys.readouterr().out.split())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name",
    [
        "ours",
        "pooled_mse",
        "lite2_random",
        "vit_random",
        "resnet50_alone",
        "both_teachers",
        "k_2",
        "token_gram",
        "white_head",
    ],
)
def test_a_variant_of_the_study_is_a_recipe_that_builds(name: str, tmp_path: Path, monkeypatch, capsys) -> None:
    from distill.cli import main

    monkeypatch.syspath_prepend(str(SCRIPTS))
    settings = {
        "ours": "full",
        "pooled_mse": "quick",
        "k_2": "ablation",
        "token_gram": "ablation",
        "white_head": "ablation_more",
    }
    setting = settings.get(name, "controls")
    read = variants.read_study(CONFIGS / "study.yaml", setting, tmp_path, tmp_path)
    file = tmp_path / f"{name}.yaml"
    file.write_text(yaml.safe_dump(next(variant.recipe for variant in read.variants if variant.name == name)))
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", str(file), "--dry_run", "true"])
    assert stop.value.code == 0
    assert f"student {'vit' if name == 'vit_random' else 'tinyvit'}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("setting", "first"),
    [
        ("quick", ["ours", "lightly_train"]),
        ("full", ["ours", "lightly_train"]),
        ("controls", ["ours", "lightly_train_tuned"]),
        ("large", ["ours", "lightly_train"]),
        ("ablation", ["no_crops", "k_2"]),
        ("ablation_more", ["no_crops", "white_head"]),
    ],
)
def test_every_setting_reads_and_puts_real_folders_in(setting: str, first: list[str], tmp_path: Path) -> None:
    read = variants.read_study(CONFIGS / "study.yaml", setting, tmp_path / "assets", tmp_path / "work")
    assert [variant.name for variant in read.variants][:2] == first
    for variant in read.variants:
        if variant.tool == "distill":
            assert variant.recipe["data"]["train"] == str(tmp_path / "work" / "data" / "train")
        assert "../shared" not in yaml.safe_dump(variant.recipe)


def test_the_pooled_loss_sees_means_only() -> None:
    student = torch.tensor([[[0.0], [2.0]]])
    assert pooled.PooledMSE().compute(student, torch.tensor([[[1.0], [1.0]]])) == 0.0
    assert pooled.PooledMSE().compute(student, torch.tensor([[[3.0], [3.0]]])) == 4.0


def test_a_difference_is_paired_image_by_image() -> None:
    generator = np.random.default_rng(0)
    base = generator.integers(0, 2, 400)
    better = base.copy()
    better[np.flatnonzero(base == 0)[:20]] = 1
    found = intervals.difference(arm("a", {0: better.tolist()}), arm("b", {0: base.tolist()}), [KEY])
    # Unpaired, twenty of four hundred images would drown in an interval of seven points either way.
    assert found.value == pytest.approx(0.05)
    assert 0.02 < found.low < 0.05 < found.high < 0.08


def test_images_of_one_group_are_resampled_together() -> None:
    right = [1] * 50 + [0] * 50
    single = intervals.difference(arm("a", {0: right}), arm("b", {0: [0] * 100}), [KEY])
    grouped = [
        arm(name, {0: values}, [at // 10 for at in range(100)]) for name, values in (("a", right), ("b", [0] * 100))
    ]
    clustered = intervals.difference(grouped[0], grouped[1], [KEY])
    assert clustered.high - clustered.low > 2 * (single.high - single.low)


def test_the_spread_over_seeds_widens_the_interval() -> None:
    same = arm("a", {seed: [1] * 60 + [0] * 40 for seed in range(3)})
    spread = arm("b", {0: [1] * 90 + [0] * 10, 1: [1] * 60 + [0] * 40, 2: [1] * 30 + [0] * 70})
    base = arm("c", {0: [0] * 100})
    narrow, wide = (intervals.difference(one, base, [KEY]) for one in (same, spread))
    assert narrow.value == wide.value == pytest.approx(0.6)
    assert wide.high - wide.low > 1.5 * (narrow.high - narrow.low)


def test_other_test_images_are_refused() -> None:
    one, other = arm("a", {0: [1] * 10}), arm("b", {0: [1] * 10})
    parts = other.figures[KEY][0]
    for changed in ({"rows": parts.rows + 1}, {"data": "others"}, {"groups": parts.groups // 2}):
        other.figures[KEY][0] = dataclasses.replace(parts, **changed)
        with pytest.raises(ValueError, match="other images"):
            intervals.difference(one, other, [KEY])
        with pytest.raises(ValueError, match="other images"):
            intervals.gap_closed(one, one, other, [KEY])
        seeds = collect.Arm("a", "variant", {KEY: {0: parts, 1: other.figures[KEY][0]}})
        with pytest.raises(ValueError, match="seeds were judged on other images"):
            seeds.values(KEY)


def test_the_gap_is_closed_by_half() -> None:
    count = 200
    initial, half, teacher = (arm(n, {0: [1] * k + [0] * (count - k)}) for n, k in (("i", 40), ("h", 80), ("t", 120)))
    share = intervals.gap_closed(half, initial, teacher, [KEY])
    assert share.value == pytest.approx(0.5)
    assert share.low < 0.5 < share.high


def test_a_table_has_each_arm_with_its_images_and_the_spread_over_seeds() -> None:
    several = arm("ours", {0: [1, 1, 0, 0], 1: [1, 1, 1, 0]})
    text = tables.figures_table([arm("initialisation", {0: [1, 0, 0, 0]}), several], "knn_top1")
    assert "trashnet (n 4)" in text
    assert "| initialisation | 1 | 25.0 | 25.0 |" in text
    assert "| ours | 2 | 62.5 ± 17.7 | 62.5 |" in text
    less = tables.differences_table([several], lambda _: arm("initialisation", {0: [1, 0, 0, 0]}), ["knn_top1"])
    assert "| ours | initialisation | 2, 1 | kNN | +37.5 [" in less


def test_a_step_that_is_done_is_not_repeated_and_a_failing_one_shows_its_log(tmp_path: Path) -> None:
    done = tmp_path / "done"
    calls: list[int] = []
    step = steps.Step("touch", done.is_file, lambda: (calls.append(1), done.touch())[1])
    for _ in range(2):
        steps.perform([step], QUIET)
    assert calls == [1]
    words = [sys.executable, "-c", "print('the cause'); raise SystemExit(3)"]
    with pytest.raises(steps.StepError, match=r"(?s)status 3.*the cause"):
        steps.Commands(tmp_path).run(words, tmp_path / "log")


def test_steps_go_on_beside_each_other_and_wait_for_those_they_need() -> None:
    both = threading.Barrier(2)  # broken unless two steps are under way at a time
    ended: list[str] = []

    def meet(name: str) -> None:
        both.wait(timeout=60)
        ended.append(name)

    one = steps.Step("one", lambda: False, lambda: meet("one"))
    after = steps.Step("after", lambda: False, lambda: ended.append("after"), (one,))
    other = steps.Step("other", lambda: False, lambda: meet("other"))
    steps.perform([one, after, other], QUIET, jobs=2)
    assert ended.index("after") > ended.index("one")
    assert sorted(ended) == ["after", "one", "other"]


def test_after_a_failure_what_is_under_way_ends_and_nothing_is_begun() -> None:
    failed = threading.Event()
    ended: list[str] = []

    def fail() -> None:
        failed.set()
        raise steps.StepError("the cause")

    bad = steps.Step("bad", lambda: False, fail)
    slow = steps.Step("slow", lambda: False, lambda: (failed.wait(60), time.sleep(0.2), ended.append("slow")))
    never = steps.Step("never", lambda: False, lambda: ended.append("never"), (bad,))
    later = steps.Step("later", lambda: False, lambda: ended.append("later"), (slow,))
    with pytest.raises(steps.StepError, match="the cause"):
        steps.perform([bad, slow, never, later], QUIET, jobs=2)
    assert ended == ["slow"]


def test_an_interruption_ends_the_commands_that_are_running_and_starts_no_more(tmp_path: Path) -> None:
    commands = steps.Commands(tmp_path, threads=1)
    begun = tmp_path / "begun"
    words = [sys.executable, "-c", f"import pathlib, time; pathlib.Path({str(begun)!r}).touch(); time.sleep(600)"]
    long = steps.Step("long", lambda: False, lambda: commands.run(words, tmp_path / "log"))

    def interrupt() -> None:
        while not begun.exists():
            time.sleep(0.01)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        steps.perform([long, steps.Step("interrupt", lambda: False, interrupt)], QUIET, 2, commands.stop)
    with pytest.raises(steps.StepError, match="being stopped"):
        commands.run(words, tmp_path / "log")


def test_a_command_computes_with_the_threads_it_is_given(tmp_path: Path) -> None:
    words = [sys.executable, "-c", "import os; print(os.environ['OMP_NUM_THREADS'])"]
    steps.Commands(tmp_path, threads=3).run(words, tmp_path / "log")
    assert (tmp_path / "log").read_text() == "3\n"


def judgings(setting: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, str]]:
    """Encoder, role and folder of what judge.py would be told by the steps of a setting, in order."""
    read = variants.read_study(CONFIGS / "study.yaml", setting, tmp_path / "assets", tmp_path / "work")
    told: list[list[str]] = []
    monkeypatch.setattr(steps.Commands, "run", lambda _, words, *__: told.append(words) or steps.Cost(0.0, 0.0))
    driver = study.Driver(read, tmp_path / "work", tmp_path / "assets", Path("python"), steps.Commands(tmp_path))
    for step in driver.steps():
        step.do()
    of_judge = [words for words in told if words[1].endswith("judge.py")]
    runs = tmp_path / "work" / setting
    return [
        (
            str(Path(words[2]).relative_to(runs)),
            words[words.index("--role") + 1],
            str(Path(words[words.index("--out") + 1]).relative_to(runs)),
        )
        for words in of_judge
    ]


def test_the_report_is_written_once_its_run_is_judged_and_again_after_another_training(tmp_path: Path) -> None:
    read = variants.read_study(CONFIGS / "study.yaml", "quick", tmp_path / "assets", tmp_path / "work")
    driver = study.Driver(read, tmp_path / "work", tmp_path / "assets", Path("python"), steps.Commands(tmp_path))
    (report,) = (step for step in driver.steps() if step.title == "report: ours, seed 0")
    titles = [step.title for step in report.needs]
    assert titles == ["train: this project, seed 0", "judge: ours, seed 0", "judge: initialisation", "judge: lite2"]
    trained = driver.runs / "ours-seed0" / "cost.json"
    trained.parent.mkdir(parents=True)
    trained.touch()
    assert not report.is_done()
    driver.report.touch()
    os.utime(trained, (1, 1))
    assert report.is_done()
    os.utime(driver.report, (0, 0))
    assert not report.is_done()


def test_each_student_is_judged_and_each_initialisation_and_teacher_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = judgings("full", tmp_path, monkeypatch)
    assert found == [
        ("ours-seed0", "student", "ours-seed0/judge"),
        ("ours-seed0", "initial", "company/initial_initialisation/judge"),
        ("ours-seed0", "teacher", "company/teacher_lite2/judge"),
        ("lightly_train-seed0/encoder.yaml", "student", "lightly_train-seed0/judge"),
        ("ours_long-seed0", "student", "ours_long-seed0/judge"),
        ("ours_longer-seed0", "student", "ours_longer-seed0/judge"),
        ("ours-seed1", "student", "ours-seed1/judge"),
        ("ours-seed2", "student", "ours-seed2/judge"),
    ]


def test_probes_that_take_long_come_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert judgings("controls", tmp_path, monkeypatch)[-4:] == [
        ("ours-seed0", "student", "ours-seed0/judge/closer"),
        ("ours-seed0", "initial", "company/initial_initialisation/judge/closer"),
        ("ours-seed0", "teacher", "company/teacher_lite2/judge/closer"),
        ("lightly_train_tuned-seed0/encoder.yaml", "student", "lightly_train_tuned-seed0/judge/closer"),
    ]


def test_other_beginnings_and_teachers_are_judged_beside_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = judgings("controls", tmp_path, monkeypatch)
    assert [(encoder, out) for encoder, role, out in found if role != "student" and "closer" not in out] == [
        ("ours-seed0", "company/initial_initialisation/judge"),
        ("ours-seed0", "company/teacher_lite2/judge"),
        ("lite2_random-seed0", "company/initial_initialisation_of_lite2_random/judge"),
        ("vit_random-seed0", "company/initial_initialisation_of_vit_random/judge"),
        ("resnet50_alone-seed0", "company/teacher_resnet50/judge"),
        ("both_teachers-seed0", "company/teacher_lite2_and_resnet50/judge"),
    ]


def test_stored_states_depend_on_the_seed_where_images_are_cropped(tmp_path: Path) -> None:
    read = variants.read_study(CONFIGS / "study.yaml", "quick", tmp_path, tmp_path)
    names = {variant.name: read.states_name(variant, 1) for variant in read.variants}
    assert names["ours"] == "lite2-crops-160-seed1"
    assert names["pooled_mse"] == "lite2-160"
    assert names["lightly_train"] is None


def test_states_with_another_number_of_views_are_refused(tmp_path: Path) -> None:
    read = variants.read_study(CONFIGS / "study.yaml", "full", tmp_path / "assets", tmp_path)
    driver = study.Driver(read, tmp_path, tmp_path / "assets", None, steps.Commands(tmp_path))
    done = tmp_path / "states" / "lite2-crops-224-seed0" / "complete.json"
    done.parent.mkdir(parents=True)
    step = next(step for step in driver.steps() if step.title.endswith("lite2-crops-224-seed0"))
    assert not step.is_done()
    done.write_text(json.dumps({"cpu_s": 1.0, "wall_s": 1.0, "views": 2}))
    assert step.is_done()
    done.write_text(json.dumps({"cpu_s": 1.0, "wall_s": 1.0, "views": 4}))
    with pytest.raises(steps.StepError, match="has 4 views .* wants 2"):
        driver.steps()


def test_another_tool_is_given_what_it_reads_and_nothing_else(tmp_path: Path) -> None:
    quick, controls = (
        variants.read_study(CONFIGS / "study.yaml", name, tmp_path / "assets", tmp_path / "work")
        for name in ("quick", "controls")
    )
    by_name = {variant.name: variant for variant in (*quick.variants, *controls.variants)}
    own, tuned = by_name["lightly_train"].recipe, by_name["lightly_train_tuned"].recipe
    assert own["data"] == {"global_batch_size": 8, "samples_per_epoch": 2400}
    assert own["model"]["teachers"] == by_name["ours"].recipe["model"]["teachers"]
    assert "frozen" not in own["model"]["students"]["tinyvit"]["init_args"]
    assert own["arguments"] == {}
    assert {**tuned, "arguments": {}} == own
    assert tuned["arguments"]["optim_args"]["lr"] > 0


def test_a_run_of_another_recipe_is_refused_and_left_alone(tmp_path: Path) -> None:
    read = variants.read_study(CONFIGS / "study.yaml", "quick", tmp_path / "assets", tmp_path / "work")
    driver = study.Driver(read, tmp_path / "work", tmp_path / "assets", None, steps.Commands(tmp_path))
    ours = read.variants[0]
    run = driver.run_of(ours, 0)
    run.mkdir(parents=True)
    (run / "recipe.yaml").write_text(driver.recipe_of(ours, 0, run))
    assert driver.steps()
    earlier = {**ours.recipe, "trainer": {**ours.recipe["trainer"], "max_epochs": 7}}
    (run / "recipe.yaml").write_text(driver.recipe_of(dataclasses.replace(ours, recipe=earlier), 0, run))
    with pytest.raises(steps.StepError, match=r"(?s)ours-seed0.*Move .* out of"):
        driver.steps()
    assert "max_epochs: 7" in (run / "recipe.yaml").read_text()


def test_cpu_time_counts_what_a_step_and_its_children_used(tmp_path: Path) -> None:
    burn = "import time; end = time.process_time() + 0.3\nwhile time.process_time() < end: pass"
    nested = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {burn!r}], check=True)"
    assert steps.Commands(tmp_path).run([sys.executable, "-c", nested], tmp_path / "log").cpu_s >= 0.3


def write_judged(file: Path, role: str, right: dict[str, list[int]], rung: str = "knn") -> None:
    """A result file of `distill probe` with one figure an encoder."""
    file.parent.mkdir(parents=True, exist_ok=True)
    tensors, listing = {}, []
    for number, (name, answers) in enumerate(right.items()):
        count = len(answers)
        parts = {
            "rows": np.arange(count),
            "numerator": np.asarray(answers, dtype=np.float64)[:, None],
            "denominator": np.ones((count, 1)),
            "groups": np.arange(count),
        }
        tensors |= {f"E{number}/{part}": values for part, values in parts.items()}
        listing.append({"encoder": name, "metric": f"{rung}_top1", "prefix": f"E{number}", "data": file.stem})
    beside = file.with_name(file.stem + ".per_image.safetensors")
    save_file(tensors, beside)
    content = {
        "format": "distill-probe/2",
        "data": {"fingerprint": file.stem},
        "encoders": [{"name": name, "role": role} for name in right],
        "per_image": beside.name,
        "tensors": listing,
    }
    file.write_text(json.dumps(content))


def receipts(file: Path, role: str, name: str, edits: list[int]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    rows = list(range(len(edits)))
    entry = {"role": role, "data": "lines", "rows": rows, "edits": edits, "characters": [10] * len(edits)}
    file.write_text(json.dumps({name: {**entry, "groups": rows}}))


def test_the_files_of_a_study_become_its_tables(tmp_path: Path) -> None:
    read, others = (variants.read_study(CONFIGS / "study.yaml", n, tmp_path, tmp_path) for n in ("full", "controls"))
    more = [variant for variant in others.variants if variant.name != "ours"]
    read = dataclasses.replace(read, variants=(*read.variants, *more), datasets=("trashnet", "dtd10"))
    folder = tmp_path / "full"
    first, rest = [1] * 10, [0] * 20
    for dataset in ("trashnet", "dtd10"):
        company = folder / "company"
        initial = company / "initial_initialisation" / "judge"
        write_judged(initial / f"{dataset}.json", "initial", {"tinyvit (initial)": [0] * 10 + [1] * 5 + [0] * 15})
        write_judged(company / "teacher_lite2" / "judge" / f"{dataset}.json", "teacher", {"lite2": [1] * 25 + [0] * 5})
        for seed, right in ((0, first + [1] * 5 + rest[:15]), (1, first + [1] * 7 + rest[:13])):
            write_judged(folder / f"ours-seed{seed}" / "judge" / f"{dataset}.json", "student", {"tinyvit": right})
        closer = folder / "ours-seed0" / "judge" / "closer" / f"{dataset}.json"
        write_judged(closer, "student", {"tinyvit": first + rest}, "attentive")
        write_judged(folder / "lite2_random-seed0" / "judge" / f"{dataset}.json", "student", {"tinyvit": first + rest})
        begun = company / "initial_initialisation_of_lite2_random" / "judge" / f"{dataset}.json"
        write_judged(begun, "initial", {"tinyvit (initial)": [1] * 2 + [0] * 28})
        # What the study does not have is no arm, nor is a run that was judged on one data set of two.
        write_judged(folder / "ours-seed0.old" / "judge" / f"{dataset}.json", "student", {"tinyvit": [0] * 30})
        write_judged(folder / "forgotten-seed0" / "judge" / f"{dataset}.json", "student", {"tinyvit": [0] * 30})
    write_judged(folder / "ours_long-seed0" / "judge" / "trashnet.json", "student", {"tinyvit": [1] * 30})
    receipts(folder / "ours-seed0" / "judge" / "closer" / "receipts.json", "student", "tinyvit", [1, 2, 3])
    receipts(
        folder / "company" / "initial_initialisation" / "judge" / "closer" / "receipts.json", "initial", "i", [2, 4, 6]
    )
    cost = {"cpu_s": 600.0, "wall_s": 700.0, "images": 6400, "is_whole": True}
    (folder / "ours-seed0" / "cost.json").write_text(json.dumps(cost))
    states = tmp_path / "states" / "lite2-crops-224-seed0"
    states.mkdir(parents=True)
    (states / "complete.json").write_text(json.dumps({"cpu_s": 200.0, "wall_s": 210.0}))
    arms = collect.collect(folder, read)
    assert list(arms) == [
        "initialisation",
        "initialisation of lite2_random",
        "ours",
        "lite2_random",
        "teacher lite2",
    ]
    text = tables.write_tables(folder, read)
    assert "| ours | 2 | 53.3 ± 4.7 | 53.3 ± 4.7 | 53.3 |" in text
    assert "| ours | 1 | 33.3 | 33.3 | 33.3 |" in text  # the attentive probe, of the first seed
    assert "| lite2_random | initialisation of lite2_random | 1, 1 | kNN | +26.7" in text
    assert "| ours | 2 | initialisation | teacher lite2 | 55 %" in text
    assert "| lite2_random | 1 | initialisation of lite2_random | teacher lite2 | 35 %" in text
    assert "| ours | 20.0 | -20.0" in text  # characters wrong on receipts
    assert "| ours | 1 | 6,400 | 600 | 200 | 700 |" in text
    assert "forgotten" not in text


def test_tables_of_nothing_are_refused(tmp_path: Path) -> None:
    read = variants.read_study(CONFIGS / "study.yaml", "full", tmp_path, tmp_path)
    with pytest.raises(ValueError, match="no judged run"):
        collect.collect(tmp_path / "full", read)


def test_lightly_train_sees_images_as_the_teacher_knows_them() -> None:
    spec = {"image_mean": [0.485, 0.458, 0.408], "image_std": [0.004, 0.004, 0.004]}
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (peer.IMAGENET_MEAN, peer.IMAGENET_STD))
    given = (images / 255 - mean) / std
    for order in ("rgb", "bgr"):
        (found,) = peer.OwnNormalisation(spec["image_mean"], spec["image_std"], order)(torch.nn.Identity(), (given,))
        own, scale = (torch.tensor(spec[name]).view(1, 3, 1, 1) for name in ("image_mean", "image_std"))
        wanted = (images / 255 - own) / scale
        torch.testing.assert_close(found, wanted.flip(1) if order == "bgr" else wanted, rtol=1e-4, atol=1e-3)


def test_tables_go_between_the_marks_of_a_page_and_nowhere_else() -> None:
    page = "before\n<!-- full: begin -->\nold\n<!-- full: end -->\nafter\n"
    assert tables.put_between(page, "full", "new") == "before\n<!-- full: begin -->\n\nnew\n<!-- full: end -->\nafter\n"
    with pytest.raises(ValueError, match="no marks"):
        tables.put_between("nothing", "full", "new")


STRIDES = {"stages.1.downsample.conv2.conv": 1}
TINY_VIT = {"depths": [1, 1, 1, 1], "embed_dims": [16, 16, 32, 32], "num_heads": [1, 1, 1, 1]}


def test_a_student_with_a_stride_of_its_own_has_a_finer_grid_and_the_same_weights() -> None:
    plain, fine = (TimmStudent("tiny_vit_5m_224", "random", 64, TINY_VIT, strides=s) for s in (None, STRIDES))
    assert (plain.patch_size, fine.patch_size) == (32, 16)
    for student in (plain, fine):
        student.load_weights()
        student.eval()
    assert plain.timm_state_dict().keys() == fine.timm_state_dict().keys()
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert fine.forward_hidden_states(images, 1)[0][1].shape == (1, 4, 4, 32)
    with pytest.raises(ValueError, match="no such module"):
        TimmStudent("tiny_vit_5m_224", "random", 64, TINY_VIT, strides={"stages.9": 1})


def test_a_teacher_takes_strides_and_channel_order_from_the_recipe() -> None:
    def features(images: torch.Tensor, **arguments) -> torch.Tensor:
        teacher = TimmTeacher("test_resnet", weights="random", image_std=(0.5, 0.5, 0.5), **arguments)
        teacher.load_weights()
        return teacher.forward_hidden_states(images, 1)[0][1]

    images = torch.rand(1, 3, 64, 64)
    plain = features(images, image_mean=(0.1, 0.2, 0.3))
    # The same weights given blue first; means are told as red, green, blue.
    blue_first = features(images.flip(1), image_mean=(0.3, 0.2, 0.1), channel_order="bgr")
    torch.testing.assert_close(blue_first, plain)
    fine = TimmTeacher("test_resnet", weights="random", strides={"conv1.0": 1})
    coarse = TimmTeacher("test_resnet", weights="random")
    assert fine.patch_size < coarse.patch_size
    with pytest.raises(ValueError, match="do not fit each other"):
        TimmTeacher("test_resnet", weights="random", strides={"layer4.0.downsample.0": 1})
    with pytest.raises(ValueError, match="has no stride"):
        TimmTeacher("test_resnet", weights="random", strides={"layer4.0.bn1": 1})
