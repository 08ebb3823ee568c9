"""Pictures of notebook 02. Each takes plain numbers and says in its title what these numbers show, on any model."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glassbox_utils.attention.forming import FORMED, History, scores
from glassbox_utils.attention.patterns import head_name
from glassbox_utils.core.figures import BLUE, GREY, RED, SKY, titled
from glassbox_utils.core.interventions import Head
from glassbox_utils.core.labels import name_points
from glassbox_utils.core.statistics import bootstrap_ci, clustered_ci

OUTCOMES = {
    "report": "he or she after a job\n(report jobs, logits)",
    "fresh": "he or she after a job\n(fresh jobs, logits)",
    "winogender": "Winogender\n(logits)",
    "winobias 2": "WinoBias type 2\n(nats)",
    "winobias 1": "WinoBias type 1\n(nats)",
    "stereoset": "StereoSet gender\n(share − ½)",
}
"""outcome -> its name and unit, in the order of the picture"""


def ablations(curve: Mapping[str, Any], seed: int = 0) -> Any:
    """What ablating the top k costs, for several k with a few random sets, and for the chosen k with many of two kinds.

    ``curve``: of the table ``heads_induction``.
    """
    import matplotlib.pyplot as plt

    clean, k, few = np.array(curve["clean"]), curve["k"], curve["curve"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.4, 3.2), width_ratios=(2, 1), sharey=True)
    top = [bootstrap_ci(np.array(row) - clean, seed=seed) for row in few["top"]]
    left.fill_between(few["ks"], [c.low for c in top], [c.high for c in top], color=RED, alpha=0.2, lw=0)
    left.plot(few["ks"], [c.value for c in top], "o-", color=RED, label="the k strongest induction heads")
    for i, draws in enumerate(few["random"]):
        costs = (np.array(draws) - clean).mean(-1)
        left.plot([few["ks"][i]] * len(costs), costs, ".", color=BLUE, label=None if i else "k random heads, each draw")
    left.set_xlabel("k, heads ablated")
    left.set_ylabel("extra loss on repeated tokens (nats)")
    left.set_xticks(few["ks"])
    left.legend()
    main, jitter = (np.array(curve["top"]) - clean).mean(), np.random.default_rng(seed)
    kinds = ("random", "matched")
    drawn = [(np.array(curve[kind]) - clean).mean(-1) for kind in kinds]
    right.plot(0, main, "o", color=RED)
    for i, costs in enumerate(drawn):
        right.plot(i + 1 + jitter.uniform(-0.15, 0.15, len(costs)), costs, ".", color=BLUE)
    right.set_xticks(range(3), ["the ones\nfound", "same\nlayers", "equal\nnorm"])
    right.set_xlim(-0.5, 2.5)
    right.set_title(f"k = {k}, {len(drawn[0])} draws of each kind", fontsize=9)
    every = np.concatenate(drawn)
    return titled(
        figure,
        f"Without its {k} induction heads the model pays {main:+.1f} nats a repeated token, without random ones "
        f"{round(every.min(), 1) + 0.0:+.1f} to {every.max():+.1f}",
    )


def name_of_key_head(report: Mapping[str, Any]) -> str:
    """``keys 17.1, read by 17.3, 17.4``: layer and key head, and its query heads that were measured."""
    return f"keys {report['layer']}.{report['key']}, read by {', '.join(map(head_name, map(tuple, report['heads'])))}"


def senders(paths: Mapping[str, Any], seed: int = 0) -> Any:
    """For each key head: the induction score that goes when one earlier head is cut off from its keys.

    ``paths``: of the table ``heads_induction``.
    """
    import matplotlib.pyplot as plt

    reports = paths["reports"]
    lost = [max(1 - np.mean(p["patched"]) / np.mean(r["base"]) for p in r["pairs"] if p["found"]) for r in reports]
    strong = sum(share > 0.5 for share in lost)
    figure, axes = plt.subplots(1, len(reports), figsize=(2.4 * len(reports) + 1.2, 3), squeeze=False, sharey=True)
    for axis, report in zip(axes.flat, reports, strict=True):
        base = np.array(report["base"])
        found = [p for p in report["pairs"] if p["found"]]
        others = [float((base - p["patched"]).mean() / base.mean()) for p in report["pairs"] if not p["found"]]
        for i, pair in enumerate(found):
            share = bootstrap_ci((base - np.array(pair["patched"])) / base.mean(), seed=seed)
            axis.bar(i, share.value, color=RED, width=0.6)
            axis.errorbar(i, share.value, [[share.value - share.low], [share.high - share.value]], color="black")
        axis.plot(len(found) + np.linspace(-0.2, 0.2, len(others)), others, ".", color=BLUE)
        names = [head_name(tuple(p["sender"])) for p in found]
        axis.set_xticks(range(len(found) + 1), [*names, "random"])
        axis.axhline(0, color=GREY, lw=0.6)
        axis.set_title(name_of_key_head(report).replace(", ", ",\n", 1), fontsize=8)
        axis.set_xlabel("earlier head cut off")
    axes[0, 0].set_ylabel("share of the induction score lost")
    return titled(
        figure, f"Of {len(reports)} key heads {strong} lose more than half of the score without one earlier head"
    )


def forming(live: Mapping[str, History], table: Mapping[str, Any], tokens: Any) -> Any:
    """Training curves of live models over those of a study's seeds, and the trained heads on one row of ``tokens``."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 4, figsize=(11.5, 2.9), width_ratios=(1.2, 1.2, 1, 1))
    colours = dict(zip(live, (RED, GREY), strict=False))
    for axis, name, unit in zip(axes, ("loss", "induction"), ("nats", "attention of the best head"), strict=False):
        for arm, history in live.items():
            for run in table["arms"][arm]["runs"]:
                axis.plot(run["steps"], run[name], color=colours[arm], lw=0.6, alpha=0.35)
            axis.plot(history.steps, getattr(history, name), color=colours[arm], lw=2, label=arm)
        axis.set_xlabel("training step")
        axis.set_ylabel(unit)
    axes[0].set_title("loss where the row repeats", fontsize=9)
    axes[1].set_title("induction score", fontsize=9)
    axes[1].axhline(FORMED, color="black", lw=0.6, ls=":")
    axes[0].legend()
    model = next(iter(live.values())).model
    found = scores(model, tokens)
    pattern = model(tokens[:1])[1].detach()[0]
    for axis, kind, title in zip(axes[2:], (found.previous, found.induction), ("one back", "induction"), strict=True):
        layer, head = divmod(int(kind.argmax()), kind.shape[1])
        axis.imshow(pattern[layer, head], cmap="Blues", vmin=0, vmax=1)
        axis.set_title(f"{title}: head {layer}.{head}, {float(kind[layer, head]):.2f}", fontsize=9)
        axis.set_xlabel("looked at (place)")
        axis.set_ylabel("from (place)")
    counts = {arm: sum(run["formed"] for run in table["arms"][arm]["runs"]) for arm in live}
    said = ", ".join(f"{arm} {counts[arm]} of {len(table['arms'][arm]['runs'])}" for arm in live)
    return titled(figure, f"Seeds in which induction forms: {said} (thin lines; thick: trained here)")


