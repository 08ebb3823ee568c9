"""Tables and findings of notebook 02, from the tables of its studies; every number with interval and control."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glassbox_utils.attention.heads_figures import OUTCOMES, name_of_key_head
from glassbox_utils.attention.patterns import head_name
from glassbox_utils.core.evidence import Control, Finding
from glassbox_utils.core.interventions import Head
from glassbox_utils.core.statistics import (
    Interval,
    adjust,
    bootstrap_ci,
    clustered_ci,
    enrichment,
    exact_ci,
    permutation_test,
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
    control = Control.drawn("random units", "heads of the senders' layers", found)
    claim = f"{named([best['sender']])} feeds the keys {keys}, the strongest path of a screen (induction score lost)"
    return frame(rows), Finding.measured(claim, 3, lost_here, "rows", control, side="above")


def lookalikes(maps: Table, paths: Table, k: int = 4) -> Any:
    """Heads that look one token back, and the most that each carries of a key head's score, by the screen."""
    rows = []
    for head in maps["back"][:k]:
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
            }
        )
    return frame(rows)


def in_context(text: Table, k: int, seed: int = 0) -> tuple[Any, Finding]:
    """What the induction heads do for real text: the in-context score, and the loss."""
    rows, changes = [], {}
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
        claim, 4, moved, "texts", Control.drawn("random units", SAME, draws), side="above"
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


# --- stereotypes --------------------------------------------------------------------------------------


def lookers(bias: Table, k: int = 4) -> Any:
    """The heads that look most, with the stereotype and against it; chosen on other jobs."""
    looks, wino = bias["looks"]["report"], bias["looks"]["winobias_test"]
    rows = []
    for what, said in (("ranking", "with"), ("against", "against")):
        for h in bias["looks"][what][:k]:
            mine, theirs = shown(entry(looks, h), "+.3f"), shown(entry(wino, h), "+.3f")
            rows.append(
                {
                    "head": head_name(tuple(h)),
                    "looks": said,
                    f"gap, {of(looks, 'pairs', 'jobs')}": mine,
                    f"WinoBias, {of(wino, 'sentences', 'jobs')}": theirs,
                }
            )
    return frame(rows)


def at_limits(parts: Mapping[str, Table], limits: Sequence[float] = (0.0, 0.01, 0.02, 0.05)) -> Any:
    """How many heads look either way in each map, for several limits on the size of the gap (q < 0.05 throughout)."""
    rows = []
    for least in limits:
        row: dict[str, Any] = {"gap beyond": f"{least}"}
        for name, part in parts.items():
            gap, q = np.array(part["mean"]), np.array(part["q"])
            for side, g in (("with it", gap), ("against it", -gap)):
                row[f"{side}: {name}"] = int(((q < 0.05) & (g > least)).sum())
        rows.append(row)
    return frame(rows)


def behaviours(bias: Table) -> dict[str, tuple[NDArray, float, NDArray]]:
    """Behaviour -> (effect of each head, the whole, q of each head): pronoun choice, and who was meant."""
    acts, refers = bias["acts"], bias["refers"]["report"]
    return {
        "(a) pronoun choice": (
            np.array(acts["ablation"]["mean"]),
            float(np.mean(acts["gap"])),
            np.array(acts["ablation"]["q"]),
        ),
        "(b) who was meant": (
            np.array(refers["effect"]["mean"]),
            float(np.mean(refers["total"])),
            np.array(refers["effect"]["q"]),
        ),
    }


def looking_heads(bias: Table, k: int = 6) -> set[Head]:
    """The strongest lookers in both directions, by selection prompts."""
    return {(h[0], h[1]) for what in ("ranking", "against") for h in bias["looks"][what][:k]}


