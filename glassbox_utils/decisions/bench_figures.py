"""Pictures and tables of notebook 07, any decision: wordings, single people, ranking, limits of an audit, moves."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glassbox_utils.core.figures import BLUE, GREY, ORANGE, RED, forest
from glassbox_utils.core.statistics import Interval
from glassbox_utils.decisions.cases import Case
from glassbox_utils.decisions.pairs import Contrast
from glassbox_utils.decisions.verdicts import Audit

MARKERS = "o^sDvPX*"


def draw_wordings(scores: Mapping[str, NDArray], favourable: str) -> None:
    """The same people in several wordings: one column each, sorted by the first wording.

    ``scores``: wording -> logits of each person; above 0 is the answer ``favourable``.
    """
    import matplotlib.pyplot as plt

    every = np.array(list(scores.values()))
    order = np.argsort(every[0])
    turned = int(np.ptp(np.sign(every), 0).astype(bool).sum())
    _, axis = plt.subplots(figsize=(8, 3.6))
    axis.vlines(range(len(order)), every.min(0)[order], every.max(0)[order], color=GREY, lw=0.6)
    for i, (name, x) in enumerate(scores.items()):
        label = f"{name}: {int((x > 0).sum())} of {len(x)}"
        axis.plot(x[order], MARKERS[i % len(MARKERS)], ms=5, label=label)
    axis.axhline(0, color="black", lw=0.8)
    axis.set_xlabel("one person a column, sorted by the first wording")
    axis.set_ylabel("for (+) or against (−), logits")
    axis.legend(title=f"answered {favourable.strip()}", loc="center left", bbox_to_anchor=(1.01, 0.5))
    axis.set_title(f"The same {len(order)} people and facts: {turned} decisions hang on the wording")
    plt.show()


def people_table(cases: Sequence[Case], scores: Mapping[str, NDArray], goes_on: Sequence[str], fields: int = 3) -> Any:
    """Single people: their first fields, what happened, their score in every wording, and how the model goes on."""
    import pandas as pd

    pd.set_option("display.max_colwidth", None)
    happened = {True: "right", False: "wrong", None: "not known"}
    rows = [
        {
            **dict(list(case.values.items())[:fields]),
            "a yes was": happened[case.outcome],
            **{name: f"{x[i]:+.2f}" for name, x in scores.items()},
            "goes on": text.strip(),
        }
        for i, (case, text) in enumerate(zip(cases, goes_on, strict=True))
    ]
    return pd.DataFrame(rows)


def draw_areas(areas: Mapping[str, Interval], opponents: Collection[str]) -> None:
    """How well each scorer ranks people, the opponents that read a table in another colour; dashed: a coin."""
    own = [x.value for name, x in areas.items() if name not in opponents]
    other = [x.value for name, x in areas.items() if name in opponents]
    n = next(iter(areas.values())).n
    title = f"The model ranks {n} unseen people at {max(own):.2f} at best, methods with a table at {max(other):.2f}"
    rows = [(name, x, ORANGE if name in opponents else BLUE) for name, x in areas.items()]
    forest(rows, "area under the curve, 95 % interval over people (dashed: a coin)", title, at=0.5)


def draw_limits(audited: Audit) -> None:
    """Effects that an audit found, and for what it did not find the effect that it would have missed too often."""
    rows: list[tuple[str, Interval | float, str]] = [(e.whom, e.logits, RED) for e in audited.found]
    for v in (v for v in audited.verdicts if v.outcome == "not found"):
        limits = [x for x in (v.smallest, v.smallest_single, v.smallest_pair) if x is not None]
        rows.append((f"{v.subject} ({v.role})", max(limits, default=0.0), GREY))
    if rows:
        title = f"{len(audited.found)} effects found; a grey bar is what this audit can't exclude"
        forest(rows, "logits; inside a grey bar: missed in one of ten audits or more", title)


def draw_moves(moves: Mapping[Contrast, Interval], protected: Collection[str], located: Contrast) -> None:
    """How far each field moves the decision, strongest first; which of them is located below is in the title."""
    order = sorted(moves, key=lambda one: -abs(moves[one].value))
    rows = [(str(one), moves[one], RED if one.what in protected else BLUE) for one in order]
    n, title = moves[located].n, f"{located} is located below: {moves[located].value:+.2f} logits (red: protected)"
    forest(rows, f"second value minus first, logits; 95 % interval over {n} people", title)
