"""The long runs behind notebook 05: ``glassbox study steering-NAME``, names in STUDIES_OF_STEERING.

Each is resumable (what is done is kept in the cache folder and not done again), deterministic, and writes one table
under ``data/studies/`` with its provenance. Sweep, sharper and layers select, on selection prompts; tone, seeds and
costs report.
"""

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from glassbox_utils.core import assets, files
from glassbox_utils.core.assets import DATA
from glassbox_utils.core.models import Model, load_model
from glassbox_utils.core.session import progress
from glassbox_utils.core.statistics import Interval, spearman
from glassbox_utils.core.studies import SEED, read_table, resumed, write_table
from glassbox_utils.steering import contrast, style, training
from glassbox_utils.steering.apply import continuations
from glassbox_utils.steering.fit import fit_direction, fit_directions, pooled
from glassbox_utils.steering.selection import select, sweep
from glassbox_utils.steering.training import train_vector
from glassbox_utils.steering.vectors import (
    ControlVector,
    Direction,
    Vector,
    fingerprint,
    load_vector,
    parts_of,
    random_vector,
    save_direction,
)

LAYERS = (6, 9, 15, 21)
"""of 30; the last fifth of the layers is left out as in refusal_direction"""
CLOSER = (15,)
"""layers of the second round: where the first had the most effect for its side effect"""
CLOSER_ALPHAS = (0.08, 0.14)
RECIPES = ("combined", "trained")
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
SPAN = (0.27, 0.7)
"""layers of the many-layer vector, as shares of the depth: 8 to 20 of 30"""
SPAN_ALPHAS = (0.010, 0.0125, 0.015)
"""the pushes of thirteen layers add up, so each is a tenth of a single layer's"""
SPAN_RECIPES = ("mean_difference", "combined")
"""fitted ones; a third, "own_answers", is the last of them trained further"""
TRAINING: dict[str, Any] = {"alpha": 0.015, "steps": 40, "n_questions": 30, "learning_rate": 0.006, "divergence": 0.01}
"""how it is trained; chosen on selection prompts"""
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


# --- where and how hard -------------------------------------------------------------------------------


def tone_directions(
    model: Model, layers: Sequence[int], method: Any = "mean_difference", n_resamples: int = 100
) -> Any:
    """The tone direction at several layers, from the train split."""
    positive, negative = contrast.pairs("tone", "train")
    return fit_directions(
        model, positive, negative, method, layers=layers, name="tone", n_resamples=n_resamples, seed=SEED
    )


def tone_answers(split: Any = "train") -> list[list[contrast.Text]]:
    """Positive and negative tone sentences as answers to generic questions: what gradients are taken through."""
    sides = contrast.pairs("tone", split)
    return [[(GENERIC[i % len(GENERIC)], str(text)) for i, text in enumerate(side)] for side in sides]


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
    asked, shared = contrast.prompts("selection")[:n], options.pop("shared", False)
    settings = [(random_vector(like, k, shared), s * alpha) for k in seeds for s in (1, -1)]
    rows = [s for s in settings for _ in asked]
    texts = continuations(model, asked * len(settings), rows, NEW_TOKENS, 100, label="random directions", **options)
    tones = style.tone(texts).reshape(len(seeds), 2, -1).mean(-1)
    return (tones[:, 0] - tones[:, 1]).round(4).tolist()


def tone_vector(
    model: Model, n_resamples: int = 100, recipe: Any = "combined", n_pairs: int | None = None
) -> ControlVector:
    """The tone direction after each layer of SPAN, over the tokens of the sentences as answers.

    ``recipe``: a method of ``fit.fit_directions``; ``n_pairs``: from the first few pairs only.
    """
    first, end = (round(share * model.n_layers) for share in SPAN)
    layers = range(max(1, first), max(2, end))
    options: dict[str, Any] = {"layers": layers, "name": "tone", "n_resamples": n_resamples, "seed": SEED}
    positive, negative = (side[:n_pairs] for side in tone_answers())
    found = fit_directions(model, positive, negative, recipe, system=NO_SYSTEM, **options)
    return ControlVector(tuple(found[layer] for layer in layers))


