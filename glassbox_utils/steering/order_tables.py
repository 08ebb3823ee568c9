"""What notebook 05 shows of the studies ``steering-order`` and ``steering-controls``: all methods on fresh prompts."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from glassbox_utils.core.evidence import Control, Finding
from glassbox_utils.core.models import Model
from glassbox_utils.core.statistics import Interval, bootstrap_ci, exact_ci, sign_flip_p
from glassbox_utils.core.studies import SEED
from glassbox_utils.steering import study, style
from glassbox_utils.steering.apply import continuations
from glassbox_utils.steering.figures import cell
from glassbox_utils.steering.order_study import PREDICATES, RULERS, perplexity
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
KINDS = {
    "shared": ("random directions", "ordered"),
    "turned": ("random directions, as long as that vector", "shipped"),
    "plain": ("trained alike on shuffled labels", "smaller"),
    "shuffled": ("trained alike on shuffled, centred labels", "smaller"),
}
"""controls, each drawn several times, and the vector that they stand beside; *plain* is what the bar names"""
BARS = {"order": 0.85, "shared": 5, "shuffled": 3}
"""set before the search, for both rulers: share of prompts in order; times as far as the strongest draw of a control"""
SOURCES = {"turned": "study steering-controls", "plain": "study steering-plain"}
NUMBERS = {3: "three", 4: "four", 5: "five", 10: "ten"}
SCALES = dict(zip(RULERS, ("lexicon", "second ruler"), strict=True))


def joined(tables: Mapping[str, Table]) -> Table | None:
    """The table of ``steering-order``, with the rows of its two studies of controls where they were run; or None."""
    if "order" not in tables:
        return None
    others = [row for name in ("controls", "plain") if name in tables for row in tables[name]["rows"]]
    return {**tables["order"], "rows": [*tables["order"]["rows"], *others]}


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
    """Every method of METHODS that was measured: order, effect by both rulers, catastrophes, price, paired gaps."""
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
            "without the word disaster, %": share(style.catastrophes(ends[0]["answers"], ["disaster"])),
            "perplexity × −, +": f"{price[0]:.2f}, {price[1]:.2f}",
            **({} if name == "ordered" else beyond_the_first(table, name)),
        }
    return pd.DataFrame(found).fillna("")


def beyond_the_first(table: Table, name: str) -> dict[str, str]:
    """A method's order and effects less those of the vector, paired by prompt."""
    more = in_order(table, name).astype(float) - in_order(table, "ordered")
    found = {"by both, less the first, points": cell(bootstrap_ci(100 * more, seed=SEED), 0)}
    for ruler, word in SCALES.items():
        gap = steps_up(table, name, ruler).sum(0) - steps_up(table, "ordered", ruler).sum(0)
        found[f"effect less the first, {word}"] = cell(bootstrap_ci(gap, seed=SEED))
    return found


def controls_table(table: Table) -> Any:
    """Vectors beside what was drawn at random: effects on the prompts that the controls answered, and prices.

    Random directions stand beside a vector of their length, vectors trained on shuffled labels beside one of their
    size.
    """
    import pandas as pd

    rows, found = by_condition(table), {}
    n, every = len(rows["smaller 1"]["tone"]), sum(how["steps"] for how in (table["started"], *table["training"]))
    beside = METHODS | {"smaller": METHODS["ordered"]}
    steps = {"ordered": str(every), "smaller": f"{sum(table['smaller'])} instead of {every}"}
    for kind, (label, own) in KINDS.items():
        names = [name for name in rows if name.startswith(f"{kind} ")]
        if not names:
            continue
        line: dict[str, Any] = {"beside": beside[own], "steps of its training": steps.get(own, "")}
        price = [perplexity(rows[name], n) / perplexity(rows["unsteered"], n) for name in names]
        own_price = [perplexity(rows[f"{own} {sign}"], n) / perplexity(rows["unsteered"], n) for sign in (-1, 1)]
        for ruler, word in SCALES.items():
            others = draws(table, kind, ruler)
            mine = effect(table, own, ruler, n)
            line |= {
                f"vector, {word}": cell(mine), f"controls, {word}": f"{min(others):+.2f} to {max(others):+.2f}",
                f"times the strongest, {word}": round(times(table, own, kind, ruler), 1),
            }  # fmt: skip
        line |= {"vector, perplexity × −, +": ", ".join(f"{x:.2f}" for x in own_price)}
        found[f"{len(others)} {label}"] = line | {"controls, perplexity ×": f"{min(price):.2f} to {max(price):.2f}"}
    return pd.DataFrame(found)


