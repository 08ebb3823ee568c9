"""Steering vectors: a direction in the residual stream, added while the model writes, and gone afterwards.

*Fit* a direction from texts with and without a trait, *steer* with it for some rows of a batch, *sweep* layer and
strength under a side-effect budget, *save* it, and *export* it for llama.cpp. Strength is in units of the layer's
typical residual norm, so that 0.1 means the same push at every layer and in every model: the typical norm is the
median over the tokens of the fitting texts, without each row's first token (an attention sink whose norm is many
times larger) and without tokens above ten times the median.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from glassbox_utils import GlassboxError, style
from glassbox_utils.attribution import resume
from glassbox_utils.evaluation import Interval
from glassbox_utils.interventions import Scope, by_row, capture, check_rows, edit, not_first, paired
from glassbox_utils.models import (
    Batch,
    Model,
    Site,
    chat,
    check_layer,
    generate,
    progress,
    tokenize,
    wrap_model,
)

Method = Literal["mean_difference", "pca", "probe", "mean_centred", "gradient", "combined", "sae"]
METHODS: tuple[Method, ...] = ("mean_difference", "pca", "probe", "mean_centred", "gradient", "combined", "sae")
Pool = Literal["mean", "last"]
Mode = Literal["add", "project_out", "affine"]
Text = str | tuple[str, str]
"""A text, or a user's prompt with the answer to it: of the latter only the answer's tokens are read."""

DATA = Path(__file__).resolve().parents[1] / "data"
OUTLIER = 10.0
"""times the median norm: tokens above it are left out of means and norms"""


class SteeringError(GlassboxError, ValueError):
    """A direction, method, mode or file that does not fit; the message names what does."""


@dataclass(frozen=True, eq=False)
class Direction:
    """A unit vector in the residual stream after one layer, with what is needed to use it elsewhere."""

    vector: Float[Tensor, " d_model"]
    """length 1"""
    layer: int
    scale: float
    """the layer's typical residual norm: alpha = 1 adds a vector of this length"""
    name: str = ""
    method: str = "given"
    pooling: str = ""
    model_name: str = ""
    model_type: str = "llama"
    """transformers' name of the architecture, which llama.cpp calls the model hint"""
    model_hash: str = ""
    """weights it was fitted on; empty: not checked"""
    coordinates: tuple[float, float] = (0.0, 0.0)
    """mean coordinate of the negative and of the positive texts along the vector, units of ``scale``"""
    n_texts: tuple[int, int] = (0, 0)
    """number of positive and of negative texts"""
    stability: Interval | None = None
    """cosine between the direction and its bootstrap refits; a direction made of noise has about .7"""

    def __repr__(self) -> str:
        stable = f", stability {self.stability.value:.2f}" if self.stability else ""
        return f"Direction({self.name or 'unnamed'}, layer {self.layer}, {self.method}, norm {self.scale:.0f}{stable})"


@dataclass(frozen=True, eq=False)
class ControlVector:
    """Directions after several layers that are turned by one dial: alpha pushes each by alpha of its own typical norm.

    A little at many layers adds up where the directions agree in meaning; what llama.cpp and repeng call a
    control vector.
    """

    parts: tuple[Direction, ...]
    """one for each layer, lowest first"""

    def __post_init__(self) -> None:
        layers = [part.layer for part in self.parts]
        if not layers or sorted(set(layers)) != layers:
            raise SteeringError(
                f"A control vector has one direction for each of its layers, lowest first; these are for layers "
                f"{layers}. Sort them, and add up those of the same layer."
            )

    @property
    def name(self) -> str:
        """Name of its first part."""
        return self.parts[0].name

    @property
    def layers(self) -> list[int]:
        """The layers after which it is added."""
        return [part.layer for part in self.parts]

    def __repr__(self) -> str:
        return f"ControlVector({self.name or 'unnamed'}, layers {self.layers}, {self.parts[0].method})"


Vector = Direction | ControlVector


def parts_of(vector: Vector) -> tuple[Direction, ...]:
    """The directions of a steering vector: several, or itself."""
    return vector.parts if isinstance(vector, ControlVector) else (vector,)


