from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from distill import checkpoint_files
from distill.callbacks.checkpoint_io import AtomicCheckpointIO
from distill.checkpoint import newest_verified, read_checkpoint
from distill.checkpoint_files import LEFTOVER, manifest_path, read_manifest, storage_bytes, sweep, verify
from distill.errors import ConfigError, WeightsError
from distill.resume import resume_from, set_earlier_run_aside

IO = AtomicCheckpointIO()


def state(step: int, count: int = 1000) -> dict[str, Any]:
    training = {"optimizer_states": [], "loops": {}}
    return {"state_dict": {"a": torch.full((count,), float(step))}, "global_step": step, "epoch": 0, **training}


def save(folder: Path, step: int, name: str = "last.ckpt", count: int = 1000) -> Path:
    IO.save_checkpoint(state(step, count), folder / name)
    return folder / name


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))


def test_a_save_leaves_the_file_its_manifest_the_one_before_and_nothing_else(tmp_path: Path) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2)
    names = {"last.ckpt", "previous.ckpt"}
    assert {file.name for file in tmp_path.iterdir()} == names | {f"{name}.manifest.json" for name in names}
    entry = verify(tmp_path / "last.ckpt")
    assert (entry.global_step, entry.bytes) == (2, (tmp_path / "last.ckpt").stat().st_size)
    assert entry.versions.keys() == {"distill", "lightning", "torch", "python"}
    assert verify(tmp_path / "previous.ckpt").global_step == 1
    assert read_checkpoint(tmp_path / "previous.ckpt")["state_dict"]["a"][0] == 1


def test_where_the_file_system_has_no_hard_links_the_one_before_is_kept_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*words: object) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    for step in (1, 2, 3):
        save(tmp_path, step)
    assert verify(tmp_path / "last.ckpt").global_step == 3
    assert verify(tmp_path / "previous.ckpt").global_step == 2


@pytest.mark.parametrize("has_links", [True, False])
def test_a_crash_before_any_rename_sync_or_link_of_a_save_leaves_a_checkpoint_that_verifies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, has_links: bool
) -> None:
    class Crash(BaseException):
        """As sudden as a kill: no handler cleans up (the temporaries are looked at apart)."""

    calls, limit = 0, 0

    def counted(real: Any) -> Any:
        def call(*words: Any, **more: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == limit:
                raise Crash
            return real(*words, **more)

        return call

    monkeypatch.setattr(Path, "replace", counted(Path.replace))
    monkeypatch.setattr(os, "fsync", counted(os.fsync))
    link = counted(os.link)
    monkeypatch.setattr(os, "link", link if has_links else counted(lambda *words: (_ for _ in ()).throw(OSError())))
    step, crashes = 2, 0
    save(tmp_path, 0)
    save(tmp_path, 1)
    while True:
        calls, limit = 0, crashes + 1
        try:
            save(tmp_path, step)
        except Crash:
            crashes += 1
        else:
            break
        calls, limit = 0, 0
        found, _ = newest_verified(tmp_path)
        assert found is not None, f"crash at call {crashes}"
        assert verify(found).global_step in (step - 1, step - 2, step), f"crash at call {crashes}"
        calls, limit = 0, 0
        save(tmp_path, step)
        step += 1
    assert crashes >= 10


def test_the_manifest_lists_both_files_before_the_new_one_takes_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1)
    seen: list[list[int]] = []
    replace = Path.replace

    def spy(own: Path, target: Any) -> Path:
        if Path(target).name == "last.ckpt":
            seen.append([entry.global_step for entry in read_manifest(tmp_path / "last.ckpt")])
        return replace(own, target)

    monkeypatch.setattr(Path, "replace", spy)
    save(tmp_path, 2)
    assert seen == [[2, 1]]
    assert [entry.global_step for entry in read_manifest(tmp_path / "last.ckpt")] == [2]


