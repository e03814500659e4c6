"""How close is close enough: differences, cosines, and where float32 itself is coarser than the bound."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from distill.encoder import Layer
from distill.errors import ConfigError, ExportError
from distill.export import fresh_process
from distill.export.compare import allowed_difference, compare_features
from distill.export.contract import TOLERANCE, Bound, install_command
from distill.export.golden import Golden, Preprocessing
from distill.export.targets import TARGETS, find_target

PREPROCESSING = Preprocessing(4, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
EXACT, BY_COSINE = Bound(absolute=TOLERANCE), Bound(cosine=0.9999)


def golden(scale: float = 1.0) -> Golden:
    generator = torch.Generator().manual_seed(0)
    layers: list[Layer] = [
        (torch.randn(1, 1, 8, generator=generator) * scale, torch.randn(1, 2, 2, 8, generator=generator) * scale)
        for _ in range(2)
    ]
    return Golden("timm", PREPROCESSING, torch.zeros(3, 4, 4, dtype=torch.uint8), layers)


def answer(reference: Golden, variant: str = "float32") -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for position, (prefix, patches) in enumerate(reference.layers):
        tensors[f"{variant}.{position}.prefix"], tensors[f"{variant}.{position}.patches"] = (
            prefix.clone(),
            patches.clone(),
        )
    return tensors


def test_equal_features_differ_by_nothing() -> None:
    closeness = compare_features(golden(), answer(golden()), "float32", EXACT, "it")
    assert (closeness.worst_difference, closeness.tolerance) == (0.0, TOLERANCE)
    assert closeness.min_cosine == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("place", ["0.prefix", "1.prefix", "0.patches", "1.patches"])
def test_one_feature_beyond_the_bound_is_refused_with_its_place_and_number(place: str) -> None:
    got = answer(golden())
    got[f"float32.{place}"].view(-1)[3] += 2e-4
    layer, name = int(place[0]) - 2, place[2:]
    with pytest.raises(
        ExportError, match=rf"it \(float32\) gives other .*: layer {layer}, {name} tokens differ by 0\.0002"
    ):
        compare_features(golden(), got, "float32", EXACT, "it")


def test_the_bound_grows_with_features_that_float32_cannot_tell_apart_more_finely() -> None:
    assert allowed_difference(TOLERANCE, 10.0) == TOLERANCE
    assert allowed_difference(TOLERANCE, 400.0) == pytest.approx(400 * 2**-20)
    large = golden(scale=1000.0)
    got = answer(large)
    got["float32.1.patches"].view(-1)[0] += 5e-4
    assert compare_features(large, got, "float32", EXACT, "it").worst_difference > TOLERANCE


def test_a_cosine_bound_lets_small_errors_pass_and_refuses_one_token_of_another_direction() -> None:
    got = answer(golden(), "q8_0")
    got["q8_0.1.patches"] += 1e-3
    closeness = compare_features(golden(), got, "q8_0", BY_COSINE, "it")
    assert closeness.tolerance is None
    assert 0.9999 <= closeness.min_cosine < 1
    got["q8_0.1.patches"][0, 1, 1] = got["q8_0.1.patches"][0, 0, 0]
    with pytest.raises(ExportError, match=r"patches tokens have a cosine of .* at least 0\.9999 is asked for"):
        compare_features(golden(), got, "q8_0", BY_COSINE, "it")


@pytest.mark.parametrize("bound", [EXACT, BY_COSINE])
def test_features_that_are_not_a_number_are_refused(bound: Bound) -> None:
    got = answer(golden())
    got["float32.0.patches"].view(-1)[0] = float("nan")
    with pytest.raises(ExportError, match="other features"):
        compare_features(golden(), got, "float32", bound, "it")


def test_another_shape_is_refused_with_both() -> None:
    got = answer(golden())
    got["float32.0.patches"] = got["float32.0.patches"][:, :1]
    with pytest.raises(ExportError, match=r"of shape \(1, 1, 2, 8\), the encoder \(1, 2, 2, 8\)"):
        compare_features(golden(), got, "float32", EXACT, "it")


def test_a_bound_that_bounds_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="lets everything pass"):
        Bound()


def test_a_consumer_in_a_folder_of_its_own_counts_as_installed_and_comes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Elsewhere:
        FORMAT, REQUIRES, EXTRA, CONSUMER_FOLDER = "else", ("consumer_of_no_one",), "export", "else-1.0"

    target: object = Elsewhere()
    with pytest.raises(ConfigError, match=r"consumer_of_no_one, which is not installed\. Run: pip install"):
        fresh_process.require_consumer(target)  # type: ignore[arg-type]
    (tmp_path / "else-1.0" / "consumer_of_no_one").mkdir(parents=True)
    monkeypatch.setattr(fresh_process, "CONSUMERS_ROOT", tmp_path)
    fresh_process.require_consumer(target)  # type: ignore[arg-type]
    first, second, *_ = fresh_process._environment("else-1.0")["PYTHONPATH"].split(":")
    assert (first, second) == (str(tmp_path / "else-1.0"), str(fresh_process.PACKAGE_ROOT))


def test_every_target_says_how_its_consumer_is_installed() -> None:
    for name in TARGETS:
        assert install_command(find_target(name)).startswith(("pip install", "bash scripts/"))
