"""Steer: add a vector while the model reads and writes, per row of a batch, and leave no trace afterwards."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from glassbox_utils.core.interventions import Scope, by_row, edits, paired
from glassbox_utils.core.models import Model, Site, check_layer, wrap_model
from glassbox_utils.core.session import progress
from glassbox_utils.core.text import chat, generate
from glassbox_utils.steering.vectors import ControlVector, Direction, SteeringError, Vector, parts_of

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

    ``scope``: all tokens, the prompt's only, or the generated ones only. Blocks nest: two vectors add up.
    Raises SteeringError for a vector of another width, another model or an unknown mode.
    """
    if mode not in ("add", "project_out", "affine"):
        raise SteeringError(f"There is no mode {mode!r}. Allowed: add, project_out, affine.")
    functions, n_rows = functions_of(model, direction, alpha, mode)
    with edits(model, functions, scope, n_rows):
        yield


def functions_of(model: Model, direction: Any, alpha: Any, mode: Mode) -> tuple[dict[Site, Any], int | None]:
    """Site -> function, all that can be computed before a run computed here; and the rows that they are for."""
    rows, n_rows = paired(direction, alpha, isinstance(direction, Vector), "directions", SteeringError)
    for part in {id(p): p for v, _ in rows if v is not None for p in parts_of(v)}.values():
        check_direction(model, part)
    at = [{} if v is None or a is None else {p.layer: p for p in parts_of(v)} for v, a in rows]
    like = next(model.hf.parameters())
    strength = by_row([a if a is not None and here else 0.0 for (_, a), here in zip(rows, at, strict=True)], like)
    layers = sorted({layer for here in at for layer in here})
    return {Site("resid_post", k): _edit([here.get(k) for here in at], strength, mode) for k in layers}, n_rows


def _edit(parts: Sequence[Direction | None], strength: Tensor, mode: Mode) -> Any:
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

    return function


def check_direction(model: Model, direction: Direction) -> None:
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
    ``text.chat``.
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
