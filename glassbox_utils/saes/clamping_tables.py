"""Tables, pictures and findings of notebook 04, from its studies and from what was measured there.

Each picture says in its title what it shows, on any model; no number stands without its control.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from glassbox_utils.core.evidence import Control, Finding
from glassbox_utils.core.figures import BLUE, GREEN, GREY, ORANGE, titled
from glassbox_utils.core.labels import name_points
from glassbox_utils.core.statistics import Interval, bootstrap_ci, exact_ci
from glassbox_utils.core.tables import frame, shown
from glassbox_utils.saes import clamping, clamping_choice_study, clamping_report_study, clamping_study
from glassbox_utils.saes.clamping_study import GOAL, LEARNED, TWIN, WRITER, family

Table = Mapping[str, Any]
Measures = Mapping[str, Interval]
FOUR = ("mentions", "perplexity ×", "distinct-2 of the set", "relevance ×")
"""the four measures of the goal"""
LIMITS = dict(zip(FOUR, (GOAL["mention"], GOAL["perplexity"], GOAL["distinct"], GOAL["relevance"]), strict=True))


# --- reading and writing ------------------------------------------------------------------------------


BEST = 0.05
"""the share of a dictionary that counts as its best writers"""


def written_by_readers(choice: Table) -> dict[str, Interval]:
    """Share of the features that read the bridge, and of random features that fire somewhere, among the best writers of
    the whole dictionary by gradient. Chance is ``BEST``."""
    limit = round(BEST * choice["d_sae"])
    sides = {"readers": choice["candidates"], "random": choice["random"]}
    return {name: exact_ci(sum(c["rank"] < limit for c in some), len(some)) for name, some in sides.items() if some}


def readers_and_writers(choice: Table) -> Any:
    """Each feature by how it reads the name and by its place among all writers, beside random features."""
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6.6, 3.8))
    for kind, colour, label in (("random", GREY, "random features"), ("candidates", BLUE, "features that read it")):
        rows = choice[kind]
        axis.scatter([r["auc"] for r in rows], [r["rank"] + 1 for r in rows], color=colour, label=label, s=22)
    tried = {i for r in choice["rows"] if r["method"] == "one feature" for i in r["features"]}
    some = [r for r in choice["candidates"] if r["feature"] in tried]
    axis.scatter([r["auc"] for r in some], [r["rank"] + 1 for r in some], color=ORANGE, label="tried one by one", s=30)
    axis.axhline(BEST * choice["d_sae"], color="black", lw=0.7, ls=":", label=f"the best {BEST:.0%}")
    axis.set_yscale("log")
    axis.set_ylim(1.5 * choice["d_sae"], 0.7)
    axis.set(xlabel="reads: area under the curve on sentences (.5: blind)", ylabel="writes: place among all features")
    axis.legend(fontsize=8)
    name_points(axis, [(r["auc"], r["rank"] + 1) for r in some], [str(r["feature"]) for r in some], 4.0)
    limit = round(BEST * choice["d_sae"])
    both = {kind: [c["rank"] < limit for c in choice[kind]] for kind in ("candidates", "random")}
    return titled(
        figure,
        f"{sum(both['candidates'])} of {len(both['candidates'])} features that read the bridge are among the {BEST:.0%}"
        f" that write it best, {sum(both['random'])} of {len(both['random'])} random ones",
    )


def tried(choice: Table) -> Any:
    """Every feature and every few of them that were tried on selection prompts, each at the push that came nearest to
    the goal: what it reads, its place among all writers, the four measures."""
    reads = {c["feature"]: c for c in [*choice["candidates"], *choice["writers"]]}
    sets: dict[tuple[str, tuple[int, ...]], list[Any]] = {}
    for row in choice["rows"]:
        if row["method"] in clamping_study.OF_FEATURES and "features" in row:
            sets.setdefault((row["method"], tuple(row["features"])), []).append(row)
    rows = []
    for (method, some), tries in sets.items():
        best, one = clamping_choice_study.choose(tries), reads.get(some[0]) if len(some) == 1 else None
        rows.append({
            "tried as": method, "features": ", ".join(map(str, some)), "reads": f"{one['auc']:.2f}" if one else "",
            "writer no.": str(one["rank"] + 1) if one else "", "push": f"{best['strength']:.0%}",
            "mentions": f"{best['mention']:.2f}", "most mentions": f"{max(r['mention'] for r in tries):.2f}",
            "perplexity ×": f"{best['perplexity']:.1f}", "distinct-2": f"{best['distinct']:.2f}",
            "relevance ×": f"{best['relevance']:.2f}",
        })  # fmt: skip
    return frame(rows)


# --- the goal and its opponents -----------------------------------------------------------------------


def at_selected(report: Table) -> dict[str, Measures]:
    """Method -> its four measures and more on the report prompts, at the strength that was selected for it."""
    plain, found = report["rows"][0], dict[str, Measures]()
    for row in report["rows"]:  # the selected strength of each method stands before its others
        if row["method"] not in found and len(row["answers"]) == len(plain["answers"]):
            found[row["method"]] = clamping_report_study.measures(row, plain)
    return found


def compared(found: Mapping[str, Measures], report: Table, sizes: Mapping[str, float]) -> Any:
    """The four measures of every method; of one that was drawn several times the mean with lowest and highest draw.

    ``sizes``: of a push at strength 1, as a share of a typical norm (``clamping_study.push_sizes``).
    """
    strengths = {row["method"]: row["strength"] for row in reversed(report["rows"])}  # the selected one stands first
    groups: dict[str, list[Measures]] = {}
    for method, measures in found.items():
        groups.setdefault(family(method), []).append(measures)
    rows = []
    for name, draws in groups.items():
        row = {"method": name if len(draws) == 1 else f"{name} ({len(draws)} draws)"}
        push = [sizes[m] * strengths[m] for m in found if family(m) == name and m in sizes]
        row["push"] = f"{np.mean(push):.0%}" if push else ""
        for what in (FOUR[0], "names it", *FOUR[1:]):
            values = [m[what].value for m in draws]
            spread = Interval(float(np.mean(values)), min(values), max(values), len(values))
            row[what] = shown(draws[0][what] if len(draws) == 1 else spread)
        row["all four"] = "yes" if all(map(reached, draws)) else "no"
        rows.append(row)
    said = {k: f"{'≤' if k.startswith('perp') else '≥'} {v:g}" for k, v in LIMITS.items()}
    return frame([{"method": "**goal**"} | {k: said.get(k, "") for k in rows[0] if k != "method"}, *rows])


def reached(measures: Measures) -> bool:
    """Does a setting reach the goal in all four measures (by its values)?"""
    return all(
        measures[k].value <= v if k.startswith("perplexity") else measures[k].value >= v for k, v in LIMITS.items()
    )


def _drawn_as(method: str) -> tuple[str, str, bool]:
    """Label and colour of a method's points, and whether a line joins its strengths (draws are not joined)."""
    own = {
        "none": "black", LEARNED: BLUE, TWIN: ORANGE, clamping_study.READERS: GREEN, "learned vector": "#56B4E9",
        "mean difference": "#CC79A7", "system prompt": "#8c564b",
    }  # fmt: skip
    if method in own:
        return method, own[method], method not in (TWIN, "none")
    if method in clamping_study.OF_FEATURES:
        return "one to three features", "#D55E00", False
    return "random features and directions", GREY, False


