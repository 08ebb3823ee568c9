"""Choose layer and strength: effect on one side, side effects on the other, a budget between them."""

from collections.abc import Mapping, Sequence
from numbers import Real

import numpy as np
from numpy.typing import NDArray

from glassbox_utils.core.arguments import items, number, shown, whole
from glassbox_utils.core.losses import answer_losses, log_probabilities
from glassbox_utils.core.models import Model
from glassbox_utils.core.session import progress
from glassbox_utils.core.text import tokenize
from glassbox_utils.steering import style
from glassbox_utils.steering.apply import continuations, steer
from glassbox_utils.steering.vectors import SteeringError, Vector, parts_of


def side_effect(
    model: Model, texts: Sequence[str], settings: Sequence[tuple[Vector, float]], batch_size: int = 16
) -> NDArray:
    """KL divergence (nats per token) of unsteered from steered predictions on texts, [setting, text batch].

    KL(unsteered || steered), mean over all tokens but the first of each batch of texts. SteeringError for no text, no
    setting, or a batch size that is none.
    """
    texts = items("texts", texts, SteeringError)
    settings = items("settings", settings, SteeringError, tuple, word="tuples (vector, strength)")
    whole("batch_size", batch_size, 1, SteeringError)
    values = np.zeros((len(settings), -(-len(texts) // batch_size)))
    for j, start in enumerate(progress(range(0, len(texts), batch_size), "side effect")):
        batch = tokenize(model, list(texts[start : start + batch_size]))
        plain = log_probabilities(model, batch)
        for i, (direction, alpha) in enumerate(settings):
            with steer(model, direction, alpha):
                steered = log_probabilities(model, batch)
            values[i, j] = float((plain.exp() * (plain - steered)).sum(-1).mean())
    return values


def costs(model: Model, direction: Vector, alphas: Sequence[float], texts: Sequence[str]) -> list[float]:
    """Side effect (see ``side_effect``) of a vector at each strength, of the two signs the worse."""
    found = side_effect(model, texts, [(direction, s * a) for a in alphas for s in (1, -1)]).mean(1)
    return found.reshape(-1, 2).max(1).tolist()


IDLE = 0.1
"""of a budget: strengths that all cost less are too small to be a grid"""
MOST_HALVINGS = 10
MOST_DOUBLINGS = 3
"""a push as long as a token itself is no nuance any more, whatever it costs"""


def fitting_strengths(
    model: Model, direction: Vector, alphas: Sequence[float], texts: Sequence[str], kl: float
) -> list[float]:
    """The strengths, ascending, halved together until the smallest is within the budget ``kl``.

    Or doubled together while even the largest costs less than a tenth of it. A strength is a share of the typical
    norm, and what it disturbs differs between models by more than a fixed grid spans. SteeringError as ``sweep``.
    """
    number("kl", kl, SteeringError, above=0)
    alphas = sorted(items("alphas", alphas, SteeringError, Real, word="numbers"))
    factor = 1.0
    for _ in range(MOST_HALVINGS):
        if costs(model, direction, [factor * alphas[0]], texts)[0] <= kl:
            break
        factor /= 2
    while 1 <= factor < 2**MOST_DOUBLINGS:
        if costs(model, direction, [factor * alphas[-1]], texts)[0] >= IDLE * kl:
            break
        factor *= 2
    return [factor * a for a in alphas]


def sweep(
    model: Model,
    direction: Vector,
    alphas: Sequence[float],
    questions: Sequence[str],
    neutral: Sequence[str],
    max_new_tokens: int = 24,
    batch_size: int = 100,
    system: str | None = None,
) -> list[dict[str, float]]:
    """Effect and side effects of one steering vector at several strengths: a list of rows.

    Each row: ``layer`` (the first, of several), ``alpha``; ``effect``: mean tone of the answers at +alpha minus
    that at -alpha; ``kl``: see ``side_effect``; ``perplexity``: perplexity of the answers under the unsteered model;
    ``distinct``: distinct-2 of the answers. Of the last three, the worse of the two signs. The row with
    alpha 0 is the unsteered model. Source of the design: refusal_direction (arXiv 2406.11717). SteeringError, before
    anything is computed, for no question, text or strength, and for a strength that is not above 0.
    """
    questions, neutral = (items(n, x, SteeringError) for n, x in (("questions", questions), ("neutral", neutral)))
    alphas = [
        number(f"alphas[{i}]", a, SteeringError, above=0)
        for i, a in enumerate(items("alphas", alphas, SteeringError, Real, word="numbers"))
    ]
    if not isinstance(direction, Vector):
        raise SteeringError(f"{shown(direction)} is no steering vector. Give a Direction or a ControlVector.")
    layer = parts_of(direction)[0].layer
    signed = [0.0, *(s * a for a in alphas for s in (1, -1))]
    settings = [(direction, a) for a in signed for _ in questions]
    asked = list(questions) * len(signed)
    texts = continuations(model, asked, settings, max_new_tokens, batch_size, system=system, label=f"layer {layer}")
    tones = style.tone(texts).reshape(len(signed), -1).mean(-1)
    repeats = style.distinct(texts).reshape(len(signed), -1).mean(-1)
    losses, counts = (x.reshape(len(signed), -1).sum(-1) for x in answer_losses(model, asked, texts, 25, system))
    ppl = np.exp(losses / counts.clip(1))
    kl = side_effect(model, neutral, [(direction, a) for a in signed]).mean(-1)
    rows = []
    for i, a in enumerate([0.0, *alphas]):
        both = slice(0, 1) if i == 0 else slice(2 * i - 1, 2 * i + 1)
        row = {"layer": layer, "effect": tones[both][0] - tones[both][-1], "kl": kl[both].max()}
        row |= {"perplexity": ppl[both].max(), "distinct": repeats[both].min()}
        rounded = {key: round(float(value), 4) for key, value in row.items()}
        rows.append({"layer": rounded.pop("layer"), "alpha": float(a), **rounded})
    return rows


def select(rows: Sequence[Mapping[str, float]], kl: float, perplexity: float) -> Mapping[str, float]:
    """The row of a sweep with the largest effect within both budgets.

    ``kl``: nats per token on neutral text; ``perplexity``: times that of the unsteered answers (the row
    with alpha 0). Raises SteeringError if no row is within them, or if rows or budgets are not what they should be.
    """
    number("kl", kl, SteeringError, least=0)
    number("perplexity", perplexity, SteeringError, above=0)
    needed, rows = (
        ("alpha", "effect", "kl", "perplexity"),
        items("rows", rows, SteeringError, Mapping, 2, "rows of a sweep"),
    )
    signs = {row.get("alpha") != 0 for row in rows}
    if signs != {True, False} or any(not isinstance(row.get(name), Real) for row in rows for name in needed):
        raise SteeringError(
            f"The rows of a sweep have the numbers {', '.join(needed)} each, one row has alpha 0 and others have not; "
            f"these are {shown(rows)}. Give what sweep returned."
        )
    found = within(rows, kl, perplexity)
    if not found:
        plain = min(row["perplexity"] for row in rows if row["alpha"] == 0)
        steered = [row for row in rows if row["alpha"] != 0]
        raise SteeringError(
            f"No setting is within {kl} nats per token and {perplexity} times the unsteered perplexity; the smallest "
            f"are {min(r['kl'] for r in steered):.3f} and {min(r['perplexity'] for r in steered) / plain:.2f}. Sweep "
            "weaker strengths, or raise the budget."
        )
    return max(found, key=lambda row: row["effect"])


def within(rows: Sequence[Mapping[str, float]], kl: float, perplexity: float) -> list[Mapping[str, float]]:
    """The steered rows of a sweep that are within both budgets of ``select``."""
    plain = min(row["perplexity"] for row in rows if row["alpha"] == 0)
    return [row for row in rows if row["alpha"] and row["kl"] <= kl and row["perplexity"] <= perplexity * plain]