def own_vector(model: Model, start: ControlVector) -> ControlVector:
    """A vector trained further on the model's own answers to the train questions; 13 minutes, resumable."""
    key = json.dumps([fingerprint(start), TRAINING, model.hash, NEW_TOKENS, SEED], sort_keys=True)
    name = f"own-answers-{hashlib.sha256(key.encode()).hexdigest()[:16]}.safetensors"
    checkpoint = assets.cache_dir() / "studies" / "steering_layers" / name
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    options: dict[str, Any] = {"new_tokens": NEW_TOKENS, "system": NO_SYSTEM, "seed": SEED, "checkpoint": checkpoint}
    return train_vector(model, contrast.prompts("train"), start, **TRAINING, **options)


def fit_attribute(model: Model, name: str, layer: int, method: Any = "mean_difference") -> Direction:
    """The direction of one of the shipped contrast sets at one layer, from its train split."""
    positive, negative = contrast.pairs(name, "train")
    return fit_direction(model, positive, negative, method, layer=layer, name=name, seed=SEED)


def study_sweep() -> Path:
    """Layer x strength of tone on 30 selection prompts and 48 neutral sentences; ships vectors at the best layer.

    The tone vector of that one layer is ``tone-single``.
    """
    start, model = time.time(), load_model()
    directions = tone_directions(model, LAYERS)
    rows: list[dict[str, float]] = []
    for layer in progress(list(LAYERS), "layers"):
        key = [layer, ALPHAS, model.hash, NEW_TOKENS]
        asked, neutral = contrast.prompts("selection")[:30], contrast.prompts("neutral")
        rows += resumed("steering_sweep", key, sweep, model, directions[layer], ALPHAS, asked, neutral, NEW_TOKENS)
    best = select(rows, KL_BUDGET, PERPLEXITY_BUDGET)
    for name in ATTRIBUTES:
        path = DATA / "vectors" / ("tone-single" if name == "tone" else name)
        save_direction(fit_attribute(model, name, int(best["layer"])), path)
    budgets = {"kl": KL_BUDGET, "perplexity": PERPLEXITY_BUDGET}
    stability = {d.layer: [round(x, 3) for x in _triple(d.stability)] for d in directions.values()}
    return write_table(
        "steering_sweep", model, time.time() - start, budgets=budgets, selected=best, stability=stability, rows=rows
    )


def _triple(interval: Any) -> tuple[float, float, float]:
    return interval.value, interval.low, interval.high


