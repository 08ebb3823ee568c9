"""The second ruler of tone, which no vector was trained against: ``glassbox study steering-ruler``."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from glassbox_utils.core import files, prepared
from glassbox_utils.core.models import Model
from glassbox_utils.core.prepared import load_subject
from glassbox_utils.core.statistics import spearman
from glassbox_utils.core.studies import SEED, write_table
from glassbox_utils.steering import style
from glassbox_utils.steering.fit import pooled
from glassbox_utils.steering.vectors import SteeringError

RATED = 1000
"""rated sentences of each source that the second ruler is fitted on; as many others check it"""


def ruler_path() -> Path:
    """Weights of the second ruler of tone, fitted in the model in use."""
    return prepared.path("vectors", "second-ruler.safetensors")


def study_ruler() -> Path:
    """A ruler of tone that no vector was trained against, and its rank correlation with people on other sentences.

    It reads the unsteered model's residual stream, averaged over a text, half-way up: ridge regression on sentences
    that people rated, -4 to 4 (``style.human_ratings``). Shipped are the weights for [mean residual stream, 1].
    """
    start, model, rng = time.time(), load_subject(), np.random.default_rng(SEED)
    fitted, checks, n = [], {}, prepared.sized(RATED, 100)
    for source in style.RATED:
        texts, rating = _readable(model, *style.human_ratings(source))
        if len(texts) < 2 * n:
            raise SteeringError(
                f"Only {len(texts)} of the rated {source} fit into the {model.n_context} tokens of {model.name}; the "
                f"ruler needs {2 * n}. Give a model with a longer context, or do without this ruler."
            )
        chosen = rng.choice(len(texts), 2 * n, replace=False)
        read = read_by(model, [texts[i] for i in chosen])
        fitted.append((read[:n], torch.from_numpy(rating[chosen[:n]]).type_as(read)))
        checks[source] = (read[n:], rating[chosen[n:]])
    x, y = (torch.cat(side) for side in zip(*fitted, strict=True))
    spread = x.std(0).clamp(min=1e-6)
    spread[-1] = 1.0  # the constant
    scaled = x / spread
    penalty = 0.1 * len(x) * torch.eye(len(spread)).type_as(x)
    penalty[-1, -1] = 0
    weights = torch.linalg.solve(scaled.T @ scaled + penalty, scaled.T @ y) / spread
    with files.atomic_path(ruler_path()) as partial:
        save_file({"weights": weights.contiguous()}, partial)
    rho = {source: round(spearman((r @ weights).numpy(), v).rho.value, 3) for source, (r, v) in checks.items()}
    about: dict[str, Any] = {"layer": model.n_layers // 2, "rated": n, "rank_correlation": rho}
    return write_table("steering_ruler", model, time.time() - start, **about)


def _readable(model: Model, texts: Sequence[str], rating: NDArray) -> tuple[list[str], NDArray]:
    """The rated sentences that fit into the model's context: all of them, unless it is very short."""
    rows = model.tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    kept = [i for i, row in enumerate(rows) if len(row) + 1 < model.n_context]
    return [texts[i] for i in kept], rating[kept]


def read_by(model: Model, texts: Sequence[str]) -> torch.Tensor:
    """What the second ruler reads of each text: mean residual stream half-way up, and a constant; no chat."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # little padding
    found = pooled(model, [texts[i] or "." for i in order], [model.n_layers // 2])[0][0].double()
    read = torch.empty_like(found)
    read[order] = found
    return torch.cat([read, torch.ones(len(read), 1).type_as(read)], 1)


def read_tone(model: Model, texts: Sequence[str]) -> list[float]:
    """The second ruler's rating of each text, -4 to 4."""
    return (read_by(model, texts) @ load_file(ruler_path())["weights"]).numpy().round(4).tolist()
