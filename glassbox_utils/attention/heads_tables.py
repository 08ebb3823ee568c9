"""Tables and findings of notebook 02, from the tables of its studies; every number with interval and control.

Those about stereotypes are in ``bias_tables``.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glassbox_utils.attention.heads_figures import name_of_key_head
from glassbox_utils.attention.patterns import head_name
from glassbox_utils.core.evidence import Control, Finding
from glassbox_utils.core.interventions import Head
from glassbox_utils.core.statistics import (
    Interval,
    bootstrap_ci,
    clustered_ci,
    exact_ci,
    spearman,
)
from glassbox_utils.core.tables import frame, shown

SAME = "sets of the same layers"
Table = Mapping[str, Any]


def named(found: Sequence[Any]) -> str:
    """``18.6, 17.3``, or none."""
    return ", ".join(head_name(tuple(h)) for h in found) or "none"


def spread(draws: Sequence[float] | NDArray, form: str = "+.2f") -> str:
    """``20 sets: -0.01 to +0.20``."""
    return f"{len(draws)} sets: {min(draws):{form}} to {max(draws):{form}}"


def entry(part: Table, head: Sequence[int], n: int | None = None) -> Interval:
    """One head of a map, with its interval."""
    mean, low, high = (float(part[key][head[0]][head[1]]) for key in ("mean", "low", "high"))
    return Interval(mean, low, high, n or part["n"])


def of(part: Table, cases: str, clusters: str) -> str:
    """``36 pairs of 6 x 6 jobs``: how many cases a map has, and how many clusters they share."""
    return f"{part['n']} {cases} of {' × '.join(map(str, part['clusters']))} {clusters}"


def shared_ci(values: NDArray, *clusters: Sequence[Any]) -> Interval:
    """``clustered_ci`` of one mean."""
    mean, low, high, _ = (float(x) for x in clustered_ci(values, *clusters))
    return Interval(mean, low, high, len(values))


def median_head(part: Table) -> Control:
    """What half of the heads do not reach: the base rate of a map."""
    return Control("base rate", "the median head", float(np.median(part["mean"])))


# --- induction ----------------------------------------------------------------------------------------


def ranked(maps: Table, here: NDArray, k: int = 6) -> Any:
    """The first heads of the ranking, by live rows, by the study, on natural text, and how far each copies."""
    rows = [
        {
            "head": head_name(tuple(h)),
            "here": f"{here[tuple(h)]:.2f}",
            f"study, {maps['induction']['n']} rows": shown(entry(maps["induction"], h)),
            f"natural text, {maps['natural']['n']} texts": shown(entry(maps["natural"], h)),
            "copying (OV, chance 0.5)": f"{entry(maps['copying'], h).value:.2f}",
            "one token back": f"{entry(maps['previous'], h).value:.2f}",
        }
        for h in maps["ranking"][:k]
    ]
    return frame(rows)


def found_head(part: Table, head: Sequence[int], claim: str, unit: str, side: Any = "above") -> Finding:
    """Where one head looks, that other prompts chose, beside the median head."""
    return Finding.measured(
        f"{head_name((head[0], head[1]))} {claim}", 2, entry(part, head), unit, median_head(part), side=side
    )


def extra_loss(curve: Table, found: Sequence[Head], seed: int = 0) -> tuple[Any, Finding]:
    """What ablation costs: the induction heads ``found``, both kinds of random sets, and single heads, one by one."""
    clean = np.array(curve["clean"])
    lost = bootstrap_ci(np.array(curve["top"]) - clean, seed=seed)
    drawn = {kind: (np.array(curve[kind]) - clean).mean(-1) for kind in ("random", "matched")}
    rows = [{"ablated": f"the {curve['k']} induction heads", "extra loss (nats)": shown(lost, "+.2f")}]
    for kind, what in (("random", "of the same layers"), ("matched", "of equal norm")):
        rows.append({"ablated": f"random heads {what}", "extra loss (nats)": spread(drawn[kind])})
    few = curve["curve"]
    if 1 in few["ks"]:
        first = few["ks"].index(1)
        one = bootstrap_ci(np.array(few["top"][first]) - clean, seed=seed)
        name = f"{named(found[:1])} alone, the strongest of them"
        rows.append({"ablated": name, "extra loss (nats)": shown(one, "+.2f")})
        single = (np.array(few["random"][first]) - clean).mean(-1)
        rows.append({"ablated": "one random head of the same layers", "extra loss (nats)": spread(single)})
    for head, cost in zip(curve["alone"]["heads"], curve["alone"]["cost"], strict=True):
        name = f"{named([head])} alone, which looks one token back"
        rows.append({"ablated": name, "extra loss (nats)": shown(bootstrap_ci(cost, seed=seed), "+.2f")})
    control = Control.drawn(
        "random units", "sets of the same layers or of equal norm", np.concatenate(list(drawn.values()))
    )
    claim = f"loss on repeated tokens without the {curve['k']} induction heads (nats)"
    return frame(rows), Finding.measured(claim, 3, lost, "rows", control, side="above")


def feeding(paths: Table, seed: int = 0) -> tuple[Any, Finding]:
    """Who feeds each key head, beside random heads; the finding is about the strongest path of the screen."""
    rows, found = [], []
    for report in paths["reports"]:
        base = np.array(report["base"])
        lost = [bootstrap_ci((base - pair["patched"]) / base.mean(), seed=seed) for pair in report["pairs"]]
        pairs = list(zip(report["pairs"], lost, strict=True))
        others = [x.value for pair, x in pairs if not pair["found"]]
        rows.append(
            {
                "key head": name_of_key_head(report),
                "score": f"{base.mean():.2f}",
                "share lost without one sender": "; ".join(
                    f"{named([pair['sender']])} {shown(x, '.0%')}" for pair, x in pairs if pair["found"]
                ),
                "without a random one": f"{len(others)} heads: {min(others):.0%} to {max(others):.0%}",
            }
        )
        found += [float((base - pair["patched"]).mean()) for pair in report["pairs"] if not pair["found"]]
    first = max(range(len(rows)), key=lambda i: float(np.max(paths["screens"][i]["lost"])))
    report = paths["reports"][first]
    best, keys = report["pairs"][0], f"{report['layer']}.{report['key']}"
    lost_here = bootstrap_ci(np.array(report["base"]) - best["patched"], seed=seed)
    drawn = {tuple(pair["sender"]) for report in paths["reports"] for pair in report["pairs"] if not pair["found"]}
    control = Control.drawn("random units", f"paths from {len(drawn)} heads of the senders' layers", found)
    claim = f"{named([best['sender']])} feeds the keys {keys}, the strongest path of a screen (induction score lost)"
    return frame(rows), Finding.measured(claim, 3, lost_here, "rows", control, side="above")


def lookalikes(maps: Table, paths: Table, costs: NDArray) -> Any:
    """Heads that look one token back, the most that each carries of a key head's score, by the screen, and what it
    costs to lose it alone (``costs``: [head][row])."""
    rows = []
    for head, cost in zip(maps["back"], costs, strict=True):
        shares = {
            name_of_key_head(s): s["lost"][head[0]][head[1]] / s["base"]
            for s in paths["screens"]
            if head[0] < s["layer"]
        }
        best = max(shares, key=lambda key: shares[key], default="none after it")
        rows.append(
            {
                "head": head_name(tuple(head)),
                "one token back": f"{entry(maps['previous'], head).value:.2f}",
                "largest share of a key head's score": f"{shares.get(best, 0):.0%}",
                "which": best,
                "loss alone (nats)": f"{np.asarray(cost).mean():+.2f}",
            }
        )
    return frame(rows)


def in_context(text: Table, k: int, seed: int = 0) -> tuple[Any, Finding]:
    """What the induction heads do for real text: the in-context score, and the loss."""
    rows, changes, whole = [], {}, bootstrap_ci(np.array(text["score"])[0], seed=seed)
    for name, form in (("score", "+.2f"), ("loss", "+.3f")):
        values = np.array(text[name])
        moved = bootstrap_ci(values[1] - values[0], seed=seed)
        changes[name] = moved, (values[2:] - values[0]).mean(1)
        rows.append(
            {
                "of held-out text": {"score": "in-context score", "loss": "loss"}[name],
                "all heads": shown(bootstrap_ci(values[0], seed=seed)),
                f"change without {k}": shown(moved, form),
                "without random ones": spread(changes[name][1], form),
            }
        )
    moved, draws = changes["score"]
    claim = "context helps real text less without the induction heads (change of the in-context score, nats)"
    return frame(rows), Finding.measured(
        claim,
        4,
        moved,
        "texts",
        Control.drawn("random units", SAME, draws),
        side="above",
        declared=None if whole.excludes(0) else "not testable",  # a score that may be nothing has nothing to lose
    )


def formed(arms: Table) -> tuple[Any, Finding]:
    """In how many seeds induction formed, by arm."""
    rows, rate = [], {}
    for name, arm in arms.items():
        runs = arm["runs"]
        rate[name] = exact_ci(sum(run["formed"] for run in runs), len(runs))
        at = [run["formed_at"] for run in runs if run["formed"]]
        rows.append(
            {
                "trained": name,
                "induction formed": f"{sum(run['formed'] for run in runs)} of {len(runs)} seeds",
                "exact interval": f"{rate[name].low:.2f} to {rate[name].high:.2f}",
                "at step": f"{min(at)} to {max(at)}" if at else "never",
                "score on rows like its own": f"{np.median([run['induction'][-1] for run in runs]):.2f}",
                "at varied distances": f"{np.median([run['elsewhere']['induction'] for run in runs]):.2f}",
                "loss there": f"{np.median([run['elsewhere']['loss'] for run in runs]):.1f}",
            }
        )
    control = Control.measured("other group", "the same model with one layer", rate["one layer"])
    claim = "induction forms in two layers of attention within 300 steps (share of seeds)"
    return frame(rows), Finding.measured(claim, 3, rate["two layers"], "seeds", control, side="above")


# --- meaning, and several roles -----------------------------------------------------------------------


def meaning(semantic: Table) -> tuple[Any, Finding]:
    """The semantic heads on categories that did not choose them, and what the model loses without them."""
    six, value = semantic["ranking"], np.array(semantic["preference"])
    rows = [
        {
            "head": head_name(tuple(h)),
            f"extra attention, {of(semantic['report'], 'lists', 'categories')}": shown(entry(semantic["report"], h)),
        }
        for h in six
    ]
    lost, draws = shared_ci(value[0] - value[1], semantic["preference_of"]), (value[0] - value[2:]).mean(1)
    claim = f"of {value[0].mean():.1f} nats of preference for a held-out category, lost without {len(six)} heads"
    return frame(rows), Finding.measured(
        claim, 4, lost, "lists of 8 categories", Control.drawn("random units", SAME, draws), side="above"
    )


def in_roles(patient_to_doctor: Any, semantic: Table, bias: Table) -> Any:
    """The rank among all heads of those that group meanings or look at the stereotype, in each role.

    ``patient_to_doctor``: [layer, head], attention from patient to doctor beyond that to other jobs.
    """
    gap = np.array(bias["looks"]["report"]["mean"])
    roles = {
        "patient → doctor": np.asarray(patient_to_doctor),
        "same category": np.array(semantic["report"]["mean"]),
        "with the stereotype": gap,
        "against it": -gap,
    }
    found = [*semantic["ranking"], *bias["looks"]["ranking"][:4], *bias["looks"]["against"][:4]]
    return frame(
        [
            {f"rank among {gap.size}": head_name(h), **{n: int((r > r[h]).sum()) + 1 for n, r in roles.items()}}
            for h in dict.fromkeys((a, b) for a, b in found)
        ]
    )


def roles_together(patient_to_doctor: Any, semantic: Table, bias: Table) -> str:
    """Over all heads, chosen or not: do the other roles go with looking at the stereotype? Rank correlations."""
    gap = np.array(bias["looks"]["report"]["mean"])
    same, patient = np.array(semantic["report"]["mean"]), np.asarray(patient_to_doctor)
    found = {
        "same category and gap": (same, gap),
        "patient → doctor and gap": (patient, gap),
        "same category and gap, sizes": (np.abs(same), np.abs(gap)),
    }
    said = [f"{name} {shown(spearman(a, b).rho)}" for name, (a, b) in found.items()]
    return f"rank correlations over all {gap.size} heads: " + "; ".join(said)
