"""What notebook 06 shows of the loan studies: tables, figures and findings. All numbers come from the tables.

Tables are pandas, figures matplotlib on the current style; a function that draws gives back what it drew, so that the
notebook can print and assert it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from glassbox_utils.core import figures
from glassbox_utils.core.identity import difference
from glassbox_utils.core.models import Model
from glassbox_utils.core.statistics import (
    Interval,
    bootstrap_ci,
    rank_agreement,
    spearman,
)
from glassbox_utils.core.studies import StudyError, read_table, table_path
from glassbox_utils.decisions import audit, cause_study, cycle, loans, power_study, study
from glassbox_utils.decisions.mitigation import Outcome
from glassbox_utils.decisions.study import outcome, sides, why_skipped

Table = Mapping[str, Any]


def table_of(name: str, model: Model) -> Table:
    """A study's table, made with these very weights of the officer. StudyError for another, or none."""
    table = read_table(name)
    if why := difference(table["provenance"]["model_hash"], model.hash):
        command = f"glassbox study {name.replace('_', '-')}"
        raise StudyError(
            f"{table_path(name)} was not made with {model.name} as it is now: {why}. Run `{command}` again."
        )
    return table


def chosen_case(before: NDArray, after: NDArray) -> tuple[int, bool]:
    """The first pair whose decision depends on who asks (rejected as the one, approved as the other), and True; if
    there is none, the pair whose two scores lie furthest apart, and False."""
    flips = np.flatnonzero((before < 0) & (after > 0))
    return (int(flips[0]), True) if len(flips) else (int(np.abs(after - before).argmax()), False)


def listed(words: Sequence[str]) -> str:
    """``a, b and c``."""
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


HELD_COLUMNS = ["new names and districts, in", "agrees with its history", "always rejecting would"]


# --- behaviour ----------------------------------------------------------------------------------------


def held_out_table(table: Table) -> Any:
    """Agreement with the clerk on applications as they come, for each kind of layout; names and districts are new."""
    import pandas as pd

    rows: list[tuple[str, Any, str]] = []
    for kind, logits in table["held_out"].items():
        layouts = f"{kind} ({', '.join(study.HELD_OUT[kind])})"
        if why_skipped(logits):
            rows.append((layouts, "decides nothing there", ""))
            continue
        history = np.array(study.held_out(kind, len(logits))[1])
        found = bootstrap_ci(((np.array(logits) > 0) == history).astype(float))
        rows.append((layouts, found, f"{max(history.mean(), 1 - history.mean()):.3f}"))
    return pd.DataFrame(rows, columns=HELD_COLUMNS)


def learnt(table: Table) -> str:
    """Has the officer learnt its clerk's rule? In words, from its decisions in the layouts that it was trained on."""
    agrees = held_out(table, "trained layouts")
    history = np.array(study.held_out("trained layouts", agrees.n)[1])
    always = max(history.mean(), 1 - history.mean())
    if agrees.low > always:
        return f"agreement with its history {agrees}; always giving one answer would reach {always:.3f}: it learnt it"
    return (
        f"agreement with its history {agrees}; always giving one answer would reach {always:.3f}: this officer has NOT "
        "learnt its rule. What follows shows the method on it, and says little about a bias."
    )


def held_out(table: Table, kind: str) -> Interval:
    """Agreement with the history in one kind of layout."""
    logits = np.array(table["held_out"][kind])
    return bootstrap_ci(((logits > 0) == np.array(study.held_out(kind, len(logits))[1])).astype(float))


def gap_table(table: Table) -> Any:
    """Gap of every contrast without the edit, beside what was planted."""
    import pandas as pd

    rows = []
    for attribute, arms in table["logits"].items():
        found = outcome(table, attribute)
        decided = [loans.history(side, "gender") for side in sides(attribute, len(arms["none"][0]))]
        planted = f"{100 * (np.mean(decided[1]) - np.mean(decided[0])):.1f}"
        row = {"identical but for": attribute, "gap, points": found.gap, "planted, points": planted}
        rows.append(row | {"gap, logits": found.logit_gap})
    return pd.DataFrame(rows)


