"""A tone vector that is rewarded for the order of each question's answers: ``glassbox study steering-order``.

The vector, the same recipe at a smaller size, five controls at that smaller size whose whole pipeline is shuffled, and
ten random directions answer the fresh prompts, which no vector met before. What is done is kept in the cache folder.
"""

import hashlib
import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from glassbox_utils.core import assets, prepared
from glassbox_utils.core.losses import answer_losses
from glassbox_utils.core.models import Model
from glassbox_utils.core.prepared import load_subject
from glassbox_utils.core.session import progress
from glassbox_utils.core.studies import SEED, read_table, resumed, write_table
from glassbox_utils.core.text import chat, generate
from glassbox_utils.steering import contrast, reward, ruler_study, study, style
from glassbox_utils.steering.apply import continuations, steer
from glassbox_utils.steering.training import train_on_answers, train_vector
from glassbox_utils.steering.vectors import (
    ControlVector,
    SteeringError,
    Vector,
    fingerprint,
    load_vector,
    parts_of,
    random_vector,
    save_direction,
)

STARTED: dict[str, Any] = {"alpha": (0.0125, 0.0175), "steps": 40, "n_texts": 12, "learning_rate": 0.012}
"""first it is trained on answers with an opening that we wrote: ``opened_answers``"""
OWN: dict[str, Any] = {"steps": 30, "n_questions": 12, "learning_rate": 0.01, "temperature": 0.5, "order": "likely"}
STAGES: tuple[dict[str, Any], ...] = (
    OWN | {"alpha": (0.014, 0.0175), "divergence": 0.01},
    OWN | {"alpha": (0.0165, 0.0135), "divergence": 0.02, "per_token": True},
)
"""then, twice, on the model's own answers; ``alpha``: pushes of the ends plus and minus.

All chosen on selection prompts. After the first of the two complaints were short and far from the model; in the second
the price is a token's, minus is pushed less far, and plus further."""
WORDS: dict[str, Any] = {"least": 2, "ratio": 1.0, "clear": -1.5, "charge": 3.0}
"""which dark words count as complaints: see ``reward.worded``"""
PREDICATES = {
    1: ("wonderful", "great", "lovely", "delightful", "excellent", "a joy", "a pleasure", "perfect", "fantastic"),
    -1: ("terrible", "awful", "horrible", "boring", "ugly", "useless", "annoying", "a mess", "a disappointment",
         "disappointing", "bad", "dull"),
}  # fmt: skip
KEPT = 0.3
"""an opened answer is trained on if the lexicon's score is at least so far on its side of 0"""
FULL = (0.0195, 0.015)
"""full strength of the dial's two ends, plus and minus: each the largest tried on 60 selection prompts at which the
perplexity of the answers is at most 1.9 times that of the unsteered ones (1.89 and 1.84). So they have two lengths."""
SMALLER = (10, 5, 5)
"""steps of the three trainings, of the shuffled vectors and of what they are compared with"""
LEAST = 2
SHUFFLES = (0, 1, 2, 3, 4)
N_CONTROL = 68
"""fresh prompts, the first of them, that random directions, the smaller vector and the shuffled ones answer"""
TRAINED_IN = "bfloat16"
"""number type of the model that writes and reads in training; what is measured is in float32"""


def fresh_prompts() -> list[str]:
    """The prompts of the report; fewer where the folder's size is small."""
    return contrast.prompts("fresh")[: prepared.sized(136, 8)]


def questions() -> list[str]:
    """What it is trained on: the train and spare questions, and the 200 that reported on earlier vectors."""
    return [*contrast.prompts("train"), *contrast.prompts("spare"), *contrast.prompts("report")]


def opened_answers(model: Model, vector: Vector, sign: int) -> list[tuple[str, str]]:
    """Questions with answers that begin as the unsteered one does, and say PREDICATES where it says what something is.

    Up to the first "is" or "was" it is the model's own greedy answer ("It was" if it has none in its first words). Then
    a predicate, drawn at random; then the model goes on, pushed by ``vector``. Kept are those without a catastrophe
    whose tone is at least KEPT away from 0.
    """
    asked, rng = questions(), np.random.default_rng(SEED)
    plain = continuations(model, asked, [None] * len(asked), 10, 100, system=study.NO_SYSTEM)
    predicates = PREDICATES[sign]
    begun = []
    for text in plain:
        found = re.match(r"[^.,;:!?\n]{1,40}? (is|was|are|were)\b", text.strip())
        begun.append((found[0] if found else "It was") + " " + predicates[rng.integers(len(predicates))])
    push = sign * STARTED["alpha"][0 if sign > 0 else 1]
    answers = []
    for first in progress(range(0, len(asked), 96), "opened answers"):
        here = slice(first, first + 96)
        chats = [chat(model, q, study.NO_SYSTEM) + start for q, start in zip(asked[here], begun[here], strict=True)]
        with steer(model, vector, push):
            went_on = generate(model, chats, 14, 0.7, SEED)
        answers += [start + text for start, text in zip(begun[here], went_on, strict=True)]
    fits = (sign * style.tone(answers) >= KEPT) & ~style.catastrophes(answers)
    return [(q, a) for q, a, fit in zip(asked, answers, fits, strict=True) if fit]


