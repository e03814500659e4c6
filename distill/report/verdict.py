"""What may be claimed: sentences computed from paired differences, none that their interval does not allow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from distill.probe.number_text import difference_text
from distill.probe.results import OVERALL, EncoderScores, Paired, ProbeResults

Outcome = Literal["yes", "no", "unknown"]

FIDELITY = "cosine_centred"
LINEAR = "linear_top1"
KNN = "knn_top1"


@dataclass(frozen=True)
class Claim:
    """One thing the run was meant to show, and whether it did.

    Attributes:
        outcome: "yes" only when the 95 % interval of every difference it needs lies above zero.
        short: a few words for the heading: "in fidelity in every domain".
        text: the sentence with its numbers.
    """

    outcome: Outcome
    short: str
    text: str


@dataclass(frozen=True)
class Verdict:
    """A student's heading and the claims under it."""

    student: str
    outcome: Outcome
    heading: str
    claims: tuple[Claim, ...]


def judge(results: ProbeResults) -> list[Verdict]:
    """Return, for each distilled student, whether it beats its own initialisation.

    The promise has two parts: fidelity in every domain, and linear-probe accuracy overall. kNN accuracy is told beside
    them and decides nothing.
    """
    return [_judge_student(results, student) for student in results.of_role("student")]


def _judge_student(results: ProbeResults, student: EncoderScores) -> Verdict:
    initial = results.initial_of(student.name)
    if initial is None:
        text = "The probe compared it with no initialisation, so nothing can be said about what distillation changed."
        heading = f"Whether {student.name} beats its initialisation is not known."
        return Verdict(student.name, "unknown", heading, (Claim("unknown", "", text),))
    names = (student.name, initial.name)
    fidelity = fidelity_claim(results, *names)
    linear = accuracy_claim(results, *names, LINEAR, "Linear-probe")
    knn = accuracy_claim(results, *names, KNN, "kNN")
    deciding = (fidelity, linear)
    outcomes = {claim.outcome for claim in deciding}
    outcome: Outcome = "no" if "no" in outcomes else "unknown" if "unknown" in outcomes else "yes"
    return Verdict(student.name, outcome, _heading(deciding), (*deciding, knn))


def _heading(claims: Sequence[Claim]) -> str:
    parts = {
        "yes": [claim.short for claim in claims if claim.outcome == "yes"],
        "no": [claim.short for claim in claims if claim.outcome == "no"],
        "unknown": [claim.short for claim in claims if claim.outcome == "unknown"],
    }
    if not parts["yes"] and not parts["no"]:
        return "Whether the distilled student beats its initialisation is not known."
    if parts["yes"]:
        text = "The distilled student beats its initialisation " + " and ".join(parts["yes"])
        text += ", but not " + " and ".join(parts["no"]) if parts["no"] else ""
    else:
        text = "The distilled student does not beat its initialisation " + " or ".join(parts["no"])
    return text + ("; " + " and ".join(parts["unknown"]) + ", it was not measured." if parts["unknown"] else ".")


def fidelity_claim(results: ProbeResults, student: str, initial: str) -> Claim:
    """Return whether fidelity rose in every probed domain by more than the interval."""
    short = "in fidelity in every domain"
    found = {scope: results.comparison(student, initial, FIDELITY, scope) for scope in results.domains}
    entries = {scope: entry for scope, entry in found.items() if entry is not None}
    if not entries:
        return Claim("unknown", "in fidelity", "Fidelity to the teacher was not compared in any domain.")
    by_verdict: dict[str, list[str]] = {}
    for scope, entry in entries.items():
        by_verdict.setdefault(honest_verdict(entry), []).append(scope)
    absent = [scope for scope in found if scope not in entries]
    least = min(entries.values(), key=lambda entry: entry.difference)
    gain = difference_text(results.info(FIDELITY).kind, least.difference, least.low, least.high)
    if set(by_verdict) == {"better"} and not absent:
        text = (
            f"Fidelity to the teacher rose in all {len(entries)} domains by more than the 95\u00a0% interval; "
            f"least in {least.scope}: {gain}."
        )
        return Claim("yes", short, text)
    pieces = [f"{verdict} in {', '.join(scopes)}" for verdict, scopes in by_verdict.items()]
    pieces += [f"not measured in {', '.join(absent)}"] if absent else []
    settled = set(by_verdict) == {"better"}
    text = f"Fidelity to the teacher, by domain: {'; '.join(pieces)}. Smallest difference, in {least.scope}: {gain}."
    return Claim("unknown" if settled else "no", short, text)


def accuracy_claim(results: ProbeResults, student: str, initial: str, metric: str, name: str) -> Claim:
    """Return whether accuracy over all domains together rose by more than the interval."""
    short = f"in {name[0].lower() + name[1:] if name != 'kNN' else name} accuracy overall"
    entry = results.comparison(student, initial, metric, OVERALL)
    if entry is None:
        return Claim("unknown", short, f"{name} accuracy overall was not compared.")
    change = difference_text(results.info(metric).kind, entry.difference, entry.low, entry.high)
    count = "" if entry.n is None else f" (n = {entry.n:,})"
    verdict = honest_verdict(entry)
    if verdict == "better":
        return Claim(
            "yes", short, f"{name} accuracy overall rose by more than the 95\u00a0% interval: {change}{count}."
        )
    if verdict == "worse":
        return Claim("no", short, f"{name} accuracy overall fell by more than the 95\u00a0% interval: {change}{count}.")
    text = f"{name} accuracy overall cannot be told from that of the initialisation: {change}{count}."
    return Claim("no", short, text)


def honest_verdict(entry: Paired, *, lower_is_better: bool = False) -> str:
    """Return the probe's verdict, weakened to "not distinguishable" where the interval does not bear it out."""
    if entry.low is None or entry.high is None:
        return "not distinguishable"
    above, below = ("worse", "better") if lower_is_better else ("better", "worse")
    if entry.verdict == above and entry.low > 0:
        return above
    if entry.verdict == below and entry.high < 0:
        return below
    return "not distinguishable"
