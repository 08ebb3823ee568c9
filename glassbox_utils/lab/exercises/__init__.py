"""Exercises of the notebooks: one module for each, with a ``check_NAME`` and a ``solve_NAME`` for every exercise.

A check calls the reader's function on seeded inputs and says in words what is wrong with what comes out; the typical
wrong answers are among the tests. The solutions stand folded in the notebook, word for word: a test compares them.
"""

import copy
import inspect
import textwrap
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from glassbox_utils.core.errors import GlassboxError

BLANK = "not done yet: write the function, then run this cell again"
RIGHT = "right"


class WrongError(GlassboxError, ValueError):
    """An answer that is not right; the message says what is wrong with it."""


class _BlankError(Exception):
    """The stub returned nothing."""


def checker(test: Callable[[Callable[..., Any]], None]) -> Callable[[Callable[..., Any]], str]:
    """A test that raises WrongError as a check that says it: ``BLANK``, ``RIGHT``, or what is wrong, in one line."""

    @wraps(test)
    def check(function: Callable[..., Any]) -> str:
        try:
            test(function)
        except _BlankError:
            return BLANK
        except WrongError as reason:
            return f"not yet: {reason}"
        return RIGHT

    return check


def answer(function: Callable[..., Any], *inputs: Any) -> Any:
    """What a reader's function makes of these inputs. WrongError if it raises, or changes them in place."""
    given = copy.deepcopy(inputs)
    try:
        found = function(*given)
    except Exception as error:  # whatever a reader wrote
        raise WrongError(f"your function raises {type(error).__name__}: {' '.join(str(error).split())[:200]}") from None
    if found is None or found is ...:
        raise _BlankError
    for before, after in zip(inputs, given, strict=True):
        if isinstance(before, Tensor) and not torch.equal(before, after):
            raise WrongError("your function changes its input in place. Work on a copy: x = x.clone().")
    return found


def tensor(found: Any, shape: Sequence[int]) -> Tensor:
    """The answer as a finite float tensor of this shape; WrongError otherwise."""
    if not isinstance(found, Tensor):
        raise WrongError(f"the answer is a {type(found).__name__}, and should be a tensor of shape {tuple(shape)}.")
    if tuple(found.shape) != tuple(shape):
        raise WrongError(f"the answer has shape {tuple(found.shape)}, and should have {tuple(shape)}.")
    if not bool(torch.isfinite(found.float()).all()):
        raise WrongError("the answer holds values that are not finite (NaN or infinity).")
    return found.detach().float()


def number(found: Any) -> float:
    """The answer as one number; WrongError otherwise."""
    try:
        return float(found)
    except (TypeError, ValueError, RuntimeError):
        said = " ".join(repr(found).split())[:80]  # a tensor's repr has many lines
        raise WrongError(f"the answer is {said}, and should be one number.") from None


def near(found: Any, wanted: Any, tolerance: float = 1e-4) -> bool:
    """Equal up to rounding?"""
    a, b = torch.as_tensor(found).float(), torch.as_tensor(wanted).float()
    return a.shape == b.shape and bool(torch.allclose(a, b, atol=tolerance, rtol=tolerance))


def wrong_if(condition: bool, words: str) -> None:
    """WrongError with these words if the condition holds."""
    if condition:
        raise WrongError(words)


def source(solution: Callable[..., Any], name: str) -> str:
    """A solution as the notebook shows it: the function's code without its docstring, under the stub's name."""
    lines = textwrap.dedent(inspect.getsource(solution)).splitlines()
    signature = inspect.signature(solution)
    body = lines[1:]
    if solution.__doc__:
        end = next(i for i, line in enumerate(body) if line.rstrip().endswith('"""'))
        body = body[end + 1 :]
    return "\n".join([f"def {name}({', '.join(signature.parameters)}):", *body])