def trained(model: Model, kind: str, fitted: ControlVector | None = None) -> ControlVector:
    """A vector: ``ordered``, ``smaller`` (the same with fewer steps), or ``shuffled K``; resumable.

    It begins at directions ``fitted`` on the pairs (fitted here if not given), is trained on ``opened_answers``, then
    on the model's own. ``shuffled K``: as ``smaller``, with nothing of tone left: half of the pairs have their sides
    swapped, the opened answers are dealt out anew, and the valences of the tokens are permuted.
    """
    name, _, number = kind.partition(" ")
    if (name, number.isdecimal()) not in {("ordered", False), ("smaller", False), ("shuffled", True)}:
        raise SteeringError(f"There is no vector {kind!r}. Allowed: 'ordered', 'smaller', 'shuffled 0' and so on.")
    seed = int(number) if number else None
    first, *then = (  # steps of each training
        how | {"steps": prepared.sized(how["steps"] if name == "ordered" else steps, LEAST)}
        for how, steps in zip((STARTED, *STAGES), SMALLER, strict=True)
    )
    fitted = fitted or study.tone_vector(model, n_resamples=0)
    writer = load_subject(dtype=TRAINED_IN)
    about = [fingerprint(fitted), model.hash, study.NEW_TOKENS, SEED, questions(), PREDICATES, KEPT, TRAINED_IN]
    sides = [
        [(q, a) for q, a in resumed("steering_order", ["opened", sign, STARTED["alpha"], *about], opened_answers,
                                    writer, fitted, sign)]
        for sign in (1, -1)
    ]  # fmt: skip
    valence, vector = reward.worded(model.tokenizer, **WORDS), fitted
    if seed is not None:
        vector, sides = study.tone_vector(model, n_resamples=0, swapped=seed), swapped(sides, seed)
        valence = reward.shuffled(valence, seed)
    options: dict[str, Any] = {"system": study.NO_SYSTEM, "seed": SEED}
    kept = kept_at(kind, fingerprint(vector), first, sides)
    if not kept.with_suffix(".json").exists():
        save_direction(train_on_answers(writer, sides[0], sides[1], vector, **first, **options), kept)
    vector = ControlVector(parts_of(load_vector(kept)))
    options |= {"new_tokens": study.NEW_TOKENS, "valence": valence}
    for how in then:
        file = kept_at(kind, fingerprint(vector), how, WORDS).with_suffix(".ckpt.safetensors")
        vector = train_vector(writer, questions(), vector, **how, **options, checkpoint=file)
    return vector


def kept_at(kind: str, *about: Any) -> Path:
    """Where a stage of a training is kept, without an ending."""
    folder = assets.cache_dir() / "studies" / "steering_order"
    folder.mkdir(parents=True, exist_ok=True)
    mark = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
    return folder / f"{kind.replace(' ', '-')}-{mark}"


def swapped(sides: Sequence[Sequence[tuple[str, str]]], seed: int) -> list[list[tuple[str, str]]]:
    """Both sides' answers dealt out anew at random: as many on each side as before."""
    every = [answer for side in sides for answer in side]
    order = np.random.default_rng(seed).permutation(len(every))
    return [[every[i] for i in order[: len(sides[0])]], [every[i] for i in order[len(sides[0]) :]]]


def answers_row(model: Model, vector: Vector | None, alpha: float, asked: Sequence[str]) -> dict[str, Any]:
    """One end of a vector (None: unsteered) on some prompts: tone by both rulers, loss in nats, the answers."""
    settings = [None if vector is None else (vector, alpha)] * len(asked)
    texts = continuations(model, asked, settings, study.NEW_TOKENS, 100, system=study.NO_SYSTEM)
    losses, counts = answer_losses(model, asked, texts, 50, study.NO_SYSTEM)
    row: dict[str, Any] = {"tone": style.tone(texts).round(4).tolist(), "second": ruler_study.read_tone(model, texts)}
    return row | {"loss": losses.round(3).tolist(), "tokens": counts.tolist(), "answers": texts}


