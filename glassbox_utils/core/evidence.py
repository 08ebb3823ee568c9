"""Findings and the evidence ladder: a claim says on which rung it stands, what it was compared with, and the outcome.

1 *observed* (a weight, an active feature) · 2 *localised* (which head, layer, feature, against a control) ·
3 *causal* (ablate, patch, clamp: the behaviour moves, against a random control) · 4 *behavioural* (on held-out
prompts) · 5 *side effects* (what else changed). No rung is jumped: evidence, never proof.

The verdict is computed from the numbers: nobody can call a claim *held* whose interval holds its control's number.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, Self, get_args

from glassbox_utils.core.errors import GlassboxError
from glassbox_utils.core.statistics import Interval

RUNGS = {1: "observed", 2: "localised", 3: "causal", 4: "behavioural", 5: "side effects"}
MIMETYPE = "application/vnd.glassbox.findings+json"
"""under which a ladder keeps its findings in a notebook's output"""

Kind = Literal["random units", "base rate", "shuffled labels", "trained opponent", "other group"]
Verdict = Literal["held", "refuted", "null", "not testable"]
Side = Literal["above", "below", "apart"]


class EvidenceError(GlassboxError, ValueError):
    """A finding that claims more than it can show; the message says what is missing."""


@dataclass(frozen=True)
class Control:
    """What an effect was compared with: a measured thing with a number, in the effect's unit.

    ``random units`` (heads, features, directions of like activity and size) · ``base rate`` (the rate among all
    admissible units, or what chance gives) · ``shuffled labels`` · ``trained opponent`` (another method with the same
    data) · ``other group`` (the same measure where the claim says that nothing should happen).
    """

    kind: Kind
    what: str
    """which ones, in words"""
    value: float
    ci: tuple[float, float] | None = None
    """interval, or lowest and highest draw: needed for random units and shuffled labels"""

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise EvidenceError(f"There is no kind of control {self.kind!r}. Allowed: {', '.join(get_args(Kind))}.")
        if not isinstance(self.what, str) or not self.what.strip():
            raise EvidenceError(f"The control ({self.kind}) is not described. Say in words what was measured.")
        if not _number(self.value):
            raise EvidenceError(f"The control {self.what!r} has the value {self.value!r}. Give its measured number.")
        drawn = self.kind in ("random units", "shuffled labels")
        if self.ci is None and drawn:
            raise EvidenceError(
                f"The control {self.what!r} ({self.kind}) has no spread. Give ci=(low, high): the interval over its "
                "draws, or the lowest and the highest."
            )
        if self.ci is not None and not _ordered(self.ci):
            raise EvidenceError(f"The interval {self.ci} of the control {self.what!r} is not (low, high).")

    @property
    def can_fail(self) -> bool:
        """Random draws that come out the same each time could not have sunk any claim: silent units, an orthogonal
        direction. A finding with such a control is not testable."""
        return self.kind not in ("random units", "shuffled labels") or self.ci is None or self.ci[0] < self.ci[1]

    def __str__(self) -> str:
        spread = "" if self.ci is None else f" [{self.ci[0]:.2f}, {self.ci[1]:.2f}]"
        return f"{self.kind}: {self.what}: {self.value:.2f}{spread}"

    @classmethod
    def measured(cls, kind: Kind, what: str, x: Interval) -> Self:
        """A control whose number is an interval."""
        return cls(kind, what, x.value, (x.low, x.high))

    @classmethod
    def drawn(cls, kind: Kind, what: str, values: Iterable[float]) -> Self:
        """A control that was drawn several times: the mean, with the lowest and the highest draw."""
        draws = [float(x) for x in values]
        if not draws:
            raise EvidenceError(f"The control {what!r} ({kind}) has no draws. Give the number of each.")
        return cls(kind, f"{len(draws)} {what}", sum(draws) / len(draws), (min(draws), max(draws)))


