"""The keys and values that a pass leaves behind, by the name that transformers gives them: ``past_key_values``, and
``cache`` from 5.24 on. A hook that asks for one name only would take every pass for the first one, in silence."""

import inspect
from collections.abc import Mapping
from typing import Any

NAMES = ("cache", "past_key_values")


def handed(hf: Any, cache: Any) -> dict[str, Any]:
    """The keyword argument that hands a cache to a pass of the model ``hf``."""
    known = inspect.signature(hf.forward).parameters
    return {next((name for name in NAMES if name in known), NAMES[-1]): cache}


def left_by(out: Any) -> Any:
    """The cache in what a pass returned; None if it left none."""
    return next((out[name] for name in NAMES if name in out), None)


def among(arguments: Mapping[str, Any]) -> Any:
    """The cache among the keyword arguments of a pass; None if there is none."""
    return next((arguments[name] for name in NAMES if arguments.get(name) is not None), None)