def frontier(report: Table) -> Any:
    """Mentions against price, and relevance against variety: every setting that was reported, one point each."""
    import matplotlib.pyplot as plt

    plain, groups = report["rows"][0], dict[str, list[dict[str, Interval]]]()
    n = min(len(r["answers"]) for r in report["rows"])
    for row in report["rows"]:
        small = clamping_report_study.thinned(row, n)
        groups.setdefault(family(row["method"]), []).append(
            clamping_report_study.measures(small, clamping_report_study.thinned(plain, n))
        )
    figure, axes = plt.subplots(1, 2, figsize=(10.5, 4.2))
    for axis, (x, y) in zip(
        axes, (("perplexity ×", "mentions"), ("distinct-2 of the set", "relevance ×")), strict=True
    ):
        seen = set[str]()
        for name, rows in groups.items():
            label, colour, line = _drawn_as(name)
            order = sorted(rows, key=lambda m: m["perplexity ×"].value)
            xs, ys = [m[x].value for m in order], [m[y].value for m in order]
            axis.plot(xs, ys, linestyle="-" if line else "none", marker="o", ms=4, color=colour,
                      label="_" if label in seen else label)  # fmt: skip
            seen.add(label)
        axis.set(xlabel=x, ylabel=y)
        axis.axvline(LIMITS[x], color=GREY, lw=0.8, ls=":")
        axis.axhline(LIMITS[y], color=GREY, lw=0.8, ls=":")
    axes[0].set_xscale("log")
    axes[0].set_xticks([1, 2, 3, 5, 10], ["1", "2", "3", "5", "10"])
    axes[0].minorticks_off()
    axes[1].legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.02, 1.0))
    full = [m for rows in groups.values() for m in rows]
    said = (
        "no setting reaches the goal" if not any(map(reached, full)) else f"{sum(map(reached, full))} settings reach it"
    )
    return titled(figure, f"Mentions, price, variety and relevance of {len(full)} settings, {n} prompts each: {said}")


