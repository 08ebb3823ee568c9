"""The long runs behind notebook 05: ``glassbox study steering-NAME``, names in STUDIES_OF_STEERING.

Each is resumable (what is done is kept in the cache folder and not done again), deterministic, and writes one table
into the prepared folder with its provenance. Sweep, sharper and layers select, on selection prompts; tone, seeds and
costs report. Layers are at the relative depth, and strengths start from the grid, that the embedded model had; the
grid moves where it does not fit (``selection.fitting_strengths``).
"""

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from glassbox_utils.core import assets, prepared
from glassbox_utils.core.models import Model
from glassbox_utils.core.prepared import load_subject
from glassbox_utils.core.session import progress
from glassbox_utils.core.statistics import Interval
from glassbox_utils.core.studies import SEED, has_table, read_table, resumed, write_table
from glassbox_utils.steering import contrast, reward, style, training
from glassbox_utils.steering.apply import continuations
from glassbox_utils.steering.fit import fit_direction, fit_directions
from glassbox_utils.steering.selection import costs, fitting_strengths, select, sweep, within
from glassbox_utils.steering.training import train_vector
from glassbox_utils.steering.vectors import (
    ControlVector,
    Direction,
    Vector,
    fingerprint,
    load_direction,
    load_vector,
    parts_of,
    random_vector,
    save_direction,
)

LAYERS = (6, 9, 15, 21)
"""of 30, and at the same depth elsewhere; the last fifth of the layers is left out as in refusal_direction"""
CLOSER = 15
"""layer of the second round, of 30: where the embedded model had the most effect for its side effect"""
CLOSER_ALPHAS = (0.08, 0.14)
SELECTION_SEEDS = (100, 101)
"""random directions of the second round; the report's have the seeds 0 to 9"""
TURN_SEEDS = tuple(range(100, 110))
"""random directions that the many-layer vector is compared with on selection prompts"""
NO_SYSTEM = ""
"""the report's chats have an empty system message: the model's default one would be most of every prompt"""
ALPHAS = (0.08, 0.14, 0.20)
KL_BUDGET = 0.35
"""nats per token on neutral text: half of log 2"""
PERPLEXITY_BUDGET = 1.75
"""times the unsteered answers' perplexity on selection prompts; the report's limit is 2"""
WEAKER = (4.0, 16.0, 64.0, 256.0)
"""what the strengths are divided by, one after the other, while all cost too much"""
SPAN = (0.27, 0.7)
"""layers of the many-layer vector, as shares of the depth: 8 to 20 of 30"""
SPAN_ALPHAS = (0.010, 0.0125, 0.015)
"""the pushes of thirteen layers add up, so each is a tenth of a single layer's"""
SPAN_RECIPES = ("mean_difference", "combined")
"""fitted ones; a third, "own_answers", is the last of them trained further"""
TRAINING: dict[str, Any] = {"alpha": 0.015, "steps": 40, "n_questions": 30, "learning_rate": 0.006, "divergence": 0.01}
"""how it is trained; chosen on the embedded model's selection prompts"""
LEAST_TRAINING = {"steps": 6, "n_questions": 10}
TURNS = (0.5, 1.0)
"""half and full turn of the dial: at one of them, chosen on selection prompts, the bar is counted"""
STEPS = (-1.0, -0.5, 0.0, 0.5, 1.0)
"""strengths of the report, times the selected alpha"""
N_RANDOM = 10
KINDS = ("shared", "apart")
"""random directions of many layers: one for all layers, or one drawn for each layer.

Stated before the report prompts were touched: the bar of five times is counted against the ten *shared* ones, whose
pushes add up through the layers as the fitted ones do; ten drawn *apart* are reported beside them. Three vectors met
the report prompts before the one that ships, and missed the bar (3.0, 4.0 and at most 4.4 times); recipe, layers and
turn were chosen on selection prompts each time."""
NEW_TOKENS = 20

ATTRIBUTES = ("tone", "formality", "honesty", "refusal", "gender")

SYSTEM = {
    "positive": "You are extremely positive. You praise everything, and you find everything wonderful.",
    "negative": "You are extremely negative. You complain about everything, and you find everything horrible.",
}
GENERIC = ["Tell me something.", "Write one sentence.", "What happened?", "Write a short review.", "How was it?"]
"""users' turns for training sentences that answer no question"""


# --- what is measured on ------------------------------------------------------------------------------


def selection_prompts(n: int = 60) -> list[str]:
    """The first n selection prompts; fewer where the folder's size is small."""
    return contrast.prompts("selection")[: prepared.sized(n, 8)]