def study_layers() -> Path:
    """A little at many layers: three recipes x three strengths on the 60 selection prompts; ships the tone vector.

    Same budgets as the sweep's. Full strength is the largest effect within them. Then the half and the full turn are
    compared with ten random directions each, shared by the layers: the turn at which the vector stands out more
    (effect over the root mean square of theirs) is the one at which the report counts its bar.
    """
    start, model = time.time(), load_model()
    asked, neutral = contrast.prompts("selection"), contrast.prompts("neutral")
    vectors = {recipe: tone_vector(model, recipe=recipe) for recipe in SPAN_RECIPES}
    vectors["own_answers"] = own_vector(model, vectors["combined"])
    rows: list[dict[str, Any]] = []

    def measured(recipe: str, alpha: float) -> list[dict[str, Any]]:
        vector = vectors[recipe]
        key = [recipe, fingerprint(vector), alpha, model.hash, NEW_TOKENS, len(asked)]
        given: list[Any] = [vector, [alpha], asked, neutral, NEW_TOKENS, 100, NO_SYSTEM]
        found = resumed("steering_layers", key, sweep, model, *given)
        return [{"recipe": recipe.replace("_", " "), **row} for row in found]

    for recipe in vectors:
        for alpha in SPAN_ALPHAS:  # one at a time: what gets interrupted is short
            rows += measured(recipe, alpha)
    best = select(rows, KL_BUDGET, PERPLEXITY_BUDGET)
    recipe = next(r for r in vectors if r.replace("_", " ") == best["recipe"])
    vector = vectors[recipe]
    save_direction(vector, DATA / "vectors" / "tone")
    turns = []
    for step in TURNS:
        alpha = step * best["alpha"]
        [row] = [row for row in measured(recipe, alpha) if row["alpha"]]
        key = ["shared", recipe, fingerprint(vector), alpha, TURN_SEEDS, model.hash, NEW_TOKENS, len(asked)]
        others = resumed("steering_layers", key, _others, model, vector, alpha)
        turns.append(row | {"step": step, "random": others, "times": round(standing_out(row["effect"], others), 2)})
    before = vectors["combined"]
    stability = {d.layer: [round(x, 3) for x in _triple(d.stability)] for d in before.parts}
    kept = [
        round(float(x.vector @ y.vector), 3) for x, y in zip(vectors["own_answers"].parts, before.parts, strict=True)
    ]
    about = {
        "selected": best,
        "training": TRAINING,
        "cosines_with_start": kept,
        "turns": turns,
        "turn": max(turns, key=lambda t: t["times"])["step"],
    }
    return write_table("steering_layers", model, time.time() - start, **about, stability=stability, rows=rows)


def _others(model: Model, like: Vector, alpha: float) -> list[float]:
    return random_effects(model, like, alpha, TURN_SEEDS, n=60, shared=True, system=NO_SYSTEM)


def standing_out(effect: float, others: Sequence[float]) -> float:
    """An effect as a multiple of the root mean square of random directions' effects."""
    return float(effect / np.sqrt(np.mean(np.square(others))))


def selected() -> tuple[Vector, float]:
    """The shipped tone vector and the strength that was selected for it."""
    return load_vector("tone"), read_table("steering_layers")["selected"]["alpha"]


def turn() -> float:
    """The part of the full turn at which the bar is counted, from the selection prompts."""
    return read_table("steering_layers")["turn"]


def single() -> tuple[Vector, float]:
    """The best vector of one layer and its strength, from the sweep: what many layers are compared with."""
    return load_vector("tone-single"), read_table("steering_sweep")["selected"]["alpha"]


def dial(model: Model) -> tuple[ControlVector, float, bool]:
    """Tone vector, full strength, and whether it is the shipped one; another model gets one fitted on the spot."""
    table = read_table("steering_layers")
    if model.hash == table["provenance"]["model_hash"]:
        vector, alpha = selected()
        return ControlVector(parts_of(vector)), alpha, True
    return tone_vector(model, n_resamples=0), table["selected"]["alpha"], False


RATED = 1000
"""rated sentences of each source that the second ruler is fitted on; as many others check it"""
RULER = DATA / "vectors" / "second-ruler.safetensors"


