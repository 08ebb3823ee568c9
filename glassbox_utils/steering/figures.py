"""What notebook 05 shows of the steering studies: tables and figures. All numbers come from the studies' tables.

Tables are pandas, figures matplotlib on the current style.
"""

import itertools
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glassbox_utils.core import figures
from glassbox_utils.core.statistics import Interval, bootstrap_ci, difference_ci, spearman
from glassbox_utils.core.studies import SEED
from glassbox_utils.steering import style
from glassbox_utils.steering.report_study import SIDE_EFFECTS, at_effect, extra
from glassbox_utils.steering.study import N_RANDOM

Table = Mapping[str, Any]


def cell(i: Interval, digits: int = 2, sign: str = "+") -> str:
    """An interval as a table shows it."""
    return f"{i.value:{sign}.{digits}f} ({i.low:{sign}.{digits}f} to {i.high:{sign}.{digits}f})"


def ruler_table(n: int = 1000, seed: int = SEED) -> Any:
    """Rank correlation of the lexicon with human ratings, for each source of rated sentences."""
    import pandas as pd

    rng, rows = np.random.default_rng(seed), []
    for source in style.RATED:
        texts, rating = style.human_ratings(source)
        chosen = rng.choice(len(texts), n, replace=False)
        rho = spearman(style.tone([texts[i] for i in chosen]), rating[chosen], n_resamples=500).rho
        rows.append({"sentences": source, "n": n, "rank correlation": cell(rho, sign="")})
    return pd.DataFrame(rows).set_index("sentences")


# --- choosing -----------------------------------------------------------------------------------------


def heat_maps(table: Table, rows: str = "layer", picked: Mapping[str, Any] | None = None) -> Any:
    """Effect, side effect and perplexity of every setting of a sweep; the chosen one in a red frame."""
    import matplotlib.pyplot as plt
    import pandas as pd

    frame = pd.DataFrame(table["rows"])
    grid = frame[frame.alpha > 0]
    figure, axes = plt.subplots(1, 3, figsize=(9, 0.9 + 0.6 * grid[rows].nunique()))
    panels = [
        ("effect on tone\n(mean at +α minus mean at −α)", grid.effect),
        ("side effect\n(nats per token on neutral text)", grid.kl),
        ("answers' perplexity\n(times unsteered)", grid.perplexity / frame[frame.alpha == 0].perplexity.min()),
    ]
    for axis, (label, values) in zip(axes, panels, strict=True):
        square = grid.assign(value=values).pivot(index=rows, columns="alpha", values="value")
        names = [f"{v:.0f}" if isinstance(v, float) else v for v in square.index]
        known = square.to_numpy()[np.isfinite(square)]  # layers may have been swept at other strengths each
        axis.imshow(square, aspect="auto", origin="lower", cmap="viridis")
        axis.set_xticks(range(square.shape[1]), [f"{a:g}" for a in square.columns])
        axis.set_yticks(range(len(names)), names if axis is axes[0] else [])
        middle = (known.max() + known.min()) / 2
        for (i, j), value in np.ndenumerate(square.to_numpy()):
            if not np.isfinite(value):
                continue
            colour = "white" if value < middle else "black"
            axis.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=8, color=colour)
        if picked:
            i, j = list(square.index).index(picked[rows]), list(square.columns).index(picked["alpha"])
            frame_ = plt.Rectangle((j - 0.5, i - 0.5), 1, 1, fill=False, edgecolor=figures.RED, linewidth=2.5)
            axis.add_patch(frame_)
        axis.set_xlabel("strength α (typical residual norms)")
        axis.set_title(label)
    axes[0].set_ylabel("after layer" if rows == "layer" else rows)
    return figure