def overlaps(bias: Table, limits: Sequence[float] = (0.025, 0.05, 0.1)) -> Any:
    """Do those that look act? For several limits of what counts as acting, beside the base rate among all heads; and
    how many of the acting heads pass a false discovery rate of 5 % over all heads."""
    gap, chosen, rows = np.array(bias["looks"]["report"]["mean"]), looking_heads(bias), []
    every = [(int(a), int(b)) for a, b in np.ndindex(gap.shape)]
    for name, (effect, whole, q) in behaviours(bias).items():
        rank = spearman(np.abs(gap).ravel(), np.abs(effect).ravel()).rho
        for least in limits:
            marked = {h for h in every if abs(effect[h]) > least * abs(whole)}
            sure = {h for h in marked if q[h] < 0.05}
            found = enrichment(chosen, marked, every) if marked else None
            rows.append(
                {
                    "behaviour": name,
                    "acting: more than": f"{least:.1%}",
                    "heads": len(marked),
                    f"of the {len(chosen)} lookers": f"{len(marked & chosen)} ({named(sorted(marked & chosen))})",
                    "times the base rate": shown(found.ratio, ".1f") if found else "",
                    "p": f"{found.p_value:.2f}" if found else "",
                    "of these q < .05: heads": len(sure),
                    "and lookers": f"{len(sure & chosen)} ({named(sorted(sure & chosen))})",
                    "rank correlation of sizes, all heads": shown(rank),
                }
            )
    return frame(rows)


def change(after: Table, outcome: str, group: str, rows: Any = slice(None)) -> tuple[float, NDArray, list[float]]:
    """An outcome's mean, its change without a set of heads [unit], and the mean change without each random set."""
    sets, values = list(after["sets"]), after["outcomes"][outcome]
    values = np.array(values["values"] if isinstance(values, dict) else values)[:, rows]
    moved = values - values[sets.index("none")]
    draws = [float(moved[i].mean()) for i, name in enumerate(sets) if name.startswith(f"random as {group}")]
    return float(values[sets.index("none")].mean()), moved[sets.index(group)], draws


def carried(after: Table, seed: int = 0) -> tuple[Any, list[Finding]]:
    """What goes of each outcome without the acting and without the looking heads; Holm-corrected over all rows."""
    tests = [(outcome, group) for group in ("acting", "looking") for outcome in OUTCOMES]
    p_values = adjust([permutation_test(change(after, *test)[1]) for test in tests], "holm")
    rows, findings = [], []
    for (outcome, group), p in zip(tests, p_values, strict=True):
        whole, moved, draws = change(after, outcome, group)
        x, n, what = bootstrap_ci(moved, seed=seed), len(after["sets"][group]), OUTCOMES[outcome].replace("\n", " ")
        rows.append(
            {
                "outcome": what,
                "without": group,
                "gap": f"{whole:+.2f}",
                "change": shown(x, "+.2f"),
                "without random ones": spread(draws),
                "Holm p": f"{p:.3f}",
                "resampled": f"{x.n} {after['units'][outcome]}",
            }
        )
        claim = f"{what}: the gap shrinks without {n} {group} heads"
        control = Control.drawn("random units", SAME, draws)
        findings.append(Finding.measured(claim, 4, x, after["units"][outcome], control, side="below", p_value=float(p)))
    return frame(rows), findings


def bill(after: Table, seed: int = 0) -> tuple[Any, list[Finding]]:
    """What else goes without the acting heads."""
    male = np.array(after["outcomes"]["leaning"]["is_male"])
    asked = [
        ("leaning", male, "logit(he) − logit(she) after men's jobs", "below"),
        ("leaning", ~male, "logit(he) − logit(she) after women's jobs", "apart"),
        ("together", slice(None), "probability of he or she", "below"),
        ("defined", slice(None), "gap of king and queen (logits)", "below"),
        ("text", slice(None), "loss on held-out text (nats a token)", "above"),
    ]
    rows, findings = [], []
    for outcome, which, what, side in asked:
        whole, moved, draws = change(after, outcome, "acting", which)
        x = bootstrap_ci(moved, seed=seed)
        rows.append(
            {
                "what": what,
                "all heads": f"{whole:.2f}",
                "change": shown(x, "+.2f"),
                "without random ones": spread(draws),
            }
        )
        control, claim = Control.drawn("random units", SAME, draws), f"{what}: change without the acting heads"
        findings.append(Finding.measured(claim, 5, x, after["units"][outcome], control, side=side))
    return frame(rows), findings


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
