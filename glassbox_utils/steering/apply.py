"""Steer: add a vector while the model reads and writes, per row of a batch, and leave no trace afterwards."""

import math
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor

from glassbox_utils.core.arguments import items, shown, whole
from glassbox_utils.core.devices import beside, like, result
from glassbox_utils.core.identity import difference
from glassbox_utils.core.interventions import Scope, by_row, edits, largest_push, paired
from glassbox_utils.core.models import Model, Site, check_layer, wrap_model
from glassbox_utils.core.session import progress
from glassbox_utils.core.text import chat, generate
from glassbox_utils.steering.vectors import ControlVector, Direction, SteeringError, Vector, check_unit, parts_of

Mode = Literal["add", "project_out", "affine"]


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

    ``scope``: all tokens, the prompt's only, or the generated ones only. Blocks nest: two vectors add up. Threads that
    share a model steer it apart: what runs in a thread with blocks of its own sees those only, what runs in a thread
    without any (a worker that generates for the thread that opened the block) sees all. ``steer(model, None)`` keeps
    a thread to itself.

    Raises SteeringError, before anything runs, for a vector of another width or another model, one that is no unit
    vector, a strength that is no finite number or too large for the model's type, an empty list, or an unknown mode.
    """
    if mode not in ("add", "project_out", "affine"):
        raise SteeringError(f"There is no mode {mode!r}. Allowed: add, project_out, affine.")
    functions, n_rows = functions_of(model, direction, alpha, mode)
    with _for_this_thread(model, functions) as own, edits(model, own, scope, n_rows):
        yield


Functions = dict[Site, Callable[[Tensor], Tensor]]
_open: WeakKeyDictionary[Any, Counter[int]] = WeakKeyDictionary()
"""transformers model -> thread -> blocks of ``steer`` that it has open"""
_opening = threading.Lock()


@contextmanager
def _for_this_thread(model: Model, functions: Functions) -> Iterator[Functions]:
    """The functions, without effect in passes of another thread that has blocks of its own."""
    me = threading.get_ident()
    with _opening:
        blocks = _open.setdefault(model.hf, Counter())
        blocks[me] += 1

    def guarded(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def own(x: Tensor) -> Tensor:
            here = threading.get_ident()
            return function(x) if here == me or not blocks[here] else x

        return own

    try:
        yield {site: guarded(function) for site, function in functions.items()}
    finally:
        with _opening:
            blocks[me] -= 1


def functions_of(
    model: Model, direction: Any, alpha: Any, mode: Mode
) -> tuple[dict[Site, Callable[[Tensor], Tensor]], int | None]:
    """Site -> function, all that can be computed before a run computed here; and the rows that they are for."""
    single = direction is None or isinstance(direction, Vector)
    if not single and (isinstance(direction, Tensor | str) or not isinstance(direction, Sequence)):
        raise SteeringError(
            f"{type(direction).__name__} is no direction. Give a Direction or a ControlVector, a list with one (or "
            "None) for each row, or use generate_with_steering(..., layer=) for a bare tensor."
        )
    rows, n_rows = paired(direction, alpha, single, "directions", SteeringError)
    parts = {id(p): p for v, _ in rows if v is not None for p in _parts(v)}
    for part in parts.values():
        check_direction(model, part)
    at = [{} if v is None or a is None else {p.layer: p for p in parts_of(v)} for v, a in rows]
    alphas = [float(a) if a is not None and here else 0.0 for (_, a), here in zip(rows, at, strict=True)]
    _check_size(model, alphas, at, mode)
    anchor = beside(torch.zeros((), dtype=torch.promote_types(model.dtype, torch.float32)), model.device)
    strength = by_row(alphas, anchor)
    layers = sorted({layer for here in at for layer in here})
    return {Site("resid_post", k): _edit(model, [here.get(k) for here in at], strength, mode) for k in layers}, n_rows


def _parts(vector: Any) -> tuple[Direction, ...]:
    if not isinstance(vector, Vector):
        raise SteeringError(
            f"{type(vector).__name__} is no direction. Allowed for a row: a Direction, a ControlVector, or None."
        )
    return parts_of(vector)


def _edit(
    model: Model, parts: Sequence[Direction | None], strength: Float[Tensor, "#row 1 1"], mode: Mode
) -> Callable[[Tensor], Tensor]:
    """What is done after one layer: one small product for all rows, however many vectors and strengths they have."""
    unit = like(_units(parts), strength)[:, None]  # [row, 1, d_model]; a row without steering has the zero vector
    scale = by_row([1.0 if d is None else float(d.scale) for d in parts], strength)
    if mode == "add":
        delta = like(strength * scale * unit, next(model.hf.parameters()))

        def function(x: Float[Tensor, "row pos d_model"]) -> Float[Tensor, "row pos d_model"]:
            return x + like(delta, x)

    elif mode == "project_out":

        def function(x: Float[Tensor, "row pos d_model"]) -> Float[Tensor, "row pos d_model"]:
            return x - strength * (x * unit).sum(-1, keepdim=True) * unit

    else:
        target = strength * scale

        def function(x: Float[Tensor, "row pos d_model"]) -> Float[Tensor, "row pos d_model"]:
            return x + (target - (x * unit).sum(-1, keepdim=True)) * unit

    return function


def check_direction(model: Model, direction: Direction) -> None:
    """SteeringError unless the direction has this model's width, layers and weights, and is a unit vector."""
    if not isinstance(direction, Direction):
        raise SteeringError(f"{type(direction).__name__} is no Direction. Fit one with fit_direction, or load one.")
    if not isinstance(direction.vector, Tensor) or direction.vector.shape != (model.d_model,):
        raise SteeringError(
            f"The direction {direction.name!r} has {_shape(direction.vector)} numbers, but the "
            f"residual stream of {model.name} has {model.d_model}: it was fitted on "
            f"{direction.model_name or 'another model'}. Fit it here."
        )
    check_layer(model, direction.layer)
    if why := difference(direction.model_hash, model.hash):
        raise SteeringError(
            f"The direction {direction.name!r} was fitted on {direction.model_name} ({direction.model_hash}), this is "
            f"{model.name} ({model.hash}): {why}. Fit it here, or use dataclasses.replace(direction, model_hash='') to "
            "try it all the same."
        )
    check_unit(direction)