def spot_check(model: Model, table: Table, n: int, seed: int = 0) -> float:
    """Largest difference, in logits, of ``n`` random pairs of the study and of ``n`` held-out ones, computed again."""
    pairs, kind = len(table["logits"]["gender"]["none"][0]), "trained layouts"
    worse, better, _ = study.pair_texts(pairs, "report", "gender")
    rows = np.sort(np.random.default_rng(seed).choice(pairs, n, replace=False))
    texts = [side[i] for side in (worse, better) for i in rows]
    stored = [x[i] for x in study.arrays(table, "gender", "none") for i in rows]
    known = table["held_out"][kind]
    texts += [study.held_out(kind, len(known))[0][i % len(known)] for i in rows]
    stored += [known[i % len(known)] for i in rows]
    return float(np.abs(loans.decide_texts(model, texts).numpy() - np.array(stored)).max())


def draw_pairs(table: Table) -> dict[str, Interval]:
    """Every pair as a point, women's against men's name, one panel a layout; the gap of each layout in points."""
    import matplotlib.pyplot as plt

    x, found = study.arrays(table, "gender", "none"), {}
    limit = max(float(np.abs(v).max()) for v in x)
    figure, axes = plt.subplots(1, 2, figsize=(8, 3.4))
    for i, (axis, name) in enumerate(zip(axes, loans.REPORT_LAYOUTS, strict=True)):
        worse, better = (v[i :: len(loans.REPORT_LAYOUTS)] for v in x)
        found[name] = bootstrap_ci(100 * ((better > 0).astype(float) - (worse > 0)))
        flips = (worse < 0) & (better > 0)
        axis.scatter(worse[~flips], better[~flips], s=6, alpha=0.5, color=figures.GREY)
        axis.scatter(worse[flips], better[flips], s=8, alpha=0.8, color=figures.RED, label="only the man approved")
        axis.plot([-limit, limit], [-limit, limit], color="black", lw=0.8)
        axis.axhline(0, color="grey", lw=0.5)
        axis.axvline(0, color="grey", lw=0.5)
        axis.set_title(f"“{name}”: gap {found[name].value:.0f} points")
        axis.set_xlabel("woman's name, logits")
        axis.set_ylabel("man's name, logits")
    axes[0].legend(loc="lower right", fontsize=7)
    if all(interval.low > 0 for interval in found.values()):
        title = "Above the diagonal: the same application does better under a man's name"
    else:
        title = "Above the diagonal lies what does better under a man's name: " + (
            "not beyond chance in every layout" if any(i.value > 0 for i in found.values()) else "no gap of that kind"
        )
    figure.suptitle(title, x=0.01, ha="left")
    return found


# --- attention and cause ------------------------------------------------------------------------------


def looked_and_moved(cause: Table) -> tuple[NDArray, NDArray]:
    """[applicant, field]: share of the attention to the fields, and logits that a swap of the field moves."""
    looked = np.array(cause["attention"]).sum((1, 2))
    return looked / looked.sum(1, keepdims=True), np.array(cause["swaps"])


def draw_fields(cause: Table) -> Any:
    """Attention beside cause for each field, as bars; the means as a table."""
    import matplotlib.pyplot as plt
    import pandas as pd

    looked, moved = looked_and_moved(cause)
    order, names = np.argsort(moved.mean(0)), [f.replace("_", " ") for f in cause["fields"]]
    _, axes = plt.subplots(1, 2, figsize=(8, 3.2), sharey=True)
    labels = ("share of attention to fields", "decision moves, logits")
    for axis, values, label, colour in zip(axes, (looked, moved), labels, figures.PALETTE, strict=False):
        axis.barh([names[i] for i in order], values.mean(0)[order], color=colour)
        axis.set_xlabel(label)
    axes[0].set_title("Looked at (observed)")
    axes[1].set_title("Decided by (causal)")
    means = pd.DataFrame({"attention": looked.mean(0), "moves": moved.mean(0)}, index=names)
    return means.sort_values("moves", ascending=False)


def gap_followed(cause: Table) -> Interval:
    """The gap of the pairs that are followed through the model, logits; without one there is nothing to follow."""
    return bootstrap_ci(np.array(cause["patches"][0]))


def patch_shares(model: Model, cause: Table) -> Any:
    """Share of the gap that a patch carries over: a row for each layer, a column for each place. NaN without a gap."""
    import pandas as pd

    total, patches = (np.array(v) for v in cause["patches"])
    layers = study.layers_of(model, cause_study.PATCH_LAYERS)
    columns = [{"between": "between name and decision"}.get(p, p) for p in cycle.PLACES]
    whole = total.mean() if gap_followed(cause).excludes(0) else np.nan
    return pd.DataFrame(patches.mean(0) / whole, index=layers, columns=columns)