def study_ruler() -> Path:
    """A ruler of tone that no vector was trained against, and its rank correlation with people on other sentences.

    It reads the unsteered model's residual stream, averaged over a text, half-way up: ridge regression on sentences
    that people rated, -4 to 4 (``style.human_ratings``). Shipped are the weights for [mean residual stream, 1].
    """
    start, model, rng = time.time(), load_model(), np.random.default_rng(SEED)
    fitted, checks = [], {}
    for source in style.RATED:
        texts, rating = style.human_ratings(source)
        chosen = rng.choice(len(texts), 2 * RATED, replace=False)
        read = read_by(model, [texts[i] for i in chosen])
        fitted.append((read[:RATED], torch.from_numpy(rating[chosen[:RATED]]).type_as(read)))
        checks[source] = (read[RATED:], rating[chosen[RATED:]])
    x, y = (torch.cat(side) for side in zip(*fitted, strict=True))
    spread = x.std(0).clamp(min=1e-6)
    spread[-1] = 1.0  # the constant
    scaled = x / spread
    penalty = 0.1 * len(x) * torch.eye(len(spread)).type_as(x)
    penalty[-1, -1] = 0
    weights = torch.linalg.solve(scaled.T @ scaled + penalty, scaled.T @ y) / spread
    with files.atomic_path(RULER) as partial:
        save_file({"weights": weights.contiguous()}, partial)
    rho = {source: round(spearman((r @ weights).numpy(), v).rho.value, 3) for source, (r, v) in checks.items()}
    about: dict[str, Any] = {"layer": model.n_layers // 2, "rated": RATED, "rank_correlation": rho}
    return write_table("steering_ruler", model, time.time() - start, **about)


def read_by(model: Model, texts: Sequence[str]) -> torch.Tensor:
    """What the second ruler reads of each text: mean residual stream half-way up, and a constant; no chat."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # little padding
    found = pooled(model, [texts[i] or "." for i in order], [model.n_layers // 2])[0][0].double()
    read = torch.empty_like(found)
    read[order] = found
    return torch.cat([read, torch.ones(len(read), 1).type_as(read)], 1)


def read_tone(model: Model, texts: Sequence[str]) -> list[float]:
    """The second ruler's rating of each text, -4 to 4."""
    return (read_by(model, texts) @ load_file(RULER)["weights"]).numpy().round(4).tolist()


# --- sharper directions -------------------------------------------------------------------------------


def sharper_direction(model: Model, recipe: str, layer: int) -> Direction:
    """``combined``, or ``trained``: the combined direction trained further for the strongest push of the selection."""
    key = [recipe, "vector", layer, CLOSER_ALPHAS[-1], model.hash]
    found = resumed("steering_sweep", key, _fitted, model, recipe, layer)
    found |= {"vector": torch.tensor(found["vector"])}
    found |= {"stability": Interval(**found["stability"]) if found["stability"] else None}
    return Direction(**found)


def _fitted(model: Model, recipe: str, layer: int) -> dict[str, Any]:
    if recipe == "combined":
        d = combined_directions(model, [layer])[layer]
    else:
        first = sharper_direction(model, "combined", layer)
        positive, negative = tone_answers()
        push = CLOSER_ALPHAS[-1]
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
    """Sharper directions at one layer, compared and chosen on 30 selection prompts: a null result, kept as one."""
    start, model = time.time(), load_model()
    asked, neutral = contrast.prompts("selection")[:30], contrast.prompts("neutral")
    recipes = {recipe: {layer: sharper_direction(model, recipe, layer) for layer in CLOSER} for recipe in RECIPES}
    rows: list[dict[str, Any]] = []
    control: dict[int, list[float]] = {}
    for layer in progress(list(CLOSER), "layers"):
        for recipe in RECIPES:
            key = [recipe, layer, CLOSER_ALPHAS, model.hash, NEW_TOKENS]
            given: list[Any] = [recipes[recipe][layer], CLOSER_ALPHAS, asked, neutral, NEW_TOKENS, 100, NO_SYSTEM]
            found = resumed("steering_sweep", key, sweep, model, *given)
            rows += [{"recipe": recipe, **row} for row in found]
        strongest = CLOSER_ALPHAS[-1]
        key = ["random", layer, strongest, SELECTION_SEEDS, model.hash, NEW_TOKENS]
        given = [recipes["combined"][layer], strongest, SELECTION_SEEDS]
        control[layer] = resumed("steering_sweep", key, random_effects, model, *given)
    best = choose(rows, control)
    chosen = recipes[best["recipe"]][int(best["layer"])]
    save_direction(chosen, DATA / "vectors" / "tone-sharper")
    return write_table("steering_sharper", model, time.time() - start, selected=best, random=control, rows=rows)
