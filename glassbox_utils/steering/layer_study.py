"""One layer or many, at equal price: ``glassbox study steering-alone``.

The fitted direction (mean difference) after thirteen layers, some of its parts alone, and that of each layer of the
sweep, on the same selection prompts under the same empty system message. What is done is kept in the cache folder.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from glassbox_utils.core import prepared
from glassbox_utils.core.losses import answer_losses
from glassbox_utils.core.models import Model
from glassbox_utils.core.prepared import load_subject
from glassbox_utils.core.session import progress
from glassbox_utils.core.studies import resumed, write_table
from glassbox_utils.steering import study, style
from glassbox_utils.steering.apply import continuations
from glassbox_utils.steering.fit_figures import MANY
from glassbox_utils.steering.selection import costs
from glassbox_utils.steering.vectors import Vector, fingerprint

PARTS = (12, 15, 18)
"""of 30: parts of the many-layer vector that are measured alone; they are fitted on the sentences as answers, as it is,
where the sweep's directions are fitted on the bare sentences"""


def measured(model: Model, vector: Vector, alphas: Sequence[float], asked: Sequence[str]) -> list[dict[str, Any]]:
    """A row for each strength: side effect, and tone and loss of the answers at minus and plus; strength 0 first."""
    prices = [0.0, *costs(model, vector, alphas, study.neutral_texts())]
    signed = [0.0, *(sign * a for a in alphas for sign in (-1, 1))]
    settings, questions = [(vector, a) for a in signed for _ in asked], list(asked) * len(signed)
    texts = continuations(model, questions, settings, study.NEW_TOKENS, 100, system=study.NO_SYSTEM)
    losses, counts = (
        x.reshape(len(signed), -1).sum(-1) for x in answer_losses(model, questions, texts, 50, study.NO_SYSTEM)
    )
    tones, rows = style.tone(texts).reshape(len(signed), -1).round(4), []
    for i, (alpha, kl) in enumerate(zip([0.0, *alphas], prices, strict=True)):
        minus, plus = (0, 0) if i == 0 else (2 * i - 1, 2 * i)
        worse = max(np.exp(losses[j] / max(counts[j], 1)) for j in (minus, plus))
        row = {"alpha": alpha, "kl": round(float(kl), 4), "perplexity": round(float(worse), 4)}
        rows.append(row | {"minus": tones[minus].tolist(), "plus": tones[plus].tolist()})
    return rows


def study_alone() -> Path:
    """Mean differences after many layers and after one, at the strengths of the sweeps, on the selection prompts."""
    start, model = time.time(), load_subject()
    layers = sorted({prepared.depth(model, layer) for layer in prepared.thinned(study.LAYERS, 3)})
    single = study.tone_directions(model, layers, n_resamples=0)
    many = study.tone_vector(model, n_resamples=0, recipe="mean_difference")
    alone = {prepared.depth(model, layer) for layer in prepared.thinned(PARTS)}
    vectors: dict[str, tuple[Vector, Sequence[float]]] = {
        MANY: (many, study.SPAN_ALPHAS),
        **{f"its layer {part.layer} alone": (part, study.ALPHAS) for part in many.parts if part.layer in alone},
        **{f"layer {layer}": (single[layer], study.ALPHAS) for layer in layers},
    }
    asked, rows = study.selection_prompts(), []
    for name, (vector, alphas) in progress(vectors.items(), "vectors"):
        key = [name, fingerprint(vector), alphas, model.hash, study.NEW_TOKENS, len(asked)]
        found = resumed("steering_alone", key, measured, model, vector, alphas, asked)
        rows += [{"vector": name, **row} for row in found]
    return write_table("steering_alone", model, time.time() - start, rows=rows)


STUDIES_OF_LAYERS = {"steering-alone": study_alone}
"""not among those that ``prepare`` repeats on another model"""