@pytest.mark.slow
def test_a_save_holds_no_second_copy_of_the_state_in_memory(tmp_path: Path) -> None:
    code = f"""
import resource, torch
from pathlib import Path
from distill.callbacks.checkpoint_io import AtomicCheckpointIO
io = AtomicCheckpointIO()
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
tensor = torch.ones(20_000_000)
io.save_checkpoint({{"state_dict": {{"a": tensor[:10]. clone()}}}}, Path({str(tmp_path)!r}) / "small.ckpt")
before = peak()
io.save_checkpoint({{"state_dict": {{"a": tensor}}}}, Path({str(tmp_path)!r}) / "large.ckpt")
print(peak() - before)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300)
    assert float(result.stdout) < 40  # MiB; the state has 76


@pytest.mark.parametrize("damage", ["bit", "truncated", "empty", "no manifest", "bad manifest", "older bytes"])
def test_a_damaged_checkpoint_is_passed_over_with_the_reason_and_the_one_before_is_taken(
    tmp_path: Path, damage: str
) -> None:
    folder = tmp_path / "checkpoints"
    save(folder, 1)
    last = save(folder, 2)
    if damage == "bit":
        flip_a_bit(last)
    elif damage == "truncated":
        os.truncate(last, last.stat().st_size - 100)
    elif damage == "empty":
        last.write_bytes(b"")
    elif damage == "no manifest":
        manifest_path(last).unlink()
    elif damage == "bad manifest":
        manifest_path(last).write_text("{")
    else:
        last.unlink()  # `previous.ckpt` may be the same file by a second name
        shutil.copyfile(folder / "previous.ckpt", last)
    point = resume_from(tmp_path, "auto", None)
    assert point is not None
    assert (point.path.name, point.global_step) == ("previous.ckpt", 1)
    assert "last.ckpt" in point.notices[0]
    assert "Passed over" in point.notices[0]


@pytest.mark.parametrize("damage", ["bit", "truncated"])
def test_reading_a_damaged_checkpoint_names_the_older_one_to_use(tmp_path: Path, damage: str) -> None:
    save(tmp_path, 1)
    last = save(tmp_path, 2)
    if damage == "bit":
        flip_a_bit(last)
    else:
        os.truncate(last, 1000)
    with pytest.raises(WeightsError, match=r"damaged.*Use .*previous\.ckpt instead.*step 1"):
        read_checkpoint(last)
    with pytest.raises(WeightsError, match=r"previous\.ckpt instead"):
        resume_from(tmp_path, "no", last)


def test_a_checkpoint_altered_after_it_was_verified_is_read_again(tmp_path: Path) -> None:
    last = save(tmp_path, 1)
    verify(last)
    flip_a_bit(last)
    with pytest.raises(WeightsError, match="damaged"):
        verify(last)


def test_a_damaged_file_never_takes_the_place_of_the_one_before_it(tmp_path: Path) -> None:
    save(tmp_path, 1)
    flip_a_bit(save(tmp_path, 2))
    save(tmp_path, 3)
    assert verify(tmp_path / "last.ckpt").global_step == 3
    assert verify(tmp_path / "previous.ckpt").global_step == 1


def test_resume_auto_passes_over_weights_without_the_state_of_training(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    last = save(folder, 1)
    weights_only = {key: value for key, value in state(5).items() if key not in ("optimizer_states", "loops")}
    IO.save_checkpoint(weights_only, folder / "epoch=0-step=5.ckpt")
    point = resume_from(tmp_path, "auto", None)
    assert point is not None
    assert point.path == last
    assert "step=5.ckpt holds weights only" in point.notices[0]


def test_resume_auto_fails_with_the_list_when_there_are_checkpoints_and_none_verifies(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    save(folder, 1)
    save(folder, 2)
    for name in ("last.ckpt", "previous.ckpt"):
        flip_a_bit(folder / name)
    with pytest.raises(WeightsError, match=r"(?s)none can be used.*last\.ckpt.*previous\.ckpt.*--resume no"):
        resume_from(tmp_path, "auto", None)


def test_resume_auto_begins_anew_where_there_is_no_checkpoint(tmp_path: Path) -> None:
    assert resume_from(tmp_path, "auto", None) is None
    assert resume_from(tmp_path, "no", None) is None


def test_the_checkpoint_of_the_latest_step_is_taken_whatever_its_name_and_time(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    save(folder, 7, "best.ckpt")
    save(folder, 5)
    os.utime(folder / "best.ckpt", (1, 1))
    point = resume_from(tmp_path, "auto", None)
    assert point is not None
    assert point.path.name == "best.ckpt"


def test_a_manifest_that_promises_a_later_step_than_its_file_has_does_not_win(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    save(folder, 7, "best.ckpt")
    old = save(folder, 5).read_bytes()
    present = read_manifest(folder / "last.ckpt")
    save(folder, 9)
    # Cut short between manifest and data: the file is that of step 5.
    checkpoint_files.write_manifest(folder / "last.ckpt", [*read_manifest(folder / "last.ckpt"), *present])
    (folder / "last.ckpt").write_bytes(old)
    (folder / "previous.ckpt").unlink()
    point = resume_from(tmp_path, "auto", None)
    assert point is not None
    assert (point.path.name, point.global_step) == ("best.ckpt", 7)


def test_contradicting_flags_and_urls_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="both given"):
        resume_from(tmp_path, "auto", "some.ckpt")
    for url in ("https://example.org/last.ckpt", "s3://bucket/last.ckpt"):
        with pytest.raises(ConfigError, match="is an URL"):
            resume_from(tmp_path, url, None)
        with pytest.raises(ConfigError, match="is an URL"):
            IO.load_checkpoint(url)
        with pytest.raises(ConfigError, match="is an URL"):
            IO.save_checkpoint(state(1), url)


class Bomb:
    """What a hostile file would hold."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> Any:
        return (Path.touch, (self.proof,))