def some_answers(report: Table, row: Table, seed: int, n: int = 8) -> str:
    """Answers drawn at random, each under its question."""
    asked = report["prompts"][:: len(report["prompts"]) // len(row["answers"])]
    pick = np.sort(np.random.default_rng(seed).choice(len(asked), min(n, len(asked)), replace=False))
    return "\n".join(f"{asked[i]}\n    {' '.join(row['answers'][i].split())}" for i in pick)


def forbidden(report: Table) -> tuple[Any, dict[str, Interval]]:
    """Share of answers with a late mention, on neutral prompts and on those that forbid the subject."""
    words = clamping_study.prompts()["golden_gate"]["words"]
    rates: dict[str, dict[str, Interval]] = {}
    for where, rows in (("neutral prompts", report["rows"]), ("prompts that forbid it", report["adversarial"])):
        for row in rows:
            hits = clamping.mentions(row["later"], words)
            rates.setdefault(row["method"], {}).setdefault(where, exact_ci(int(sum(hits)), len(hits)))
    told = [row["method"] for row in report["adversarial"]]
    table = frame([{"method": m} | {where: shown(x) for where, x in rates[m].items()} for m in told])
    return table, {m: rates[m]["prompts that forbid it"] for m in told}


# --- further concepts, side effects -------------------------------------------------------------------


def star(table: Table) -> Table:
    """Of the further concepts the one whose feature came nearest to the goal on the *selection* prompts."""

    def order(row: Table) -> tuple[float, float, float]:
        here = row["selection"]
        return clamping_study.reached(here), here["mention"], -here["perplexity"]

    return max(table["rows"], key=order)


def concepts(table: Table, seed: int) -> tuple[Any, list[Finding]]:
    """The ten further concepts by the bridge's rule, and their means beside random features that are pushed as much."""
    rows = table["rows"]
    further = frame([
        {
            "concept": r["concept"], "feature": r["feature"], "reads": f"{r['candidate']['auc']:.2f}",
            "writer no.": r["candidate"]["rank"] + 1, "push": f"{r['strength']:.0%}",
            "mentions": f"{np.mean(r['mentioned']):.2f}", "unclamped": f"{np.mean(r['unclamped']):.2f}",
            "random feature": f"{r['random']['mention']:.2f}" if r["random"] else "",
            "perplexity ×": f"{r['perplexity']:.1f}", "distinct-2": f"{r['distinct']:.2f}",
            "relevance ×": f"{r['relevance']:.2f}",
        }
        for r in rows
    ])  # fmt: skip
    both = [(r | {"mention": float(np.mean(r["mentioned"]))}, r["random"]) for r in rows if r["random"] is not None]
    found = list[Finding]()
    for rung, what, said, side in (
        (4, "mention", "share of answers that mention it after token 8", "above"),
        (5, "perplexity", "perplexity, times the unclamped answers'", "above"),
        (5, "relevance", "relevance, times the unclamped answers'", "below"),
    ):
        if not both:
            break
        held, drawn = (bootstrap_ci(np.array([r[what] for r in some]), seed=seed) for some in zip(*both, strict=True))
        if what == "mention":  # mostly none at all: its interval is the exact one, over answers
            drawn = exact_ci(
                sum(round(r[what] * len(r["answers"])) for _, r in both), len(both) * len(rows[0]["answers"])
            )
        control = Control.measured("random units", "a random feature each, pushed as much", drawn)
        claim = f"everyday topics, one feature each, chosen by one rule: {said}, mean over topics"
        null = 0.0 if what == "mention" else 1.0
        found.append(Finding.measured(
            claim, rung, held, "topics", control, side=side, null=null, source="study clamp-concepts"
        ))  # fmt: skip
    return further, found


def some_topics(table: Table, asked: Sequence[str], seed: int) -> str:
    """Of every topic one answer drawn at random, under its question."""
    rng, lines = np.random.default_rng(seed), list[str]()
    for r in table["rows"]:
        i = int(rng.integers(len(r["answers"])))
        lines.append(f"{r['concept']}, feature {r['feature']}. {asked[i]}\n    {' '.join(r['answers'][i].split())}")
    return "\n".join(lines)


def costs(table: Table, seed: int) -> tuple[Any, dict[str, Interval]]:
    """What holding costs on text that has nothing to do with it: rise of the loss (nats a token), right answers."""
    clean, rows, rises = table["rows"][0], [], {}
    for r in table["rows"][1:]:
        rise = np.array(r["loss"]) - clean["loss"], np.array(r["tokens"])
        rises[r["method"]] = bootstrap_ci(rise, lambda d, t: float(d.sum() / t.sum()), n_resamples=1000, seed=seed)
        right = bootstrap_ci(np.array(r["choice"]) - np.array(clean["choice"]), seed=seed)
        held = {"held": r["method"], "strength": r["strength"], "held-out text, nats": shown(rises[r["method"]])}
        rows.append(held | {f"multiple choice (unclamped {np.mean(clean['choice']):.2f})": shown(right)})
    return frame(rows), rises


def ablation(table: Table, seed: int) -> tuple[Any, dict[str, Interval]]:
    """What facts cost more (nats a token) without some features: the bridge's and other landmarks'."""
    known, rows, lost = table["ablation"][0], [], {}
    for r in table["ablation"][1:]:
        both = {
            k: bootstrap_ci(np.array(r[k]) - np.array(known[k]), n_resamples=1000, seed=seed)
            for k in ("facts", "other_facts")
        }
        lost[r["ablated"]] = both["facts"]
        row = {"set to zero": r["ablated"], "features": r["n"], "facts about the bridge": shown(both["facts"])}
        rows.append(row | {"other landmarks": shown(both["other_facts"])})
    return frame(rows), lost


# --- findings -----------------------------------------------------------------------------------------


CONTROLS = {clamping_study.READERS: "random readers", LEARNED: "random features"}
"""method -> family of the random draws that hold as many features at the same values; of all others: random pushes"""


def controls(draw: str, method: str) -> bool:
    """Is a random draw the control of this method?"""
    return family(draw) == CONTROLS.get(method, "random push")


def _drawn_words(method: str) -> str:
    """What the random draws beside a method are."""
    if method in CONTROLS:
        return "random features, at the same values"
    return "random features, as many and as hard as the best set of found ones"


def _never(draws: Sequence[Measures], what: str, words: str) -> Control:
    """The mentions of random draws, which mostly have none at all: all answers together, by their exact interval."""
    rates = [m[what] for m in draws]
    rate = exact_ci(sum(round(x.value * x.n) for x in rates), sum(x.n for x in rates))
    return Control.measured("random units", f"{len(rates)} draws of {words}", rate)


def findings(choice: Table, report: Table, found: Mapping[str, Measures], shown_method: str) -> list[Finding]:
    """What the notebook claims of the bridge, each with its control."""
    claims = list[Finding]()
    source = "study clamp-choose"
    share = written_by_readers(choice)
    if len(share) == 2:
        claim = "features that read the bridge: share among the 5 % that write it best, by gradient"
        control = Control.measured("random units", "features that fire on other sentences", share["random"])
        chance = BEST
        claims.append(
            Finding.measured(claim, 3, share["readers"], "features", control, side="above", null=chance, source=source)
        )
    mine, source = found[shown_method], "study clamp-report"
    draws = [m for method, m in found.items() if controls(method, shown_method)]
    if draws:
        for rung, what, claim, side in (
            (4, "mentions", "share of report answers with a mention after token 8", "above"),
            (4, "names it", "share of report answers that name the Golden Gate after token 8", "above"),
            (5, "perplexity ×", "perplexity of its answers, times the unclamped ones'", "above"),
            (5, "relevance ×", "relevance of its answers, times the unclamped ones'", "below"),
        ):
            values = [m[what].value for m in draws]
            control = Control.drawn("random units", _drawn_words(shown_method), values)
            if what in ("mentions", "names it"):
                control = _never(draws, what, _drawn_words(shown_method))
            nothing = 0.0 if rung == 4 else 1.0
            claim = f"the clamp on the bridge: {claim}"
            claims.append(
                Finding.measured(claim, rung, mine[what], "prompts", control, side=side, null=nothing, source=source)
            )
    pushes = [m for method, m in found.items() if family(method) == "random push"]
    for method, what in (("one feature", "the best writer among its readers"), (WRITER, "the best writer of all")):
        if method in found and pushes and method != shown_method:
            claim = (
                f"one feature alone at its chosen push, {what}: share of report answers with a mention after token 8"
            )
            rate = found[method]["mentions"]
            claims.append(
                Finding.measured(
                    claim,
                    4,
                    rate,
                    "prompts",
                    _never(pushes, "mentions", _drawn_words(method)),
                    side="above",
                    null=0.0,
                    source=source,
                )
            )
    drawn = [m for method, m in found.items() if controls(method, clamping_study.READERS)]
    if drawn and clamping_study.READERS in found and shown_method != clamping_study.READERS:
        for what, said in (("mentions", "with a mention"), ("names it", "that name the Golden Gate")):
            control = _never(drawn, what, _drawn_words(clamping_study.READERS))
            claim = (
                f"the features that fire most on the name, held as there: share of report answers {said} after token 8"
            )
            rate = found[clamping_study.READERS][what]
            claims.append(Finding.measured(claim, 4, rate, "prompts", control, side="above", null=0.0, source=source))
    twins = [method for method in found if family(method) == TWIN]
    if LEARNED in found and len(twins) > 1:
        page, rows = clamping_study.prompts()["golden_gate"], {r["method"]: r for r in reversed(report["rows"])}
        for words, said in ((page["words"], "mention"), (page["words"][:1], "name")):
            hits = {m: np.array(clamping.mentions(rows[m]["later"], words), dtype=float) for m in (LEARNED, *twins)}
            gap = bootstrap_ci(hits[LEARNED] - np.mean([hits[m] for m in twins], 0))
            each = [float(np.mean(hits[m]) - np.mean([hits[o] for o in twins if o != m])) for m in twins]
            control = Control.drawn("random units", "random dictionaries, each against the others", each)
            claim = (
                f"values fitted once on the SAE's rows {said} it more often than those fitted on random rows "
                "(difference)"
            )
            claims.append(Finding.measured(claim, 4, gap, "prompts", control, side="above", source=source))
        for what, side in (("perplexity ×", "below"), ("relevance ×", "above")):
            control = Control.drawn(
                "random units", "dictionaries of random rows, same fit", [found[m][what].value for m in twins]
            )
            claim = f"values fitted on the SAE's rows: {what}, against the same fit on random rows"
            fit = found[LEARNED][what]
            claims.append(Finding.measured(claim, 5, fit, "prompts", control, side=side, null=None, source=source))
    _, forbid = forbidden(report)
    if shown_method in forbid:
        control = Control.measured("other group", "the same prompts, nothing held", forbid["none"])
        claim = "the clamp on the bridge: share of answers with a late mention where the prompt forbids it"
        claims.append(
            Finding.measured(claim, 4, forbid[shown_method], "prompts", control, side="above", null=None, source=source)
        )
    return claims


def side_effects(price: Mapping[str, Interval], lost: Mapping[str, Interval], shown_method: str) -> list[Finding]:
    """What holding costs on other text, and what the model loses when the name's features are taken away."""
    claims, source = list[Finding](), "study clamp-costs"
    push = next((m for m in price if controls(m, shown_method)), None)
    if push:
        control = Control.measured("random units", f"one draw of {_drawn_words(shown_method)}", price[push])
        claim = "the clamp on the bridge: rise of the loss on held-out text (nats per token)"
        claims.append(Finding.measured(claim, 5, price[shown_method], "texts", control, source=source))
    if "the name's features" in lost and "features as active" in lost:
        control = Control.measured(
            "random units", "features that are as active on these texts", lost["features as active"]
        )
        claim = "the name's features set to zero: rise of the loss of facts about the bridge (nats per token)"
        claims.append(
            Finding.measured(claim, 3, lost["the name's features"], "sentences", control, side="above", source=source)
        )
    return claims
