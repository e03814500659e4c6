"""An export appears complete or not at all, and nothing of the user's is overwritten by mistake."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from distill.errors import ExportError
from distill.export.files import MANIFEST_FILE, staged, write_json, write_safetensors


@contextmanager
def file_size_limit(size_bytes: int) -> Iterator[None]:
    """Let the system refuse longer files, as it does when a disk is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def publish(out: Path, text: str, *, overwrite: bool = False) -> None:
    with staged(out, overwrite=overwrite) as directory:
        write_json(directory / MANIFEST_FILE, {"text": text})


def test_an_export_appears_with_its_parents_when_the_block_ends(tmp_path: Path) -> None:
    out = tmp_path / "a" / "b"
    with staged(out, overwrite=False) as directory:
        write_json(directory / MANIFEST_FILE, {})
        assert not out.exists()
        assert directory.parent == out.parent  # one file system, so that taking its place is one rename
    assert [path.name for path in out.iterdir()] == [MANIFEST_FILE]
    assert [path.name for path in out.parent.iterdir()] == ["b"]


def test_a_failure_leaves_nothing_behind_not_even_new_parents(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="no"), staged(tmp_path / "a" / "b", overwrite=False) as directory:
        (directory / "half").write_text("x")
        raise ExportError("no")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_export_is_replaced_only_when_asked(tmp_path: Path) -> None:
    out = tmp_path / "out"
    publish(out, "first")
    with pytest.raises(ExportError, match="holds an export already.*--overwrite"):
        publish(out, "second")
    assert "first" in (out / MANIFEST_FILE).read_text()
    publish(out, "second", overwrite=True)
    assert "second" in (out / MANIFEST_FILE).read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_export_survives_the_failure_of_its_replacement(tmp_path: Path) -> None:
    out = tmp_path / "out"
    publish(out, "first")
    with pytest.raises(ExportError), staged(out, overwrite=True):
        raise ExportError("the second failed")
    assert "first" in (out / MANIFEST_FILE).read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_that_is_no_export_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ExportError, match="exists and is no export"):
        publish(tmp_path, "x", overwrite=True)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_an_empty_folder_may_be_filled(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    publish(out, "x")
    assert (out / MANIFEST_FILE).is_file()


def test_a_place_that_cannot_be_written_is_named_with_its_cause(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ExportError, match=r"out could not be written: Not a directory\. Free space there or give"):
        publish(tmp_path / "file" / "out", "x")


def test_a_full_disk_is_an_error_that_leaves_nothing(tmp_path: Path) -> None:
    with (
        pytest.raises(ExportError, match=r"model\.safetensors could not be written: .*Free space"),
        file_size_limit(10_000),
        staged(tmp_path / "out", overwrite=False) as directory,
    ):
        write_safetensors(directory / "model.safetensors", {"weight": torch.zeros(100, 100)})
    assert list(tmp_path.iterdir()) == []


def test_weights_may_be_read_by_whoever_may_read_the_directory(tmp_path: Path) -> None:
    old = os.umask(0o022)
    try:
        with staged(tmp_path / "out", overwrite=False) as directory:
            write_safetensors(directory / "model.safetensors", {"weight": torch.zeros(2)})
            write_json(directory / MANIFEST_FILE, {})
    finally:
        os.umask(old)
    assert (tmp_path / "out" / "model.safetensors").stat().st_mode & 0o777 == 0o644


def test_a_value_that_is_no_json_is_an_error_of_ours(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"config\.json cannot be written as JSON"):
        write_json(tmp_path / "config.json", {"value": float("nan")})