def words_line(table: Table) -> str:
    """Whose words, and how many different ones: minus answers that hold a dark predicate of ours, and distinct-2."""
    rows, parts = by_condition(table), []
    ours = re.compile(r"\b(" + "|".join(map(re.escape, PREDICATES[-1])) + r")\b", re.IGNORECASE)
    for name in ("ordered", "lora", "shipped", "unsteered"):
        condition = name if name == "unsteered" else f"{name} -1"
        if condition in rows:
            said = rows[condition]["answers"]
            held = sum(bool(ours.search(text)) for text in said)
            mess, cruel = (sum(bool(re.search(rf"\b{w}\b", text, re.I)) for text in said) for w in ("a mess", "cruel"))
            diverse = style.distinct_over(said)
            parts.append(f"{condition}: {held} (a mess {mess}), cruel {cruel}; distinct-2 {diverse:.3f}")
    n = len(rows["unsteered"]["answers"])
    return f"of {n} answers each, so many hold one of our dark predicates:\n  " + "\n  ".join(parts)


def drawn_answers(table: Table, names: Sequence[str] = ("ordered", "lora"), n: int = 8, seed: int = SEED) -> str:
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
    """What the fresh prompts say of the vector that is trained for order, with the control of each claim, and the bars.

    A bar is for both rulers, so the ruler that it is furthest from decides: order by both, effects by the second.
    """
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
        found += bar_of_order(order, control, source)
    if "single" in rates:
        mine, other = effect(table, "ordered", "second"), effect(table, "single", "second")
        opponent = "a vector after one layer with the same reward"
        control = Control.measured("trained opponent", opponent, other)
        claim = "many layers move tone further than one, trained alike, one training each (second ruler, -4 to 4)"
        found.append(Finding.measured(claim, 4, mine, "prompts", control, side="above", source=source))
        paired = float(sign_flip_p(rates["ordered"].astype(float) - rates["single"], seed=SEED))
        other = exact_ci(int(rates["single"].sum()), len(rates["single"]))
        control = Control("trained opponent", opponent, other.value)
        claim = "many layers turn more prompts than one, trained alike, one training each (share, by both rulers)"
        options: dict[str, Any] = {"side": "above", "null": None, "p_value": paired, "source": source}
        found.append(Finding.measured(claim, 4, order, "prompts", control, **options))
    kinds: dict[str, tuple[Any, str]] = {
        "shared": ("random units", "the strongest of {} random directions"),
        "turned": ("random units", "the strongest of {} random directions of its length"),
        "plain": ("shuffled labels", "the strongest of {} trained alike on shuffled labels"),
        "shuffled": ("shuffled labels", "the strongest of {} trained alike on shuffled, centred labels"),
    }
    for kind, (form, words) in kinds.items():
        own, others = KINDS[kind][1], [abs(x) for x in draws(table, kind, "second")]  # of either sign
        if not others:
            continue
        words = words.format(NUMBERS.get(len(others), len(others)))
        control, mine = Control(form, words, max(others), (min(others), max(others))), effect(table, own, "second", n)
        who = "the dial of sections 1 to 5" if own == "shipped" else "the dial trained for order"
        claim = f"{who} moves tone further than {words} (second ruler, -4 to 4)"
        options = {"side": "above", "source": source if kind in ("shared", "shuffled") else SOURCES[kind]}
        found.append(Finding.measured(claim, 4, mine, "prompts", control, **options))
        if kind == "shared" or kind == ("plain" if draws(table, "plain") else "shuffled"):
            k = BARS["shared" if kind == "shared" else "shuffled"]
            control = Control(form, f"{k} times {words}", k * max(others), (k * min(others), k * max(others)))
            claim = f"bar set beforehand: it moves tone {k} times as far as {words} (second ruler, -4 to 4)"
            found.append(Finding.measured(claim, 4, mine, "prompts", control, **options))
    return found


def bar_of_order(order: Interval, control: Control, source: str) -> list[Finding]:
    """The bar for the share of prompts in order by both rulers: what is no effect is the bar itself."""
    claim = f"bar set beforehand: it turns at least {BARS['order']:.0%} of the prompts (share, by both rulers)"
    options: dict[str, Any] = {"side": "above", "null": BARS["order"], "source": source}
    return [Finding.measured(claim, 4, order, "prompts", control, **options)]


def _there(table: Table, name: str) -> bool:
    return f"{name} 1" in by_condition(table)
