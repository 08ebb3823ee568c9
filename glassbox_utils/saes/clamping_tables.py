"""Tables, pictures and findings of notebook 04, from its studies and from what was measured there.

Each picture says in its title what it shows, on any model; no number stands without its control.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glassbox_utils.core.evidence import Control, Finding
from glassbox_utils.core.figures import BLUE, GREEN, GREY, ORANGE, PINK, RED, SKY, titled
from glassbox_utils.core.labels import name_points
from glassbox_utils.core.statistics import Interval, bootstrap_ci, exact_ci
from glassbox_utils.core.tables import frame, shown
from glassbox_utils.saes import (
    clamping,
    clamping_choice_study,
    clamping_fit_tables,
    clamping_report_study,
    clamping_study,
)
from glassbox_utils.saes.clamping_study import GOAL, LEARNED, TWIN, family

Table = Mapping[str, Any]
Measures = Mapping[str, Interval]
FOUR = clamping_report_study.FOUR
BENT = ("relevance of mentions ×", "mentions and keeps half")
"""are the answers bent or replaced? the relevance of those that mention it, and the share that does both"""
LIMITS = dict(zip(FOUR, (GOAL["mention"], GOAL["perplexity"], GOAL["distinct"], GOAL["relevance"]), strict=True))


# --- reading and writing ------------------------------------------------------------------------------


BEST = 0.05
"""the share of a dictionary that counts as its best writers"""


def written_by_readers(choice: Table, more: Table) -> dict[str, Interval]:
    """Share of the features that read the bridge among the best writers of the whole dictionary by gradient; beside it
    that of features as active on its sentences that don't tell them apart (``more``: of ``clamp-controls``), and of
    random features that fire somewhere. Chance is ``BEST``."""
    limit = round(BEST * choice["d_sae"])
    sides = {"readers": choice["candidates"], "as active, blind": more["active"], "random": choice["random"]}
    return {name: exact_ci(sum(c["rank"] < limit for c in some), len(some)) for name, some in sides.items() if some}


def readers_and_writers(choice: Table, more: Table) -> Any:
    """Each feature by how it reads the name and by its place among all writers, beside its two controls."""
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6.6, 3.8))
    for rows, colour, label in (
        (choice["random"], GREY, "random features"),
        (more["active"], PINK, "as active, but blind"),
        (choice["candidates"], BLUE, "features that read it"),
    ):
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
    said = {name: f"{round(x.value * x.n)} of {x.n}" for name, x in written_by_readers(choice, more).items()}
    title = f"{said.pop('readers')} features that read the bridge are among the {BEST:.0%} that write it best"
    return titled(figure, "; ".join([title, *(f"{name}: {x}" for name, x in said.items())]))


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


def alone(choice: Table) -> Interval:
    """Share of all answers to selection prompts that mention the bridge while one feature alone is held: every feature
    that was tried, at every push, each pair once."""
    singles = [
        r for r in choice["rows"] if r["method"] in clamping_study.OF_FEATURES and len(r.get("features", ())) == 1
    ]
    rates = {(r["features"][0], r["strength"]): r["mention"] for r in singles}
    n = len(choice["prompts"])
    return exact_ci(sum(round(rate * n) for rate in rates.values()), n * len(rates))


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
        for what in (FOUR[0], "names it", *FOUR[1:], *BENT):
            some = [m[what] for m in draws if what in m]
            row[what] = shown(some[0] if len(some) == 1 else spread_of(x.value for x in some)) if some else ""
        rows.append(row)
    said = {k: f"{'≤' if k.startswith('perp') else '≥'} {v:g}" for k, v in LIMITS.items()}
    return frame([{"method": "**goal**"} | {k: said.get(k, "") for k in rows[0] if k != "method"}, *rows])


def spread_of(values: Iterable[float]) -> Interval:
    """The mean of some draws, with the lowest and the highest."""
    drawn = list(values)
    return Interval(float(np.mean(drawn)), min(drawn), max(drawn), len(drawn))


def reached(measures: Measures) -> bool:
    """Does a setting reach the goal in all four measures (by its values)?"""
    return all(
        measures[k].value <= v if k.startswith("perplexity") else measures[k].value >= v for k, v in LIMITS.items()
    )


def _drawn_as(method: str) -> tuple[str, str, bool]:
    """Label and colour of a method's points, and whether a line joins its strengths (most draws are not joined)."""
    own = {
        "none": "black", LEARNED: BLUE, TWIN: ORANGE, clamping_study.READERS: GREEN, "learned vector": RED,
        "mean difference": PINK, "system prompt": "#8c564b",
    }  # fmt: skip
    if method in own:
        return method, own[method], method != "none"
    if method in clamping_study.OF_FEATURES:
        return "one to three features", SKY, False
    return "random features and directions", GREY, False


