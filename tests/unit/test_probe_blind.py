"""What a guess scores that never looks at the image."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from distill.errors import ConfigError
from distill.probe.blind import commonest_class_accuracy, constant_text_error
from distill.probe.ocr import edit_distances
from distill.probe.run import probe


def test_the_class_is_learnt_where_one_learns_and_scored_where_one_scores() -> None:
    targets = np.asarray([2, 2, 1, 1, 1, 0, 2, 1])
    assert commonest_class_accuracy(targets, np.arange(3), np.arange(3, 8)) == pytest.approx(1 / 5)
    assert commonest_class_accuracy(targets, np.arange(5), np.arange(5, 8)) == pytest.approx(1 / 3)


def test_the_best_constant_text_is_found_among_its_kinds() -> None:
    assert constant_text_error(["abc", "abc", "zzz"], ["abc", "abd"], edit_distances) == pytest.approx(1 / 6)
    assert constant_text_error(["7", "7177", "7277"], ["777", "7"], edit_distances) == pytest.approx(2 / 4)
    unlike = [chr(65 + i) * 9 for i in range(20)]
    assert constant_text_error(unlike[:10], unlike[10:], edit_distances) == 1.0


def test_text_lines_without_the_rung_that_reads_them_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--text_lines .*for the rung ocr"):
        probe("nowhere", data=str(tmp_path), text_lines=tmp_path / "a.jsonl", rungs=["knn"], out=tmp_path / "p.json")
