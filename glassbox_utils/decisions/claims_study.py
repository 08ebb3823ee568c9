"""What the loan studies claim in the end: findings with rung, control and verdict, and the ladder they stand on."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from glassbox_utils.core import figures as style
from glassbox_utils.core.evidence import RUNGS, Control, Finding
from glassbox_utils.core.models import Model
from glassbox_utils.core.statistics import (
    Interval,
    bootstrap_ci,
    cluster_bootstrap,
    cluster_sign_flip_p,
    rank_agreement,
)
from glassbox_utils.decisions import study
from glassbox_utils.decisions.figures import Table, arms, costs, features, gap_followed, heads, looked_and_moved
from glassbox_utils.decisions.study import outcome, pairs_of_names, why_skipped


def findings(
    model: Model, table: Table, rest: Table | None = None, cause: Table | None = None, source: str = "notebook 06"
) -> list[Finding]:
    """The loan officer's claims with rung, control and verdict; those that their own test refutes stay. A part that
    was not measured on this model has no claims."""
    one = partial(_one, source)
    gaps = {k: outcome(table, k) for k in ("gender", "district", "same group")}
    same = Control.measured("other group", "another name of the same group", gaps["same group"].gap)
    none, edit = (np.subtract(*study.arrays(table, "gender", a)[::-1]) for a in ("none", "edit"))
    found, shared = arms(table), pairs_of_names("gender", len(none))
    random = [f"random {s}" for s in range(study.N_RANDOM) if f"random {s}" in found]
    drawn = [np.subtract(*study.arrays(table, "gender", a)[::-1]) for a in random]
    removed = [float((np.abs(none) - np.abs(x)).mean()) for x in drawn]
    alike = partial(Control.drawn, "random units", "random directions edited alike")
    names = "pairs of names"
    out = [
        *(_of_cause(model, cause, one) if cause else ()),
        one("women's names cost approvals on unseen names, districts and layouts (points)", 4, gaps["gender"].gap,
            names, same, side="above", p_value=cluster_sign_flip_p(none, shared)),
        one("the East costs approvals there too (points)", 4, gaps["district"].gap, "names", same, side="above"),
    ]  # fmt: skip
    if drawn:
        out += [
            one("the edit shrinks the gap of a pair (logits)", 4,
                cluster_bootstrap(np.abs(none) - np.abs(edit), shared), names, alike(removed), side="above"),
            one("gap left by the edit (points)", 4, found["edit"].gap, names,
                alike([found[a].gap.value for a in random]), side="below", null=None),
            one("agreement with the merit rule rises under the edit (share)", 5, found["edit"].merit, names,
                alike([found[a].merit.value for a in random]), side="above"),
        ]  # fmt: skip
    if rest:
        side = costs(rest)
        tuned = Control.measured("trained opponent", "fine-tuning on corrected decisions", side["fine-tuned"][0])
        claim = "perplexity of other text with the edit left on is lower than after fine-tuning (times)"
        if not why_skipped(table["gate"]):
            out.append(one(claim, 5, side["edit"][0], "texts", tuned, side="below", null=None))
            claim = "so it is without its gate (times)"
        out.append(one(claim, 5, side["no gate"][0], "texts", tuned, side="below", null=None))
    return [finding for finding in out if finding]


def _one(
    source: str, claim: str, rung: int, x: Interval, unit: str, control: Control | None = None, **more: Any
) -> Finding | None:
    """A finding, unless its number is none (the correlation of something constant)."""
    if not np.isfinite([x.value, x.low, x.high]).all():
        return None
    return Finding.measured(claim, rung, x, unit, control, source=source, **more)


def _of_cause(model: Model, cause: Table, one: Callable[..., Finding | None]) -> list[Finding | None]:
    """What the decision looks at and what moves it; the name's way, only if there is a gap to follow."""
    looked, moved = looked_and_moved(cause)
    names = [f.replace("_", " ") for f in cause["fields"]]
    agreement = rank_agreement(torch.tensor(looked), torch.tensor(moved))
    most = int(looked.mean(0).argmax())
    best = _strongest(moved.mean(0), most)
    total, patches = (np.array(v) for v in cause["patches"])
    applicants, pairs = "applicants", "pairs of applications"
    strongest = Control.measured(
        "other group", f"{names[best]}, the strongest other field", bootstrap_ci(moved[:, best])
    )
    out = [
        one("attention ranks the fields as they move the decision (rank correlation)", 1, agreement, applicants,
            side="above"),
        one(f"the decision rests on the {names[most]}, which gets most of the attention (logits when swapped)", 3,
            bootstrap_ci(moved[:, most]), applicants, strongest, side="above"),
    ]  # fmt: skip
    if not gap_followed(cause).excludes(0):
        return out
    if not why_skipped(cause["heads"]):
        head = heads(model, cause)
        looks = int(np.argmax(head["attention"]))
        acts = _strongest(np.abs(head["effect"]), looks)
        other_head = bootstrap_ci(np.abs(head["effects"][:, acts]))
        out += [
            one(f"attention to the name tells which heads carry it, layers {head['layers']} (rank correlation)", 1,
                head["agreement"], pairs, side="above"),
            one(f"head {head['names'][looks]}, which looks at the name most, carries the gender (size in logits)", 3,
                bootstrap_ci(np.abs(head["effects"][:, looks])), pairs,
                Control.measured("other group", f"{head['names'][acts]}, the strongest other head", other_head),
                side="above"),
        ]  # fmt: skip
    at_name = bootstrap_ci(patches[:, -1, 0] / total.mean())
    out.append(
        one("the name's gender is at the decision position by the last layers (share of the gap)", 3,
            bootstrap_ci(patches[:, -1, 2] / total.mean()), pairs,
            Control.measured("other group", "patched at the name there", at_name), side="above")
    )  # fmt: skip
    if not why_skipped(cause["features"]):
        feature = features(cause)
        out.append(
            one("SAE features of the group at the name carry the gap (logits removed)", 3, feature["removed"], pairs,
                Control.drawn("random units", "features of like activity", feature["like"]), side="above")
        )  # fmt: skip
    return out


def _strongest(values: NDArray, but: int) -> int:
    """Index of the largest value that is not at ``but``."""
    return int(np.argmax(np.where(np.arange(len(values)) == but, -np.inf, values)))


def draw_ladder(found: Sequence[Finding]) -> None:
    """How many claims stand on each rung, and how they ended."""
    import matplotlib.pyplot as plt

    rungs, done = range(1, 6), np.zeros(5)
    _, axis = plt.subplots(figsize=(6.5, 2.6))
    colours = {"held": style.GREEN, "null": style.GREY, "refuted": style.RED, "not testable": style.BLUE}
    for verdict, colour in colours.items():
        count = np.array([sum(f.rung == r and f.verdict == verdict for f in found) for r in rungs])
        if count.any():
            axis.barh(rungs, count, left=done, color=colour, label=verdict)
        done = done + count
    axis.set_yticks(rungs, [f"{r} {name}" for r, name in RUNGS.items()])
    axis.set_xlabel("claims")
    axis.legend()
    axis.set_title("The ladder: how far each claim got, and how it ended")