def frontier(report: Table) -> Any:
    """Mentions against price, and relevance against variety: every setting that was reported, one point each, on the
    same prompts; a ring marks the strength that was selected."""
    import matplotlib.pyplot as plt

    plain, groups = report["rows"][0], dict[str, list[tuple[Measures, bool]]]()
    n, seen, full = min(len(r["answers"]) for r in report["rows"]), set[str](), list[Measures]()
    base = clamping_report_study.thinned(plain, n)
    for row in report["rows"]:
        full.append(clamping_report_study.measures(clamping_report_study.thinned(row, n), base))
        first = row["method"] not in groups
        groups.setdefault(row["method"], []).append((full[-1], first))
    figure, axes = plt.subplots(1, 2, figsize=(10.5, 4.4))
    for name, rows in groups.items():
        label, colour, line = _drawn_as(family(name))
        rows.sort(key=lambda row: row[0]["perplexity ×"].value)
        for axis, (x, y) in zip(axes, (FOUR[1::-1], FOUR[2:]), strict=True):
            xs, ys = ([m[k].value for m, _ in rows] for k in (x, y))
            axis.plot(xs, ys, linestyle="-" if line else "none", lw=1, marker="o", ms=4, color=colour,
                      label="_" if label in seen else label)  # fmt: skip
            if line:
                ring = [i for i, (_, first) in enumerate(rows) if first]
                axis.plot([xs[i] for i in ring], [ys[i] for i in ring], "o", ms=9, mfc="none", mec=colour, label="_")
        seen.add(label)
    for axis, (x, y) in zip(axes, (FOUR[1::-1], FOUR[2:]), strict=True):
        axis.set(xlabel=x, ylabel=y)
        axis.axvline(LIMITS[x], color="black", lw=0.8, ls=":")
        axis.axhline(LIMITS[y], color="black", lw=0.8, ls=":")
        most = "at most" if x.startswith("perplexity") else "at least"
        axis.annotate(f"goal: {most} {LIMITS[x]:g}", (LIMITS[x], 0.99), (-10, 0), ("data", "axes fraction"),
                      "offset points", fontsize=7, rotation=90, va="top")  # fmt: skip
        axis.annotate(f"goal: at least {LIMITS[y]:g}", (0.01, LIMITS[y]), (0, 3), ("axes fraction", "data"),
                      "offset points", fontsize=7)  # fmt: skip
    axes[0].set_xscale("log")
    axes[0].set_xticks([1, 2, 3, 5, 10, 20], ["1", "2", "3", "5", "10", "20"])
    axes[0].minorticks_off()
    axes[1].plot([], [], "o", ms=9, mfc="none", mec="black", label="the strength that was selected")
    axes[1].legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.02, 1.0))
    said = (
        "no setting reaches the goal" if not any(map(reached, full)) else f"{sum(map(reached, full))} settings reach it"
    )
    return titled(
        figure, f"Mentions, price, variety and relevance of {len(full)} settings, the same {n} prompts each: {said}"
    )


def turned_up(report: Table) -> Any:
    """What every curve of ``frontier`` comes to at its largest strength."""
    last = dict[str, Table]()
    for row in report["rows"]:
        first = last.get(row["method"], row)
        if family(row["method"]) in clamping_report_study.CURVES and row["strength"] >= first["strength"]:
            last[row["method"]] = row
    rows = []
    for method, row in last.items():
        m, columns = clamping_report_study.measures(row, report["rows"][0]), (FOUR[0], "names it", *FOUR[1:])
        rows.append(
            {"turned up": method, "strength": f"{row['strength']:g}"} | {k: f"{m[k].value:.2f}" for k in columns}
        )
    return frame(rows)


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


def _bent(row: Table, usual: NDArray) -> NDArray:
    """Which answers mention the topic and keep at least half of the relevance of the unclamped ones (``usual``)."""
    return (np.array(row["mentioned"]) > 0) & (np.array(row["related"]) >= usual / 2)