def neutral_texts() -> list[str]:
    """The neutral sentences that side effects are read on; fewer where the folder's size is small."""
    return contrast.prompts("neutral")[: prepared.sized(48, 12)]


def train_pairs(name: str) -> list[list[contrast.Text]]:
    """Both sides of a contrast set's train split; at least half of it, since the vectors are what is kept."""
    sides = contrast.pairs(name, "train")
    return [side[: prepared.sized(len(side), 32)] for side in sides]


def searched(measure: Callable[[float], list[dict[str, Any]]]) -> tuple[list[dict[str, Any]], Mapping[str, Any]]:
    """Rows of a sweep and the selected one; weaker strengths are swept while none is within both budgets.

    ``measure``: rows at the grid's strengths, divided by a number.
    """
    rows = measure(1.0)
    for divisor in WEAKER:
        if within(rows, KL_BUDGET, PERPLEXITY_BUDGET):
            break
        rows += measure(divisor)
    return rows, select(rows, KL_BUDGET, PERPLEXITY_BUDGET)


# --- where and how hard -------------------------------------------------------------------------------


def tone_directions(
    model: Model, layers: Sequence[int], method: Any = "mean_difference", n_resamples: int = 100
) -> Any:
    """The tone direction at several layers, from the train split."""
    positive, negative = train_pairs("tone")
    return fit_directions(
        model, positive, negative, method, layers=layers, name="tone", n_resamples=n_resamples, seed=SEED
    )


def tone_answers() -> list[list[contrast.Text]]:
    """Positive and negative tone sentences as answers to generic questions: what gradients are taken through."""
    return [[(GENERIC[i % len(GENERIC)], str(text)) for i, text in enumerate(side)] for side in train_pairs("tone")]


def combined_directions(model: Model, layers: Sequence[int], n_pairs: int | None = None, n_resamples: int = 100) -> Any:
    """Half-way between mean difference and gradient at several layers (``n_pairs``: from the first few only)."""
    positive, negative = (side[:n_pairs] for side in tone_answers())
    options: dict[str, Any] = {"n_resamples": n_resamples, "seed": SEED, "system": NO_SYSTEM}
    return fit_directions(model, positive, negative, "combined", layers=layers, name="tone", **options)


def random_effects(
    model: Model, like: Vector, alpha: float, seeds: Sequence[int], n: int = 30, **options: Any
) -> list[float]:
    """Effect on tone (mean at +alpha minus mean at -alpha) of random directions, on the first n selection prompts.

    ``options``: ``shared`` of ``vectors.random_vector``, ``system`` of ``apply.continuations``.
    """
    asked, shared = selection_prompts(n), options.pop("shared", False)
    settings = [(random_vector(like, k, shared), s * alpha) for k in seeds for s in (1, -1)]
    rows = [s for s in settings for _ in asked]
    texts = continuations(model, asked * len(settings), rows, NEW_TOKENS, 100, label="random directions", **options)
    tones = style.tone(texts).reshape(len(seeds), 2, -1).mean(-1)
    return (tones[:, 0] - tones[:, 1]).round(4).tolist()