@pytest.mark.parametrize("is_zip", [True, False])
def test_code_in_a_checkpoint_is_never_executed_even_with_a_manifest_that_fits(tmp_path: Path, *, is_zip: bool) -> None:
    folder, proof = tmp_path / "checkpoints", tmp_path / "executed"
    last = save(folder, 1)
    if is_zip:
        IO.save_checkpoint({**state(2), "bomb": Bomb(proof)}, last)
        assert verify(last).global_step == 2
    else:
        last.write_bytes(pickle.dumps(Bomb(proof)))
        manifest_path(last).unlink()
    for call in (lambda: read_checkpoint(last), lambda: IO.load_checkpoint(last, weights_only=False)):
        with pytest.raises(WeightsError):
            call()
    found, reasons = newest_verified(folder)
    assert found is None or found.name == "previous.ckpt"
    assert reasons
    assert not proof.exists()


def test_a_disk_without_room_is_refused_before_writing_and_what_is_there_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    last = save(tmp_path, 1)
    before = last.read_bytes()
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2_000_000))
    with pytest.raises(WeightsError, match=r"last\.ckpt.*4,000,000 bytes.*5,048,576 bytes.*2,000,000 bytes"):
        save(tmp_path, 2, count=1_000_000)
    assert last.read_bytes() == before
    assert verify(last).global_step == 1
    assert not [file for file in tmp_path.iterdir() if LEFTOVER.match(file.name)]


def test_room_is_reckoned_from_the_tensors_with_shared_ones_counted_once(tmp_path: Path) -> None:
    tensor = torch.zeros(500_000)
    content = {"state_dict": {"a": tensor, "view": tensor[10:20]}, "list": [torch.zeros(7), {"b": (torch.zeros(3),)}]}
    assert storage_bytes(content) == 2_000_000 + 28 + 12
    IO.save_checkpoint(content, tmp_path / "x.ckpt")
    assert 0 < (tmp_path / "x.ckpt").stat().st_size - storage_bytes(content) < checkpoint_files.MANIFEST_MARGIN_BYTES


def test_the_sweep_removes_leftovers_of_dead_processes_and_leaves_those_of_living_ones(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    save(tmp_path, 1)
    kept = [tmp_path / "last.ckpt", manifest_path(tmp_path / "last.ckpt"), tmp_path / f".last.ckpt.{os.getppid()}.tmp"]
    kept[-1].write_bytes(b"half")
    leftovers = [tmp_path / f".{name}.{dead.pid}.tmp" for name in ("last.ckpt", "last.ckpt.manifest.json")]
    for file in leftovers:
        file.write_bytes(b"half")
    assert sweep(tmp_path) == leftovers
    assert sorted(tmp_path.iterdir()) == sorted(kept)


def test_an_earlier_runs_files_move_to_earlier_n_and_are_never_merged(tmp_path: Path) -> None:
    for number in (1, 2):
        save(tmp_path / "checkpoints", number)
        (tmp_path / "metrics.csv").write_text(f"step\n{number}\n")
        for name in ("ledger", "non_finite", "failures", "tensorboard"):
            (tmp_path / name).mkdir()
            (tmp_path / name / "file").write_text(str(number))
        assert set_earlier_run_aside(tmp_path) == tmp_path / f"earlier-{number}"
        assert not (tmp_path / "checkpoints").exists()
    for number in (1, 2):
        folder = tmp_path / f"earlier-{number}"
        assert verify(folder / "checkpoints" / "last.ckpt").global_step == number
        assert (folder / "metrics.csv").read_text() == f"step\n{number}\n"
        for name in ("ledger", "non_finite", "failures", "tensorboard"):
            assert (folder / name / "file").read_text() == str(number)
    assert set_earlier_run_aside(tmp_path) is None


def test_paths_with_spaces_and_other_scripts_work(tmp_path: Path) -> None:
    folder = tmp_path / "läufe 1" / "実験"
    save(folder, 1)
    save(folder, 2)
    found, reasons = newest_verified(folder)
    assert (found, reasons) == (folder / "last.ckpt", [])


def test_a_checkpoint_that_is_removed_takes_its_manifest_along(tmp_path: Path) -> None:
    file = save(tmp_path, 1, "best.ckpt")
    IO.remove_checkpoint(file)
    assert list(tmp_path.iterdir()) == []


def test_the_manifest_is_plain_json(tmp_path: Path) -> None:
    file = save(tmp_path, 3)
    content = json.loads(manifest_path(file).read_text())
    assert content["format"] == 1
    assert content["files"][0]["global_step"] == 3