def _of_mentions(row: Table, usual: NDArray) -> str:
    """Mean relevance of the answers that mention the topic, times the unclamped answers'."""
    hits = np.array(row["mentioned"]) > 0
    return f"{np.mean(np.array(row['related'])[hits]) / np.mean(usual):.2f}" if hits.any() else ""


def concepts(table: Table, seed: int) -> tuple[Any, list[Finding]]:
    """The ten further concepts by the bridge's rule, and their means beside random features that are pushed as much."""
    rows, usual = table["rows"], np.array(table["unclamped_related"])
    further = frame([
        {
            "concept": r["concept"], "feature": r["feature"], "reads": f"{r['candidate']['auc']:.2f}",
            "writer no.": r["candidate"]["rank"] + 1, "push": f"{r['strength']:.0%}",
            "mentions": f"{np.mean(r['mentioned']):.2f}", "unclamped": f"{np.mean(r['unclamped']):.2f}",
            "random feature": f"{r['random']['mention']:.2f}" if r["random"] else "",
            "other topics' features": f"{np.mean([o['others'][r['concept']] for o in rows if o is not r]):.2f}",
            "perplexity ×": f"{r['perplexity']:.1f}", "distinct-2": f"{r['distinct']:.2f}",
            "relevance ×": f"{r['relevance']:.2f}", BENT[0]: _of_mentions(r, usual),
            BENT[1]: f"{np.mean(_bent(r, usual)):.2f}",
        }
        for r in rows
    ])  # fmt: skip
    both = [(r | {"mention": float(np.mean(r["mentioned"])), "bent": float(np.mean(_bent(r, usual)))},
             r["random"] | {"bent": float(np.mean(_bent(r["random"], usual)))})
            for r in rows if r["random"] is not None]  # fmt: skip
    found = list[Finding]()
    for rung, what, said, side in (
        (4, "mention", "share of answers that mention it after token 8", "above"),
        (4, "bent", "share that mentions it and keeps half of the unclamped answer's relevance", "above"),
        (5, "perplexity", "perplexity, times the unclamped answers'", "above"),
        (5, "relevance", "relevance, times the unclamped answers'", "below"),
    ):
        if not both:
            break
        held, drawn = (bootstrap_ci(np.array([r[what] for r in some]), seed=seed) for some in zip(*both, strict=True))
        if rung == 4:  # mostly none at all: its interval is the exact one, over answers
            drawn = exact_ci(
                sum(round(r[what] * len(r["answers"])) for _, r in both), len(both) * len(rows[0]["answers"])
            )
        control = Control.measured("random units", "a random feature each, pushed as much", drawn)
        claim = f"everyday topics, one feature each, chosen by one rule: {said}, mean over topics"
        null = 0.0 if rung == 4 else 1.0
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


ACTIVE = "features as active"
"""family of the draws that are taken away beside the features of the name"""


def ablation(table: Table, seed: int) -> tuple[Any, dict[str, dict[str, list[Interval]]]]:
    """What facts cost more (nats a token) without some features: the bridge's, those of them that do not end in its
    name, and other landmarks'. Of what was drawn several times every draw, and in the table their mean and range."""
    known, lost = table["ablation"][0], dict[str, dict[str, list[Interval]]]()
    spelled = [clamping_study.prompts()["golden_gate"]["words"][0] in end.lower() for _, end in _facts()]
    rows: dict[str, dict[str, Any]] = {}
    for r in table["ablation"][1:]:
        rise = {k: np.array(r[k]) - np.array(known[k]) for k in ("facts", "other_facts")}
        kinds = {BRIDGE: rise["facts"], UNSPELLED: rise["facts"][~np.array(spelled)], OTHERS: rise["other_facts"]}
        name = family(r["ablated"])
        for kind, x in kinds.items():
            lost.setdefault(name, {}).setdefault(kind, []).append(bootstrap_ci(x, n_resamples=1000, seed=seed))
        fires = f"{r['fires']['facts']} and {r['fires']['other_facts']}"
        rows.setdefault(name, {"set to zero": name, "features": r["n"], "fires in (of 8 and 8)": fires})
    for name, kinds_of in lost.items():
        n = len(kinds_of[BRIDGE])
        rows[name]["set to zero"] = name if n == 1 else f"{name} ({n} draws)"
        rows[name] |= {k: shown(x[0] if n == 1 else spread_of(i.value for i in x)) for k, x in kinds_of.items()}
    return frame(list(rows.values())), lost


