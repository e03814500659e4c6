from __future__ import annotations

import subprocess
import sys

import pytest

from distill import __version__
from distill.cli import TRAINING_VERBS, VERBS, main


def test_help_lists_every_verb_and_loads_no_torch() -> None:
    code = (
        "import sys\nfrom distill.cli import main\nmain(['--help'])\n"
        "sys.exit('torch' in sys.modules or 'lightning' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    for verb in (*TRAINING_VERBS, *VERBS):
        assert f"  {verb}" in result.stdout


def test_version_is_printed(capsys) -> None:
    main(["--version"])
    assert capsys.readouterr().out.strip() == __version__


def test_an_unknown_verb_is_refused_with_the_list(capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["distil"])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert "unknown verb 'distil'" in error
    assert "export" in error


def test_a_run_that_does_not_exist_is_one_line_and_exit_1(capsys, tmp_path) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["export", str(tmp_path / "nowhere"), "--format", "timm"])
    assert stop.value.code == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "config.yaml is missing" in error
    assert "Traceback" not in error


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_every_verb_explains_itself(verb: str, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        main([verb, "--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert f"distill {verb}" in out
    assert "--" in out
