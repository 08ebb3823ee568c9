"""Who did it: direct logit attribution, logit lens, activation, attribution and path patching.

Everything here answers "which head moved the answer?" with the model itself, so results are *causal* or, for the
direct attribution and the gradient, exact statements about one path or a first-order guess that the exact
functions can check. Weights are raw (see ``models``); prompts of a batch need their answers at the last position.

Exact effects of every head cost one forward pass each, unless the layers before the head are skipped: they do not
change. ``resume`` does that, for any decoder.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from glassbox_utils.attention.ablation import HeadMeans
from glassbox_utils.attention.patterns import attention_modules, eager, output_weights, project
from glassbox_utils.core import anatomy, caches, readout
from glassbox_utils.core.devices import beside, like, result
from glassbox_utils.core.interventions import Head, edit, edits, position_mask, recording
from glassbox_utils.core.models import Kind, Model, ModelError, Site, check_heads, check_layer, find_part, is_whole
from glassbox_utils.core.readout import final_norm as _final_norm
from glassbox_utils.core.session import progress
from glassbox_utils.core.text import Batch

Metric = Callable[[Float[Tensor, "row vocab"]], Float[Tensor, " row"]]
"""From the logits at the last position of each prompt to one number per prompt."""


@dataclass(frozen=True)
class LogitDifference:
    """The metric ``logit(target) - logit(other)``, one pair of tokens per prompt."""

    target: Int[Tensor, " row"]
    other: Int[Tensor, " row"]

    def __call__(self, logits: Float[Tensor, "row vocab"]) -> Float[Tensor, " row"]:
        rows = torch.arange(len(logits), device=logits.device)
        x, y = (logits[rows, beside(ids, logits)].float() for ids in (self.target, self.other))
        return x - y


def logit_difference(target: Int[Tensor, " row"], other: Int[Tensor, " row"]) -> LogitDifference:
    """The metric ``logit(target) - logit(other)``, one pair of tokens per prompt."""
    return LogitDifference(target, other)


@contextmanager
def few_logits(model: Model, metric: Metric) -> Iterator[Metric]:
    """Inside the block the unembedding gives the logits of the metric's own tokens alone; yields the metric of those.

    All 262,144 of a large vocabulary cost more than a small model's layers. What an architecture does to its logits
    afterwards (scale, soft cap) still happens. A metric that may read any logit, or an unembedding that is no plain
    matrix, stays as it is.
    """
    head = model.hf.get_output_embeddings()
    if not isinstance(metric, LogitDifference) or type(head) is not nn.Linear or "forward" in head.__dict__:
        yield metric
        return
    pair = torch.stack([beside(ids, head.weight) for ids in (metric.target, metric.other)])
    tokens, places = pair.unique(return_inverse=True)
    weight = head.weight.detach()[tokens]
    bias = None if head.bias is None else head.bias.detach()[tokens]

    def forward(input: Tensor) -> Tensor:
        return nn.functional.linear(input, weight, bias)

    head.forward = forward  # type: ignore[method-assign]  # on the instance: the class stays as it is
    try:
        yield LogitDifference(places[0], places[1])
    finally:
        head.__dict__.pop("forward", None)


def last_logits(model: Model, batch: Batch) -> Float[Tensor, "row vocab"]:
    """Logits after the last token of each prompt."""
    return model.hf(**batch.inputs, logits_to_keep=1, use_cache=False).logits[:, -1]


# --- skip what can't change ---------------------------------------------------------------------------


@contextmanager
def resume(model: Model, start: int, resid: Float[Tensor, "batch pos d_model"], stop: int | None = None) -> Iterator:
    """Inside the block, plain passes begin at layer ``start`` with ``resid`` and end before layer ``stop``.

    The other layers return their input. Call the model with ``use_cache=False`` and tokens of resid's shape.
    """
    start = check_layer(model, start)
    layers = [model.sites[Site("resid_pre", i)][0] for i in range(model.n_layers)]
    skipped = [*layers[:start], *layers[model.n_layers if stop is None else stop :]]

    def forward(hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        return hidden_states

    def with_pattern(hidden_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        return hidden_states, None

    given = with_pattern if any(layer.returns_tuple for layer in model.anatomy) else forward
    try:
        for layer in skipped:
            layer.forward = given  # on the instance: the class stays as it is
        with edit(model, Site("resid_pre", start), lambda _: resid):
            yield
    finally:
        for layer in skipped:
            layer.__dict__.pop("forward", None)


# --- direct effects -----------------------------------------------------------------------------------


@torch.no_grad()
def logit_lens(model: Model, batch: Batch, positions: int = -1) -> Float[Tensor, "layer batch vocab"]:
    """Logits that the model would give if the residual stream after each layer were its last one.

    Everything after the last layer is the model's own: final norm, unembedding, scale or soft cap. So the last layer's
    logits are those of the model; ModelError if they are not. nostalgebraist, "interpreting GPT: the logit lens", 2020.
    """
    if not is_whole(positions):
        raise ModelError(f"The position of a logit lens is {positions!r}. Give one whole number, such as -1, the last.")
    sites = [Site("resid_post", layer) for layer in range(model.n_layers)]
    ends: list[Tensor] = []

    def keep(x: Tensor) -> Tensor:
        position_mask(x, positions)  # raises for one that is not there
        ends[:] = [x[:, -1]]
        return x[:, positions]

    with recording(model, sites, keep=keep) as store:
        own = model.hf(**batch.inputs, logits_to_keep=1).logits[:, -1]
    lens = [readout.logits_of(model, store[site]) for site in sites]
    last = lens[-1] if positions == -1 else readout.logits_of(model, ends[0])
    readout.check_same(model, last, own, "The logit lens")
    return torch.stack([result(logits) for logits in lens])


@dataclass(frozen=True)
class DirectAttribution:
    """Parts of ``logit(target) - logit(other)`` at the last position; they add up to ``total``. Units: logits."""

    heads: Float[Tensor, "batch layer head"]
    mlps: Float[Tensor, "batch layer"]
    rest: Float[Tensor, " batch"]
    """embeddings and biases"""
    total: Float[Tensor, " batch"]


@torch.no_grad()
def direct_logit_attribution(
    model: Model, batch: Batch, target: Int[Tensor, " batch"], other: Int[Tensor, " batch"]
) -> DirectAttribution:
    """What each head and MLP writes along ``target - other``, with the scale of every norm on its way held fixed.

    Only the direct path: a head that acts through later layers shows nothing here. Elhage et al. 2021,
    "A Mathematical Framework for Transformer Circuits". ``total`` is the model's own difference of logits, also
    where an
    architecture has a norm or a factor between a sublayer and the stream, scales its logits, or caps them softly (every
    part then keeps the same share). ModelError for one whose parts do not add up: see ``core.anatomy``.
    """
    n, size = len(batch.input_ids), model.hf.get_output_embeddings().weight.shape[0]
    for name, ids in (("target", target), ("other", other)):
        if tuple(ids.shape) != (n,) or not bool(((ids >= 0) & (ids < size)).all()):
            raise ModelError(
                f"The tokens of {name} are {ids.tolist()}. Give one token for each of the {n} prompts, 0 to {size - 1}."
            )
    readout.require(model, range(model.n_layers), "The direct attribution")
    kinds: tuple[Kind, ...] = ("resid_pre", "z", "attn_out", "mlp_out", "resid_post")
    sites = [Site(k, i) for k in kinds for i in range(model.n_layers)]
    with recording(model, sites, keep=lambda x: x[:, -1]) as store:
        own = model.hf(**batch.inputs, logits_to_keep=1).logits[:, -1]
    resid, norm, head = store[sites[-1]], _final_norm(model), model.hf.get_output_embeddings()
    target, other = (beside(ids, head.weight) for ids in (target, other))
    direction = head.weight[target].float() - head.weight[other].float()
    gain, offset = readout.through_norm(model, norm, resid, direction)
    if (bias := getattr(head, "bias", None)) is not None:
        offset = offset + (bias[target] - bias[other]).float()
    share = readout.through_head(model, head(norm(resid)), own, target, other)
    gain, offset = gain * share[:, None], offset * share
    total = (resid.float() * gain).sum(-1) + offset
    rows = torch.arange(n, device=own.device)
    size_of = own.float().abs().amax(-1)
    readout.check_same(
        model, torch.stack([total, size_of]), torch.stack([(own[rows, target] - own[rows, other]).float(), size_of]),
        "The direct attribution",
    )  # fmt: skip
    heads, mlps = [], []
    for layer in range(model.n_layers):
        pre, z, attn_out, mlp_out, post = (store[Site(k, layer)] for k in kinds)
        if layer and not torch.equal(pre, store[Site("resid_post", layer - 1)]):
            raise ModelError(
                f"{model.name} changes its residual stream between layers {layer - 1} and {layer}, so what earlier "
                "layers write has no direct path to the logits. Use ablation or patching instead."
            )
        form, ways = model.anatomy[layer], []
        for kind, out in (("attention", attn_out), ("mlp", mlp_out)):
            way: anatomy.Way = getattr(form, kind)
            raw = out if way.factor == 1 else out / way.factor
            ways.append(gain if way.norm is None else _before(model, layer, way.norm, raw, gain))
            pre = pre + readout.written(model, layer, kind, raw)
        readout.check_same(model, pre, post, f"The sum of what layer {layer} writes")
        parts = z.float().unflatten(-1, (model.n_heads, model.d_head))
        heads.append(torch.einsum("bhd,hdm,bm->bh", parts, output_weights(model, layer).float(), ways[0]))
        mlps.append((mlp_out.float() * ways[1]).sum(-1))
    by_head, by_mlp, total = result(torch.stack(heads, 1)), result(torch.stack(mlps, 1)), result(total)
    return DirectAttribution(by_head, by_mlp, total - by_head.sum((1, 2)) - by_mlp.sum(1), total)


def _before(model: Model, layer: int, norm: str, x: Tensor, gain: Tensor) -> Tensor:
    """The gain in front of a norm that comes after a sublayer."""
    return readout.through_norm(model, readout.part(model, layer, norm), x, gain)[0]


# --- total effects ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HeadEffects:
    """The metric of each prompt, and what it becomes when one head's output is replaced, for every head."""

    base: Float[Tensor, " batch"]
    replaced: Float[Tensor, "batch layer head"]

    @property
    def effect(self) -> Float[Tensor, "batch layer head"]:
        """Change of the metric by the replacement."""
        return self.replaced - self.base[:, None, None]


