"""The wheel holds the three packages and nothing else; the versions it asks for leave the known-bad ones out."""

from __future__ import annotations

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    pytest.importorskip("hatchling")
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(out)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return zipfile.ZipFile(next(out.glob("*.whl")))


def test_the_wheel_holds_exactly_the_three_packages_and_its_metadata(wheel: zipfile.ZipFile) -> None:
    tops = {name.split("/")[0] for name in wheel.namelist()}
    metadata = {top for top in tops if top.endswith(".dist-info")}
    assert tops - metadata == {"distill", "teachers", "students"}
    assert len(metadata) == 1
    assert next(iter(metadata)).startswith("encoder_distill-")


def test_the_wheel_holds_every_module_and_no_weights_or_images(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    for package in ("distill", "teachers", "students"):
        for file in (ROOT / package).rglob("*.py"):
            assert str(file.relative_to(ROOT)) in names
    kinds = {Path(name).suffix for name in names if ".dist-info" not in name}
    assert kinds <= {".py", ".j2", ".css", ".js"}


def test_the_wheel_installs_the_command_and_carries_the_licence(wheel: zipfile.ZipFile) -> None:
    info = next(name for name in wheel.namelist() if name.endswith("entry_points.txt"))
    assert "distill = distill.cli:main" in wheel.read(info).decode()
    assert any(name.endswith("licenses/LICENSE") for name in wheel.namelist())


@pytest.mark.parametrize(
    ("name", "version"), [("lightning", "2.6.2"), ("lightning", "2.6.3"), ("torch", "2.13.0"), ("pillow", "12.9.9")]
)
def test_known_bad_versions_are_excluded(name: str, version: str) -> None:
    requirement = next(r for r in map(Requirement, PROJECT["dependencies"]) if r.name == name)
    assert not requirement.specifier.contains(version)


def test_constraints_name_exact_versions_and_no_address() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert pins
    for pin in pins:
        requirement = Requirement(pin)
        assert [spec.operator for spec in requirement.specifier] == ["=="]
        assert requirement.url is None