def _shape(vector: Any) -> str:
    return " x ".join(map(str, getattr(vector, "shape", ()))) or "no"


def _units(parts: Sequence[Direction | None]) -> Float[Tensor, "part d_model"]:
    """The vectors as rows, zeros for None."""
    width = next(len(d.vector) for d in parts if d is not None)
    return torch.stack([torch.zeros(width) if d is None else result(d.vector) for d in parts])


def _check_size(model: Model, alphas: Sequence[float], at: Sequence[dict[int, Direction]], mode: Mode) -> None:
    """SteeringError for a push that the model can't compute with."""
    largest = largest_push(model)
    for alpha, here in zip(alphas, at, strict=True):
        unit = max((part.scale for part in here.values()), default=0.0) if mode != "project_out" else 1.0
        if abs(alpha) * unit > largest:
            raise SteeringError(
                f"The strength {alpha:g} makes a push of length {abs(alpha) * unit:.3g}, more than {model.name} can "
                f"compute with in {str(model.dtype).removeprefix('torch.')}. Allowed here: up to {largest / unit:.3g}; "
                "useful strengths are around 0.01 to 1."
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
    transformers builds; whether a vector was fitted on these weights is not checked here. Model and tokenizer are
    afterwards as they were (training mode, side of the padding, padding token). Raises SteeringError for a
    tensor of another width, or one that is zero or not finite, and as ``steer`` does.
    """
    if not hasattr(model, "generate") or not callable(tokenizer):
        raise SteeringError(
            f"{shown(model)} and {shown(tokenizer)} are no transformers model and its tokenizer. Give what "
            "AutoModelForCausalLM and AutoTokenizer load; for a Model of this package use steer and generate."
        )
    with _as_it_was(model, tokenizer):
        wrapped = wrap_model(model, tokenizer, name=type(model).__name__)
        texts = [prompt] if isinstance(prompt, str) else items("prompt", prompt, SteeringError)
        asked = [chat(wrapped, t) if t and tokenizer.chat_template else t for t in texts]
        with steer(wrapped, _placed(wrapped, steering_vector, layer), alpha, scope=scope):
            answers = generate(wrapped, asked, max_new_tokens, temperature, seed)
    return answers[0] if isinstance(prompt, str) else answers


@contextmanager
def _as_it_was(model: Any, tokenizer: Any) -> Iterator[None]:
    """Give a caller's model and tokenizer back unchanged: ``wrap_model`` sets what the package needs."""
    modes = [(module, module.training) for module in model.modules()]
    side, pad = tokenizer.padding_side, tokenizer.pad_token
    try:
        yield
    finally:
        tokenizer.padding_side, tokenizer.pad_token = side, pad
        for module, mode in modes:
            module.training = mode


def _placed(wrapped: Model, steering_vector: Any, layer: int | None) -> ControlVector:
    """What steers a plain model: a vector with its layers, or a bare tensor after one."""
    if isinstance(steering_vector, Vector):
        if layer is not None:
            raise SteeringError(f"{steering_vector} knows its layer: leave layer= out, or give its bare tensor.")
        parts = tuple(replace(part, model_hash="") for part in parts_of(steering_vector))
    elif layer is None:
        raise SteeringError("A bare tensor does not say where it belongs. Give layer=, or a Direction that has one.")
    else:
        if not isinstance(steering_vector, Tensor):
            raise SteeringError(f"{shown(steering_vector)} is no steering vector. Give a Direction, or a tensor.")
        bare = result(steering_vector)
        length = float(bare.norm())
        if bare.shape != (wrapped.d_model,) or not 0 < length < math.inf:
            raise SteeringError(
                f"The steering vector has shape {tuple(bare.shape)} and length {length:.3g}. Needed: {wrapped.d_model} "
                "finite numbers that are not all zero. To leave the model alone give alpha=0 or None."
            )
        parts = (Direction(bare / length, check_layer(wrapped, layer), length, model_name="you"),)
    return ControlVector(parts)


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
    ``text.chat``. SteeringError, before anything is written, unless there is one setting for each question.
    """
    questions = items("questions", questions, SteeringError, least=0)
    whole("batch_size", batch_size, 1, SteeringError)
    if seed is not None:
        whole("seed", seed, 0, SteeringError)
    settings = items("settings", settings, SteeringError, (tuple, type(None)), 0, "tuples (vector, strength) or None")
    if len(settings) != len(questions) or any(s is not None and len(s) != 2 for s in settings):
        raise SteeringError(
            f"There are {len(questions)} questions and {len(settings)} settings. Give one setting for each: a tuple of "
            "a steering vector and a strength, or None."
        )
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
