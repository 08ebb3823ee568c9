"""How many cases a notebook takes of a model in the minutes that it is given: fewer of a large one, not an hour."""

from typing import Literal

from glassbox_utils.core.arguments import number, whole
from glassbox_utils.core.errors import GlassboxError
from glassbox_utils.core.models import Model, Site

WEIGHTS, HEAD_WEIGHTS = 200e6, 4e10
"""up to so many weights, or so many heads times the weights of the layers, a model takes all cases in the stated time
on two cores"""
FASTER = 50
"""times the cases on a GPU"""


class SizeError(GlassboxError, ValueError):
    """A number of cases or minutes that is none; the message says what is allowed."""


def cases(
    model: Model,
    full: int,
    minutes: float,
    stated: float,
    least: int = 1,
    of: Literal["model", "every head"] = "model",
) -> int:
    """Up to ``full`` cases: all of them if ``minutes`` are the ``stated`` ones and the model is small; else in
    proportion, and at least ``least``. ``of``: what one case passes through.

    From the sizes of the model alone, so that two machines take the same cases. SizeError for numbers that are none.
    """
    whole("full", full, 1, SizeError)
    number("minutes", minutes, SizeError, above=0)
    if of == "every head":
        blocks = [model.sites[Site("resid_pre", layer)][0] for layer in range(model.n_layers)]
        weights = sum(p.numel() for block in blocks for p in block.parameters())
        work = weights * model.n_layers * model.n_heads / HEAD_WEIGHTS
    else:
        work = sum(p.numel() for p in model.hf.parameters()) / WEIGHTS
    room = minutes / stated * (1 if model.device.type == "cpu" else FASTER) / work
    return min(full, max(least, round(full * room)))