def _donor(model: Model, source: HeadMeans | Batch, batch: Batch) -> Callable[[int], Tensor]:
    """Layer -> head outputs [batch or 1, pos or 1, head, d_head] that take the place of the original ones."""
    if isinstance(source, HeadMeans):
        return lambda layer: source.z[layer][None, None]
    if source.input_ids.shape != batch.input_ids.shape:
        raise ModelError(
            f"The patch comes from prompts of shape {tuple(source.input_ids.shape)}, these have "
            f"{tuple(batch.input_ids.shape)}. Pair prompts of equal length, row by row."
        )
    with recording(model, [Site("z", layer) for layer in range(model.n_layers)]) as store:
        model.hf(**source.inputs, logits_to_keep=1)
    return lambda layer: store[Site("z", layer)].unflatten(-1, (model.n_heads, model.d_head))


def _constant(value: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda _: value


@torch.no_grad()
def replace_each_head(
    model: Model,
    batch: Batch,
    source: HeadMeans | Batch,
    metric: Metric,
    positions: Any = None,
    layers: Sequence[int] | None = None,
) -> HeadEffects:
    """The exact effect of every head: replace its output alone, and run the rest of the model.

    ``source``: the averages of ``head_means`` (mean ablation), or a batch of the same shape whose run gives
    the head's output (activation patching, Meng et al., arXiv 2202.05262). ``positions`` as in
    ``ablation``. Layers that are not asked for keep the base value.
    """
    donor = _donor(model, source, batch)
    sites = [Site(k, i) for k in ("resid_pre", "z") for i in range(model.n_layers)]
    heads = model.n_heads
    tiled = Batch(*(t.repeat(heads, 1) for t in batch))
    with few_logits(model, metric) as answer:
        with recording(model, sites) as clean:
            base = answer(last_logits(model, batch))
        n, one = len(base), torch.eye(heads, dtype=torch.bool, device=base.device)
        replaced = base[:, None, None].expand(n, model.n_layers, heads).clone()
        for layer in progress(range(model.n_layers) if layers is None else layers, "heads"):
            z = clean[Site("z", layer)].unflatten(-1, (heads, model.d_head))
            where = position_mask(z, positions)[None, :, :, None, None] & one[:, None, None, :, None]
            swapped = torch.where(where, like(donor(layer), z)[None], z[None]).flatten(-2).flatten(0, 1)
            resid = clean[Site("resid_pre", layer)].repeat(heads, 1, 1)
            with resume(model, layer, resid), edit(model, Site("z", layer), _constant(swapped)):
                logits = last_logits(model, tiled)
            replaced[:, layer] = torch.stack([answer(part) for part in logits.split(n)], -1)
    return HeadEffects(result(base), result(replaced))


@torch.no_grad()
def replace_each_head_at_the_end(
    model: Model, batch: Batch, means: HeadMeans, metric: Metric, layers: Sequence[int] | None = None
) -> HeadEffects:
    """Mean ablation of every head at the last position only: the place where the answer is read off.

    What a head does at earlier positions stays. Their keys and values are computed once, so a head costs one
    token per prompt: about a tenth of ``replace_each_head``. Layers that are not asked for keep the base value.
    """
    inputs = batch.inputs
    prefix = {name: tensor[:, :-1] for name, tensor in inputs.items()}
    last = {name: tensor[:, -1:] for name, tensor in inputs.items()} | {"attention_mask": inputs["attention_mask"]}
    past = caches.left_by(model.hf(**prefix, use_cache=True, logits_to_keep=1))

    def answer(of: Metric) -> Tensor:
        return of(model.hf(**last, **caches.handed(model.hf, _fresh(past)), use_cache=True).logits[:, -1])

    with few_logits(model, metric) as few:
        with recording(model, [Site(k, i) for k in ("resid_pre", "z") for i in range(model.n_layers)]) as clean:
            base = answer(few)
        replaced = base[:, None, None].expand(len(base), model.n_layers, model.n_heads).clone()
        for layer in progress(range(model.n_layers) if layers is None else layers, "heads"):
            z = clean[Site("z", layer)].unflatten(-1, (model.n_heads, model.d_head))
            for head in range(model.n_heads):
                swapped = z.clone()
                swapped[:, :, head] = like(means.z[layer, head], z)
                with (
                    resume(model, layer, clean[Site("resid_pre", layer)]),
                    edit(model, Site("z", layer), _constant(swapped.flatten(-2))),
                ):
                    replaced[:, layer, head] = answer(few)
    return HeadEffects(result(base), result(replaced))


def _fresh(past: Any) -> Any:
    """A cache that a pass may add to, while ``past`` stays as it is.

    The growing layers of transformers make new tensors and never write into the old ones, so theirs are shared: copying
    them would cost more than the pass.
    """
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer  # there once a model is

    growing = (DynamicLayer, DynamicSlidingWindowLayer)
    if type(past) is not DynamicCache or any(type(layer) not in growing for layer in past.layers):
        return copy.deepcopy(past)
    fresh = copy.copy(past)
    fresh.layers = [copy.copy(layer) for layer in past.layers]
    return fresh


def attribution_patching(
    model: Model, batch: Batch, source: HeadMeans | Batch, metric: Metric, positions: Any = None
) -> Float[Tensor, "batch layer head"]:
    """First-order guess of ``replace_each_head(...).effect`` for all heads: two forward passes, one backward.

    Nanda 2023, "Attribution patching"; Syed et al., arXiv 2310.10348. A guess: check it where it matters.
    """
    with torch.no_grad():
        donor = _donor(model, source, batch)
    kept: dict[int, Tensor] = {}

    def leaf(layer: int) -> Callable[[Tensor], Tensor]:
        def function(z: Tensor) -> Tensor:
            # An addition of zero that requires a gradient: the graph begins at the heads, weights stay out.
            kept[layer] = torch.zeros_like(z, requires_grad=True)
            values[layer] = z
            return z + kept[layer]

        return function

    values: dict[int, Tensor] = {}
    leaves = {Site("z", layer): leaf(layer) for layer in range(model.n_layers)}
    with torch.enable_grad(), few_logits(model, metric) as few, edits(model, leaves):
        total = few(last_logits(model, batch)).sum()
    gradients = torch.autograd.grad(total, [kept[layer] for layer in range(model.n_layers)])
    effects = []
    for layer, gradient in enumerate(gradients):
        shape = (model.n_heads, model.d_head)
        z, g = values[layer].detach().unflatten(-1, shape), gradient.unflatten(-1, shape)
        where = position_mask(z, positions)[..., None]
        effects.append(((like(donor(layer), z) - z) * g).sum(-1).masked_fill(~where, 0).sum(1))
    return result(torch.stack(effects, 1))


# --- paths: from a head into another head's keys ------------------------------------------------------


@torch.no_grad()
def key_changes(
    model: Model, clean: Batch, donor: Batch | HeadMeans, senders: Sequence[Head], receiver: Head
) -> Float[Tensor, "sender batch pos d_head"]:
    """How the keys of ``receiver`` change when only the direct path from one sender into them is replaced.

    The sender's output is taken from ``donor``, the residual stream that the receiver reads is otherwise the
    clean one. Path patching, Wang et al., arXiv 2211.00593; Goldowsky-Dill et al., arXiv 2304.05969. Exact: a norm or a
    factor that an architecture has between the sender's attention and the stream is part of the path. ModelError for
    one whose parts do not add up.
    """
    (layer, head), chosen = check_heads(model, [receiver])[0], check_heads(model, senders)
    late = [s for s in chosen if s[0] >= layer]
    if late:
        raise ModelError(f"Head {late[0]} can't feed head {receiver}: senders must be in layers 0 to {layer - 1}.")
    readout.require(model, sorted({i for i, _ in chosen}), "The path into the keys")
    sites = [
        *(Site("z", i) for i in range(layer)),
        *(Site("attn_out", i) for i in range(layer)),
        Site("resid_pre", layer),
    ]
    with recording(model, sites) as store:
        model.hf(**clean.inputs, logits_to_keep=1)
    other, resid = _donor(model, donor, clean), store[Site("resid_pre", layer)]
    before = project(model, layer, resid).k
    group = head * before.shape[-2] // model.n_heads
    changes = []
    for i, h in chosen:
        z = store[Site("z", i)].unflatten(-1, (model.n_heads, model.d_head))[:, :, h]
        write = (like(other(i), z)[:, :, h] - z) @ output_weights(model, i)[h]
        if model.anatomy[i].attention.norm is not None:
            raw, factor = store[Site("attn_out", i)], model.anatomy[i].attention.factor
            before_norm = (raw / factor, (raw + write) / factor)
            out, moved = (readout.written(model, i, "attention", x) for x in before_norm)
            write = moved - out
        changes.append((project(model, layer, resid + write).k - before)[..., group, :])
    return torch.stack(changes)


@contextmanager
def add_to_keys(model: Model, layer: int, kv_head: int, change: Float[Tensor, "batch pos d_head"]) -> Iterator[None]:
    """Add ``change`` to the keys (before any rotation) of one key head, in plain passes inside the block."""
    attention = attention_modules(model)[check_layer(model, layer)]
    d = model.d_head

    def shifted(output: Tensor, start: int) -> Tensor:
        output = output.clone()
        output[..., start : start + d] += like(change, output)
        return output

    if isinstance(module := getattr(attention, "k_proj", None), nn.Module):
        start = kv_head * d
    elif isinstance(module := getattr(attention, "c_attn", None), nn.Module):
        start = model.n_heads * d + kv_head * d
    else:
        module, start = find_part(attention, "query_key_value"), (3 * kv_head + 1) * d
    handle = module.register_forward_hook(lambda _module, _args, output: shifted(output, start))
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def path_patch_keys(
    model: Model,
    clean: Batch,
    donor: Batch | HeadMeans,
    senders: Sequence[Head],
    receiver: Head,
    score: Callable[[Float[Tensor, "batch dst src"]], Float[Tensor, " batch"]],
    rows: int = 64,
) -> tuple[Float[Tensor, " batch"], Float[Tensor, "sender batch"]]:
    """A score of the receiver's attention pattern: clean, and with each sender cut off from its keys alone.

    Only the receiver's layer is run, so all earlier heads of a 270-head model take seconds.
    """
    (layer, head) = check_heads(model, [receiver])[0]
    changes = key_changes(model, clean, donor, senders, receiver)
    with recording(model, [Site("resid_pre", layer)]) as store:
        model.hf(**clean.inputs, logits_to_keep=1)
    resid = store[Site("resid_pre", layer)]
    group = head * project(model, layer, resid[:1, :1]).k.shape[-2] // model.n_heads
    n = len(resid)
    pattern: list[Tensor] = []
    look = attention_modules(model)[layer].register_forward_hook(lambda _m, _a, out: pattern.append(out[1][:, head]))

    def run(part: Float[Tensor, "sender batch pos d_head"]) -> Tensor:
        times = len(part)
        batch = Batch(*(t.repeat(times, 1) for t in clean))
        with (
            resume(model, layer, resid.repeat(times, 1, 1), stop=layer + 1),
            add_to_keys(model, layer, group, part.flatten(0, 1)),
        ):
            model.hf(**batch.inputs, logits_to_keep=1, use_cache=False)
        return torch.stack([result(score(p)) for p in pattern.pop().float().split(n)])

    try:
        with eager(model):
            base = run(torch.zeros_like(changes[:1]))[0]
            parts = [run(part) for part in changes.split(max(1, rows // n))]
    finally:
        look.remove()
    return base, torch.cat(parts)
