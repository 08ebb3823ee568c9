"""Fit a direction: from texts with and without a trait to a unit vector in the residual stream."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from glassbox_utils.core import coding
from glassbox_utils.core.arguments import items, shown, whole
from glassbox_utils.core.devices import beside, exact, like, result
from glassbox_utils.core.interventions import capture, edits
from glassbox_utils.core.losses import answer_nats, frozen_weights
from glassbox_utils.core.models import Model, Site, check_layer
from glassbox_utils.core.session import progress
from glassbox_utils.core.statistics import Interval
from glassbox_utils.steering import contrast
from glassbox_utils.steering.vectors import Direction, SteeringError

Method = Literal["mean_difference", "pca", "probe", "mean_centred", "gradient", "combined", "sae"]
METHODS: tuple[Method, ...] = ("mean_difference", "pca", "probe", "mean_centred", "gradient", "combined", "sae")
Pool = Literal["mean", "last"]


OUTLIER = 10.0
"""times the median norm: tokens above it are left out of means and norms"""


@torch.no_grad()
def pooled(
    model: Model,
    texts: Sequence[contrast.Text],
    layers: Sequence[int],
    pool: Pool = "mean",
    batch_size: int = 16,
    encode: Callable[[Tensor], Tensor] | None = None,
    system: str | None = None,
) -> tuple[Float[Tensor, "layer text width"], Float[Tensor, " layer"]]:
    """One vector for each text and layer, and each layer's typical residual norm.

    ``mean``: average over the text's tokens (of a prompt with an answer, over the answer's) without the
    first token and outliers; ``last``: the last token. Residual stream after the layer, d_model wide; or what
    ``encode`` makes of every token of it (features of a sparse autoencoder) before they are averaged.
    ``system`` as in ``text.chat``, for texts that are answers.
    """
    if pool not in ("mean", "last"):
        raise SteeringError(f"There is no pooling {shown(pool)}. Allowed: mean, last.")
    texts = contrast.check_texts("texts", texts)
    whole("batch_size", batch_size, 1, SteeringError)
    sites = [Site("resid_post", check_layer(model, layer)) for layer in layers]
    vectors, norms = [], []
    for start in progress(range(0, len(texts), batch_size), "reading"):
        batch, mask = contrast.answer_batch(model, texts[start : start + batch_size], system)
        found = capture(model, batch, sites)
        x = torch.stack([found[site] for site in sites]).float()
        size = x.norm(dim=-1)
        here = size[:, mask]
        norms.append(result(here))
        keep = mask & (size < OUTLIER * here.median(-1).values[:, None, None])
        if pool == "last":
            vectors.append(result(encode(x[:, :, -1]) if encode else x[:, :, -1]))
        else:
            value = encode(x) if encode else x
            vectors.append(result((value * keep[..., None]).sum(2) / keep.sum(2, keepdim=True).clamp(min=1)))
    return torch.cat(vectors, 1), torch.cat(norms, 1).median(-1).values


def gradients(
    model: Model, texts: Sequence[contrast.Text], layers: Sequence[int], batch_size: int = 26, system: str | None = None
) -> Float[Tensor, "layer text d_model"]:
    """How each text's log-probability (nats per token) grows with a vector that is added after a layer.

    The vector goes to all tokens, as ``steer`` does; the gradient is taken where it is zero. ``system`` as in
    ``text.chat``, for texts that are answers. One backward pass gives all layers.
    """
    texts = contrast.check_texts("texts", texts)
    whole("batch_size", batch_size, 1, SteeringError)
    sites = [Site("resid_post", check_layer(model, layer)) for layer in layers]
    found = []
    with frozen_weights(model), torch.enable_grad():
        for start in progress(range(0, len(texts), batch_size), "gradients"):
            batch, mask = contrast.answer_batch(model, texts[start : start + batch_size], system)
            zero = beside(torch.zeros(len(mask), 1, model.d_model), model.device)
            added = [zero.clone().requires_grad_() for _ in sites]
            with edits(model, {s: partial(torch.add, other=vector) for s, vector in zip(sites, added, strict=True)}):
                answer_nats(model, batch, mask).sum().neg().backward()
            found.append(torch.stack([result(vector.grad[:, 0]) for vector in added if vector.grad is not None]))
    return torch.cat(found, 1)


def direction_of(
    positive: Float[Tensor, "p d_model"], negative: Float[Tensor, "n d_model"], method: Method = "mean_difference"
) -> Float[Tensor, " d_model"]:
    """The unit vector that points from ``negative`` to ``positive``; pure, no model.

    * mean_difference: difference of the means (CAA, arXiv 2312.06681);
    * mean_centred: the same formula, where ``negative`` is not the opposite but a general sample
      (arXiv 2312.03813);
    * pca: first principal direction of the pairs' differences, not centred (arXiv 2310.01405);
    * probe: weights of a logistic regression with L2 penalty on standardised coordinates.
    """
    for side, x in (("positive", positive), ("negative", negative)):
        if not isinstance(x, Tensor) or x.ndim != 2 or not len(x) or not bool(torch.isfinite(x).all()):
            what = f"a tensor of shape {tuple(x.shape)}" if isinstance(x, Tensor) else shown(x)
            raise SteeringError(
                f"The {side} vectors are {what}. Allowed: finite numbers, one row for each of at least one text."
            )
    if positive.shape[1] != negative.shape[1]:
        raise SteeringError(
            f"The positive vectors have {positive.shape[1]} numbers, the negative ones {negative.shape[1]}. Read both "
            "from one model."
        )
    difference = positive.mean(0) - negative.mean(0)
    if method in ("mean_difference", "mean_centred"):
        found = difference
    elif method == "pca":
        if len(positive) != len(negative):
            raise SteeringError(
                f"Method 'pca' needs pairs, but there are {len(positive)} positive and {len(negative)} negative texts. "
                "Give equally many in the same order, or use mean_difference."
            )
        found = torch.linalg.svd(positive - negative, full_matrices=False).Vh[0]
    elif method == "probe":
        found = _probe(positive, negative)
    else:
        raise SteeringError(f"There is no method {method!r}. Allowed: {', '.join(METHODS)}.")
    found = found * torch.sign(found @ difference)
    length = found.norm()
    if not torch.isfinite(length) or length == 0:
        raise SteeringError("Positive and negative texts have the same mean, so there is no direction between them.")
    return found / length


def _probe(positive: Tensor, negative: Tensor, penalty: float = 1.0) -> Tensor:
    x = exact(torch.cat([positive, negative]))
    mean, std = x.mean(0), x.std(0).clamp(min=1e-6)
    z = (x - mean) / std
    y = torch.cat([torch.ones(len(positive)), torch.zeros(len(negative))]).double()
    weight = torch.zeros(z.shape[1] + 1, dtype=torch.double, requires_grad=True)
    optimiser = torch.optim.LBFGS([weight], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimiser.zero_grad()
        logits = z @ weight[:-1] + weight[-1]
        value = torch.nn.functional.binary_cross_entropy_with_logits(logits, y, reduction="sum")
        value = value + penalty * weight[:-1].square().sum() / 2
        value.backward()
        return value

    with torch.enable_grad():
        optimiser.step(loss)
    return like(weight.detach()[:-1] / std, positive)  # back from standardised to plain coordinates


def fit_direction(
    model: Model,
    positive: Sequence[contrast.Text],
    negative: Sequence[contrast.Text],
    method: Method = "mean_difference",
    *,
    layer: int | None = None,
    pool: Pool = "mean",
    name: str = "",
    sae: Any = None,
    n_resamples: int = 100,
    seed: int = 0,
    system: str | None = None,
) -> Direction:
    """Fit a direction at one layer (the middle one if None). See ``fit_directions``."""
    chosen = model.n_layers // 2 if layer is None else check_layer(model, layer)
    options: dict[str, Any] = {"pool": pool, "name": name, "sae": sae, "n_resamples": n_resamples, "seed": seed}
    options["system"] = system
    return fit_directions(model, positive, negative, method, layers=[chosen], **options)[chosen]


def fit_directions(
    model: Model,
    positive: Sequence[contrast.Text],
    negative: Sequence[contrast.Text],
    method: Method = "mean_difference",
    *,
    layers: Sequence[int] | None = None,
    pool: Pool = "mean",
    name: str = "",
    sae: Any = None,
    n_resamples: int = 100,
    seed: int = 0,
    system: str | None = None,
) -> dict[int, Direction]:
    """Fit a direction at each of several layers (all if None) with one pass over the texts.

    ``method`` as in ``direction_of``, or "sae": every token is encoded by a sparse autoencoder of the residual
    stream after that layer (``sae``, one layer only), the ten features whose mean changes most between the
    two kinds of text are decoded, weighted by their change; or "gradient": the vector that, added to every
    token, makes the positive texts likelier and the negative ones less likely at the steepest rate (the first
    step of training a steering vector: arXiv 2205.05124, 2406.00045); or "combined": half-way between the
    mean difference and the gradient, what the model *says* differs and what *moves* it. ``pool`` and
    ``system`` as in ``pooled``. ``n_resamples``
    bootstrap refits (whole pairs are drawn if there are as many positive as negative texts) give
    ``stability``; 0 skips it. Raises SteeringError below 2 texts a side, or if the SAE is of another place.
    """
    positive, negative = (contrast.check_texts(n, t, 0) for n, t in (("positive", positive), ("negative", negative)))
    whole("n_resamples", n_resamples, 0, SteeringError)
    whole("seed", seed, 0, SteeringError)
    if method not in METHODS:
        raise SteeringError(f"There is no method {shown(method)}. Allowed: {', '.join(METHODS)}.")
    if min(len(positive), len(negative)) < 2:
        raise SteeringError(
            f"A direction needs at least 2 texts a side, there are {len(positive)} positive and {len(negative)} "
            "negative ones. Aim at 50 or more: glassbox_utils.steering.contrast.pairs('tone', 'train') has an example."
        )
    if method == "sae" and sae is None:
        raise SteeringError(
            "Method 'sae' needs sae=, a sparse autoencoder of the residual stream after that layer "
            "(gb.load_sae loads one). Without one, use mean_difference."
        )
    every = range(model.n_layers)
    chosen = [
        check_layer(model, layer)
        for layer in items("layers", every if layers is None else layers, SteeringError, object)
    ]
    if method == "sae":
        _check_sae(model, sae, chosen)
    x, scale_p = pooled(model, positive, chosen, pool, system=system)
    y, scale_n = pooled(model, negative, chosen, pool, system=system)
    a, b = x, y  # what is fitted on: activations, gradients, or features
    fit: Callable[[Tensor, Tensor], Tensor] = partial(direction_of, method=method)
    if method == "sae":
        fit = _from_sae(sae)
        a, b = (
            pooled(model, t, chosen, pool, encode=partial(_written, sae), system=system)[0]
            for t in (positive, negative)
        )
    elif method in ("gradient", "combined"):
        a, b = (gradients(model, t, chosen, system=system) for t in (positive, negative))
        fit = direction_of
        if method == "combined":
            a, b, fit = torch.cat([x, a], -1), torch.cat([y, b], -1), _half_way
    rng = np.random.default_rng(seed)
    draws = [_draw(rng, len(positive), len(negative)) for _ in range(n_resamples)]
    found = {}
    for i, layer in enumerate(chosen):
        vector = fit(a[i], b[i])
        refits = torch.stack([fit(a[i][p], b[i][n]) for p, n in draws]) if draws else None
        scale = float((scale_p[i] + scale_n[i]) / 2)
        found[layer] = Direction(
            vector=vector,
            layer=layer,
            scale=scale,
            name=name,
            method=method,
            pooling=pool,
            model_name=model.name,
            model_type=model.hf.config.model_type,
            model_hash=model.hash,
            coordinates=(float((y[i] @ vector).mean()) / scale, float((x[i] @ vector).mean()) / scale),
            n_texts=(len(positive), len(negative)),
            stability=None if refits is None else _stability(refits @ vector),
        )
    return found


def _draw(rng: np.random.Generator, n_positive: int, n_negative: int) -> tuple[Tensor, Tensor]:
    p = torch.from_numpy(rng.integers(n_positive, size=n_positive))
    return p, p if n_negative == n_positive else torch.from_numpy(rng.integers(n_negative, size=n_negative))


def _stability(cosines: Tensor) -> Interval:
    low, high = np.quantile(result(cosines).numpy(), [0.025, 0.975])
    return Interval(float(cosines.mean()), float(low), float(high), len(cosines))


def _half_way(positive: Tensor, negative: Tensor) -> Tensor:
    """From activations and gradients side by side: the mean of the two unit directions, as a unit vector."""
    parts = zip(positive.chunk(2, -1), negative.chunk(2, -1), strict=True)
    return torch.nn.functional.normalize(sum((direction_of(p, n) for p, n in parts), torch.zeros(())), dim=0)


def _check_sae(model: Model, sae: Any, layers: Sequence[int]) -> None:
    hook = sae.cfg.metadata.get("hook_name") or ""
    known = {
        f"blocks.{layer}.{end}": layer for layer in range(model.n_layers) for end in ("hook_resid_post", "hook_out")
    }
    if sae.cfg.d_in != model.d_model or (hook and [known.get(hook)] != list(layers)):
        raise SteeringError(
            f"The SAE reads {sae.cfg.d_in} numbers at {hook or 'a place that it does not name'}, but layer "
            f"{', '.join(map(str, layers))} of {model.name} was asked for, whose residual stream has {model.d_model}. "
            + (f"Use layer={known[hook]}." if hook in known else "Take an SAE of the residual stream after a layer.")
        )


def _written(sae: Any, x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch d_sae"]:
    """What each feature adds along its decoder row, in the stream's own units."""
    return coding.encode(sae, x) * coding.gain(sae, x)


def _from_sae(sae: Any, n_features: int = 10) -> Callable[[Tensor, Tensor], Tensor]:
    """(features of positive texts, of negative texts) -> unit direction, through the decoder."""

    @torch.no_grad()
    def fit(positive: Tensor, negative: Tensor) -> Tensor:
        change = positive.mean(0) - negative.mean(0)
        top = change.abs().topk(min(n_features, len(change))).indices
        vector = change[top] @ result(coding.rows(sae))[top]
        length = vector.norm()
        if not torch.isfinite(length) or length == 0:
            raise SteeringError("No feature of the SAE changes between positive and negative texts.")
        return vector / length

    return fit
