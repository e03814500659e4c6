"""What the report claims follows from the paired intervals, in both directions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from distill.errors import DataError
from distill.probe.number_text import count_text, interval_text, score_text, short_count_text
from distill.probe.results import Paired
from distill.probe.results_file import read_probe
from distill.report.verdict import Verdict, honest_verdict, judge

DOMAINS = ("natural", "ocr")
GOOD = (0.10, 0.05, 0.15, "better")
EVEN = (0.01, -0.04, 0.06, "not distinguishable")
BAD = (-0.10, -0.15, -0.05, "worse")

Figures = tuple[float, float, float, str]


def paired(metric: str, scope: str, figures: Figures, *, swapped: bool = False) -> dict[str, Any]:
    difference, low, high, verdict = figures
    entry = {"metric": metric, "scope": scope, "a": "s", "b": "s (initial)", "n": 40, "verdict": verdict}
    if swapped:
        opposite = {"better": "worse", "worse": "better"}.get(verdict, verdict)
        entry |= {"a": "s (initial)", "b": "s", "verdict": opposite}
        difference, low, high = -difference, -high, -low
    return {**entry, "difference": difference, "low": low, "high": high}


def encoder(name: str, role: str) -> dict[str, Any]:
    return {"name": name, "role": role, "embed_dim": 8, "num_params": 10, "linear": None, "knn": None, "fidelity": None}


def judged(tmp_path: Path, entries: list[dict[str, Any]]) -> Verdict:
    file = tmp_path / "probe.json"
    encoders = [encoder("s (initial)", "initial"), encoder("s", "student"), encoder("t", "teacher")]
    content = {"format": "distill-probe/1", "data": {"domains": list(DOMAINS)}, "encoders": encoders, "paired": entries}
    file.write_text(json.dumps(content))
    return judge(read_probe(file))[0]


def entries(fidelity: dict[str, Figures], linear: Figures, knn: Figures = GOOD, **kwargs: bool) -> list[dict[str, Any]]:
    found = [paired("cosine_centred", scope, figures, **kwargs) for scope, figures in fidelity.items()]
    found.append(paired("linear_top1", "overall", linear, **kwargs))
    return [*found, paired("knn_top1", "overall", knn, **kwargs)]


def test_a_student_better_in_every_domain_and_in_accuracy_beats_its_initialisation(tmp_path: Path) -> None:
    verdict = judged(tmp_path, entries(dict.fromkeys(DOMAINS, GOOD), GOOD))
    assert verdict.outcome == "yes"
    assert verdict.heading == (
        "The distilled student beats its initialisation in fidelity in every domain and in linear-probe "
        "accuracy overall."
    )
    assert "+10.0 points [5.0,\u00a015.0] (n = 40)" in verdict.claims[1].text


def test_one_domain_that_cannot_be_told_apart_denies_the_claim_and_is_named(tmp_path: Path) -> None:
    verdict = judged(tmp_path, entries({"natural": GOOD, "ocr": EVEN}, GOOD))
    assert verdict.outcome == "no"
    assert verdict.heading.startswith(
        "The distilled student beats its initialisation in linear-probe accuracy overall,"
    )
    assert verdict.heading.endswith("but not in fidelity in every domain.")
    assert "better in natural; not distinguishable in ocr" in verdict.claims[0].text


def test_accuracy_within_the_interval_is_not_called_a_gain(tmp_path: Path) -> None:
    verdict = judged(tmp_path, entries(dict.fromkeys(DOMAINS, GOOD), EVEN))
    assert verdict.outcome == "no"
    assert "cannot be told from that of the initialisation" in verdict.claims[1].text
    assert "but not in linear-probe accuracy overall" in verdict.heading


def test_a_loss_of_accuracy_is_said(tmp_path: Path) -> None:
    verdict = judged(tmp_path, entries(dict.fromkeys(DOMAINS, BAD), BAD))
    assert verdict.heading == (
        "The distilled student does not beat its initialisation in fidelity in every domain or in linear-probe "
        "accuracy overall."
    )
    assert "fell by more than the 95\u00a0% interval: \u221210.0 points" in verdict.claims[1].text


def test_knn_is_reported_but_decides_nothing(tmp_path: Path) -> None:
    verdict = judged(tmp_path, entries(dict.fromkeys(DOMAINS, GOOD), GOOD, knn=BAD))
    assert verdict.outcome == "yes"
    assert verdict.claims[2].outcome == "no"


@pytest.mark.parametrize(("figures", "outcome"), [(GOOD, "yes"), (EVEN, "no"), (BAD, "no")])
def test_the_order_of_the_pair_does_not_change_the_verdict(tmp_path: Path, figures: Figures, outcome: str) -> None:
    straight = judged(tmp_path, entries(dict.fromkeys(DOMAINS, figures), figures))
    swapped = judged(tmp_path, entries(dict.fromkeys(DOMAINS, figures), figures, swapped=True))
    assert straight == swapped
    assert straight.outcome == outcome


def test_a_verdict_that_its_interval_contradicts_is_not_repeated(tmp_path: Path) -> None:
    boast = (0.10, -0.05, 0.25, "better")
    assert judged(tmp_path, entries(dict.fromkeys(DOMAINS, boast), boast)).outcome == "no"


def test_a_domain_that_was_not_measured_leaves_the_claim_open(tmp_path: Path) -> None:
    verdict = judged(tmp_path, entries({"natural": GOOD}, GOOD))
    assert verdict.outcome == "unknown"
    assert "not measured in ocr" in verdict.claims[0].text


def test_without_comparisons_nothing_is_claimed(tmp_path: Path) -> None:
    verdict = judged(tmp_path, [])
    assert verdict.outcome == "unknown"
    assert verdict.heading == "Whether s beats its initialisation is not known."


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "has the format None"),
        ('{"format": "distill-probe/9"}', "'distill-probe/9'"),
        ('{"format": "distill-probe/1", "data": {}, "encoders": [{}]}', "does not hold what"),
        ('{"format": "distill-probe/1", "data": {}, "encoders": 3}', "does not hold what"),
    ],
)
def test_a_probe_file_that_cannot_be_used_is_refused_with_the_way_out(
    tmp_path: Path, content: str, message: str
) -> None:
    file = tmp_path / "probe.json"
    file.write_text(content)
    with pytest.raises(DataError, match="Run `distill probe` again") as error:
        read_probe(file)
    assert message in str(error.value)


def test_numbers_are_written_as_a_reader_expects() -> None:
    assert score_text("accuracy", 0.6125) == "61.3"
    assert score_text("cosine", -0.5) == "\u22120.500"
    assert score_text("cka", None) == "\u2013"
    assert interval_text("accuracy", 0.1, None) == ""
    assert count_text(304_012_288) == "304,012,288"
    assert short_count_text(5_536_496_000) == "5.54\u202fB"


def test_a_verdict_that_its_interval_does_not_bear_out_is_weakened_in_either_direction() -> None:
    def entry(low: float, high: float, verdict: str) -> Paired:
        return Paired("m", "overall", "a", "b", (low + high) / 2, low, high, 9, verdict)

    assert honest_verdict(entry(0.1, 0.3, "better")) == "better"
    assert honest_verdict(entry(-0.1, 0.3, "better")) == "not distinguishable"
    # Fewer errors are better: the difference lies below zero.
    assert honest_verdict(entry(-0.3, -0.1, "better"), lower_is_better=True) == "better"
    assert honest_verdict(entry(0.1, 0.3, "worse"), lower_is_better=True) == "worse"
    assert honest_verdict(entry(0.1, 0.3, "better"), lower_is_better=True) == "not distinguishable"
