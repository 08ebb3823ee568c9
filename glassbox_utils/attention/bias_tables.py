"""Tables and findings of notebook 02 about stereotypes: who looks, who acts, what sets of heads carry, and the bill."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glassbox_utils.attention.bias import by_lot
from glassbox_utils.attention.heads_figures import OUTCOMES
from glassbox_utils.attention.heads_tables import SAME, Table, entry, named, of, spread
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


def found_lookers(bias: Table, crossed: Table, seed: int = 0) -> tuple[str, list[Finding]]:
    """The heads that look most with the stereotype and against it, beside jobs that are dealt to the sides by lot."""
    looks, of = bias["looks"]["report"], [crossed["looks"][split] for split in ("selection", "report")]
    selection, report = (np.array(x["parts"]) for x in of)
    lots = by_lot(selection, report, len(of[1]["men"]), seed=seed)
    findings, said = [], []
    for what, side, name, draws in (
        ("ranking", "above", "with", lots.first),
        ("against", "below", "against", lots.against),
    ):
        head = bias["looks"][what][0]
        x, (low, high) = entry(looks, head), (float(q) for q in np.quantile(draws, (0.025, 0.975)))
        what = f"jobs dealt to the sides by lot, {len(draws)} times (95 % of the deals)"
        as_large = (1 + int((np.abs(draws) >= abs(x.value)).sum())) / (1 + len(draws))
        findings.append(
            Finding.measured(
                f"{head_name((head[0], head[1]))} looks {name} the stereotype, chosen on other jobs (attention gap)",
                2,
                x,
                f"pairs of {' × '.join(map(str, looks['clusters']))} jobs",
                Control("shuffled labels", what, float(draws.mean()), (low, high)),
                side=side,
                p_value=as_large,
            )
        )
        said.append(f"{head_name((head[0], head[1]))} {x.value:+.3f}, by lot {low:+.3f} to {high:+.3f}")
    explained = ", ".join(f"{x['explained']:.2f}" for x in of)
    lines = [
        f"{len(lots.first)} deals by lot, 95 of 100: {'; '.join(said)}",
        f"the largest gap of all {np.size(looks['mean'])} heads, by lot: {np.median(lots.largest):.3f} in the median, "
        f"below {np.quantile(lots.largest, 0.95):.3f} in 95 of 100",
        f"single jobs explain of what differs between pairs (selection, report): {explained}",
    ]
    return "\n".join(lines), findings


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
    """Do those that look act? For several limits of what counts as acting, beside the base rate among all heads; how
    many push with the behaviour and against it; and how many pass a false discovery rate of 5 % over all heads."""
    gap, chosen, rows = np.array(bias["looks"]["report"]["mean"]), looking_heads(bias), []
    every = [(int(a), int(b)) for a, b in np.ndindex(gap.shape)]
    for name, (effect, whole, q) in behaviours(bias).items():
        rank = spearman(np.abs(gap).ravel(), np.abs(effect).ravel()).rho
        for least in limits:
            marked = {h for h in every if abs(effect[h]) > least * abs(whole)}
            sure = {h for h in marked if q[h] < 0.05}
            found = enrichment(chosen, marked, every) if marked else None
            with_it = sum(effect[h] * whole > 0 for h in marked)
            rows.append(
                {
                    "behaviour": name,
                    "acting: more than": f"{least:.1%}",
                    "heads": f"{len(marked)} ({with_it} with it, {len(marked) - with_it} against)",
                    f"of the {len(chosen)} lookers": f"{len(marked & chosen)} ({named(sorted(marked & chosen))})",
                    "times the base rate": shown(found.ratio, ".1f") if found else "",
                    "p": f"{found.p_value:.2f}" if found else "",
                    "of these q < .05: heads": len(sure),
                    "and lookers": f"{len(sure & chosen)} ({named(sorted(sure & chosen))})",
                    "rank correlation of sizes, all heads": shown(rank),
                }
            )
    return frame(rows)


def looking_acts(bias: Table, least: float = 0.05, draws: int = 200, seed: int = 0) -> list[Finding]:
    """Do those that look act? The twelve lookers beside all heads, and the rank correlation of sizes over all heads
    beside the same with the heads of each layer exchanged."""
    gap, chosen, findings = np.abs(np.array(bias["looks"]["report"]["mean"])), looking_heads(bias), list[Finding]()
    rng = np.random.default_rng(seed)
    for name, (effect, whole, _) in behaviours(bias).items():
        acts = np.abs(effect) > least * abs(whole)
        k, said = sum(bool(acts[h]) for h in chosen), f"act on {name} (more than {least:.0%} of it)"
        claim = f"heads that look at the stereotype, either way, {said} more often than others (share)"
        every = Control("base rate", f"of all {acts.size} heads", float(acts.mean()))
        findings.append(
            Finding.measured(claim, 3, exact_ci(k, len(chosen)), "looking heads", every, side="above", null=None)
        )
        exchanged = [spearman(rng.permuted(gap, axis=1), np.abs(effect), 2).rho.value for _ in range(draws)]
        low, high = (float(q) for q in np.quantile(exchanged, (0.025, 0.975)))
        what = f"heads exchanged within their layers, {draws} times (95 % of the draws)"
        control = Control("shuffled labels", what, float(np.mean(exchanged)), (low, high))
        claim = f"over all heads the size of the gap goes with the size of the effect on {name} (rank correlation)"
        findings.append(Finding.measured(claim, 3, spearman(gap, np.abs(effect)).rho, "heads", control, side="above"))
    return findings


def back_goes_too(bias: Table, maps: Table) -> str:
    """The opponent that knows of no job: how attention one token back goes with the sizes of the effects."""
    back = np.array(maps["previous"]["mean"])
    found = {name: spearman(back, np.abs(effect)).rho for name, (effect, *_) in behaviours(bias).items()}
    said = "; ".join(f"{name} {shown(rho)}" for name, rho in found.items())
    return f"rank correlation of attention one token back, on random tokens, with the size of the effect: {said}"


def without(after: Table, outcome: str, name: str) -> NDArray:
    """An outcome without one set of heads, [unit]."""
    return np.array(after["outcomes"][outcome])[list(after["sets"]).index(name)]


def change(after: Table, outcome: str, group: str, rows: Any = slice(None)) -> tuple[float, NDArray, list[float]]:
    """An outcome's mean, its change without a set of heads [unit], and the mean change without each random set."""
    sets, values = list(after["sets"]), after["outcomes"][outcome]
    values = np.array(values["values"] if isinstance(values, dict) else values)[:, rows]
    moved = values - values[sets.index("none")]
    draws = [float(moved[i].mean()) for i, name in enumerate(sets) if name.startswith(f"random as {group}")]
    return float(values[sets.index("none")].mean()), moved[sets.index(group)], draws