@dataclass(frozen=True)
class Finding:
    """One measured claim. On rung 2 to 5 it can't be built without a typed control that has its own number."""

    claim: str
    rung: int
    effect: float
    """in the unit that the claim names"""
    ci: tuple[float, float]
    n: int
    """how many units were resampled for the interval"""
    control: Control | None = None
    p_value: float | None = None
    source: str = ""
    unit: str = ""
    """what was resampled, in the plural: prompts, name pairs, templates, seeds"""
    side: Side = "apart"
    """where the claim puts the effect: above its control, below it, or just apart from it"""
    null: float | None = 0.0
    """what means no effect: 0 for a change, .5 for an area under a curve, 1 for a ratio; None: no such value"""
    declared: Verdict | None = None
    """a verdict that is more modest than the numbers; ``held`` can't be declared against them"""

    def __post_init__(self) -> None:
        if self.rung not in RUNGS or isinstance(self.rung, bool):
            raise EvidenceError(f"There is no rung {self.rung!r}. Allowed: {RUNGS}.")
        where = f"The finding {self.claim!r}"
        if self.control is not None and not isinstance(self.control, Control):
            raise EvidenceError(
                f"{where} has the control {self.control!r}, which is no measured number. Give a Control: its kind "
                f"({', '.join(get_args(Kind))}), what it was, and its value."
            )
        if self.rung > 1 and self.control is None:
            raise EvidenceError(
                f"{where} stands on rung {self.rung} ({RUNGS[self.rung]}) without a control. Measure what it is "
                f"compared with ({', '.join(get_args(Kind))}), or claim rung 1."
            )
        if not isinstance(self.unit, str) or not self.unit.strip():
            raise EvidenceError(f"{where} names no unit. Say what was resampled: prompts, name pairs, seeds, ...")
        if isinstance(self.n, bool) or not isinstance(self.n, int) or self.n < 1:
            raise EvidenceError(f"{where} has n = {self.n!r}. Give the number of {self.unit}, at least 1.")
        if not _ordered(self.ci) or not _number(self.effect):
            raise EvidenceError(
                f"{where} has the effect {self.effect!r} and the interval {self.ci!r}. Allowed: finite numbers, the "
                "interval as (low, high)."
            )
        if self.side not in get_args(Side):
            raise EvidenceError(f"{where} has the side {self.side!r}. Allowed: {', '.join(get_args(Side))}.")
        if self.declared is not None and self.declared not in get_args(Verdict):
            allowed = ", ".join(get_args(Verdict))
            raise EvidenceError(f"{where} has the verdict {self.declared!r}. Allowed: {allowed}, or None (computed).")
        if self.declared == "held" and self._computed != "held":
            raise EvidenceError(
                f"{where} is declared as held, but its numbers say {self._computed}: {self.effect:g} "
                f"[{self.ci[0]:g}, {self.ci[1]:g}] against {self.control or self.null}."
            )

    @classmethod
    def measured(
        cls, claim: str, rung: int, x: Interval, unit: str, control: Control | None = None, **rest: Any
    ) -> Self:
        """A finding whose number is an interval; ``unit`` is what its bootstrap drew."""
        return cls(claim, rung, x.value, (x.low, x.high), x.n, control, unit=unit, **rest)

    @property
    def verdict(self) -> Verdict:
        """*held*: the interval lies where the claim puts it, beyond the control's number and the null, and the effect
        outside the control's spread · *refuted*: on the other side · *null*: can't be told apart · *not testable*: the
        control came out the same each time, or was declared unfit."""
        return self.declared or self._computed

    @cached_property
    def _computed(self) -> Verdict:
        if self.control is not None and not self.control.can_fail:
            return "not testable"
        if self.p_value is not None and self.p_value >= 0.05:
            return "null"
        low, high = self.ci
        marks = [x for x in (self.null, None if self.control is None else self.control.value) if x is not None]
        spread = None if self.control is None else self.control.ci
        above = all(low > x for x in marks) and (spread is None or self.effect > spread[1])
        below = all(high < x for x in marks) and (spread is None or self.effect < spread[0])
        if self.side == "apart":
            beyond = all(not low <= x <= high for x in marks)
            return "held" if beyond and (spread is None or not spread[0] <= self.effect <= spread[1]) else "null"
        if above if self.side == "above" else below:
            return "held"
        wrong = any(high < x for x in marks) if self.side == "above" else any(low > x for x in marks)
        return "refuted" if wrong else "null"


def _number(x: Any) -> bool:
    return not isinstance(x, bool | str) and x is not None and math.isfinite(x)


def _ordered(ci: Any) -> bool:
    return isinstance(ci, tuple) and len(ci) == 2 and all(map(_number, ci)) and ci[0] <= ci[1]


class Ladder:
    """Findings as a table, verdicts first and nothing cut off; a notebook's output keeps them as JSON too."""

    def __init__(self, findings: Sequence[Finding]) -> None:
        self.findings = sorted(findings, key=lambda f: f.rung)

    def __len__(self) -> int:
        return len(self.findings)

    @property
    def table(self) -> Any:
        """The rows as a pandas DataFrame."""
        import pandas as pd

        return pd.DataFrame([_row(f) for f in self.findings])

    def __repr__(self) -> str:
        return self.table.to_string(index=False)

    def _repr_mimebundle_(self, **_: Any) -> dict[str, Any]:
        import pandas as pd

        with pd.option_context("display.max_colwidth", None):
            html = self.table.to_html(index=False)
        return {"text/plain": repr(self), "text/html": html, MIMETYPE: [_entry(f) for f in self.findings]}


def ladder(findings: Sequence[Finding]) -> Ladder:
    """The findings as a table, lowest rung first: how each ended, what was claimed, and against what."""
    return Ladder(findings)


def _row(f: Finding) -> dict[str, Any]:
    return {
        "verdict": f.verdict,
        "rung": f"{f.rung} {RUNGS[f.rung]}",
        "claim": f.claim,
        "effect": f"{f.effect:.2f}",
        "95 % interval": f"{f.ci[0]:.2f} to {f.ci[1]:.2f}",
        "resampled": f"{f.n} {f.unit}",
        "control": str(f.control or "none"),
        "p": "" if f.p_value is None else f"{f.p_value:.2g}",
    }


def _entry(f: Finding) -> dict[str, Any]:
    """As plain values with the table's digits, so that two machines write the same."""
    c, two = f.control, lambda x: round(float(x), 2) + 0.0
    control = c and {"kind": c.kind, "what": c.what, "value": two(c.value), "ci": c.ci and [two(x) for x in c.ci]}
    row = _row(f)
    return {
        "verdict": f.verdict,
        "rung": f.rung,
        "claim": f.claim,
        "effect": two(f.effect),
        "ci": [two(x) for x in f.ci],
        "n": f.n,
        "unit": f.unit,
        "control": control,
        "p": row["p"],
        "source": f.source,
    }
