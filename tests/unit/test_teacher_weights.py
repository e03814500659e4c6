from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from teachers.sources import resolve_path
from teachers.weights import load_strictly, read_state_dict, weights_sha256


class Dangerous:
    """Unpickles by creating a file: what a hostile checkpoint could do."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.touch, (self.target,)


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".safetensors"])
def test_plain_tensors_are_read_from_every_kind_of_file(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"weights{suffix}"
    tensors = {"a.weight": torch.arange(3.0), "b": torch.ones(2, 2)}
    save_file(tensors, path) if suffix == ".safetensors" else torch.save(tensors, path)
    read = read_state_dict(path)
    assert set(read) == {"a.weight", "b"}
    assert torch.equal(read["a.weight"], torch.arange(3.0))


def test_the_name_that_data_parallel_training_puts_in_front_is_taken_off(tmp_path: Path) -> None:
    torch.save({"module.a": torch.ones(1)}, tmp_path / "run.pth")
    assert list(read_state_dict(tmp_path / "run.pth")) == ["a"]


@pytest.mark.parametrize("wrapper", ["state_dict", "model"])
def test_a_training_checkpoint_is_unwrapped(tmp_path: Path, wrapper: str) -> None:
    torch.save({"epoch": 3, wrapper: {"a": torch.ones(1)}}, tmp_path / "run.pth")
    assert list(read_state_dict(tmp_path / "run.pth")) == ["a"]


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_only_the_part_under_the_prefix_is_read(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"clip{suffix}"
    tensors = {"visual.proj": torch.ones(1), "logit_scale": torch.zeros(1)}
    save_file(tensors, path) if suffix == ".safetensors" else torch.save(tensors, path)
    assert list(read_state_dict(path, prefix="visual.")) == ["proj"]


def test_a_checkpoint_that_would_run_code_is_refused_and_runs_none(tmp_path: Path) -> None:
    target = tmp_path / "created"
    torch.save({"a": Dangerous(target)}, tmp_path / "bad.pth")
    with pytest.raises(ValueError, match=r"bad\.pth.*safetensors"):
        read_state_dict(tmp_path / "bad.pth")
    assert not target.exists()


def test_a_truncated_pickle_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "cut.pth"
    torch.save({"a": torch.ones(1000)}, path)
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(ValueError, match=r"cut\.pth.*download"):
        read_state_dict(path)


@pytest.mark.parametrize("content", [[1, 2], {}, {"a": "text"}])
def test_a_pickle_without_named_tensors_is_refused(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "odd.pth")
    with pytest.raises(ValueError, match=r"odd\.pth"):
        read_state_dict(tmp_path / "odd.pth")


def test_an_unknown_suffix_is_refused(tmp_path: Path) -> None:
    (tmp_path / "weights.npz").touch()
    with pytest.raises(ValueError, match=r"weights\.npz.*\.safetensors"):
        read_state_dict(tmp_path / "weights.npz")


def test_strict_loading_names_missing_unexpected_and_misshapen_tensors() -> None:
    layer, source = nn.Linear(2, 3), Path("some.safetensors")
    good = {"weight": torch.ones(3, 2), "bias": torch.zeros(3)}
    load_strictly(layer, good, source)
    assert torch.equal(layer.weight, torch.ones(3, 2))
    with pytest.raises(ValueError, match=r"some\.safetensors: tensor 'bias' is missing"):
        load_strictly(layer, {"weight": torch.ones(3, 2)}, source)
    with pytest.raises(ValueError, match=r"some\.safetensors: tensor 'scale' is unexpected"):
        load_strictly(layer, good | {"scale": torch.ones(1)}, source)
    with pytest.raises(ValueError, match=r"some\.safetensors: tensor 'bias' has shape \(1,\)"):
        load_strictly(layer, good | {"bias": torch.zeros(1)}, source)


def test_the_checksum_of_a_file_is_the_standard_one(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"weights")
    assert weights_sha256(path) == hashlib.sha256(b"weights").hexdigest()


def test_the_checksum_of_a_directory_follows_contents_and_ignores_notes(tmp_path: Path) -> None:
    for name in ("a.safetensors", "b.safetensors", "config.json"):
        (tmp_path / name).write_text(name)
    before = weights_sha256(tmp_path)
    (tmp_path / "README.md").write_text("notes")
    assert weights_sha256(tmp_path) == before
    (tmp_path / "b.safetensors").write_text("other")
    assert weights_sha256(tmp_path) != before


def test_a_directory_without_weights_has_no_checksum(tmp_path: Path) -> None:
    (tmp_path / "config.json").touch()
    with pytest.raises(FileNotFoundError, match="no weight file"):
        weights_sha256(tmp_path)


def test_a_file_in_a_package_is_found_without_importing_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "some_weights"
    (package / "models").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "models" / "w.pth").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert resolve_path("package:some_weights/models/w.pth") == package / "models" / "w.pth"
    with pytest.raises(FileNotFoundError, match=r"absent\.pth"):
        resolve_path("package:some_weights/absent.pth")
    with pytest.raises(FileNotFoundError, match="no package 'no_such_package'"):
        resolve_path("package:no_such_package/w.pth")
