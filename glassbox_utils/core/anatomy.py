"""How a decoder is put together, measured on it instead of read off its name.

What the techniques attribute has to add up to what the model computes. Between a sublayer's output and the residual
stream some architectures put a norm (Gemma-2, OLMo-2) or a factor (Granite), between the final norm and the logits a
scale (Cohere) or a soft cap (Gemma-2). ``anatomy`` runs a few tokens through a copy of the modules without any hooks
(the tensors are shared) and finds for every layer what lies there. A layer that does not add up is marked, and whoever
attributes something in it refuses it in words: ``readout.require``.
"""

import copy
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from glassbox_utils.core.devices import exact
from glassbox_utils.core.errors import ModelError

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 6e-2, torch.float16: 1e-2}
"""the gap, relative to what is to be explained, up to which parts count as adding up; rounding alone stays far below"""


Kind = Literal["resid_pre", "resid_post", "z", "attn_out", "mlp_post", "mlp_out"]
KINDS: tuple[Kind, ...] = ("resid_pre", "resid_post", "z", "attn_out", "mlp_post", "mlp_out")


class Site(NamedTuple):
    """A place in the forward pass: ``Site("resid_post", 14)`` is the residual stream after layer 14.

    Shapes: ``resid_pre resid_post attn_out mlp_out`` are [batch, pos, d_model]; ``z`` is
    [batch, pos, n_heads * d_head], the heads' outputs side by side before the output projection; ``mlp_post`` is
    [batch, pos, d_mlp], the MLP's neurons as its output projection reads them (behind the gate, if it has one).
    ``attn_out`` and ``mlp_out`` are what is added to the stream: a factor of the architecture (Granite) is part of
    them, a norm that comes after them (Gemma-2, OLMo-2) is not, since it is no sum over heads.
    """

    kind: Kind
    layer: int


class Way(NamedTuple):
    """A sublayer's output on its way into the stream: through a norm (its name in the layer), then a factor."""

    norm: str | None = None
    factor: float = 1.0


DIRECT = Way()


@dataclass(frozen=True)
class Layer:
    """How one layer reads and writes."""

    reads: str | None = None
    """the norm (its name in the layer) between the stream and the attention; "" if there is none, None if unknown"""
    attention: Way = DIRECT
    mlp: Way = DIRECT
    gap: float = 0.0
    """what the layer adds to the stream and its two sublayers do not explain, relative to what it adds"""
    returns_tuple: bool = False


def bare_copy(hf: nn.Module, memo: dict[int, Any] | None = None) -> Any:
    """The same tree of modules over the same tensors, without any hooks."""
    shared: dict[int, Any] = {id(t): t for t in [*hf.parameters(), *hf.buffers()]} | (memo or {})
    for module in hf.modules():
        shared |= {id(value): OrderedDict() for name, value in vars(module).items() if _holds_hooks(name)}
    return copy.deepcopy(hf, shared)


def _holds_hooks(name: str) -> bool:
    return name.startswith("_forward_") and "hooks" in name