BRIDGE, UNSPELLED, OTHERS = "facts about the bridge", "those that don't end in its name", "other landmarks"


def _facts() -> list[list[str]]:
    return clamping_study.prompts()["facts"]


# --- findings -----------------------------------------------------------------------------------------


CONTROLS = {clamping_study.READERS: "random readers", LEARNED: "random features"}
"""method -> family of the random draws that hold as many features and push as far; of all others: random pushes"""


def controls(draw: str, method: str) -> bool:
    """Is a random draw the control of this method?"""
    return family(draw) == CONTROLS.get(method, "random push")


def _drawn_words(method: str) -> str:
    """What the random draws beside a method are."""
    if method in CONTROLS:
        return "random features, as many and pushed as far"
    return "random features, as many and as hard as the best set of found ones"


def _never(draws: Sequence[Measures], what: str, words: str) -> Control:
    """The mentions of random draws, which mostly have none at all: all answers together, by their exact interval."""
    rates = [m[what] for m in draws]
    rate = exact_ci(sum(round(x.value * x.n) for x in rates), sum(x.n for x in rates))
    return Control.measured("random units", f"{len(rates)} draws of {words}", rate)


def findings(
    choice: Table, report: Table, more: Table, found: Mapping[str, Measures], shown_method: str
) -> list[Finding]:
    """What the notebook claims of the bridge, each with its control."""
    claims = list[Finding]()
    source = "study clamp-choose"
    share = written_by_readers(choice, more)
    if "as active, blind" in share:
        claim = "features that read the bridge: share among the 5 % that write it best, by gradient"
        what = "features as active on its sentences that don't tell them from others"
        control, chance = Control.measured("random units", what, share["as active, blind"]), BEST
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
            if rung == 4:
                control = _never(draws, what, _drawn_words(shown_method))
            nothing = 0.0 if rung == 4 else 1.0
            claim = f"the clamp on the bridge: {claim}"
            claims.append(
                Finding.measured(claim, rung, mine[what], "prompts", control, side=side, null=nothing, source=source)
            )
    pushes = [m for method, m in found.items() if family(method) == "random push"]
    if pushes and (rate := alone(choice)).n:
        claim = (
            "one feature alone, each that was tried at each push: share of selection answers that mention the bridge"
        )
        control = _never(pushes, "mentions", "random features, three at a time, on report prompts")
        claims.append(
            Finding.measured(claim, 4, rate, "answers", control, side="above", null=0.0, source="study clamp-choose")
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
    claims += clamping_fit_tables.fit_claims(report, more)
    _, forbid = forbidden(report)
    if shown_method in forbid:
        control = Control.measured("other group", "the same prompts, nothing held", forbid["none"])
        claim = "the clamp on the bridge: share of answers with a late mention where the prompt forbids it"
        claims.append(
            Finding.measured(claim, 4, forbid[shown_method], "prompts", control, side="above", null=None, source=source)
        )
    return claims


def side_effects(
    price: Mapping[str, Interval], lost: Mapping[str, Mapping[str, Sequence[Interval]]], shown_method: str
) -> list[Finding]:
    """What holding costs on other text, and what the model loses when the name's features are taken away."""
    claims, source = list[Finding](), "study clamp-costs"
    push = next((m for m in price if controls(m, shown_method)), None)
    if push:
        control = Control.measured("random units", f"one draw of {_drawn_words(shown_method)}", price[push])
        claim = "the clamp on the bridge: rise of the loss on held-out text (nats per token)"
        claims.append(Finding.measured(claim, 5, price[shown_method], "texts", control, source=source))
    if "the name's features" in lost and ACTIVE in lost:
        for kind in (BRIDGE, UNSPELLED):
            drawn = [x.value for x in lost[ACTIVE][kind]]
            control = Control.drawn("random units", "draws of features that are as active on these texts", drawn)
            claim = f"the name's features set to zero: rise of the loss of {kind} (nats per token)"
            (rise,) = lost["the name's features"][kind]
            claims.append(Finding.measured(claim, 3, rise, "sentences", control, side="above", source=source))
    return claims
