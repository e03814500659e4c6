"""What `distill doctor` says of good and bad machines."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch

from distill.cli import main
from distill.doctor import machine, training, verb
from distill.doctor.machine import check_disk, check_precision, check_shared_memory, check_versions, version_fault
from distill.doctor.recipe_checks import check_weights, find_weights
from distill.doctor.verdict import Verdict, run_check
from distill.errors import DataError


def test_this_environment_has_no_known_bad_version() -> None:
    assert check_versions().status == "ok"


@pytest.mark.parametrize(
    ("package", "version"),
    [
        ("torch", "2.13.0"),
        ("torch", "2.13.0+cu130"),
        ("torch", "2.10.1"),
        ("lightning", "2.6.2"),
        ("lightning", "2.6.3"),
        ("lightning", "2.5.9"),
        ("pillow", "12.9.9"),
    ],
)
def test_known_bad_versions_are_named_with_a_way_out(package: str, version: str) -> None:
    fault = version_fault(package, version)
    assert fault is not None
    assert version in fault[0]
    assert "pip install" in fault[1]


@pytest.mark.parametrize(
    ("package", "version"), [("torch", "2.14.0+cpu"), ("lightning", "2.6.6"), ("pillow", "13.0.0")]
)
def test_good_versions_pass(package: str, version: str) -> None:
    assert version_fault(package, version) is None


def test_a_bad_version_fails_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    real = machine.version
    monkeypatch.setattr(machine, "version", lambda name: "2.6.3" if name == "lightning" else real(name))
    verdict = check_versions()
    assert verdict.status == "failed"
    assert "malicious" in verdict.found
    assert "credential" in verdict.way_out


def test_a_check_that_breaks_has_failed_and_names_the_reason() -> None:
    def breaks() -> Verdict:
        raise OSError("no such device")

    def refuses() -> Verdict:
        raise DataError("shard a.tar is damaged")

    assert run_check("x", breaks) == Verdict(
        "x", "failed", "OSError: no such device", "This check could not be carried out."
    )
    assert run_check("x", refuses).found == "shard a.tar is damaged"


def test_a_disk_is_measured_and_left_as_it_was(tmp_path: Path) -> None:
    verdict = check_disk(tmp_path / "not" / "yet" / "made")
    assert verdict.status in ("ok", "warning")
    assert "MB/s" in verdict.found
    assert list(tmp_path.iterdir()) == []


def test_a_disk_without_room_for_the_run_fails(tmp_path: Path) -> None:
    verdict = check_disk(tmp_path, needed_bytes=2**60)
    assert verdict.status == "failed"
    assert "trainer.default_root_dir" in verdict.way_out


def test_too_little_shared_memory_fails(tmp_path: Path) -> None:
    verdict = check_shared_memory(needed_bytes=2**60, folder=tmp_path)
    assert verdict.status == "failed"
    assert "--shm-size" in verdict.way_out


def test_bfloat16_asked_for_where_it_is_slow_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "measured_tflops", lambda device, dtype, side: 1.0 if dtype == torch.float32 else 0.1)
    assert check_precision("bf16-mixed").status == "warning"
    assert check_precision("32-true").status == check_precision(None).status == "ok"


def test_weights_are_found_and_hashed(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"weights")
    digest = hashlib.sha256(b"weights").hexdigest()
    good = check_weights("teacher t", {"weights": str(file), "sha256": digest}, hash_all=False)
    assert good.status == "ok"
    assert digest[:16] in good.found
    bad = check_weights("teacher t", {"weights": str(file), "sha256": "0" * 64}, hash_all=False)
    assert bad.status == "failed"
    assert "damaged" in bad.way_out


@pytest.mark.parametrize(
    ("weights", "status"),
    [("random", "ok"), ("pretrained", "warning"), ("/no/such/file.safetensors", "failed")],
)
def test_each_kind_of_weights_has_its_verdict(weights: str, status: str) -> None:
    assert check_weights("student s", {"weights": weights}, hash_all=False).status == status


def test_weights_inside_a_package_are_found() -> None:
    assert find_weights("package:timm/version.py") is not None
    assert find_weights("package:timm/nothing.bin") is None
    assert find_weights("package:no_such_package/x") is None


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_self_test_trains_resumes_and_ends_bit_for_bit() -> None:
    verdicts = training.check_training()
    assert [(v.check, v.status) for v in verdicts] == [("two-step run", "ok"), ("resume", "ok")], verdicts


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_resumed_run_that_takes_another_course_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert training.check_two_steps(tmp_path).status == "ok"
    real = training.train

    def astray(recipe: Path, run_dir: Path, steps: int, *more: str) -> None:
        real(recipe, run_dir, steps, *more, "--trainer.gradient_clip_val=0.0001")

    monkeypatch.setattr(training, "train", astray)
    assert training.check_resume(tmp_path).status != "ok"


def test_a_failure_makes_the_command_exit_1_after_all_checks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failed = Verdict("versions", "failed", "torch 2.13.0", "install another")
    monkeypatch.setattr(verb, "check_versions", lambda: failed)
    monkeypatch.setattr(verb, "check_precision", lambda wanted: Verdict("precision", "ok", ""))
    with pytest.raises(SystemExit) as stop:
        main(["doctor", "--train", "false", "--run_dir", str(tmp_path), "--json", str(tmp_path / "verdicts.json")])
    assert stop.value.code == 1
    out = capsys.readouterr().out
    assert "install another" in out
    assert "1 failed" in out
    checks = json.loads((tmp_path / "verdicts.json").read_text())["checks"]
    assert [check["check"] for check in checks][-1] == "shared memory"
    assert checks[0]["status"] == "failed"
