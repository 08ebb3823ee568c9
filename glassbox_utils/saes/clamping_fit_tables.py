"""How much of a fitted clamp is the dictionary's merit: the same fit again on the SAE's rows and on random ones.

Fits differ in the order of the lessons (the SAE's rows) or in the rows (random ones); they are the unit.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glassbox_utils.core.evidence import Control, Finding, Verdict
from glassbox_utils.core.statistics import Interval, bootstrap_ci
from glassbox_utils.core.tables import frame
from glassbox_utils.saes import clamping, clamping_report_study, clamping_study
from glassbox_utils.saes.clamping_study import LEARNED, TWIN, family

Table = Mapping[str, Any]


def fits(report: Table, more: Table) -> dict[str, list[Table]]:
    """The fits on the SAE's rows and on random rows, those of ``clamp-choose`` first, with their report answers."""
    rows = [
        next(r for r in report["rows"] if r["method"] == m) for m in dict.fromkeys(r["method"] for r in report["rows"])
    ]
    found: dict[str, list[Table]] = {LEARNED: [], TWIN: []}
    for row in [*rows, *more["fits"]]:
        if row["answers"] and family(row["method"]) in found:
            found[family(row["method"])].append(row)
    return found


def fitted_twice(report: Table, more: Table) -> Any:
    """Every fit by its mentions, its price and its relevance."""
    rows, (first, *rest) = [], clamping_report_study.FOUR
    for method, some in fits(report, more).items():
        for k, row in enumerate(some):
            m = clamping_report_study.measures(row, report["rows"][0])
            rows.append({"fit": f"{method} {k}"} | {x: f"{m[x].value:.2f}" for x in (first, "names it", *rest)})
    return frame(rows)


def over_fits(a: NDArray, b: NDArray, seed: int = 0, n_resamples: int = 2000) -> Interval:
    """Mean of ``a`` minus mean of ``b`` ([fit, prompt]) with its interval over fits *and* prompts: fits are drawn anew
    on each side, prompts for both at once."""
    rng, draws = np.random.default_rng(seed), []
    for _ in range(n_resamples):
        asked = rng.integers(a.shape[1], size=a.shape[1])
        x, y = (some[rng.integers(len(some), size=len(some))][:, asked].mean() for some in (a, b))
        draws.append(x - y)
    low, high = np.quantile(draws, (0.025, 0.975))
    return Interval(float(a.mean() - b.mean()), float(low), float(high), len(a) + len(b))


def fit_claims(report: Table, more: Table) -> list[Finding]:
    """Do the SAE's rows matter? The same fit on random rows; the unit is the fit. One fit can't tell."""
    mine, drawn = fits(report, more).values()
    if not mine or len(drawn) < 2:
        return []
    page, claims = clamping_study.prompts()["golden_gate"], list[Finding]()
    declared: Verdict | None = None if len(mine) > 1 else "not testable"
    for words, said in ((page["words"], "mention"), (page["words"][:1], "name")):
        a, b = (np.array([clamping.mentions(r["later"], words) for r in rows], dtype=float) for rows in (mine, drawn))
        each = [float(x.mean() - np.delete(b, i, 0).mean()) for i, x in enumerate(b)]
        control = Control.drawn("random units", "random dictionaries, each against the others", each)
        claim = f"values fitted on the SAE's rows {said} it more often than those fitted on random rows (difference)"
        claims.append(Finding.measured(claim, 4, over_fits(a, b), "fits, and prompts", control, side="above",
                                       source="study clamp-controls", declared=declared))  # fmt: skip
    for what, side in (("perplexity ×", "below"), ("relevance ×", "above")) if len(mine) > 1 else ():
        own, other = (
            [clamping_report_study.measures(r, report["rows"][0])[what].value for r in rows] for rows in (mine, drawn)
        )
        control = Control.drawn("random units", "dictionaries of random rows, same fit", other)
        effect = bootstrap_ci(np.array(own))
        claim = f"values fitted on the SAE's rows: {what}, against the same fit on random rows"
        claims.append(Finding.measured(claim, 5, effect, "fits", control, side=side, null=None,
                                       source="study clamp-controls"))  # fmt: skip
    return claims
