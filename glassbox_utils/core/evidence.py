"""Findings and the evidence ladder: a claim says on which rung it stands, and what it was compared with.

1 *observed* (a weight, an active feature) · 2 *localised* (which head, layer, feature, against a control) ·
3 *causal* (ablate, patch, clamp: the behaviour moves, against a random control) · 4 *behavioural* (on held-out
prompts) · 5 *side effects* (what else changed). No rung is jumped: evidence, never proof.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from glassbox_utils.core.errors import GlassboxError

RUNGS = {1: "observed", 2: "localised", 3: "causal", 4: "behavioural", 5: "side effects"}


class EvidenceError(GlassboxError, ValueError):
    """A finding that claims more than it can show; the message says what is missing."""


@dataclass(frozen=True)
class Finding:
    """One measured claim.

    ``effect`` and ``ci`` are in the unit that the claim names; ``control`` says what the effect was
    compared with. A finding on rung 2 to 5 can't be built without one. ``refuted`` marks a claim that its
    own test contradicts: it stays in the table.
    """

    claim: str
    rung: int
    effect: float
    ci: tuple[float, float]
    n: int
    control: str | None = None
    p_value: float | None = None
    source: str = ""
    refuted: bool = False

    def __post_init__(self) -> None:
        if self.rung not in RUNGS:
            raise EvidenceError(f"There is no rung {self.rung!r}. Allowed: {RUNGS}.")
        if self.rung > 1 and not self.control:
            raise EvidenceError(
                f"The finding {self.claim!r} stands on rung {self.rung} ({RUNGS[self.rung]}) without a control. Name "
                "what the effect was compared with (random heads, shuffled labels, ...), or claim rung 1."
            )
        if self.n < 1:
            raise EvidenceError(f"The finding {self.claim!r} has n = {self.n}. Give the number of cases, at least 1.")
        low, high = self.ci
        if not low <= high:
            raise EvidenceError(
                f"The interval {self.ci} of {self.claim!r} is not (low, high). Give the lower end first."
            )


def ladder(findings: Sequence[Finding]) -> Any:
    """The findings as a table (pandas DataFrame), lowest rung first: what was claimed, and where it stopped."""
    import pandas as pd

    rows = []
    for f in sorted(findings, key=lambda f: f.rung):
        values = asdict(f)
        rows.append(
            {
                "rung": f"{f.rung} {RUNGS[f.rung]}",
                "claim": f.claim + (" (refuted)" if f.refuted else ""),
                "effect": f"{f.effect:.2f}",
                "95 % interval": f"{values['ci'][0]:.2f} to {values['ci'][1]:.2f}",
                "n": f.n,
                "control": f.control or "none",
                "p": "" if f.p_value is None else f"{f.p_value:.1g}",
            }
        )
    return pd.DataFrame(rows)