def tone_vector(
    model: Model,
    n_resamples: int = 100,
    recipe: Any = "combined",
    n_pairs: int | None = None,
    swapped: int | None = None,
) -> ControlVector:
    """The tone direction after each layer of SPAN, over the tokens of the sentences as answers.

    ``recipe``: a method of ``fit.fit_directions``; ``n_pairs``: from the first few pairs only. ``swapped``: a control,
    in which half of the pairs, drawn with this seed, have their sides swapped.
    """
    first, end = (round(share * model.n_layers) for share in SPAN)
    first = min(max(1, first), model.n_layers - 1)
    layers = range(first, max(first + 1, end))
    options: dict[str, Any] = {"layers": layers, "name": "tone", "n_resamples": n_resamples, "seed": SEED}
    positive, negative = (side[:n_pairs] for side in tone_answers())
    if swapped is not None:
        for i in np.random.default_rng(swapped).permutation(len(positive))[: len(positive) // 2]:
            positive[i], negative[i] = negative[i], positive[i]
    found = fit_directions(model, positive, negative, recipe, system=NO_SYSTEM, **options)
    return ControlVector(tuple(found[layer] for layer in layers))


def training_options(factor: float = 1.0) -> dict[str, Any]:
    """TRAINING, with ``factor`` times its push, and fewer steps and questions where the folder's size is small."""
    sizes = {name: prepared.sized(TRAINING[name], least) for name, least in LEAST_TRAINING.items()}
    return TRAINING | sizes | {"alpha": factor * TRAINING["alpha"]}


def own_vector(model: Model, start: ControlVector, factor: float = 1.0) -> ControlVector:
    """A vector trained further on the model's own answers to the train questions; resumable.

    Thirteen minutes for the embedded model. ``factor``: how many times larger this model's grid of strengths is.
    """
    how = training_options(factor)
    key = json.dumps([fingerprint(start), how, model.hash, NEW_TOKENS, SEED], sort_keys=True)
    name = f"own-answers-{hashlib.sha256(key.encode()).hexdigest()[:16]}.safetensors"
    checkpoint = assets.cache_dir() / "studies" / "steering_layers" / name
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    options: dict[str, Any] = {"new_tokens": NEW_TOKENS, "system": NO_SYSTEM, "seed": SEED, "checkpoint": checkpoint}
    return train_vector(model, contrast.prompts("train"), start, **how, **options)


def fit_attribute(model: Model, name: str, layer: int, method: Any = "mean_difference") -> Direction:
    """The direction of one of the shipped contrast sets at one layer, from its train split."""
    positive, negative = train_pairs(name)
    return fit_direction(model, positive, negative, method, layer=layer, name=name, seed=SEED)


def attribute_path(name: str) -> Path:
    """Where the vector of one attribute at one layer lies; that of tone is ``tone-single``."""
    return prepared.path("vectors", "tone-single" if name == "tone" else name)


def study_sweep() -> Path:
    """Layer x strength of tone on 30 selection prompts and 48 neutral sentences; ships vectors at the best layer.

    The vectors of ATTRIBUTES; the tone vector of that one layer is ``tone-single``.
    """
    start, model = time.time(), load_subject()
    layers = sorted({prepared.depth(model, layer) for layer in prepared.thinned(LAYERS, 3)})
    directions = tone_directions(model, layers)
    asked, neutral, alphas = selection_prompts(30), neutral_texts(), prepared.thinned(ALPHAS)
    grids = {layer: fitting_strengths(model, directions[layer], alphas, neutral, KL_BUDGET) for layer in layers}

    def measured(divisor: float) -> list[dict[str, Any]]:
        found = []
        for layer in progress(layers, "layers"):
            weaker = [a / divisor for a in grids[layer]]
            given: list[Any] = [directions[layer], weaker, asked, neutral, NEW_TOKENS]
            key = [layer, weaker, model.hash, NEW_TOKENS]
            found += resumed("steering_sweep", key, sweep, model, *given)
        return found

    rows, best = searched(measured)
    for name in ATTRIBUTES:
        save_direction(fit_attribute(model, name, int(best["layer"])), attribute_path(name))
    budgets = {"kl": KL_BUDGET, "perplexity": PERPLEXITY_BUDGET}
    stability = {d.layer: [round(x, 3) for x in _triple(d.stability)] for d in directions.values()}
    return write_table(
        "steering_sweep", model, time.time() - start, budgets=budgets, selected=best, stability=stability, rows=rows
    )


def _triple(interval: Any) -> tuple[float, float, float]:
    return interval.value, interval.low, interval.high


def study_layers() -> Path:
    """A little at many layers: three recipes x three strengths on the 60 selection prompts; ships the tone vector.

    Two recipes if no token of the tokenizer is a word of the lexicon: there is nothing to train for. Same budgets as
    the sweep's. Full strength is the largest effect within them. Then the half and the full turn are compared with ten
    random directions each, shared by the layers: the turn at which the vector stands out more (effect over the root
    mean square of theirs) is the one at which the report counts its bar.
    """
    start, model = time.time(), load_subject()
    asked, neutral = selection_prompts(), neutral_texts()
    vectors = {recipe: tone_vector(model, recipe=recipe) for recipe in SPAN_RECIPES}

    def fitting(recipe: str) -> list[float]:
        return fitting_strengths(model, vectors[recipe], prepared.thinned(SPAN_ALPHAS), neutral, KL_BUDGET)

    grids = {recipe: fitting(recipe) for recipe in vectors}
    factor = grids["combined"][0] / SPAN_ALPHAS[0]
    if reward.valences(model.tokenizer).any():
        vectors["own_answers"] = own_vector(model, vectors["combined"], factor)
        grids["own_answers"] = fitting("own_answers")

    def measured(recipe: str, alpha: float) -> list[dict[str, Any]]:
        vector = vectors[recipe]
        key = [recipe, fingerprint(vector), alpha, model.hash, NEW_TOKENS, len(asked)]
        given: list[Any] = [vector, [alpha], asked, neutral, NEW_TOKENS, 100, NO_SYSTEM]
        found = resumed("steering_layers", key, sweep, model, *given)
        return [{"recipe": recipe.replace("_", " "), **row} for row in found]

    def every(divisor: float) -> list[dict[str, Any]]:  # one at a time: what gets interrupted is short
        return [row for r, alphas in grids.items() for a in alphas for row in measured(r, a / divisor)]

    rows, best = searched(every)
    recipe = next(r for r in vectors if r.replace("_", " ") == best["recipe"])
    vector = vectors[recipe]
    save_direction(vector, prepared.path("vectors", "tone"))
    turns = []
    for step in TURNS:
        alpha = step * best["alpha"]
        [row] = [row for row in measured(recipe, alpha) if row["alpha"]]
        key = ["shared", recipe, fingerprint(vector), alpha, TURN_SEEDS, model.hash, NEW_TOKENS, len(asked)]
        others = resumed("steering_layers", key, _others, model, vector, alpha, len(asked))
        turns.append(row | {"step": step, "random": others, "times": round(standing_out(row["effect"], others), 2)})
    before = vectors["combined"]
    stability = {d.layer: [round(x, 3) for x in _triple(d.stability)] for d in before.parts}
    after = vectors.get("own_answers", before)
    kept = [round(float(x.vector @ y.vector), 3) for x, y in zip(after.parts, before.parts, strict=True)]
    about = {
        "selected": best,
        "training": training_options(factor) if after is not before else None,
        "cosines_with_start": kept,
        "turns": turns,
        "turn": max(turns, key=lambda t: t["times"])["step"],
    }
    return write_table("steering_layers", model, time.time() - start, **about, stability=stability, rows=rows)


def _others(model: Model, like: Vector, alpha: float, n: int) -> list[float]:
    return random_effects(model, like, alpha, TURN_SEEDS, n=n, shared=True, system=NO_SYSTEM)


ROUNDING = 1e-3
"""effects on tone are known no better: what random directions do counts as at least this"""


def standing_out(effect: float, others: Sequence[float]) -> float:
    """An effect as a multiple of the root mean square of random directions' effects."""
    return float(effect / max(np.sqrt(np.mean(np.square(others))), ROUNDING))


def selected() -> tuple[Vector, float]:
    """The shipped tone vector and the strength that was selected for it."""
    return load_vector("tone"), read_table("steering_layers")["selected"]["alpha"]


def turn() -> float:
    """The part of the full turn at which the bar is counted, from the selection prompts."""
    return read_table("steering_layers")["turn"]


def single() -> tuple[Vector, float]:
    """The best vector of one layer and its strength, from the sweep: what many layers are compared with."""
    return load_vector("tone-single"), read_table("steering_sweep")["selected"]["alpha"]


@dataclass(frozen=True, eq=False)
class Dial:
    """A vector and how far it may be turned in this model."""

    vector: ControlVector
    alpha: float
    """full strength"""
    kl: float
    """side effect at full strength, nats per token on neutral text"""
    prepared: bool
    """was it made by the studies? else it was fitted, and its strength chosen, on the spot"""

    def __str__(self) -> str:
        layers = self.vector.layers
        text = (
            f"steering after layers {layers[0]} to {layers[-1]}, full strength α = ±{self.alpha:.4g}: "
            f"{self.kl:.2f} nats per token of side effect on neutral text"
        )
        if self.kl > KL_BUDGET:
            text += (
                f". That is above the budget of {KL_BUDGET}: no weaker strength was found, and what is generated at "
                "this one may be word salad"
            )
        return text


def dial(model: Model) -> Dial:
    """The tone dial of the prepared folder; a model without one gets a vector fitted on the spot.

    Its strength is then chosen by side effects alone (``live_strength``).
    """
    if has_table("steering_layers", model):
        found = read_table("steering_layers")["selected"]
        return Dial(ControlVector(parts_of(load_vector("tone"))), found["alpha"], found["kl"], True)
    vector = tone_vector(model, n_resamples=0)
    return Dial(vector, *live_strength(model, vector, SPAN_ALPHAS), False)


def live_strength(model: Model, vector: Vector, alphas: Sequence[float]) -> tuple[float, float]:
    """The largest strength of the grid that fits this model within the budget, and its side effect, nats per token."""
    texts = neutral_texts()[:16]
    grid = fitting_strengths(model, vector, alphas, texts, KL_BUDGET)
    found = list(zip(grid, costs(model, vector, grid, texts), strict=True))
    return max((pair for pair in found if pair[1] <= KL_BUDGET), default=found[0])


def attributes(model: Model) -> tuple[dict[str, Direction], float]:
    """The directions of ATTRIBUTES at one layer, and the strength of that of tone.

    Those of the prepared folder, or made now.
    """
    if has_table("steering_sweep", model):
        found = {name: load_direction(attribute_path(name)) for name in ATTRIBUTES}
        return found, read_table("steering_sweep")["selected"]["alpha"]
    found = {name: fit_attribute(model, name, prepared.depth(model, CLOSER)) for name in ATTRIBUTES}
    return found, live_strength(model, found["tone"], ALPHAS)[0]


# --- sharper directions -------------------------------------------------------------------------------


def sharper_direction(model: Model, recipe: str, layer: int, push: float = CLOSER_ALPHAS[-1]) -> Direction:
    """``combined``, or ``trained``: the combined direction trained further for a push, the strongest of the grid."""
    key = [recipe, "vector", layer, push, model.hash]
    found = resumed("steering_sweep", key, _fitted, model, recipe, layer, push)
    found |= {"vector": torch.tensor(found["vector"])}
    found |= {"stability": Interval(**found["stability"]) if found["stability"] else None}
    return Direction(**found)


def _fitted(model: Model, recipe: str, layer: int, push: float) -> dict[str, Any]:
    if recipe == "combined":
        d = combined_directions(model, [layer])[layer]
    else:
        first = sharper_direction(model, "combined", layer)
        positive, negative = tone_answers()
        d = training.train_direction(model, positive, negative, first, push, system=NO_SYSTEM, seed=SEED)
    return asdict(replace(d, vector=torch.zeros(0))) | {"vector": d.vector.tolist()}


def choose(rows: Sequence[Mapping[str, Any]], control: Mapping[int, Sequence[float]]) -> Mapping[str, Any]:
    """Layer, then strength, both within the budgets.

    The layer with the largest effect at the strongest setting as a multiple of what random directions do there
    (root mean square); at that layer the strength with the largest effect.
    """
    strongest = max(row["alpha"] for row in rows)
    plain = min(row["perplexity"] for row in rows if row["alpha"] == 0)
    at = [row for row in rows if row["alpha"] == strongest]
    allowed = [r for r in at if r["kl"] <= KL_BUDGET and r["perplexity"] <= PERPLEXITY_BUDGET * plain]

    def ratio(row: Mapping[str, Any]) -> float:
        return standing_out(row["effect"], control[int(row["layer"])])

    layer = max(allowed or at, key=ratio)["layer"]
    return select([row for row in rows if row["layer"] == layer], KL_BUDGET, PERPLEXITY_BUDGET)


def study_sharper() -> Path:
    """Sharper directions at one layer, compared and chosen on 30 selection prompts.

    For the embedded model a null result, kept as one. Only *combined* for a model of one layer, since nothing above
    it could train the other.
    """
    start, model = time.time(), load_subject()
    asked, neutral = selection_prompts(30), neutral_texts()
    layer = min(prepared.depth(model, CLOSER), max(model.n_layers - 2, 0))
    recipes = {"combined": sharper_direction(model, "combined", layer)}
    grid = fitting_strengths(model, recipes["combined"], CLOSER_ALPHAS, neutral, KL_BUDGET)
    if model.n_layers > 1:
        recipes["trained"] = sharper_direction(model, "trained", layer, grid[-1])

    def measured(divisor: float) -> list[dict[str, Any]]:
        rows, alphas = [], [a / divisor for a in grid]
        for recipe, direction in recipes.items():
            key = [recipe, layer, alphas, model.hash, NEW_TOKENS]
            given: list[Any] = [direction, alphas, asked, neutral, NEW_TOKENS, 100, NO_SYSTEM]
            found = resumed("steering_sweep", key, sweep, model, *given)
            rows += [{"recipe": recipe, **row} for row in found]
        return rows

    rows, _ = searched(measured)
    key = ["random", layer, grid[-1], SELECTION_SEEDS, model.hash, NEW_TOKENS]
    given: list[Any] = [recipes["combined"], grid[-1], SELECTION_SEEDS]
    control = {layer: resumed("steering_sweep", key, random_effects, model, *given)}
    best = choose(rows, control)
    save_direction(recipes[best["recipe"]], prepared.path("vectors", "tone-sharper"))
    return write_table("steering_sharper", model, time.time() - start, selected=best, random=control, rows=rows)