@torch.no_grad()
def measure(whole_model: Any, first: int) -> list[Layer]:
    """The anatomy of every layer of a transformers model (``Model.anatomy`` keeps it); ``first`` begins a text."""
    hf = bare_copy(whole_model)
    places = sites(hf)
    n = sum(site.kind == "resid_pre" for site in places)
    layers = [places[Site("resid_pre", i)] for i in range(n)]
    for layer in layers:
        layer.__dict__.pop("forward", None)  # attribution.resume may have replaced it for a while
    seen: dict[tuple[int, str], Any] = {}
    fed: dict[tuple[int, str], Tensor] = {}
    norms: dict[tuple[int, str], str] = {}
    handles = []

    def note(key: tuple[int, str]) -> Callable:
        def look(_module: nn.Module, _args: tuple, output: Any) -> None:
            seen[key] = output

        return look

    def before(i: int) -> Callable:
        def look(_module: nn.Module, args: tuple, kwargs: dict) -> None:
            seen[i, "pre"] = args[0] if args else kwargs["hidden_states"]

        return look

    def into_attention(i: int) -> Callable:
        def look(_module: nn.Module, args: tuple, kwargs: dict) -> None:
            seen[i, "read"] = args[0] if args else kwargs.get("hidden_states")

        return look

    def between(i: int, name: str) -> Callable:
        """Is this part of the layer fed with nothing but a sublayer's output?"""

        def look(_module: nn.Module, args: tuple, output: Any) -> None:
            if args and args[0] is seen[i, "pre"] and isinstance(output, Tensor):
                fed[i, name] = output
            for kind in ("attention", "mlp"):
                source = seen.get((i, f"{kind} out"))
                if args and source is not None and args[0] is source and isinstance(output, Tensor):
                    if output is not source and not (source.is_meta or torch.equal(output, source)):
                        norms[i, kind] = name
                    seen[i, f"{kind} out"] = output

        return look

    for i, layer in enumerate(layers):
        handles.append(layer.register_forward_pre_hook(before(i), with_kwargs=True))
        handles.append(layer.register_forward_hook(note((i, "post"))))
        for kind, site in (("attention", "attn_out"), ("mlp", "mlp_out")):
            inner = places.get(Site(site, i))  # type: ignore[arg-type]
            if inner is None:
                continue
            handles.append(inner.register_forward_hook(note((i, kind))))
            outer = next(m for m in layer.children() if any(inner is part for part in m.modules()))
            handles.append(outer.register_forward_hook(_out(seen, (i, f"{kind} out"))))
            if kind == "attention":
                handles.append(outer.register_forward_pre_hook(into_attention(i), with_kwargs=True))
        for name, part in layer.named_children():
            handles.append(part.register_forward_hook(between(i, name)))
    embedding = hf.get_input_embeddings().weight
    others = [int(len(embedding) * share) for share in (0.2, 0.4, 0.6, 0.8)]
    ids = torch.tensor([[first, *others]], device=embedding.device)
    hf(input_ids=ids, use_cache=False)
    found = []
    for i, layer in enumerate(layers):
        post, read = seen[i, "post"], seen.get((i, "read"))
        whole = _first(post)
        reads = next((name for (j, name), out in fed.items() if j == i and out is read), None)
        reads = "" if read is seen[i, "pre"] else reads
        if any((i, f"{kind} out") not in seen for kind in ("attention", "mlp")):  # a part of it was not found
            found.append(Layer(reads, gap=float("inf"), returns_tuple=isinstance(post, tuple)))
            continue
        if whole.is_meta:  # shapes only: there is nothing to measure
            found.append(Layer(reads, returns_tuple=isinstance(post, tuple)))
            continue
        added = (exact(whole) - exact(seen[i, "pre"])).flatten(0, 1)
        parts = [exact(_first(seen[i, f"{kind} out"])).view_as(added) for kind in ("attention", "mlp")]
        factors, gap = _factors(layer, parts, added)
        paths = [Way(norms.get((i, k)), f) for k, f in zip(("attention", "mlp"), factors, strict=True)]
        found.append(Layer(reads, paths[0], paths[1], gap, isinstance(post, tuple)))
    return found


def _out(seen: dict, key: tuple[int, str]) -> Callable:
    def look(_module: nn.Module, _args: tuple, output: Any) -> None:
        seen[key] = _first(output)

    return look


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _factors(
    layer: nn.Module, parts: list[Float[Tensor, "pos d_model"]], added: Float[Tensor, "pos d_model"]
) -> tuple[tuple[float, float], float]:
    """The factors with which the parts give what was added, and the relative gap that stays. 1, or a number that the
    layer holds: a fitted one would be as inexact as the model's numbers are."""
    numbers = {1.0, *(v for v in vars(layer).values() if isinstance(v, float) and v)}
    best = (1.0, 1.0), float("inf")
    for a in sorted(numbers, key=lambda v: v != 1):
        for b in sorted(numbers, key=lambda v: v != 1):
            gap = float((added - a * parts[0] - b * parts[1]).norm() / added.norm().clamp_min(1e-30))
            if gap < 0.5 * best[1]:
                best = (a, b), gap
    return best


