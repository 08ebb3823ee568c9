"""A training run at one moment, in one safetensors file: tensors, and everything else as JSON in its metadata.

No pickle, so that a file from elsewhere can't run code. Written beside the old one and renamed: after a kill at any
moment one of the two is there, and a continued run ends with the same bits.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from glassbox_utils.core import files
from glassbox_utils.core.devices import beside
from glassbox_utils.core.errors import GlassboxError

FIX = "Delete it to begin again, or give another path."


class Saved(NamedTuple):
    """What a checkpoint holds; its tensors are on the CPU."""

    tensors: dict[str, Tensor]
    step: int
    """steps that are done"""
    history: list[float]
    """the loss of each, if the run keeps it"""


def write(
    path: Path,
    about: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    optimiser: torch.optim.Optimizer,
    step: int,
    history: Sequence[float] = (),
) -> None:
    """Keep a run. ``about``: the settings that make it this run, plain values."""
    words = {"about": about, "step": step, "history": list(history)}
    keep(path, dict(weights) | memory(optimiser), words)


def keep(path: Path, tensors: Mapping[str, Tensor], words: Mapping[str, Any]) -> None:
    """Write one file of tensors and plain values; after a kill at any moment the old one or the new one is there."""
    near = {name: beside(t.detach(), torch.device("cpu")).contiguous() for name, t in tensors.items()}
    with files.explain_os_errors(path), files.atomic_path(path) as partial:
        save_file(near, partial, {name: json.dumps(value) for name, value in words.items()})


def read(path: Path, error: type[GlassboxError]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The plain values and the tensors (on the CPU) of such a file; ``error`` for one that is damaged or of another
    kind (a pickle)."""
    try:
        with safe_open(path, "pt") as file:
            words = {name: json.loads(value) for name, value in (file.metadata() or {}).items()}
            return words, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, RecursionError) as reason:
        said = " ".join(str(reason).split())[:120]
        raise error(f"The checkpoint {path} can't be read ({said}): it is damaged, or no checkpoint. {FIX}") from reason


def memory(optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What an optimiser remembers of each weight: ``optimizer.NUMBER.NAME``."""
    kept = optimiser.state_dict()["state"]
    return {f"optimizer.{number}.{name}": torch.as_tensor(v) for number, of in kept.items() for name, v in of.items()}


def resume(
    path: Path,
    about: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    optimiser: torch.optim.Optimizer,
    error: type[GlassboxError],
) -> Saved | None:
    """Put back what ``write`` kept, in place: the weights' values, and the memory of an Adam; None if there is no file.

    Raises ``error``, before anything is changed, for a file that is damaged, of another kind (a pickle), of a run with
    other settings, or of other weights.
    """
    if not path.exists():
        return None
    words, tensors = read(path, error)
    there, step, history = (words.get(name) for name in ("about", "step", "history"))
    losses = [x for x in history if isinstance(x, float)] if isinstance(history, list) else []
    if not isinstance(there, dict) or type(step) is not int or step < 0 or losses != history:
        raise error(f"{path} is no checkpoint of ours: it does not say which run it belongs to. {FIX}")
    here = json.loads(json.dumps(dict(about)))
    if changed := [name for name in sorted({*here, *there}) if here.get(name) != there.get(name)]:
        what = "; ".join(f"{name}: {there.get(name)!r} there, {here.get(name)!r} asked for" for name in changed[:3])
        raise error(f"The checkpoint {path} belongs to another run ({what[:300]}). {FIX}")
    parameters = [p for group in optimiser.param_groups for p in group["params"]]
    wanted = {name: tuple(t.shape) for name, t in weights.items()}
    for number, p in enumerate(parameters):
        wanted |= {f"optimizer.{number}.{name}": tuple(p.shape) for name in ("exp_avg", "exp_avg_sq")}
        wanted[f"optimizer.{number}.step"] = ()
    shapes = {name: tuple(t.shape) for name, t in tensors.items()}
    if wrong := [name for name in wanted if shapes.get(name) != wanted[name]]:
        what = f"{wrong[0]} should have the shape {wanted[wrong[0]]}, it has {shapes.get(wrong[0], 'none')}"
        raise error(f"The checkpoint {path} does not fit this run: {what}. {FIX}")
    with torch.no_grad():
        for name, tensor in weights.items():
            tensor.copy_(tensors[name])
    kept: dict[int, dict[str, Tensor]] = {}
    for name in wanted.keys() - weights.keys():
        _, place, what = name.split(".")
        kept.setdefault(int(place), {})[what] = tensors[name]
    optimiser.load_state_dict(optimiser.state_dict() | {"state": kept})  # its settings stay those of this call
    return Saved(tensors, step, losses)