# --- on report prompts --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Report:
    """The answers of study steering-tone: what each condition does to 200 report prompts."""

    table: Table

    @property
    def rows(self) -> dict[str, Any]:
        """Condition -> its row."""
        return {row["condition"]: row for row in self.table["rows"]}

    @property
    def steps(self) -> list[str]:
        """The conditions of the dial, from minus to plus."""
        return [name for name in self.rows if name.startswith("steer")]

    def mean(self, name: str) -> Interval:
        """Mean tone of a condition's answers."""
        return bootstrap_ci(self.rows[name]["tone"], seed=SEED)

    def signs(self, kind: str, step: float = 1.0) -> tuple[str, str]:
        """Minus and plus condition of a kind: ``steer -0.5`` and ``steer 0.5``, ``lora -`` and ``lora +``."""
        turned = (f"{kind} {-step:g}", f"{kind} {step:g}")
        return turned if turned[1] in self.rows else (f"{kind} -", f"{kind} +")

    def has(self, kind: str) -> bool:
        """Was this kind measured? A model may know no system prompt, or not fit an adapter."""
        return self.signs(kind)[1] in self.rows

    def effect(self, kind: str, step: float = 1.0, ruler: str = "tone") -> Interval:
        """Tone at plus minus tone at minus, paired by prompt: of ``steer``, ``shared 3``, ``lora``, …

        ``ruler``: tone (VADER) or second (``ruler_study.study_ruler``, -4 to 4).
        """
        minus, plus = (np.array(self.rows[name][ruler]) for name in self.signs(kind, step))
        return bootstrap_ci(plus - minus, seed=SEED)

    def random(self, kind: str, step: float = 1.0, ruler: str = "tone") -> list[Interval]:
        """Effects of the ten random directions of a kind."""
        return [self.effect(f"{kind} {k}", step, ruler) for k in range(N_RANDOM)]

    def perplexity_ci(self, name: str) -> Interval:
        """Perplexity of a condition's answers under the plain model, times that of the unsteered answers."""
        pairs = tuple(np.array(self.rows[n][key]) for n in (name, "steer 0") for key in ("loss", "tokens"))

        def times(loss: NDArray, tokens: NDArray, plain: NDArray, plain_tokens: NDArray) -> float:
            return float(np.exp(loss.sum() / max(tokens.sum(), 1) - plain.sum() / max(plain_tokens.sum(), 1)))

        return bootstrap_ci(pairs, times, n_resamples=500, seed=SEED)

    def perplexity(self, name: str) -> float:
        """Its value alone."""
        return self.perplexity_ci(name).value


CONTROLS = (
    ("many layers, half turn", "steer", "shared", 0.5),
    ("many layers, half turn", "steer", "apart", 0.5),
    ("many layers, full turn", "steer", "shared", 1.0),
    ("many layers, full turn", "steer", "apart", 1.0),
    ("one layer, full turn", "single", "single-random", 1.0),
)
"""label, kind of condition, the random directions of the same length, and the part of the full strength"""


def strongest_of(others: Sequence[Interval]) -> Interval:
    """The random direction whose effect is largest, of either sign."""
    return max(others, key=lambda i: abs(i.value))


def times_as_far(effect: Interval, other: Interval) -> float:
    """How many times as far an effect is as another; infinite if the other is none at all."""
    return effect.value / abs(other.value) if other.value else float(np.copysign(np.inf, effect.value))


def monotone(report: Report, kind: str, step: float = 1.0) -> bool:
    """Does the mean tone go up, or down, from minus over zero to plus, on the prompts that were answered?"""
    minus, plus = (report.rows[name]["tone"] for name in report.signs(kind, step))
    zero = np.mean(report.rows["steer 0"]["tone"][: len(plus)])
    return bool((zero - np.mean(minus)) * (np.mean(plus) - zero) > 0)


def control_table(report: Report) -> Any:
    """Each vector beside the random directions of its own length."""
    import pandas as pd

    rows = []
    for vector, kind, control, step in CONTROLS:
        if f"{control} 0 {step:g}" not in report.rows:
            continue
        effect, others = report.effect(kind, step), report.random(control, step)
        strongest = strongest_of(others)
        row: dict[str, Any] = {"vector": vector, "random directions": "" if kind == "single" else control}
        row["effect"] = cell(effect)
        row |= {"strongest of ten random": cell(strongest), "prompts they answered": strongest.n}
        row |= {"mean size of the ten": f"{np.mean([abs(i.value) for i in others]):.2f}"}
        row["of the ten, monotone"] = sum(monotone(report, f"{control} {k}", step) for k in range(N_RANDOM))
        row["of the ten, interval without 0"] = sum(i.excludes(0) for i in others)
        row |= {"times the strongest": f"{times_as_far(effect, strongest):.1f}"}
        ppl = [report.perplexity(name) for name in report.signs(kind, step)]
        row |= {"perplexity × − / +": " / ".join(f"{v:.2f}" for v in ppl)}
        rows.append(row)
    return pd.DataFrame(rows).set_index(["vector", "random directions"])