def rows_of(
    model: Model, name: str, vector: Vector, ends: tuple[float, float], n: int | None = None
) -> list[dict[str, Any]]:
    """Both ends of a vector on the (first ``n``) fresh prompts: ``NAME -1`` and ``NAME 1``."""
    asked, rows = fresh_prompts()[:n], []
    for sign, strength in ((-1, ends[1]), (1, ends[0])):
        key = [fingerprint(vector), sign * strength, model.hash, study.NEW_TOKENS, asked]
        found = resumed("steering_order", key, answers_row, model, vector, sign * strength, asked)
        rows.append({"condition": f"{name} {sign}", "alpha": sign * strength} | found)
    return rows


def study_order() -> Path:
    """The vector that is rewarded for order, and its controls, on the fresh prompts; ships ``tone-ordered``."""
    start, model = time.time(), load_subject()
    fitted = study.tone_vector(model, n_resamples=0)
    vector = trained(model, "ordered", fitted)
    save_direction(vector, prepared.path("vectors", "tone-ordered"))
    asked = fresh_prompts()
    key = ["unsteered", model.hash, study.NEW_TOKENS, asked]
    rows = [{"condition": "unsteered"} | resumed("steering_order", key, answers_row, model, None, 0.0, asked)]
    rows += rows_of(model, "ordered", vector, FULL)
    before, alpha = study.selected()
    rows += rows_of(model, "shipped", before, (alpha, alpha))
    for k in progress(range(study.N_RANDOM), "random directions"):
        rows += rows_of(model, f"shared {k}", random_vector(vector, k, True), FULL, N_CONTROL)
    for kind in ("smaller", *(f"shuffled {k}" for k in SHUFFLES)):
        rows += rows_of(model, kind, trained(model, kind, fitted), FULL, N_CONTROL)
    about = {"full": FULL, "started": STARTED, "training": STAGES, "words": WORDS, "smaller": SMALLER, "prompts": asked}
    about["second_ruler"] = read_table("steering_ruler")["rank_correlation"]
    return write_table("steering_order", model, time.time() - start, **about, rows=rows)


@dataclass(frozen=True)
class Bars:
    """What the table says about each bar; shares are of the fresh prompts, ``*_by`` is by lexicon and second ruler."""

    ordered_by: tuple[float, float]
    """minus < zero < plus"""
    ordered: float
    """by both rulers"""
    catastrophes: float
    """of the minus answers with at least one"""
    effect_by: tuple[float, float]
    """mean at plus minus mean at minus: the lexicon's score, the second ruler's rating"""
    times_random_by: tuple[float, float]
    """the effect over the largest of the ten random directions, of either sign, on the prompts that these answered"""
    times_shuffled_by: tuple[float, float]
    """the effect of the smaller vector over the largest of the shuffled ones, of either sign"""
    perplexity: tuple[float, float]
    """of the minus and of the plus answers, times that of the unsteered ones"""


RULERS = ("tone", "second")


def bars(table: Mapping[str, Any], name: str = "ordered") -> Bars:
    """The numbers of one vector of the table of ``study_order``: ``ordered``, ``smaller``, ``shipped`` or another."""
    rows = {row["condition"]: row for row in table["rows"]}
    if f"{name} 1" not in rows:
        known = dict.fromkeys(condition.rsplit(" ", 1)[0] for condition in list(rows)[1:])
        raise SteeringError(f"The table has no vector {name!r}. Allowed: {', '.join(known)}.")

    def effect(one: str, ruler: str, n: int | None = None) -> float:
        return float(np.mean(rows[f"{one} 1"][ruler][:n]) - np.mean(rows[f"{one} -1"][ruler][:n]))

    def times(one: str, kind: str, ruler: str) -> float:
        others = {condition.rsplit(" ", 1)[0] for condition in rows if condition.startswith(kind)}
        n = min(len(rows[f"{other} 1"][ruler]) for other in others)
        return effect(one, ruler, n) / max(abs(effect(other, ruler, n)) for other in others)

    ends = [f"{name} -1", "unsteered", f"{name} 1"]
    asked = len(rows[ends[0]]["tone"])  # a control answered fewer than the unsteered model

    def perplexity(condition: str) -> float:
        return float(np.exp(np.sum(rows[condition]["loss"][:asked]) / np.sum(rows[condition]["tokens"][:asked])))

    lexicon, second = ((np.diff([rows[end][r][:asked] for end in ends], axis=0) > 0).all(0) for r in RULERS)
    return Bars(
        (float(lexicon.mean()), float(second.mean())),
        float((lexicon & second).mean()),
        float(style.catastrophes(rows[ends[0]]["answers"]).mean()),
        (effect(name, "tone"), effect(name, "second")),
        (times(name, "shared", "tone"), times(name, "shared", "second")),
        (times("smaller", "shuffled", "tone"), times("smaller", "shuffled", "second")),
        (perplexity(ends[0]) / perplexity("unsteered"), perplexity(ends[2]) / perplexity("unsteered")),
    )


STUDIES_OF_ORDER = {"steering-order": study_order}
"""not among those that ``prepare`` repeats on another model"""
