"""Where tensors live, decided once for all rooms; nobody outside ``core`` calls ``.to`` by hand.

* **Results** (scores, effects, intervals, codes) are float32 on the CPU: ``result``; sums that must not lose digits are
  float64 there: ``exact`` moves first and converts then, because Apple's GPUs have no float64.
* **Tools** (SAEs, directions, edits, gates, masks) follow the model's device and type when they are used: ``like``
  takes both from a tensor of the model, ``beside`` the device only (indices, masks, what is computed in float32).
"""

import copy
import os
import weakref
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from glassbox_utils.core.errors import GlassboxError

_copies: weakref.WeakKeyDictionary[nn.Module, dict[torch.device, tuple[list[int], nn.Module]]]
_copies = weakref.WeakKeyDictionary()


class DeviceError(GlassboxError, ValueError):
    """A device that is not on this machine; the message names those that are."""


def available() -> list[str]:
    """Kinds of device on this machine, the fastest first."""
    found = ["cpu"]
    if torch.cuda.is_available():
        found.insert(0, "cuda")
    elif torch.backends.mps.is_available():
        found.insert(0, "mps")
    return found


def choose(device: str | torch.device | None = None) -> torch.device:
    """The device asked for, as an argument or in GLASSBOX_DEVICE, else the fastest. DeviceError if it is not here."""
    device = device or os.environ.get("GLASSBOX_DEVICE") or available()[0]
    try:
        chosen = torch.device(device)
    except RuntimeError:
        chosen = torch.device("meta")
    count = torch.cuda.device_count() if chosen.type == "cuda" else 1
    if chosen.type not in available() or (chosen.index or 0) >= count:
        raise DeviceError(
            f"The device {str(device)!r} is not on this machine. Allowed here: {', '.join(available())}"
            + (f" (cuda:0 to cuda:{count - 1})." if chosen.type == "cuda" and count else ".")
        )
    return chosen


def result(x: Tensor) -> Tensor:
    """A result: on the CPU, without a gradient, and float32 if it is a number with a fraction."""
    x = x.detach()
    return (x.float() if x.is_floating_point() else x).cpu()


def exact(x: Tensor) -> Tensor:
    """On the CPU in float64, without a gradient: for sums over many values."""
    return x.detach().cpu().double()


def array(x: Tensor) -> NDArray[np.float64]:
    """``exact`` as a numpy array: what the statistics take."""
    return exact(x).numpy()


def like(x: Any, other: Tensor) -> Any:
    """A tensor with the device of ``other``, and with its type too if it is a number with a fraction."""
    return x.to(other.device, other.dtype if x.is_floating_point() else x.dtype)


def beside(x: Any, other: Tensor | torch.device) -> Any:
    """A tensor or a module on the device of ``other``, in its own type.

    A module (an SAE) of another device is copied once, and again if its weights were changed; the copy is kept as long
    as the module lives, and the caller's own stays where it is.
    """
    device = other.device if isinstance(other, Tensor) else other
    if isinstance(x, Tensor):
        return x.to(device)
    if not isinstance(x, nn.Module):  # a baseline without weights of its own: a tuple of tensors
        tensors = x._asdict() if hasattr(x, "_asdict") else {}
        return x._replace(**{k: v.to(device) for k, v in tensors.items() if isinstance(v, Tensor)}) if tensors else x
    first = next(x.parameters(), None)
    if first is None or first.device == device:
        return x
    kept, versions = _copies.setdefault(x, {}), [p._version for p in x.parameters()]
    if device not in kept or kept[device][0] != versions:
        kept[device] = versions, copy.deepcopy(x).to(device)
    return kept[device][1]