# --- pairs --------------------------------------------------------------------------------------------


def pairs(name: str, split: Literal["train", "selection", "report"]) -> tuple[list[Text], list[Text]]:
    """Positive and negative texts of one of the shipped contrast sets, in the same order.

    Sets: tone, formality, honesty, refusal (answers to prompts), gender. SteeringError for another.
    """
    folder = DATA / "pairs"
    known = sorted(p.stem for p in folder.glob("*.json"))
    if name not in known:
        raise SteeringError(f"There are no contrast pairs {name!r}. Allowed: {', '.join(known)}.")
    rows = [row for row in json.loads((folder / f"{name}.json").read_text())["pairs"] if row["split"] == split]
    if not rows:
        raise SteeringError(f"The pairs {name!r} have no split {split!r}. Allowed: train, selection, report.")

    def text(row: Mapping[str, str], side: str) -> Text:
        return (row["prompt"], row[side]) if "prompt" in row else row[side]

    return [text(r, "positive") for r in rows], [text(r, "negative") for r in rows]


def prompts(split: Literal["demo", "train", "selection", "report", "neutral", "spare"]) -> list[str]:
    """Everyday prompts that we wrote (demo 1, train 75, selection 60, report 200), or 48 neutral sentences."""
    return json.loads((DATA / "prompts" / "steering.json").read_text())[split]


# --- fitting ------------------------------------------------------------------------------------------