def rulers_table(report: Report, step: float) -> Any:
    """The vector and the shared random directions by both rulers: the lexicon it was trained with, and the other."""
    import pandas as pd

    rows = {}
    for label, ruler in (("lexicon (−1 to 1)", "tone"), ("second ruler (−4 to 4)", "second")):
        effect, strongest = report.effect("steer", step, ruler), strongest_of(report.random("shared", step, ruler))
        means = [np.mean(report.rows[name][ruler]) for name in report.steps]
        rows[label] = {
            "five strengths, − to +": " ".join(f"{m:+.2f}" for m in means),
            "effect": cell(effect),
            "strongest of ten random": cell(strongest),
            "times the strongest": f"{times_as_far(effect, strongest):.1f}",
        }
    return pd.DataFrame(rows)


def telling_words(report: Report, n: int = 10) -> dict[str, dict[str, tuple[int, int]]]:
    """Tone words of the lexicon that most more answers hold at each end of the dial than unsteered.

    End (minus, plus) -> word -> answers that hold it there, and unsteered; most telling first.
    """

    def holding(condition: str) -> Counter[str]:
        return Counter(word for text in report.rows[condition]["answers"] for word in set(style.words(text)))

    plain, lexicon, found = holding("steer 0"), style.lexicon(), {}
    for end, name in (("minus", report.steps[0]), ("plus", report.steps[-1])):
        there = holding(name)
        most = sorted(lexicon.keys() & there.keys(), key=lambda w: (plain[w] - there[w], w))[:n]
        found[end] = {word: (there[word], plain[word]) for word in most}
    return found


def words_table(found: Mapping[str, Mapping[str, tuple[int, int]]]) -> Any:
    """What ``telling_words`` finds, a column for each end."""
    import pandas as pd

    columns = {k: pd.Series([f"{w} ({there}, {plain})" for w, (there, plain) in v.items()]) for k, v in found.items()}
    return pd.DataFrame(columns).fillna("")


def effect_without(report: Report, words: Collection[str]) -> Interval:
    """The effect of a full turn if the lexicon counts none of these words, in any answer."""
    if not words:
        return report.effect("steer")
    pattern = re.compile(r"\b(" + "|".join(map(re.escape, words)) + r")\b", re.IGNORECASE)
    minus, plus = (
        style.tone([pattern.sub(" ", text) for text in report.rows[name]["answers"]])
        for name in (report.steps[0], report.steps[-1])
    )
    return bootstrap_ci(plus - minus, seed=SEED)


