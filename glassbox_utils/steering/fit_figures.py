"""What notebook 05 shows of a fit: is the direction real, and what do other recipes find? Tables are pandas."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from glassbox_utils.core.devices import result
from glassbox_utils.core.models import Model
from glassbox_utils.core.statistics import Interval, bootstrap_ci
from glassbox_utils.core.studies import SEED
from glassbox_utils.steering import contrast
from glassbox_utils.steering.figures import cell
from glassbox_utils.steering.fit import direction_of, fit_direction, pooled
from glassbox_utils.steering.vectors import ControlVector, Direction


def order_of(model: Model, direction: Direction, name: str) -> tuple[int, int]:
    """How many held-out pairs of a contrast set a direction puts in the right order, and of how many."""
    vectors = [pooled(model, texts, [direction.layer])[0][0] for texts in contrast.pairs(name, "report")]
    positive, negative = (v @ result(direction.vector) for v in vectors)
    return int((positive > negative).sum()), len(positive)


def shuffled(positive: Tensor, negative: Tensor, held: Sequence[Tensor], n: int = 200) -> tuple[Interval, Interval]:
    """The control of a fit, labels shuffled within the pairs: stability of what is found, and held-out pairs right."""
    rng = np.random.default_rng(SEED)
    stable, right = [], []
    for _ in range(n):
        flip = torch.from_numpy(rng.random(len(positive)) < 0.5)[:, None]
        a, b = torch.where(flip, negative, positive), torch.where(flip, positive, negative)
        v = direction_of(a, b)
        draws = [torch.from_numpy(rng.integers(len(a), size=len(a))) for _ in range(10)]
        stable.append(np.mean([float(direction_of(a[i], b[i]) @ v) for i in draws]))
        right.append(int((held[0] @ v > held[1] @ v).sum()))
    low, high = np.quantile(stable, [0.025, 0.975])
    fewest, most = np.quantile(right, [0.025, 0.975])
    return Interval(float(np.mean(stable)), low, high, n), Interval(float(np.mean(right)), fewest, most, n)


def fit_table(model: Model, fitted: Mapping[str, Direction], points: Sequence[Tensor]) -> tuple[Any, Interval]:
    """Stability and held-out order of each attribute's direction, shuffled tone labels last; and their stability.

    ``points``: pooled vectors of tone's positive and negative texts, of the train and of the report split.
    """
    import pandas as pd

    rows: dict[str, Any] = {}
    for name, d in fitted.items():
        right, n = order_of(model, d, name)
        rows[name] = [d.n_texts[0], cell(d.stability, sign="") if d.stability else "", f"{right} of {n}"]
    stable, ordered = shuffled(points[0], points[1], points[2:])
    last = [len(points[0]), cell(stable, sign=""), f"{cell(ordered, 0, '')} of {len(points[2])}"]
    rows["tone, labels shuffled (200 times)"] = last
    columns = ["pairs", "stability", "held-out pairs in the right order"]
    return pd.DataFrame.from_dict(rows, orient="index", columns=columns), stable


def recipes_table(model: Model, points: Sequence[Tensor], layer: int, sae: Any = None, at: int | None = None) -> Any:
    """Other directions from the same sentences: cosine with the mean difference of their layer, held-out pairs right.

    ``points``: as in ``fit_table``. ``sae``: an autoencoder of the residual stream after layer ``at``; without one its
    row is left out.
    """
    import pandas as pd

    x, y, held_p, held_n = points
    neutral = pooled(model, contrast.prompts("neutral"), [layer])[0][0]
    methods: tuple[Any, ...] = ("mean_difference", "pca", "probe")
    found = {m: direction_of(x, y, m) for m in methods} | {"mean_centred": direction_of(x, neutral, "mean_centred")}
    rows: dict[str, tuple[int | None, float, int]] = {
        m: (layer, float(v @ found["mean_difference"]), int((held_p @ v > held_n @ v).sum())) for m, v in found.items()
    }
    if sae is not None:
        praise, complaints = (side[:25] for side in contrast.pairs("tone", "train"))
        options: dict[str, Any] = {"layer": at, "n_resamples": 0}
        by_features = fit_direction(model, praise, complaints, "sae", sae=sae, name="tone", **options)
        cosine = float(by_features.vector @ fit_direction(model, praise, complaints, **options).vector)
        rows["sae (10 features)"] = (at, cosine, order_of(model, by_features, "tone")[0])
    columns = ["layer", "cosine with mean difference", f"right of {len(held_p)}"]
    return pd.DataFrame.from_dict(rows, orient="index", columns=columns).round(2)


def agreement(trained: ControlVector, fitted: ControlVector, gaps: Sequence[int] = (1, 4, 8)) -> str:
    """Cosines of a many-layer vector with another one, layer by layer, and between its own layers, in words."""
    agree = [float(a.vector @ b.vector) for a, b in zip(fitted.parts, trained.parts, strict=True)]
    lines = [f"cosine with the fitted direction of the same layer: {min(agree):.2f} to {max(agree):.2f}"]
    for gap in gaps:
        near = [float(a.vector @ b.vector) for a, b in zip(trained.parts, trained.parts[gap:], strict=False)]
        lines += [f"cosine between directions {gap} layers apart: mean {np.mean(near):.2f}"] if near else []
    return "\n".join(lines)


# --- one layer or many: study steering-alone ------------------------------------------------------------

MANY = "thirteen layers"


def at_price(table: Mapping[str, Any], vector: str, kl: float) -> tuple[NDArray, float]:
    """Each prompt's effect and the perplexity of the answers at a side effect, interpolated between strengths."""
    rows = sorted((row for row in table["rows"] if row["vector"] == vector), key=lambda row: row["kl"])
    prices = [row["kl"] for row in rows]
    effects = np.array([np.subtract(row["plus"], row["minus"]) for row in rows])  # [strength, prompt]
    effect = np.array([np.interp(kl, prices, one) for one in effects.T])
    return effect, float(np.interp(kl, prices, [row["perplexity"] for row in rows]))