@torch.no_grad()
def pooled(
    model: Model,
    texts: Sequence[Text],
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
    ``system`` as in ``models.chat``, for texts that are answers.
    """
    if pool not in ("mean", "last"):
        raise SteeringError(f"There is no pooling {pool!r}. Allowed: mean, last.")
    sites = [Site("resid_post", check_layer(model, layer)) for layer in layers]
    vectors, norms = [], []
    for start in progress(range(0, len(texts), batch_size), "reading"):
        batch, mask = answer_batch(model, texts[start : start + batch_size], system)
        found = capture(model, batch, sites)
        x = torch.stack([found[site] for site in sites]).float()
        size = x.norm(dim=-1)
        norms.append(size[:, mask])
        keep = mask & (size < OUTLIER * norms[-1].median(-1).values[:, None, None])
        if pool == "last":
            vectors.append(encode(x[:, :, -1]) if encode else x[:, :, -1])
        else:
            value = encode(x) if encode else x
            vectors.append((value * keep[..., None]).sum(2) / keep.sum(2, keepdim=True).clamp(min=1))
    return torch.cat(vectors, 1), torch.cat(norms, 1).median(-1).values


def gradients(
    model: Model, texts: Sequence[Text], layers: Sequence[int], batch_size: int = 26, system: str | None = None
) -> Float[Tensor, "layer text d_model"]:
    """How each text's log-probability (nats per token) grows with a vector that is added after a layer.

    The vector goes to all tokens, as ``steer`` does; the gradient is taken where it is zero. ``system`` as in
    ``models.chat``, for texts that are answers. One backward pass gives all layers.
    """
    sites = [Site("resid_post", check_layer(model, layer)) for layer in layers]
    found = []
    with frozen_weights(model), torch.enable_grad():
        for start in progress(range(0, len(texts), batch_size), "gradients"):
            batch, mask = answer_batch(model, texts[start : start + batch_size], system)
            added = [torch.zeros(len(mask), 1, model.d_model, device=model.device, requires_grad=True) for _ in sites]
            with ExitStack() as stack:
                for site, vector in zip(sites, added, strict=True):
                    stack.enter_context(edit(model, site, partial(torch.add, other=vector)))
                _nats(model, batch, mask).sum().neg().backward()
            found.append(torch.stack([vector.grad[:, 0] for vector in added if vector.grad is not None]))
    return torch.cat(found, 1)


def answer_batch(model: Model, texts: Sequence[Text], system: str | None = None) -> tuple[Batch, Tensor]:
    """Tokens, and which of them count: all but the first, or those of the answer."""
    asked = [None if isinstance(t, str) else chat(model, t[0], system) for t in texts]
    batch = tokenize(model, [t if isinstance(t, str) else f"{a}{t[1]}" for t, a in zip(texts, asked, strict=True)])
    mask = not_first(batch)
    for row, before in enumerate(asked):
        if before is not None:
            n_before = int(tokenize(model, before).attention_mask.sum())
            mask[row] &= batch.attention_mask[row].cumsum(-1) > n_before
    return batch, mask


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
    x = torch.cat([positive, negative]).double()
    mean, std = x.mean(0), x.std(0).clamp(min=1e-6)
    z = (x - mean) / std
    y = torch.cat([torch.ones(len(positive)), torch.zeros(len(negative))]).to(z)
    weight = torch.zeros(z.shape[1] + 1, dtype=torch.double, device=z.device, requires_grad=True)
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
    return (weight.detach()[:-1] / std).to(positive)  # back from standardised to plain coordinates


def fit_direction(
    model: Model,
    positive: Sequence[Text],
    negative: Sequence[Text],
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
    positive: Sequence[Text],
    negative: Sequence[Text],
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
    if min(len(positive), len(negative)) < 2:
        raise SteeringError(
            f"A direction needs at least 2 texts a side, there are {len(positive)} positive and {len(negative)} "
            "negative ones. Aim at 50 or more: glassbox_utils.steering.pairs('tone', 'train') has an example."
        )
    if method == "sae" and sae is None:
        raise SteeringError(
            "Method 'sae' needs sae=, a sparse autoencoder of the residual stream after that layer "
            "(glassbox_utils.saes loads one). Without one, use mean_difference."
        )
    chosen = list(range(model.n_layers)) if layers is None else [check_layer(model, layer) for layer in layers]
    if method == "sae":
        _check_sae(model, sae, chosen)
    x, scale_p = pooled(model, positive, chosen, pool, system=system)
    y, scale_n = pooled(model, negative, chosen, pool, system=system)
    a, b = x, y  # what is fitted on: activations, gradients, or features
    fit: Callable[[Tensor, Tensor], Tensor] = partial(direction_of, method=method)
    if method == "sae":
        fit = _from_sae(sae)
        a, b = (pooled(model, t, chosen, pool, encode=sae.encode, system=system)[0] for t in (positive, negative))
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
    low, high = np.quantile(cosines.numpy(force=True), [0.025, 0.975])
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


def _from_sae(sae: Any, n_features: int = 10) -> Callable[[Tensor, Tensor], Tensor]:
    """(features of positive texts, of negative texts) -> unit direction, through the decoder."""

    @torch.no_grad()
    def fit(positive: Tensor, negative: Tensor) -> Tensor:
        change = positive.mean(0) - negative.mean(0)
        top = change.abs().topk(min(n_features, len(change))).indices
        only = torch.zeros_like(change)
        only[top] = change[top]
        vector = (sae.decode(only[None]) - sae.decode(torch.zeros_like(only)[None]))[0]  # without the decoder's bias
        length = vector.norm()
        if not torch.isfinite(length) or length == 0:
            raise SteeringError("No feature of the SAE changes between positive and negative texts.")
        return vector / length

    return fit


def train_direction(
    model: Model,
    positive: Sequence[Text],
    negative: Sequence[Text],
    start: Direction,
    alpha: float,
    *,
    epochs: int = 4,
    learning_rate: float = 0.005,
    batch_size: int = 26,
    system: str | None = None,
    seed: int = 0,
) -> Direction:
    """Train a direction by gradient descent, from ``start``, for a push of ``alpha`` of its layer's typical norm.

    Minimised is the loss of the positive texts under +alpha and of the negative ones under -alpha (nats per
    token), with Adam on the unit vector; the weights stay as they are. What helps both kinds of text alike cancels,
    to first order, since the same vector has both signs. In the spirit of arXiv 2205.05124 and 2406.00045.
    Only the layers above run in each step. Raises SteeringError for a direction after the last layer.
    """
    if start.layer + 1 >= model.n_layers:
        raise SteeringError(f"A direction after the last layer ({start.layer}) has nothing above it to be trained by.")
    _check(model, start)
    half = max(batch_size // 2, 1)
    pieces = []
    for first in progress(range(0, max(len(positive), len(negative)), half), "reading"):
        texts = [*positive[first : first + half], *negative[first : first + half]]
        sign = torch.tensor([1.0] * len(positive[first : first + half]) + [-1.0] * len(negative[first : first + half]))
        batch, mask = answer_batch(model, texts, system)
        resid = capture(model, batch, [Site("resid_post", start.layer)])[Site("resid_post", start.layer)]
        pieces.append((batch, mask, resid, sign.to(resid)[:, None, None]))
    vector = start.vector.detach().to(resid).clone().requires_grad_()
    optimiser = torch.optim.Adam([vector], lr=learning_rate)
    rng = np.random.default_rng(seed)
    with frozen_weights(model), torch.enable_grad():
        order = [int(i) for _ in range(epochs) for i in rng.permutation(len(pieces))]
        for i in progress(order, "training a direction"):
            batch, mask, resid, sign = pieces[i]
            push = alpha * start.scale * sign * torch.nn.functional.normalize(vector, dim=0)
            with resume(model, start.layer + 1, resid + push):
                _nats(model, batch, mask).mean().backward()
            optimiser.step()
            optimiser.zero_grad()
    trained = torch.nn.functional.normalize(vector.detach(), dim=0)
    means: dict[float, list[float]] = {-1.0: [], 1.0: []}  # mean coordinate of each text's tokens
    for _, mask, resid, sign in pieces:
        along = ((resid @ trained) * mask).sum(-1) / mask.sum(-1).clamp(min=1) / start.scale
        for side, value in zip(sign.flatten().tolist(), along.tolist(), strict=True):
            means[side].append(value)
    where = (float(np.mean(means[-1.0])), float(np.mean(means[1.0])))
    return replace(start, vector=trained.to(start.vector), method="trained", stability=None, coordinates=where)


@contextmanager
def frozen_weights(model: Model) -> Iterator[None]:
    """No gradients for the weights inside the block."""
    weights = [p for p in model.hf.parameters() if p.requires_grad]
    for p in weights:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in weights:
            p.requires_grad_(True)


def _nats(model: Model, batch: Batch, mask: Tensor) -> Float[Tensor, " batch"]:
    """Mean loss of each row's tokens under ``mask``, which are its last ones."""
    longest = int(mask.sum(-1).max())
    logits = model.hf(**batch.inputs, logits_to_keep=longest + 1, use_cache=False).logits[:, :-1].float()
    target, counted = batch.input_ids[:, -longest:], mask[:, -longest:]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none")
    return (loss.view_as(target) * counted).sum(-1) / counted.sum(-1).clamp(min=1)


def random_direction(like: Direction, seed: int) -> Direction:
    """A random unit vector at the same layer and with the same units: the control of every steering claim."""
    generator = torch.Generator().manual_seed(seed)
    vector = torch.randn(len(like.vector), generator=generator).to(like.vector)
    return replace(
        like, vector=vector / vector.norm(), name=f"random {seed}", method="random", stability=None, coordinates=(0, 0)
    )


def random_vector(like: Vector, seed: int, shared: bool = False) -> Vector:
    """Random directions at the same layers and with the same units: the control of a vector with several layers.

    Drawn for each layer on its own; or, ``shared``, one for all layers, so that the pushes add up in the residual
    stream as those of a fitted vector do.
    """
    if isinstance(like, Direction):
        return random_direction(like, seed)
    return ControlVector(
        tuple(random_direction(d, seed if shared else 1000 * (seed + 1) + d.layer) for d in like.parts)
    )


# --- steering -----------------------------------------------------------------------------------------


@contextmanager
def steer(
    model: Model,
    direction: Vector | Sequence[Vector | None],
    alpha: float | Sequence[float | None] = 1.0,
    mode: Mode = "add",
    scope: Scope = "all",
) -> Iterator[None]:
    """Steer inside the block; outside, the model is what it was, to the bit.

    ``alpha`` is in units of the layer's typical residual norm, one number or one for each row of the
    batch; ``direction`` likewise: a Direction, or a ControlVector for several layers. A row whose direction or alpha
    is None is left alone.

    * ``add``: alpha times the direction is added;
    * ``project_out``: the fraction alpha of the coordinate along the direction is removed (1 is all);
    * ``affine``: the coordinate is set to alpha (arXiv 2411.09003), wherever it was.

    ``scope``: all tokens, the prompt's only, or the generated ones only. Blocks nest: two vectors add up.
    Raises SteeringError for a vector of another width, another model or an unknown mode.
    """
    if mode not in ("add", "project_out", "affine"):
        raise SteeringError(f"There is no mode {mode!r}. Allowed: add, project_out, affine.")
    with ExitStack() as stack:
        for layer, function in _edits(model, direction, alpha, mode).items():
            stack.enter_context(edit(model, Site("resid_post", layer), function, scope))
        yield


def _edits(model: Model, direction: Any, alpha: Any, mode: Mode) -> dict[int, Any]:
    """Layer -> function on the residual stream, everything that can be computed before a run computed here."""
    rows, n_rows = paired(direction, alpha, isinstance(direction, Vector), "directions", SteeringError)
    for part in {id(p): p for v, _ in rows if v is not None for p in parts_of(v)}.values():
        _check(model, part)
    at = [{} if v is None or a is None else {p.layer: p for p in parts_of(v)} for v, a in rows]
    like = next(model.hf.parameters())
    strength = by_row([a if a is not None and here else 0.0 for (_, a), here in zip(rows, at, strict=True)], like)
    layers = sorted({layer for here in at for layer in here})
    return {layer: _edit([here.get(layer) for here in at], strength, n_rows, mode) for layer in layers}


def _edit(parts: Sequence[Direction | None], strength: Tensor, n_rows: int | None, mode: Mode) -> Any:
    width = next(len(d.vector) for d in parts if d is not None)
    unit = torch.stack([torch.zeros(width) if d is None else d.vector for d in parts]).to(strength)
    scale = by_row([1.0 if d is None else d.scale for d in parts], strength)
    unit = unit[:, None]  # [row, 1, d_model]; a row without steering has the zero vector
    if mode == "add":
        delta = strength * scale * unit

        def function(x: Tensor) -> Tensor:
            return x + delta

    elif mode == "project_out":

        def function(x: Tensor) -> Tensor:
            return x - strength * (x * unit).sum(-1, keepdim=True) * unit

    else:
        target = strength * scale

        def function(x: Tensor) -> Tensor:
            return x + (target - (x * unit).sum(-1, keepdim=True)) * unit

    if n_rows is None:
        return function

    def checked(x: Tensor) -> Tensor:
        check_rows(x, n_rows)
        return function(x)

    return checked


def _check(model: Model, direction: Direction) -> None:
    if len(direction.vector) != model.d_model:
        raise SteeringError(
            f"The direction {direction.name!r} has {len(direction.vector)} numbers, but the residual stream of "
            f"{model.name} has {model.d_model}: it was fitted on "
            f"{direction.model_name or 'another model'}. Fit it here."
        )
    check_layer(model, direction.layer)
    if direction.model_hash and direction.model_hash != model.hash:
        raise SteeringError(
            f"The direction {direction.name!r} was fitted on {direction.model_name} ({direction.model_hash}), this is "
            f"{model.name} ({model.hash}). Fit it here, or use dataclasses.replace(direction, model_hash='') to try "
            "it all the same."
        )


def generate_with_steering(
    model: Any,
    tokenizer: Any,
    prompt: str | Sequence[str],
    steering_vector: Vector | Float[Tensor, " d_model"],
    alpha: float | Sequence[float | None] = 1.0,
    *,
    layer: int | None = None,
    max_new_tokens: int = 40,
    scope: Scope = "all",
    temperature: float = 0.0,
    seed: int | None = None,
) -> Any:
    """Steered text from a plain transformers model: one string for a prompt, a list for several.

    ``steering_vector`` is a ``Direction`` or ``ControlVector`` (alpha in units of the typical residual norm; it
    knows its layers), or a bare tensor [d_model] with ``layer=`` (then alpha multiplies the tensor as it is). The
    prompt becomes a user's turn if the tokenizer has a chat template. Works with every decoder that
    transformers builds; whether a vector was fitted on these weights is not checked here.
    """
    wrapped = wrap_model(model, tokenizer, name=type(model).__name__)
    if isinstance(steering_vector, Vector):
        if layer is not None:
            raise SteeringError(f"{steering_vector} knows its layer: leave layer= out, or give its bare tensor.")
        parts = tuple(replace(part, model_hash="") for part in parts_of(steering_vector))
    elif layer is None:
        raise SteeringError("A bare tensor does not say where it belongs. Give layer=, or a Direction that has one.")
    else:
        length = float(steering_vector.norm())
        unit = steering_vector.detach() / length
        parts = (Direction(unit, check_layer(wrapped, layer), length, model_name="you"),)
    texts = [prompt] if isinstance(prompt, str) else list(prompt)
    asked = [chat(wrapped, t) if t and tokenizer.chat_template else t for t in texts]
    with steer(wrapped, ControlVector(parts), alpha, scope=scope):
        answers = generate(wrapped, asked, max_new_tokens, temperature, seed)
    return answers[0] if isinstance(prompt, str) else answers


# --- measuring ----------------------------------------------------------------------------------------


@torch.no_grad()
def answer_losses(
    model: Model, questions: Sequence[Any], answers: Sequence[str], batch_size: int = 25, system: str | None = None
) -> tuple[NDArray, NDArray]:
    """Summed loss (nats) and number of tokens of each answer, given its chat prompt; interventions apply.

    A question is a user's turn, or a list of turns; ``system`` as in ``models.chat``. Empty answers have 0 tokens.
    """
    losses, counts = np.zeros(len(answers)), np.zeros(len(answers), dtype=int)
    order = sorted(range(len(answers)), key=lambda i: len(answers[i]))
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        before = [chat(model, questions[i], system) for i in rows]
        batch = tokenize(model, [b + answers[i] for b, i in zip(before, rows, strict=True)])
        n_before = torch.tensor([int(tokenize(model, b).attention_mask.sum()) for b in before])
        mask = batch.attention_mask.cumsum(-1).cpu() > n_before[:, None]
        longest = int(mask.sum(-1).max())
        if longest == 0:
            continue
        # Only the answers' logits are computed: the prompt is longer, and a vocabulary is wide.
        logits = model.hf(**batch.inputs, logits_to_keep=longest + 1).logits[:, :-1].float()
        target = batch.input_ids[:, -longest:]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none").cpu()
        loss = torch.where(mask[:, -longest:], loss.view(len(rows), longest), 0)
        losses[rows] = loss.double().sum(-1).numpy()
        counts[rows] = mask.sum(-1).numpy()
    return losses, counts


@torch.no_grad()
def log_probabilities(model: Model, batch: Batch) -> Float[Tensor, "token vocabulary"]:
    """Log-probabilities of the next token at every real position but the first; interventions apply."""
    return model.hf(**batch.inputs).logits[not_first(batch)].float().log_softmax(-1)


def side_effect(
    model: Model, texts: Sequence[str], settings: Sequence[tuple[Vector, float]], batch_size: int = 16
) -> NDArray:
    """KL divergence (nats per token) of unsteered from steered predictions on texts, [setting, text batch].

    KL(unsteered || steered), mean over all tokens but the first of each batch of texts.
    """
    values = np.zeros((len(settings), -(-len(texts) // batch_size)))
    for j, start in enumerate(progress(range(0, len(texts), batch_size), "side effect")):
        batch = tokenize(model, list(texts[start : start + batch_size]))
        plain = log_probabilities(model, batch)
        for i, (direction, alpha) in enumerate(settings):
            with steer(model, direction, alpha):
                steered = log_probabilities(model, batch)
            values[i, j] = float((plain.exp() * (plain - steered)).sum(-1).mean())
    return values


def continuations(
    model: Model,
    questions: Sequence[str],
    settings: Sequence[tuple[Vector, float] | None],
    max_new_tokens: int = 30,
    batch_size: int = 40,
    temperature: float = 0.0,
    seed: int | None = None,
    system: str | None = None,
    label: str = "generating",
) -> list[str]:
    """Answers to questions (as a user's turn), each with its own setting (None: unsteered), greedy by default.

    Rows with different settings share a batch: this is what per-row steering is for. ``system`` as in
    ``models.chat``.
    """
    order = sorted(range(len(questions)), key=lambda i: len(questions[i]))  # little padding
    answers = [""] * len(questions)
    for start in progress(range(0, len(order), batch_size), label):
        rows = order[start : start + batch_size]
        chosen = [settings[i] for i in rows]
        directions = [c[0] if c else None for c in chosen]
        with steer(model, directions, [c[1] if c else None for c in chosen]):
            texts = generate(
                model, [chat(model, questions[i], system) for i in rows], max_new_tokens, temperature,
                None if seed is None else seed + start,
            )  # fmt: skip
        for i, text in zip(rows, texts, strict=True):
            answers[i] = text
    return answers


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
    alpha 0 is the unsteered model. Source of the design: refusal_direction (arXiv 2406.11717).
    """
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
        row = {"layer": layer, "alpha": a, "effect": tones[both][0] - tones[both][-1], "kl": kl[both].max()}
        row |= {"perplexity": ppl[both].max(), "distinct": repeats[both].min()}
        rows.append({key: round(float(value), 4) for key, value in row.items()})
    return rows


def select(rows: Sequence[Mapping[str, float]], kl: float, perplexity: float) -> Mapping[str, float]:
    """The row of a sweep with the largest effect within both budgets.

    ``kl``: nats per token on neutral text; ``perplexity``: times that of the unsteered answers (the row
    with alpha 0). Raises SteeringError if no row is within them.
    """
    plain = min(row["perplexity"] for row in rows if row["alpha"] == 0)
    steered = [row for row in rows if row["alpha"] != 0]
    allowed = [row for row in steered if row["kl"] <= kl and row["perplexity"] <= perplexity * plain]
    if not allowed:
        raise SteeringError(
            f"No setting is within {kl} nats per token and {perplexity} times the unsteered perplexity; the smallest "
            f"are {min(r['kl'] for r in steered):.3f} and {min(r['perplexity'] for r in steered) / plain:.2f}. Sweep "
            "weaker strengths, or raise the budget."
        )
    return max(allowed, key=lambda row: row["effect"])


# --- files --------------------------------------------------------------------------------------------


def save_direction(direction: Vector, path: str | Path) -> Path:
    """Write PATH.safetensors (unit vectors, float32) and PATH.json (the card); returns the card's path.

    A ``ControlVector`` becomes one file too: tensors ``direction.LAYER``, and a card for each.
    """
    from safetensors.torch import save_file

    stem = Path(path).with_suffix("")
    stem.parent.mkdir(parents=True, exist_ok=True)
    several = isinstance(direction, ControlVector)
    tensors = {f"direction.{d.layer}" if several else "vector": d.vector for d in parts_of(direction)}
    tensors = {name: v.detach().float().cpu().contiguous() for name, v in tensors.items()}
    save_file(tensors, stem.with_suffix(".safetensors"))
    cards = [asdict(replace(d, vector=torch.zeros(0))) for d in parts_of(direction)]
    for one in cards:
        del one["vector"]
    card = {"parts": cards} if several else cards[0]
    card |= {
        "units": "alpha 1 adds a vector of length scale, the layer's typical residual norm",
        "licence": "Apache-2.0",
    }
    stem.with_suffix(".json").write_text(json.dumps(card, indent=1) + "\n")
    return stem.with_suffix(".json")


def load_vector(path: str | Path) -> Vector:
    """Read what ``save_direction`` wrote; a bare name is looked up in data/vectors.

    Raises SteeringError if a file is missing.
    """
    from safetensors.torch import load_file

    stem = Path(path).with_suffix("")
    if not stem.with_suffix(".json").exists() and stem.parent == Path():
        stem = DATA / "vectors" / stem.name
    if not stem.with_suffix(".json").exists() or not stem.with_suffix(".safetensors").exists():
        shipped = sorted(p.stem for p in (DATA / "vectors").glob("*.json"))
        raise SteeringError(
            f"There is no steering vector {str(path)!r}: a card (.json) and a tensor (.safetensors) are needed. "
            f"Shipped vectors: {', '.join(shipped) or 'none'}."
        )
    card, tensors = json.loads(stem.with_suffix(".json").read_text()), load_file(stem.with_suffix(".safetensors"))
    if "parts" in card:
        return ControlVector(tuple(_from_card(one, tensors[f"direction.{one['layer']}"]) for one in card["parts"]))
    return _from_card({key: card[key] for key in card if key not in ("units", "licence")}, tensors["vector"])


def load_direction(path: str | Path) -> Direction:
    """``load_vector`` for a file of one layer. SteeringError for a file of several."""
    found = load_vector(path)
    if isinstance(found, ControlVector):
        raise SteeringError(f"{str(path)!r} steers after the layers {found.layers}: read it with load_vector.")
    return found


def _from_card(card: Mapping[str, Any], vector: Tensor) -> Direction:
    fields = {key: tuple(value) if isinstance(value, list) else value for key, value in card.items()}
    return Direction(vector=vector, **fields | {"stability": card["stability"] and Interval(**card["stability"])})


ARCHITECTURE = "controlvector"


def export_gguf(directions: Vector | Sequence[Direction], path: str | Path, alpha: float = 1.0) -> Path:
    """Write a llama.cpp control vector: use it with ``llama-cli --control-vector-scaled FILE SCALE``.

    Tensor ``direction.N`` (float32 [d_model]) is added to the residual stream after layer N, counted from
    0 as here; llama.cpp refuses N = 0. Each is alpha times the typical norm long, so SCALE multiplies
    alpha. Metadata as repeng writes it (arXiv 2310.01405 made practical by repeng).
    """
    from gguf import GGUFWriter

    several = parts_of(directions) if isinstance(directions, Vector) else tuple(directions)
    layers = [d.layer for d in several]
    if not several or min(layers) < 1 or len(set(layers)) < len(layers):
        raise SteeringError(
            f"A control vector has one direction for each of several layers, from layer 1 on; these are for layers "
            f"{layers}. llama.cpp can't steer after layer 0."
        )
    writer = GGUFWriter(str(path), ARCHITECTURE)
    writer.add_string(f"{ARCHITECTURE}.model_hint", several[0].model_type)
    writer.add_uint32(f"{ARCHITECTURE}.layer_count", len(several))
    for d in several:
        writer.add_tensor(f"direction.{d.layer}", (alpha * d.scale * d.vector).float().numpy(force=True))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Path(path)


def import_gguf(path: str | Path) -> list[Direction]:
    """Directions of a control vector file, one for each layer; alpha = 1 adds what the file holds.

    ``ControlVector(tuple(import_gguf(path)))`` steers with all of them.

    Raises SteeringError if the file is no control vector.
    """
    from gguf import GGUFReader

    if not Path(path).exists():
        raise SteeringError(f"There is no file {path}. Give a control vector (.gguf) that repeng or Glassbox wrote.")
    reader = GGUFReader(str(path))
    field = reader.get_field("general.architecture")
    kind = field.contents() if field else None
    if kind != ARCHITECTURE:
        raise SteeringError(
            f"{path} holds {kind!r}, not a control vector. Give a file of architecture {ARCHITECTURE!r}."
        )
    hint = reader.get_field(f"{ARCHITECTURE}.model_hint")
    model_type = str(hint.contents()) if hint else ""
    found = []
    for tensor in reader.tensors:
        if tensor.name.startswith("direction."):
            vector = torch.from_numpy(np.array(tensor.data, dtype=np.float32))
            length = float(vector.norm())
            layer = int(tensor.name.split(".")[1])
            found.append(Direction(vector / length, layer, length, Path(path).stem, "imported", model_type=model_type))
    return sorted(found, key=lambda d: d.layer)
