"""What notebook 05 shows prompt by prompt: one question, all of them as a picture, shares, and answers verbatim.

A mean over prompts says little about one of them. Tables are pandas, figures matplotlib on the current style.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from glassbox_utils.core import figures
from glassbox_utils.core.evidence import Control, Finding
from glassbox_utils.core.statistics import Interval, exact_ci
from glassbox_utils.core.studies import SEED
from glassbox_utils.steering import style
from glassbox_utils.steering.figures import Report, Table, cell, more_loss, strongest_of, times_as_far

NEUTRAL = 0.05
"""VADER's own bounds: a compound score from here on is positive, from -0.05 down negative, between them neutral"""
STILL_BRIGHT = -0.3
"""a fully negative answer above this tone has hardly been turned"""
RULERS = {"lexicon": "tone", "second ruler": "second"}


def in_order(tones: ArrayLike) -> NDArray:
    """True for each prompt whose tone goes strictly up with the strength, [prompt], of tones [strength, prompt]."""
    return np.asarray((np.diff(np.asarray(tones), axis=0) > 0).all(0))


def demonstration(lexicon: NDArray, second: NDArray) -> int:
    """Which prompt to show: the first that is negative, neutral and positive by the lexicon and in order by both.

    Tones [minus zero plus, prompt]. Without such a prompt the first that is in order by both, without one of those the
    first of all: what is shown then shows that.
    """
    both = in_order(lexicon) & in_order(second)
    minus, zero, plus = np.asarray(lexicon)
    clear = both & (minus <= -NEUTRAL) & (np.abs(zero) < NEUTRAL) & (plus >= NEUTRAL)
    return next((int(found.argmax()) for found in (clear, both) if found.any()), 0)


def share(hits: ArrayLike) -> str:
    """A share with its Wilson interval, as a table shows it."""
    hits = np.asarray(hits)
    return cell(exact_ci(int(hits.sum()), len(hits), method="wilson"), sign="")


def ruled(report: Report, ruler: str) -> NDArray:
    """Tones of the steered answers, [strength, prompt], from minus to plus."""
    return np.array([report.rows[name][ruler] for name in report.steps])