def behind(table: Mapping[str, Any], vector: str, kl: float) -> Interval:
    """The effect of many layers less that of one at the same side effect; resampled are prompts."""
    return bootstrap_ci(at_price(table, MANY, kl)[0] - at_price(table, vector, kl)[0], seed=SEED)


def alone_table(table: Mapping[str, Any]) -> Any:
    """Every vector at the side effects that many layers have at their last two strengths."""
    import pandas as pd

    many = [row["kl"] for row in table["rows"] if row["vector"] == MANY][-2:]
    plain = next(row["perplexity"] for row in table["rows"] if not row["alpha"])
    found: dict[str, dict[str, str]] = {}
    for name in dict.fromkeys(row["vector"] for row in table["rows"]):
        found[name] = {}
        for kl in many:
            effect, perplexity = at_price(table, name, kl)
            reached = kl <= max(row["kl"] for row in table["rows"] if row["vector"] == name)
            found[name] |= {
                f"effect at {kl:.2f} nats": f"{effect.mean():.2f}" if reached else "not reached",
                f"many less it, {kl:.2f} nats": "" if name == MANY or not reached else cell(behind(table, name, kl)),
                f"perplexity ×, {kl:.2f} nats": f"{perplexity / plain:.2f}" if reached else "",
            }
    return pd.DataFrame(found).T


def beside_sharper(tables: Mapping[str, Mapping[str, Any]], n: int = 30) -> str:
    """What ``steering-sharper`` is compared with: random directions, and the mean difference of its layer.

    The latter on the same (first ``n``) prompts, in the same format, at the side effect of each of its rows.
    """
    sharper, alone = tables["sharper"], tables.get("alone", {"rows": []})
    drawn = [round(v, 2) for v in next(iter(sharper["random"].values()))]
    lines = [f"two random directions, strongest setting: {drawn}"]
    prices = [row["kl"] for row in sharper["rows"] if row["alpha"]]
    layer = int(sharper["selected"]["layer"])
    for name, fit in ((f"its layer {layer} alone", "sentences as answers"), (f"layer {layer}", "bare sentences")):
        if any(row["vector"] == name for row in alone["rows"]):
            effects = [f"{at_price(alone, name, kl)[0][:n].mean():.2f} at {kl:.2f}" for kl in prices]
            lines.append(
                f"mean difference, fitted on {fit}, effect at the nats of each row below: {', '.join(effects)}"
            )
    return "\n".join(lines)