def dial_figure(report: Report) -> Any:
    """Mean tone over the strengths, and the ten shared random directions; the title says which of the two moves it."""
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots()
    means = [report.mean(name) for name in report.steps]
    steps = [float(name.split()[1]) for name in report.steps]
    strengths = [step * report.table["alpha"] for step in steps]
    drawn = [step for step in steps if step and f"shared 0 {step:g}" in report.rows]
    n, ends = len(report.rows["steer 0"]["tone"]), []
    for k in range(N_RANDOM):
        points = [(0.0, means[len(means) // 2].value)]
        for step in drawn:
            tone = np.array(report.rows[f"shared {k} {step:g}"]["tone"])
            start = np.mean(report.rows["steer 0"]["tone"][: len(tone)])  # of the prompts that they answered
            points.append((step * report.table["alpha"], points[0][1] + tone.mean() - start))
        ends += [abs(report.effect(f"shared {k}", drawn[-1]).value)] if drawn else []
        label = "ten random directions" if k == 0 else None
        axis.plot(*zip(*sorted(points), strict=True), color=figures.GREY, alpha=0.5, linewidth=1, label=label)
    errors = [[i.value - i.low for i in means], [i.high - i.value for i in means]]
    options: dict[str, Any] = {"color": figures.BLUE, "marker": "o", "capsize": 3}
    axis.errorbar(strengths, [i.value for i in means], errors, label="tone vector, 95 % interval", **options)
    axis.axhline(0, color="black", linewidth=0.5)
    axis.set(
        xlabel="strength α at each of the layers (typical residual norms)",
        ylabel=f"mean tone of {n} answers\n(VADER, −1 to 1)",
        title=dial_title([i.value for i in means], report.effect("steer").value, ends),
    )
    axis.legend()
    return figure


def dial_title(means: Sequence[float], effect: float, others: Sequence[float]) -> str:
    """What the figure shows: is the tone monotone in the strength, and how many random directions move it as well?

    ``others``: sizes of the random directions' effects, which were measured at both ends. A fifth of the vector's
    effect counts as moving it: as far as the bar allows.
    """
    if all(b > a for a, b in itertools.pairwise(means)):
        first = "The dial moves the tone step by step"
    else:
        first = "The tone does not go step by step with the dial"
    if not others:
        return first
    far = sum(other >= abs(effect) / 5 for other in others)
    found = f"; {far or 'none'} of {len(others)} random directions move{'' if far else 's'} it a fifth as far"
    return first + found + " (measured at both ends)"


METHODS = {
    "steering, half": ("steer -0.5", "steer 0.5"),
    "steering, full": ("steer -1", "steer 1"),
    "steering, one layer": ("single -1", "single 1"),
    "system prompt": ("system -", "system +"),
    "three examples": ("few-shot -", "few-shot +"),
    "LoRA, half": ("half-lora -", "half-lora +"),
    "LoRA": ("lora -", "lora +"),
}


def methods_table(report: Report) -> Any:
    """Effect, fluency, relevance and off-target attributes of every method, one column each."""
    import pandas as pd

    def column(minus: str, plus: str) -> dict[str, str]:
        rows = [report.rows[name] for name in (minus, plus)]
        found = {"tone − / +": " / ".join(f"{np.mean(r['tone']):+.2f}" for r in rows)}
        for label, ruler in (("effect on tone", "tone"), ("the same, second ruler", "second")):
            found[label] = cell(bootstrap_ci(np.array(rows[1][ruler]) - np.array(rows[0][ruler]), seed=SEED))
        for sign, name, row in zip("−+", (minus, plus), rows, strict=True):
            found[f"perplexity × {sign}"] = cell(report.perplexity_ci(name), sign="")
            found[f"relevance {sign}"] = cell(bootstrap_ci(row["relevance"], seed=SEED), sign="")
        for label, measure in (
            ("Δ formality", style.formality),
            ("Δ words", style.length),
            ("Δ gender words", style.gender_words),
        ):
            off = difference_ci(measure(rows[1]["answers"]), measure(rows[0]["answers"]), n_resamples=500, seed=SEED)
            found[label] = cell(off, 1)
        return found

    return pd.DataFrame(
        {label: column(*names) for label, names in METHODS.items() if "loss" in report.rows.get(names[0], {})}
    ).T


def frontier_figure(report: Report) -> Any:
    """Tone against perplexity: what each method pays."""
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4))

    def draw(names: Sequence[str], label: str, colour: str, marker: str, line: str) -> None:
        points = sorted(
            (np.mean(report.rows[n]["tone"]), report.perplexity(n)) for n in names if "loss" in report.rows.get(n, {})
        )
        if points:
            axis.plot(*zip(*points, strict=True), color=colour, marker=marker, linestyle=line, label=label)

    draw(report.steps, "steering, many layers", figures.BLUE, "o", "-")
    draw(["single -1", "steer 0", "single 1"], "steering, one layer", figures.SKY, "v", "-")
    draw(["system -", "system +"], "system prompt", figures.ORANGE, "s", ":")
    draw(["few-shot -", "few-shot +"], "three examples", figures.GREEN, "^", ":")
    draw(["lora -", "half-lora -", "steer 0", "half-lora +", "lora +"], "LoRA", figures.PINK, "D", "-")
    axis.axhline(2, color=figures.GREY, linewidth=1)
    axis.axhline(1, color="black", linewidth=0.5)
    axis.set(
        xlabel=f"mean tone of {len(report.rows['steer 0']['tone'])} answers (VADER)",
        ylabel="perplexity under the unsteered model\n(times that of unsteered answers)",
        title="What each method pays for its tone: lower is cheaper, further out is stronger",
    )
    axis.legend()
    return figure


def seeds_table(table: Table) -> Any:
    """Sampled answers: the effect with each seed, and over all of them."""
    import pandas as pd

    tone = {row["condition"]: np.array(row["tone"]) for row in table["rows"]}  # [seed, prompt]
    difference = tone["steer 1"] - tone["steer -1"]
    found = {f"seed {k}": cell(bootstrap_ci(d, seed=SEED)) for k, d in zip(table["seeds"], difference, strict=True)}
    found["all, by prompt"] = cell(bootstrap_ci(difference.mean(0), seed=SEED))
    return pd.DataFrame({"effect from −α to +α": found}).T


# --- what it costs ------------------------------------------------------------------------------------


def more_loss(costs: Table, name: str, kind: str) -> Interval:
    """Nats per token more than the plain model, on held-out ``text`` or the ``reply`` to unrelated requests."""
    rows = {row["condition"]: row for row in costs["rows"]}
    difference = np.array(rows[name][f"{kind}_loss"]) - np.array(rows["steer 0"][f"{kind}_loss"])
    pairs = (difference, np.array(rows[name][f"{kind}_tokens"]))
    return bootstrap_ci(pairs, lambda d, t: float(d.sum() / t.sum()), n_resamples=1000, seed=SEED)


def costs_table(costs: Table) -> Any:
    """Other skills under every condition that was measured, as differences to the plain model."""
    import pandas as pd

    rows = {row["condition"]: row for row in costs["rows"]}
    plain, found = np.array(rows["steer 0"]["choice"]), {}
    for label, signs in METHODS.items():
        for sign, name in zip("−+", signs, strict=True):
            if name not in rows:
                continue
            text = cell(more_loss(costs, name, "text")) if "text_loss" in rows[name] else "no prompt there"
            choice = np.array(rows[name].get("choice", [])) - plain if "choice" in rows[name] else None
            found[f"{label} {sign}"] = {
                "held-out text, nats": text,
                "unrelated replies, nats": cell(more_loss(costs, name, "reply")),
                "multiple choice, share right": "" if choice is None else cell(bootstrap_ci(choice, seed=SEED)),
            }
    return pd.DataFrame(found).T


STRENGTHS = {
    "steering": [METHODS["steering, half"], METHODS["steering, full"]],
    "LoRA": [METHODS["LoRA, half"], METHODS["LoRA"]],
    "steering, one layer": [METHODS["steering, one layer"]],
    "system prompt": [METHODS["system prompt"]],
    "three examples": [METHODS["three examples"]],
}
PROMPTS = ("system prompt", "three examples")
LABELS = ("answers' perplexity ×", "relevance lost, nats", "held-out text, nats", "unrelated replies, nats")


def priced(report: Report, costs: Table, method: str, target: float) -> dict[str, str]:
    """A method's side effects at a given effect on tone: interpolated between the strengths that were measured."""
    cost, found = {row["condition"]: row for row in costs["rows"]}, {"effect on tone": f"{target:.2f}"}
    for kind, label in zip(SIDE_EFFECTS, LABELS, strict=True):
        source = report.rows if kind in ("answers", "relevance") else cost
        points: list[Any] = []
        for minus, plus in STRENGTHS[method]:
            key = {"answers": "loss", "relevance": "relevance"}.get(kind, f"{kind}_loss")
            if key in source.get(minus, {}):
                effect = np.mean(np.array(report.rows[plus]["tone"]) - np.array(report.rows[minus]["tone"]))
                points.append((float(effect), extra(source, (minus, plus), kind)))
        if not points:
            found[label] = "no prompt there" if kind == "text" and method in PROMPTS else "not measured"
            continue
        effects = [effect for effect, _ in points]
        if not 0 <= target <= max(effects) or sorted([0.0, *effects]) != [0.0, *effects]:
            found[label] = "not reached"
            continue
        i = bootstrap_ci(at_effect([(0.0, 0 * points[0][1]), *points], target), seed=SEED)
        times = Interval(float(np.exp(i.value)), float(np.exp(i.low)), float(np.exp(i.high)), i.n)
        found[label] = cell(times, sign="") if kind == "answers" else cell(i)
    return found


def equal_effect_table(report: Report, costs: Table) -> Any:
    """Steering, LoRA and prompts read at the same effects: the prompts', and that of steering or LoRA at full strength.

    Of the last two the weaker, whose effect both reach. Methods that were not measured are left out.
    """
    import pandas as pd

    columns = {}
    kinds = {name: kind for name, kind in (("steering", "steer"), ("LoRA", "lora")) if report.has(kind)}
    weaker, *stronger = sorted(kinds, key=lambda method: report.effect(kinds[method]).value)
    for asked, kind, others in (
        ("system prompt", "system", ("steering", "steering, one layer", "LoRA")),
        ("three examples", "few-shot", ("steering", "LoRA")),
        (weaker, kinds[weaker], stronger),
    ):
        for method in (asked, *others) if report.has(kind) else ():
            if all(name not in report.rows for signs in STRENGTHS[method] for name in signs):
                continue
            columns[f"as far as {asked}", method] = priced(report, costs, method, report.effect(kind).value)
    return pd.DataFrame(columns).T