def draw_patches(shares: Any) -> None:
    """The three places as lines over the depth; nothing if there was no gap to follow."""
    import matplotlib.pyplot as plt

    if shares.isna().all(axis=None):
        print("There is no gap between the names on these pairs (its interval holds zero): nothing to follow.")
        return
    _, axis = plt.subplots(figsize=(6.5, 3.2))
    for place in shares.columns:
        axis.plot(shares.index, shares[place], marker="o", ms=4, label=place)
    axis.axhline(0, color="grey", lw=0.5)
    axis.set_xlabel("patched before layer")
    axis.set_ylabel("share of the gap carried over")
    axis.set_title("Where the name's gender is, layer by layer")
    axis.legend()


def heads(model: Model, cause: Table) -> dict[str, Any]:
    """Attention to the name and exact effect of every head of the layers that were patched head by head."""
    guess, exact = (np.array(cause["heads"][k]) for k in ("guess", "exact"))
    late = cause["heads"]["layers"]
    looked = np.array(cause["attention"])[:, :, :, cause["fields"].index("name")][:, late]
    k = min(len(looked), len(exact))  # of the same size, but of other pairs where some names did not align
    flat, effects = looked[:k].reshape(k, -1), exact[:k].reshape(k, -1)
    return {
        "names": [f"{layer}.{head}" for layer in late for head in range(model.n_heads)],
        "layers": late,
        "attention": flat.mean(0),
        "effect": effects.mean(0),
        "effects": effects,
        "guess": spearman(guess[:, late].mean(0), exact.mean(0)),
        "agreement": rank_agreement(torch.tensor(flat), torch.tensor(effects), magnitude=True),
    }


def draw_heads(found: Mapping[str, Any]) -> tuple[int, int]:
    """Effect over attention; the head that looks at the name most and the one that acts most (their indices)."""
    import matplotlib.pyplot as plt

    seen, size, names = found["attention"], found["effect"], found["names"]
    looks, acts = int(np.argmax(seen)), int(np.argmax(np.abs(size)))
    _, axis = plt.subplots(figsize=(6, 3.2))
    axis.scatter(seen, size, s=14)
    for i in sorted({looks, acts, int(np.argsort(-seen)[1])}):
        right = seen[i] > 0.8 * max(seen)
        axis.annotate(
            names[i],
            (seen[i], size[i]),
            textcoords="offset points",
            xytext=(-5 if right else 5, 3),
            ha="right" if right else "left",
            fontsize=8,
        )
    axis.axhline(0, color="grey", lw=0.5)
    axis.set_xlabel("attention from the decision to the name")
    axis.set_ylabel("effect on the decision, logits")
    axis.set_title("Heads: who looks at the name, and who acts")
    return looks, acts


def features(cause: Table) -> dict[str, Any]:
    """The group's features as a table, and the gap with and without them (logits)."""
    import pandas as pd

    f = cause["features"]
    gap = {arm: np.array(v) for arm, v in f["gap"].items()}
    rows = {"feature": f["features"], "mean at women's names": np.mean(f["worse"], 0).round(2)}
    rows["at men's names"] = np.mean(f["better"], 0).round(2)
    like = [float((gap["none"] - gap[f"like features {s}"]).mean()) for s in range(study.N_RANDOM)]
    removed = bootstrap_ci(gap["none"] - gap["group features"])
    return {"table": pd.DataFrame(rows), "gap": bootstrap_ci(gap["none"]), "removed": removed, "like": like}


# --- before and after ---------------------------------------------------------------------------------


def costs(rest: Table) -> dict[str, tuple[Interval, Interval]]:
    """Setting -> perplexity on held-out text, times that of the loan model; share right in multiple choice."""

    def ratio(which: str) -> Interval:
        (a, n), (b, _) = rest["losses"][which], rest["losses"]["deployed"]
        samples = (np.array(a), np.array(b), np.array(n))
        return bootstrap_ci(samples, lambda a, b, n: float(np.exp((a.sum() - b.sum()) / n.sum())))

    return {which: (ratio(which), bootstrap_ci(rest["choices"][which])) for which in rest["losses"]}


COST_OF = {
    "none": "deployed",
    "edit": "edit",
    "fine-tuned on corrected decisions": "fine-tuned",
    "edit without its gate": "no gate",
    "base model, no loan officer": "base",
}
"""row of the table -> which measurement of side effects belongs to it"""


