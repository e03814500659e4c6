"""What `distill export` prints at its end: a row for each file, and a line for each format that is missing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from distill.export import run, timm_dir
from distill.export.outcome import Exported, NotExported
from distill.export.provenance import Provenance
from distill.export.run import _print_outcome
from distill.export.selection import possible_targets
from distill.export.targets import TARGETS
from distill.export.verify import VariantProof, Verification

EXACT = VariantProof("float32", "encoder.onnx", 2_000_000, 2.5e-7, 1e-4, 0.9999999, None, 12.25)
SMALL = VariantProof("int8", "encoder-int8.onnx", 600_000, 1.5e-2, None, 0.99971, 0.98, None)


def test_every_file_has_a_row_and_every_missing_format_a_reason(capsys: pytest.CaptureFixture[str]) -> None:
    proof = Verification((EXACT, SMALL), 1.0, "InferenceSession of onnxruntime 1", 31.4)
    others = [NotExported("clip-hf", "it is of another layout"), NotExported("timm", "it differs", is_failure=True)]
    _print_outcome([Exported("onnx", Path("/runs/mine/exports/onnx"), 3_000_000, proof)], others)
    printed = capsys.readouterr().out
    for heading in ("target", "precision", "size", "worst difference", "cosine", "latency, batch 1", "verified by"):
        assert heading in printed
    exact, small = (next(line for line in printed.splitlines() if name in line) for name in ("float32", "int8"))
    for cell in ("onnx", "2.0 MB", "2.5e-07", "1.000000", "12.2 ms", "InferenceSession of onnxruntime 1, 31 s"):
        assert cell in exact
    for cell in ("0.6 MB", "1.5e-02", "0.999710", "not timed"):
        assert cell in small
    assert "onnx: /runs/mine/exports/onnx\n" in printed
    assert "left out: clip-hf: it is of another layout\n" in printed
    assert "FAILED: timm: it differs\n" in printed


def test_one_formats_unexpected_error_is_its_own_failure_and_the_others_go_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def publish(encoder: Any, target: Any, place: Path, *rest: Any, **options: Any) -> Exported:
        if target.FORMAT == "gguf":
            raise ValueError("rows of 30 cannot be packed")
        return Exported(target.FORMAT, place, 1, Verification((EXACT,), 1.0, "it", 1.0))

    monkeypatch.setattr(run, "_publish", publish)
    targets = [TARGETS["gguf"], TARGETS["timm"]]
    encoder: Any = None
    places = [tmp_path, tmp_path]
    exported, failed = run._publish_all(encoder, targets, places, Provenance("small"), overwrite=False)
    assert [item.target for item in exported] == ["timm"]
    assert failed == [NotExported("gguf", "ValueError: rows of 30 cannot be packed", is_failure=True)]
    assert "Traceback" in caplog.text


def test_an_unexpected_error_of_a_check_fails_that_format_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def check(encoder: Any) -> None:
        raise KeyError("pos_embed")

    monkeypatch.setattr(timm_dir, "check", check)
    encoder: Any = None
    possible, others = possible_targets(encoder, [TARGETS["timm"]], must_all=False)
    assert (possible, others) == ([], [NotExported("timm", "KeyError: 'pos_embed'", is_failure=True)])
