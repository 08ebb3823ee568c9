"""What notebook 05 shows of the study ``steering-order``: every method on prompts that met none, and its controls."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from glassbox_utils.core.evidence import Control, Finding
from glassbox_utils.core.models import Model
from glassbox_utils.core.statistics import Interval, bootstrap_ci, exact_ci
from glassbox_utils.core.studies import SEED
from glassbox_utils.steering import study, style
from glassbox_utils.steering.apply import continuations
from glassbox_utils.steering.figures import cell
from glassbox_utils.steering.order_study import RULERS, perplexity
from glassbox_utils.steering.vectors import SteeringError, load_vector

Table = Mapping[str, Any]

METHODS = {
    "ordered": "vector, thirteen layers, this reward",
    "single": "vector, one layer, this reward",
    "lora": "LoRA, this reward but for variety",
    "system": "system prompt",
    "shipped": "the vector of sections 1 to 5",
}
"""in the order of the table"""
KINDS = {"shared": "random directions", "shuffled": "trained alike on shuffled, centred labels"}
"""of controls, each drawn several times"""
SCALES = dict(zip(RULERS, ("lexicon", "second ruler"), strict=True))


def by_condition(table: Table) -> dict[str, Mapping[str, Any]]:
    """Condition -> its row."""
    return {row["condition"]: row for row in table["rows"]}


def steps_up(table: Table, name: str, ruler: str) -> Any:
    """For each prompt, [minus to zero, zero to plus]: by how much the tone rises."""
    rows = by_condition(table)
    if f"{name} 1" not in rows:
        known = ", ".join(dict.fromkeys(c.rsplit(" ", 1)[0] for c in rows if " " in c))
        raise SteeringError(f"The table has no method {name!r}. Allowed: {known}.")
    n = len(rows[f"{name} 1"][ruler])
    return np.diff([rows[end][ruler][:n] for end in (f"{name} -1", "unsteered", f"{name} 1")], axis=0)


def in_order(table: Table, name: str, rulers: Sequence[str] = RULERS) -> Any:
    """For each prompt: is minus below zero, and zero below plus, by every one of the rulers?"""
    return np.all([steps_up(table, name, ruler) > 0 for ruler in rulers], axis=(0, 1))


def effect(table: Table, name: str, ruler: str = "tone", n: int | None = None) -> Interval:
    """Mean tone at plus less that at minus, on the (first ``n``) prompts; resampled are prompts."""
    return bootstrap_ci(steps_up(table, name, ruler).sum(0)[:n], seed=SEED)


def draws(table: Table, kind: str, ruler: str = "tone") -> list[float]:
    """The effects of all draws of a control of KINDS."""
    names = dict.fromkeys(c.rsplit(" ", 1)[0] for c in by_condition(table) if c.startswith(f"{kind} "))
    return [effect(table, name, ruler).value for name in names]


def times(table: Table, name: str, kind: str, ruler: str = "tone") -> float:
    """The effect of a vector over that of the strongest draw of a control, of either sign, on the prompts that the
    draws answered."""
    n = len(by_condition(table)["smaller 1"]["tone"])
    return effect(table, name, ruler, n).value / max(abs(x) for x in draws(table, kind, ruler))


def share(hits: Any) -> str:
    """A share of prompts with its exact interval, %."""
    found = exact_ci(int(np.sum(hits)), len(hits))
    return f"{100 * found.value:.0f} ({100 * found.low:.0f} to {100 * found.high:.0f})"


def methods_table(table: Table) -> Any:
    """Every method of METHODS that was measured: order, effect by both rulers, catastrophes, price."""
    import pandas as pd

    rows, found = by_condition(table), {}
    for name, label in METHODS.items():
        if f"{name} 1" not in rows:
            continue
        ends = [rows[f"{name} {sign}"] for sign in (-1, 1)]
        price = [perplexity(end) / perplexity(rows["unsteered"]) for end in ends]
        found[label] = {
            **{f"in order, {word}, %": share(in_order(table, name, [ruler])) for ruler, word in SCALES.items()},
            "by both, %": share(in_order(table, name)),
            **{f"effect, {word}": cell(effect(table, name, ruler)) for ruler, word in SCALES.items()},
            "catastrophes at −, %": share(style.catastrophes(ends[0]["answers"])),
            "perplexity × −, +": f"{price[0]:.2f}, {price[1]:.2f}",
        }
    return pd.DataFrame(found)


def controls_table(table: Table) -> Any:
    """The vector beside what was drawn at random: effects on the prompts that the controls answered.

    Random directions stand beside the vector itself, vectors trained on shuffled labels beside one of their own size.
    """
    import pandas as pd

    found, n = {}, len(by_condition(table)["smaller 1"]["tone"])
    for kind, label in KINDS.items():
        own = "ordered" if kind == "shared" else "smaller"
        line: dict[str, Any] = {"beside": METHODS["ordered"] + ("" if kind == "shared" else ", fewer steps")}
        for ruler, word in SCALES.items():
            others = draws(table, kind, ruler)
            mine = effect(table, own, ruler, n)
            line |= {
                f"vector, {word}": cell(mine), f"controls, {word}": f"{min(others):+.2f} to {max(others):+.2f}",
                f"times the strongest, {word}": round(times(table, own, kind, ruler), 1),
            }  # fmt: skip
        found[f"{len(others)} {label}"] = line
    return pd.DataFrame(found)


def drawn_answers(table: Table, names: Sequence[str] = ("ordered", "lora"), n: int = 6, seed: int = SEED) -> str:
    """Prompts drawn at random with the answers at minus, zero and plus, each with its tone by the lexicon."""
    rows, lines = by_condition(table), []
    for i in np.random.default_rng(seed).choice(len(table["prompts"]), n, replace=False):
        lines.append(f"\n{table['prompts'][i]}")
        conditions = [*(f"{name} -1" for name in names), "unsteered", *(f"{name} 1" for name in names)]
        for condition in conditions:
            row = rows[condition]
            lines.append(f"  {condition:>10} {row['tone'][i]:+.2f}  {' '.join(row['answers'][i].split())}")
    return "\n".join(lines)


def again(model: Model, table: Table, n: int, seed: int = SEED) -> tuple[int, int, float]:
    """Some of the vector's answers, drawn at random, generated once more.

    How many are the stored ones word for word, of how many, and the mean difference in tone.
    """
    rng, vector, rows = np.random.default_rng(seed), load_vector("tone-ordered"), by_condition(table)
    drawn = [(int(rng.integers(len(table["prompts"]))), f"ordered {rng.choice([-1, 1])}") for _ in range(n)]
    asked, settings = [table["prompts"][i] for i, _ in drawn], [(vector, rows[c]["alpha"]) for _, c in drawn]
    texts = continuations(model, asked, settings, study.NEW_TOKENS, system=study.NO_SYSTEM)
    stored = [rows[c]["answers"][i] for i, c in drawn]
    gap = np.abs(style.tone(texts) - style.tone(stored)).mean()
    return sum(map(str.__eq__, texts, stored)), n, float(gap)


def findings(table: Table) -> list[Finding]:
    """What the fresh prompts say of the vector that is trained for order, with the control of each claim."""
    n = len(by_condition(table)["smaller 1"]["tone"])
    found, source = list[Finding](), "study steering-order"
    rates = {name: in_order(table, name) for name in ("ordered", "lora", "single") if _there(table, name)}
    order = exact_ci(int(rates["ordered"].sum()), len(rates["ordered"]))
    if "lora" in rates:
        other = exact_ci(int(rates["lora"].sum()), len(rates["lora"]))
        control = Control.measured("trained opponent", "a LoRA with its reward but for variety, as many steps", other)
        claim = (
            "the dial trained for order turns more prompts, by both rulers, than a LoRA trained nearly alike (share)"
        )
        found.append(Finding.measured(claim, 4, order, "prompts", control, side="above", null=None, source=source))
    if "single" in rates:
        mine, other = effect(table, "ordered", "second"), effect(table, "single", "second")
        control = Control.measured("trained opponent", "a vector after one layer with the same reward", other)
        claim = "many layers move tone further than one, trained alike (second ruler, -4 to 4)"
        found.append(Finding.measured(claim, 4, mine, "prompts", control, side="above", source=source))
    kinds: dict[str, tuple[Any, str, str]] = {
        "shared": ("random units", "the strongest of ten random directions", "ordered"),
        "shuffled": ("shuffled labels", "the strongest of five trained alike on shuffled, centred labels", "smaller"),
    }
    for kind, (form, words, own) in kinds.items():
        others = [abs(x) for x in draws(table, kind, "second")]  # of either sign
        control = Control(form, words, max(others), (min(others), max(others)))
        claim = f"the dial trained for order moves tone further than {words} (second ruler, -4 to 4)"
        found.append(
            Finding.measured(claim, 4, effect(table, own, "second", n), "prompts", control, side="above", source=source)
        )
    return found


def _there(table: Table, name: str) -> bool:
    return f"{name} 1" in by_condition(table)