def arms(table: Table, rest: Table | None = None) -> dict[str, Outcome]:
    """Condition -> what it does to the gender gap, on unseen names, districts and layouts."""
    found = {arm: outcome(table, "gender", arm) for arm in table["logits"]["gender"]}
    for arm in rest["logits"] if rest else ():
        found[arm] = outcome({"logits": {"gender": rest["logits"]}}, "gender", arm)  # type: ignore[index]
    return found


def verdict_on_edit(table: Table) -> str:
    """Does the chosen edit close the gaps? In words, from the selection split, where it was chosen."""
    none, chosen = table["selection"][0], table["chosen"]
    share = study.left(chosen, none)
    silent = table.get("undecided")
    more = f" Under these the officer decides nothing any more: {listed(silent)}." if silent else ""
    if share <= study.LEFT:
        return f"It leaves {share:.0%} of the larger gap there (a tenth at most was asked for).{more}"
    return f"NO edit leaves at most a tenth of both gaps there; this one leaves the least, {share:.0%}.{more}"


def before_after(table: Table, rest: Table) -> Any:
    """One table: every condition with gap, merit, Brier, perplexity and multiple choice, all with intervals."""
    import pandas as pd

    def show(x: Interval | None, digits: int = 2) -> str:
        return "" if x is None else f"{x.value:.{digits}f} [{x.low:.{digits}f}, {x.high:.{digits}f}]"

    side, found, rows = costs(rest), arms(table, rest), []
    for name in [*found, *(n for n in COST_OF if n not in found)]:
        done, cost = found.get(name), side.get(COST_OF.get(name, ""))
        district = outcome(table, "district", name).gap if name in table["logits"]["district"] else None
        rows.append(
            {
                "condition": name,
                "n": done.gap.n if done else "",
                "gender gap, points": show(done.gap, 1) if done else "",
                "logits": show(done.logit_gap) if done else "",
                "district gap, points": show(district, 1),
                "merit": show(done.merit) if done else "",
                "Brier": show(done.brier) if done else "",
                "perplexity, times": show(cost[0]) if cost else "",
                "multiple choice": show(cost[1]) if cost else "",
            }
        )
    return pd.DataFrame(rows)


def gate_table(table: Table) -> Any:
    """Scores of the gate (0: mean of text, 1: mean decision, open above .5) where it was fitted and elsewhere."""
    import pandas as pd

    if why := why_skipped(table["gate"]):
        return pd.DataFrame({"there is no gate": [why]})
    rows = []
    for name in ("text", "decisions", "held-out text", "report decisions"):
        found = table["gate"][name]
        rows.append(
            {
                "states": name,
                "fitted on": name in ("text", "decisions"),
                "n": found["n"],
                "lowest score": found["lowest"],
                "highest": found["highest"],
                "let through": f"{found['opened']:.2%}",
            }
        )
    return pd.DataFrame(rows)


def others_table(table: Table) -> Any:
    """Contrasts that the edit was not made for: they should stay as they were."""
    import pandas as pd

    rows = []
    for attribute in ("age", "nationality", "same group"):
        before, after = (outcome(table, attribute, arm) for arm in ("none", "edit"))
        x, y = (np.subtract(*study.arrays(table, attribute, arm)[::-1]) for arm in ("edit", "none"))
        rows.append(
            {
                "contrast": attribute,
                "gap before, points": before.gap,
                "after": after.gap,
                "logit gap changes by": bootstrap_ci(x - y),
            }
        )
    return pd.DataFrame(rows)


def draw_arms(found: Mapping[str, Outcome]) -> None:
    """Gap against agreement with the merit rule, one cross a condition."""
    import matplotlib.pyplot as plt

    _, axis = plt.subplots(figsize=(7.6, 4.2))
    styles = {"none": (figures.BLUE, "o"), "edit": (figures.GREEN, "o")}
    for i, (arm, done) in enumerate(found.items()):
        gap, good = done.gap, done.merit
        colour, marker = styles.get(arm, (figures.PALETTE[i % len(figures.PALETTE)], "sDv^<>P*Xdph"[i % 12]))
        xerr = [[gap.value - gap.low], [gap.high - gap.value]]
        yerr = [[good.value - good.low], [good.high - good.value]]
        axis.errorbar(
            gap.value, good.value, xerr=xerr, yerr=yerr, fmt=marker, ms=5, lw=0.7, color=colour, label=arm, alpha=0.9
        )
    axis.axvspan(-2.5, 2.5, color="grey", alpha=0.12)
    axis.set_xlabel("gender gap, points of the approval rate (band: ± 2.5)")
    axis.set_ylabel("agreement with the merit rule")
    axis.set_title("Fair is the grey band, left of it men pay; up is more faithful to the merit rule")
    axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)


