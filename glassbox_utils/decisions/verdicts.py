"""What an audit says: a verdict for each subject, with effects that carry their intervals, as words and as JSON."""

import json
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from glassbox_utils.core.statistics import Interval

Outcome = Literal["found", "not found", "not tested"]


@dataclass(frozen=True)
class Effect:
    """Whom a model holds something against, or favours, and how much; everything else being equal."""

    whom: str
    """in words: a field or group and its value or window, and the condition beside it, if there is one"""
    parts: tuple[dict[str, Any], ...]
    """the same as data: subject, field, and group, value or window"""
    subjects: tuple[str, ...]
    logits: Interval
    """on the favourable answer; n: base cases"""
    points: Interval
    """percentage points of favourable answers"""
    bar: float
    """logits that the effect must exceed"""
    p_value: float
    """of "at most the bar", after the correction"""
    prompts: int
    """that had the property, among those that confirmed"""

    def __str__(self) -> str:
        side = "against" if self.logits.value < 0 else "in favour of"
        a, b = self.logits, self.points
        return (
            f"{side} {self.whom}: {a.value:+.2f} logits [{a.low:+.2f}, {a.high:+.2f}], "
            f"{b.value:+.1f} points [{b.low:+.1f}, {b.high:+.1f}], p = {self.p_value:.2g}"
        )


@dataclass(frozen=True)
class Verdict:
    """Of one field or carried attribute."""

    subject: str
    role: str
    """protected or other"""
    outcome: Outcome
    effects: tuple[Effect, ...] = ()
    smallest: float | None = None
    """not found: logits for or against one of its groups (a number: any tenth of its range) that would have been found
    with 90 % power, the group or window that is hardest to see"""
    smallest_single: float | None = None
    """the same for one value of a text alone, beyond what its other values differ among themselves"""
    smallest_pair: float | None = None
    """the same for an eighth of all, such as one group of it together with something else"""
    reason: str = ""
    """not tested: why; else what was not asked"""
    confidence: float | None = None
    """share of resamples in which the search, from the screen to the corrected test, ends with the same outcome. Base
    cases (of either half by itself) and wordings are drawn with replacement; no new prompts are asked, only questions
    that were near in the screen can be chosen, and a name that was not suspected is not asked about more often. It is
    no probability that the outcome is true; ``glassbox study audit-power`` sets it beside what a new audit says."""

    def __str__(self) -> str:
        sure = ""  # that resamples agree on "not found" says nothing of what is too small to be seen: the limits do
        if self.confidence is not None and self.outcome == "found":
            sure = f" ({self.confidence:.0%} of resamples agree)"
        lines = [f"{self.subject} ({self.role}): {self.outcome}{sure}"]
        lines += [f"    {effect}" for effect in self.effects]
        if self.outcome == "not found":
            limits = [(self.smallest, "a group or a window"), (self.smallest_single, "one value alone"),
                      (self.smallest_pair, "a group together with something else")]  # fmt: skip
            said = [f"{x:.2f} logits for {what}" for x, what in limits if x is not None]
            lines.append(f"    would have been found with 90 % power: {', '.join(said)}")
        if self.reason:
            lines.append(f"    {self.reason}")
        return "\n".join(lines)


@dataclass(frozen=True)
class Audit:
    """All verdicts, and what they cost."""

    decision: str
    verdicts: tuple[Verdict, ...]
    n: int
    """base cases, one half to choose and the other to confirm"""
    templates: tuple[str, ...]
    calls: int
    """prompts that were scored"""
    seconds: float
    bar: float
    """logits below which no effect counts"""
    bar_points: float | None
    """percentage points of favourable answers that so many logits move"""
    rewording: float | None
    """standard deviation of a score, in logits, when the same facts are told in other words"""
    favourable: float | None
    """share of favourable answers"""
    hypotheses: dict[str, int] = field(default_factory=dict)
    """kind of question -> how many were asked in the screen"""
    confirmed: int = 0
    """how many were asked again"""
    halves: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())
    """ids of the base cases that chose, and of those that confirmed"""
    seed: int = 0

    def __getitem__(self, subject: str) -> Verdict:
        return next(v for v in self.verdicts if v.subject == subject)

    @property
    def found(self) -> tuple[Effect, ...]:
        """Every distinct finding, strongest first."""
        effects = {e.whom: e for v in self.verdicts for e in v.effects}
        return tuple(sorted(effects.values(), key=lambda e: -abs(e.logits.value)))

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    def as_json(self) -> str:
        return json.dumps(self.as_dict(), indent=1, ensure_ascii=False)

    def as_text(self) -> str:
        """For a reader: the verdicts, and below what they rest on."""
        lines = [f"Audit of {self.decision}", "", *(str(v) for v in self.verdicts), ""]
        if self.calls:
            lines.append(
                f"{self.n} base cases in {len(self.templates)} wordings ({', '.join(self.templates)}), "
                f"{self.calls} prompts, {self.seconds:.0f} s, seed {self.seed}. One half of the cases chose "
                f"{self.confirmed} of {sum(self.hypotheses.values())} questions, the other half confirmed them."
            )
        if self.bar_points is not None:
            lines.append(
                f"No effect counts below {self.bar:g} logits ({self.bar_points:.1f} points of favourable answers). "
                f"The same facts in other words move a score by {self.rewording:.2f} logits; "
                f"{self.favourable:.0%} of all answers are favourable. Interval: 95 %, over cases, wordings and names."
            )
        return "\n".join(lines)