def shares_table(report: Report) -> Any:
    """How many prompts do what the mean does, by each ruler and by both; Wilson intervals."""
    import pandas as pd

    tones = {label: ruled(report, ruler) for label, ruler in RULERS.items()}
    ends = [0, len(report.steps) // 2, -1]
    ordered = {label: in_order(t[ends]) for label, t in tones.items()}
    strictly = {label: in_order(t) for label, t in tones.items()}
    rows = {
        "minus < zero < plus": [share(ordered[x]) for x in RULERS] + [share(np.all([*ordered.values()], 0))],
        "strictly up over all strengths": [share(strictly[x]) for x in RULERS]
        + [share(np.all([*strictly.values()], 0))],
        f"still above {STILL_BRIGHT} at full minus": [share(tones["lexicon"][0] > STILL_BRIGHT), "", ""],
        f"neutral at full minus (within {NEUTRAL})": [share(np.abs(tones["lexicon"][0]) < NEUTRAL), "", ""],
        "still positive at full minus": [share(tones["lexicon"][0] >= NEUTRAL), "", ""],
        "a catastrophe at full minus": [share(style.catastrophes(report.rows[report.steps[0]]["answers"])), "", ""],
        "without the word disaster": [
            share(style.catastrophes(report.rows[report.steps[0]]["answers"], ["disaster"])),
            "",
            "",
        ],
        "a catastrophe unsteered": [share(style.catastrophes(report.rows["steer 0"]["answers"])), "", ""],
    }
    return pd.DataFrame.from_dict(rows, orient="index", columns=[*RULERS, "both"])


def prompts_figure(report: Report) -> Any:
    """Every report prompt as a column: its tone at full minus, zero and full plus, by both rulers.

    Sorted within each panel by the tone at zero; prompts that are out of order are pink.
    """
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 1, figsize=(9, 5.5), sharex=True)
    for axis, (label, ruler) in zip(axes, RULERS.items(), strict=True):
        tones = ruled(report, ruler)[[0, len(report.steps) // 2, -1]]
        tones = tones[:, np.lexsort((tones[0], tones[1]))]
        right, x = in_order(tones), np.arange(tones.shape[1])
        axis.vlines(x, tones.min(0), tones.max(0), color=np.where(right, "#cccccc", figures.PINK), linewidth=1)
        for tone, colour, end in zip(
            tones, (figures.RED, "black", figures.BLUE), ("minus", "zero", "plus"), strict=True
        ):
            axis.scatter(x, tone, s=9, color=colour, label=end, zorder=3)
        axis.set(
            ylabel=label,
            title=f"{label}: {right.mean():.1%} of {len(x)} prompts in order (grey lines; pink: the others)",
        )
        axis.axhline(0, color="black", linewidth=0.5)
    axes[-1].set_xlabel("report prompts, sorted by the tone of the unsteered answer")
    axes[0].legend(ncols=3, loc="lower right", bbox_to_anchor=(1, 1))
    return figure


def random_answers(report: Report, n: int = 8, seed: int = SEED) -> str:
    """Answers to n prompts drawn at random, at full minus, zero and full plus, with their tone by the lexicon."""
    chosen = np.random.default_rng(seed).choice(len(report.table["prompts"]), n, replace=False)
    lines = []
    for i in chosen:
        lines.append(report.table["prompts"][i])
        for sign, name in zip("−0+", (report.steps[0], "steer 0", report.steps[-1]), strict=True):
            row = report.rows[name]
            lines.append(f"  {sign} {row['tone'][i]:+.2f}  {' '.join(row['answers'][i].split())}")
    return "\n".join(lines)


# --- verdicts -----------------------------------------------------------------------------------------


def bar(report: Report, step: float) -> dict[str, bool]:
    """What was asked of the dial before the report prompts were touched, and whether it is so."""
    effect, means = report.effect("steer", step), [report.mean(name).value for name in report.steps]
    times = times_as_far(effect, strongest_of(report.random("shared", step)))
    return {
        "monotone over five strengths": all(np.diff(means) > 0),
        "interval excludes zero": effect.excludes(0),
        "perplexity at most doubled": max(map(report.perplexity, report.signs("steer", step))) <= 2,
        "at least five times the strongest random direction": times >= 5,
    }


def findings(tables: Mapping[str, Table], stable: Interval, null: Interval, n: int) -> list[Finding]:
    """The ladder of notebook 05. ``stable``, ``null``: stability of the fit of n sentences, and of shuffled labels."""
    claim = "tone is linearly readable after one layer (stability of the direction, cosine)"
    control = Control.measured("shuffled labels", "the same texts", null)
    interval = (stable.low, stable.high)
    found = [Finding(claim, 2, stable.value, interval, n, control, unit="sentences", side="above", source="section 3")]
    if {"layers", "tone"} <= set(tables):  # what was measured on this model, no other
        report, step = Report(tables["tone"]), tables["layers"]["turn"]
        for claim, ruler in (
            (f"steering moves the tone of answers on report prompts (−α to +α at {step} of a full turn)", "tone"),
            ("the same by the ruler that took no part in training (−4 to 4)", "second"),
        ):
            others = [i.value for i in report.random("shared", step, ruler)]
            ends = (min(others), max(others))
            control = Control("random units", "the strongest of ten random directions", max(others, key=abs), ends)
            effect = report.effect("steer", step, ruler)
            options: dict[str, Any] = {"side": "above", "source": "study steering-tone"}
            found.append(Finding.measured(claim, 4, effect, "prompts", control, **options))
    if "costs" in tables and any(row["condition"] == "lora +" for row in tables["costs"]["rows"]):
        bill = [more_loss(tables["costs"], name, "text") for name in ("steer 1", "lora +")]
        control = Control.measured("trained opponent", "the LoRA at +", bill[1])
        claim = "steering at + raises the loss on held-out text less than the LoRA does (nats per token)"
        options = {"side": "below", "null": None, "source": "study steering-costs"}
        found.append(Finding.measured(claim, 5, bill[0], "texts", control, **options))
    return found


def shown_dial(question: str, strengths: Sequence[float], answers: Sequence[str]) -> str:
    """One question's answers along the dial, with their tone by the lexicon."""
    lines = [question]
    for a, tone, text in zip(strengths, style.tone(answers), answers, strict=True):
        lines.append(f"\nα = {a:+.4g}   tone {tone:+.2f}\n   {' '.join(text.split())}")
    return "\n".join(lines)