def gaps(found: Sequence[Head], values: NDArray, pairs: Sequence[tuple[str, str]], stored: Any = None) -> Any:
    """The attention gap of chosen heads with an interval that knows which jobs the pairs share; hollow: of the study.

    ``values``: [pair, head], for the heads of ``found``. ``pairs``: the jobs of each pair. ``stored``: mean
    of every head [layer][head].
    """
    import matplotlib.pyplot as plt

    mean, low, high, _ = clustered_ci(values, *zip(*pairs, strict=True))
    order = np.argsort(mean)
    figure, axis = plt.subplots(figsize=(7, 0.24 * len(found) + 1))
    for y, i in enumerate(order):
        colour = RED if mean[i] > 0 else BLUE
        axis.errorbar(mean[i], y, xerr=[[mean[i] - low[i]], [high[i] - mean[i]]], fmt="o", ms=4, color=colour)
        if stored is not None:
            axis.plot(stored[found[i][0]][found[i][1]], y, "o", ms=8, mfc="none", color="black")
    axis.axvline(0, color=GREY, lw=0.8)
    axis.set_yticks(range(len(found)), [head_name(found[i]) for i in order])
    axis.set_xlabel("attention gap (to the job of the pronoun's stereotype, minus the other)")
    with_it, against = int((low > 0).sum()), int((high < 0).sum())
    axis.set_title(
        f"Of {len(found)} heads chosen on other jobs {with_it} look with the stereotype, {against} against it"
    )
    return figure