def text_stack(hf: Any) -> tuple[nn.Module, nn.ModuleList]:
    """The module that holds the decoder layers of the text model, and their list.

    A wrapper for images has other stacks, possibly of the same length: the text model's holds the word embeddings too.
    """
    n, embedding = hf.config.get_text_config().num_hidden_layers, hf.get_input_embeddings()
    stacks = [
        (parent, child)
        for parent in hf.modules()
        for child in parent.children()
        if isinstance(child, nn.ModuleList) and len(child) == n
    ]
    if not stacks:
        raise ModelError(f"{type(hf).__name__} has no list of {n} decoder layers, so nothing can be hooked.")
    return next((s for s in stacks if any(embedding is part for part in s[0].modules())), stacks[0])


class Places(dict[Site, Any]):
    """What lies at each site. For one that was not found: ModelError, with the reason."""

    def __init__(self, found: Mapping[Site, Any], missing: Mapping[Site, ModelError]) -> None:
        super().__init__(found)
        self.missing = missing

    def __missing__(self, site: Site) -> Any:
        reason = self.missing.get(site, "there is no such site")
        raise ModelError(f"{site[0]} of layer {site[1]} can't be reached: {reason}")


def sites(hf: Any) -> Places:
    """The module whose input or output is each site, for any decoder that transformers builds.

    ``mlp_out`` of a mixture of experts is the output of the whole block, and it has no ``mlp_post``. Where attention or
    MLP are laid out otherwise (OPT, Falcon), their sites are missing, and the residual stream is there all the same.
    """
    found: dict[Site, nn.Module] = {}
    missing: dict[Site, ModelError] = {}
    for index, layer in enumerate(text_stack(hf)[1]):
        found[Site("resid_pre", index)] = found[Site("resid_post", index)] = layer
        parts: tuple[tuple[Callable[[nn.Module], nn.Module], tuple[Kind, ...]], ...]
        parts = (
            (_output_projection, ("z", "attn_out")),
            (_mlp_output, ("mlp_out",)),
            (_mlp_projection, ("mlp_post",)),
        )
        for find, kinds in parts:
            try:
                part = find(layer)
            except ModelError as reason:
                missing |= {Site(kind, index): reason for kind in kinds}
            else:
                found |= {Site(kind, index): part for kind in kinds}
    return Places(found, missing)


def _output_projection(layer: nn.Module) -> nn.Module:
    attention = find_part(layer, "self_attn", "attn", "attention")
    inner = find_part(attention, "attention", optional=True)
    return find_part(inner, "o_proj", "c_proj", "dense", "out_proj")


def _mlp_output(layer: nn.Module) -> nn.Module:
    block = find_part(layer, "mlp", "feed_forward", "block_sparse_moe")
    return block if hasattr(block, "experts") else _mlp_projection(layer)


def _mlp_projection(layer: nn.Module) -> nn.Module:
    """What reads the neurons."""
    block = find_part(layer, "mlp", "feed_forward", "block_sparse_moe")
    if hasattr(block, "experts"):
        raise ModelError(f"{type(block).__name__} is a mixture of experts, whose tokens share no neurons.")
    return find_part(block, "down_proj", "c_proj", "dense_4h_to_h", "fc2", "fc_out")


def find_part(module: nn.Module, *names: str, optional: bool = False) -> nn.Module:
    for name in names:
        if isinstance(child := getattr(module, name, None), nn.Module):
            return child
    if optional:
        return module
    raise ModelError(
        f"{type(module).__name__} has none of the parts {', '.join(names)}: this architecture is not supported. "
        f"Its parts are {', '.join(n for n, _ in module.named_children())}."
    )