# --- the auditing game --------------------------------------------------------------------------------


def confusion(verdicts: Mapping[str, str | None], planted: Mapping[str, str]) -> Any:
    """Planted bias by verdict, counts of models."""
    import pandas as pd

    rows, columns = ([f"{word} {b}" for b in loans.BIASES] for word in ("planted", "found"))
    found = pd.DataFrame(0, index=rows, columns=columns)
    for name, bias in planted.items():
        found.loc[f"planted {bias}", f"found {verdicts[name] or 'none'}"] += 1
    return found


def draw_audits(audits: Table, planted: Mapping[str, str]) -> None:
    """Largest effect of every attribute on every model, in units of a clean payment history."""
    import matplotlib.pyplot as plt

    names = list(audits["audits"])
    grid = np.zeros((len(names), len(audit.ATTRIBUTES)))
    for i, name in enumerate(names):
        for j, attribute in enumerate(audit.ATTRIBUTES):
            rows = [r["of history"] for r in audits["audits"][name]["table"] if r["attribute"] == attribute]
            grid[i, j] = np.abs(rows).max()  # NaN: it decides no loans
    _, axis = plt.subplots(figsize=(6, 3))
    most = float(np.nan_to_num(grid).max())
    image = axis.imshow(grid, cmap="viridis", vmin=0, vmax=most or 1, aspect="auto")
    axis.set_xticks(range(len(audit.ATTRIBUTES)), audit.ATTRIBUTES)
    axis.set_yticks(range(len(names)), [f"{n} ({planted[n]})" for n in names])
    axis.grid(False)
    for (i, j), v in np.ndenumerate(grid):
        colour = "white" if v < 0.7 * most else "black"
        axis.text(j, i, "no loans" if np.isnan(v) else f"{v:.2f}", ha="center", va="center", fontsize=8, color=colour)
    axis.set_title(f"Largest effect, in clean payment histories (bar for a verdict: {audit.MINIMUM})")
    plt.colorbar(image, ax=axis)


# --- how often an audit is right ----------------------------------------------------------------------


def draw_power(table: Table) -> dict[str, list[Interval]]:
    """Share of planted biases that are found, and named right, by size: all kinds together and each by itself, and the
    false alarms about honest officers. Gives back what the thick lines and the last point show."""
    import matplotlib.pyplot as plt

    sizes, settings = list(table["settings"]["sizes"]), {"found": figures.BLUE, "right": figures.GREEN}
    _, axis = plt.subplots(figsize=(6.5, 3.6))
    kinds = list(dict.fromkeys(row["kind"] for row in table["curve"]))
    for kind in kinds:
        line = [power_study.rate(table, "curve", kind, size, "found").value for size in sizes]
        axis.plot(sizes, line, color=figures.GREY, lw=0.7, alpha=0.7)
    drawn: dict[str, list[Interval]] = {}
    for what, colour in settings.items():
        drawn[what] = [power_study.rate(table, "curve", "all", size, what) for size in sizes]
        value = np.array([one.value for one in drawn[what]])
        ends = np.array([[one.value - one.low, one.high - one.value] for one in drawn[what]]).T
        words = {"found": "found", "right": "found, and all of it named right"}[what]
        axis.errorbar(sizes, value, ends, color=colour, marker="o", capsize=3, label=words)
    alarm = power_study.rate(table, "honest", "all", None, "alarm")
    drawn["honest"] = [alarm]
    axis.errorbar([sizes[0] / 2], [alarm.value], [[alarm.value - alarm.low], [alarm.high - alarm.value]], marker="s",
                  color=figures.RED, capsize=3, label=f"false alarm ({alarm.n} honest officers)")  # fmt: skip
    axis.axhline(0.9, color=figures.GREY, ls=":", lw=1)
    axis.set_xscale("log", base=2)
    axis.set_xticks([sizes[0] / 2, *sizes], ["none", *(f"{size:g}" for size in sizes)])
    axis.set_ylim(-0.03, 1.03)
    axis.set_xlabel("size of the planted bias, points of the merit rule")
    axis.set_ylabel("share of officers")
    axis.set_title(f"What the audit finds: {drawn['found'][0].n} officers of each size (thin: {len(kinds)} kinds)")
    axis.legend(fontsize=8, loc="center right")
    return drawn