def by_sentence(crossed: Table, outcome: str, group: str) -> tuple[Interval, Interval, float, str]:
    """WinoBias, where each sentence has two jobs: the whole gap, its change without a group of heads, the p-value of
    the change, and what was resampled. Means over the jobs that are meant, which count alike."""
    part, sets = crossed[outcome], list(crossed["sets"])
    referent, values = part["referent"], np.array(part["values"])
    counts = {job: referent.count(job) for job in referent}
    weight = np.array([len(referent) / len(counts) / counts[job] for job in referent])
    found = []
    for x in (values[0], values[sets.index(group)] - values[0]):
        mean = (weight * x).mean()
        found.append(clustered_ci(mean + weight * (x - mean), referent, part["other"]))
    whole, moved = (Interval(float(c.mean), float(c.low), float(c.high), len(referent)) for c in found)
    return whole, moved, float(found[1].p), f"sentences of {len(counts)} × {len(set(part['other']))} jobs"


def carried(after: Table, crossed: Table, seed: int = 0) -> tuple[Any, list[Finding]]:
    """What goes of each outcome without the acting and without the looking heads; Holm-corrected over all rows.

    *Not testable*: an outcome whose whole gap may be zero, and one of so few units that no flipping of their signs
    could stand after the correction.
    """
    tests = [(outcome, group) for group in ("acting", "looking") for outcome in OUTCOMES]
    found = []
    for outcome, group in tests:
        _, moved, draws = change(after, outcome, group)
        if outcome in crossed:
            found.append((*by_sentence(crossed, outcome, group), moved, draws, True))
        else:
            p, enough = permutation_test(moved), 2.0 ** (1 - len(moved)) * len(tests) < 0.05
            gap = bootstrap_ci(without(after, outcome, "none"), seed=seed)
            found.append((gap, bootstrap_ci(moved, seed=seed), p, after["units"][outcome], moved, draws, enough))
    p_values = adjust([one[2] for one in found], "holm")
    rows, findings = [], []
    for (outcome, group), p, (gap, x, _, unit, moved, draws, enough) in zip(tests, p_values, found, strict=True):
        n, what = len(after["sets"][group]), OUTCOMES[outcome].replace("\n", " ")
        rows.append(
            {
                "outcome": what,
                "without": group,
                "gap": shown(gap, "+.2f"),
                "change": shown(x, "+.2f"),
                "falls in": f"{(moved < 0).sum()} of {len(moved)} {after['units'][outcome]}",
                "without random ones": spread(draws),
                "Holm p": f"{p:.3f}",
                "resampled": f"{x.n} {unit}",
            }
        )
        claim = f"{what}: the gap shrinks without {n} {group} heads"
        control = Control.drawn("random units", SAME, draws)
        declared = None if enough and gap.excludes(0) else "not testable"
        findings.append(Finding.measured(claim, 4, x, unit, control, side="below", p_value=float(p), declared=declared))
    return frame(rows), findings


def left(after: Table) -> str:
    """What is left of each pronoun gap without the acting heads, by the outcomes that are asked alike."""
    said = []
    for outcome, what in (("fresh", "fresh jobs"), ("report", "report jobs"), ("defined", "king and queen")):
        before, now = (without(after, outcome, name).mean() for name in ("none", "acting"))
        said.append(f"{what} {now:.2f} of {before:.2f}")
    return "left without the acting heads (logits): " + ", ".join(said)


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