def looks_and_acts(looks: NDArray, acts: Mapping[str, tuple[NDArray, float]]) -> Any:
    """Every head: how much it looks at the stereotype, against how much of a behaviour goes without it.

    ``looks``: [layer, head]. ``acts``: behaviour -> (effect of each head, the whole behaviour).
    """
    import matplotlib.pyplot as plt

    def most(values: NDArray) -> list[int]:
        return np.abs(values).ravel().argsort()[-10:].tolist()

    figure, axes = plt.subplots(1, len(acts), figsize=(4.5 * len(acts), 3.5), sharex=True, squeeze=False)
    for axis, (name, (effect, whole)) in zip(axes.flat, acts.items(), strict=True):
        x, y = looks.ravel(), effect.ravel() / (whole or float("nan"))
        axis.axhline(0, color=GREY, lw=0.6)
        axis.axvline(0, color=GREY, lw=0.6)
        axis.plot(x, y, ".", ms=4, color=BLUE)
        named = sorted({*most(x)[-5:], *most(y)[-5:]})
        axis.margins(0.1)
        name_points(axis, [(x[i], y[i]) for i in named], [head_name(divmod(i, looks.shape[1])) for i in named])
        axis.set_title(name, fontsize=9)
        axis.set_xlabel("attention gap")
    axes[0, 0].set_ylabel("share of the behaviour lost (a) or carried (b)")
    shared = [len({*most(looks)} & {*most(effect)}) for effect, _ in acts.values()]
    said, chance = " and ".join(map(str, shared)), len(most(looks)) ** 2 / looks.size
    return titled(
        figure,
        f"Of the ten heads with the largest gaps {said} are among the ten that act most (by chance {chance:.1f})",
    )


def outcomes(table: Mapping[str, Any], seed: int = 0) -> Any:
    """Each outcome's gap with no head ablated, with each found set, and with every random set.

    ``table``: ``heads_outcomes``.
    """
    import matplotlib.pyplot as plt

    names, shown = list(table["sets"]), ("none", "acting", "looking", "against", "referring")
    figure, axes = plt.subplots(2, 3, figsize=(9.6, 4.8), sharex=True)
    fewer = []
    for axis, (outcome, title) in zip(axes.flat, OUTCOMES.items(), strict=True):
        values = np.array(table["outcomes"][outcome])
        cis = [bootstrap_ci(values[names.index(group)], seed=seed) for group in shown]
        for i, ci in enumerate(cis):
            colour = RED if shown[i] == "acting" else "black"
            axis.errorbar(i, ci.value, [[ci.value - ci.low], [ci.high - ci.value]], fmt="o", ms=4, color=colour)
        means = values.mean(1)
        for i, group in ((1, "acting"), (2, "looking")):
            draws = [means[j] for j, name in enumerate(names) if name.startswith(f"random as {group}")]
            axis.plot(i + np.linspace(0.15, 0.4, len(draws)), draws, ".", ms=3, color=SKY)
            fewer += [outcome] if i == 1 and means[names.index("acting")] < min(draws) else []
        axis.axhline(0, color=GREY, lw=0.6)
        axis.set_title(title, fontsize=8)
        axis.set_xticks(range(len(shown)), shown, rotation=30)
    title = f"Without the acting heads the gap is below every random set in {len(fewer)} of {len(OUTCOMES)} outcomes"
    figure.supxlabel("heads ablated (small dots: random sets of the same layers)", fontsize=8)
    return titled(figure, title)


def leaning(table: Mapping[str, Any], seed: int = 0) -> Any:
    """What else goes: the leaning between he and she for each kind of job, and the two pronouns' probability.

    ``table``: ``heads_outcomes``.
    """
    import matplotlib.pyplot as plt

    names, of = list(table["sets"]), table["outcomes"]
    male = np.array(of["leaning"]["is_male"])
    draws = [i for i, name in enumerate(names) if name.startswith("random as acting")]
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.4, 3))
    values = np.array(of["leaning"]["values"])
    rows = [names.index("none"), names.index("acting")]
    for x, mask, colour, label in ((-0.08, male, BLUE, "men's jobs"), (0.08, ~male, RED, "women's jobs")):
        for i, row in enumerate(rows):
            ci = bootstrap_ci(values[row][mask], seed=seed)
            axis_label = None if i else label
            left.errorbar(
                i + x, ci.value, [[ci.value - ci.low], [ci.high - ci.value]], fmt="o", color=colour, label=axis_label
            )
        left.plot([2 + x] * len(draws), values[draws][:, mask].mean(1), ".", color=colour, ms=3)
    left.axhline(0, color=GREY, lw=0.6)
    left.set_ylabel("logit(he) − logit(she)")
    left.legend()
    together = np.array(of["together"]["values"])
    for i, row in enumerate(rows):
        ci = bootstrap_ci(together[row], seed=seed)
        right.errorbar(i, ci.value, [[ci.value - ci.low], [ci.high - ci.value]], fmt="o", color="black")
    right.plot([2] * len(draws), together[draws].mean(1), ".", color="black", ms=3)
    right.set_ylabel("probability of he or she")
    right.set_ylim(0, None)
    for axis in (left, right):
        axis.set_xticks(range(3), ["all heads", "without the\nacting ones", "without\nrandom ones"])
    before, after = (values[row].mean() for row in rows)
    both = [together[row].mean() for row in rows]
    return titled(
        figure,
        f"Without the acting heads the leaning goes from {before:+.2f} to {after:+.2f} (he positive), the probability "
        f"of the two pronouns from {both[0]:.2f} to {both[1]:.2f}",
    )
