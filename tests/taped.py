"""A CUDA graph without a GPU: the operations of a step are put on a tape, and replayed without the step's Python code.

As on the device, recording changes nothing, every tensor keeps its place, what Python decided is frozen, and an
operation that hands a number to Python breaks the recording. ``Tape`` is the graph, ``taped`` a fixture's work: text is
written as on a GPU, with a tape in the graph's place.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from glassbox_utils.core import decoding

aten = torch.ops.aten
WAITS = {aten.item.default, aten._local_scalar_dense.default, aten.is_nonzero.default, aten.nonzero.default}


def tensors(tree):
    return [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]


def place(x):
    return x.untyped_storage().data_ptr()


class Tape(TorchDispatchMode):
    """``with tape: step()``, then ``tape.rewind()``, then ``tape.replay()`` for every further token."""

    def __init__(self):
        super().__init__()
        self.operations, self.before, self.made = [], {}, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in WAITS:
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        arguments = tensors((args, kwargs))
        if func._schema.is_mutable:
            for x in arguments:
                if place(x) not in self.made and place(x) not in self.before:
                    whole = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage())
                    self.before[place(x)] = whole, whole.clone()
        out = func(*args, **kwargs)
        places = {place(x) for x in arguments}
        fresh = [x for x in tensors(out) if place(x) not in places]
        self.made |= {place(x) for x in fresh}
        if func._schema.is_mutable or fresh:
            self.operations.append((func, args, kwargs, out if fresh else None))
        return out

    def rewind(self):
        for whole, kept in self.before.values():
            whole.copy_(kept)

    def replay(self):
        for func, args, kwargs, out in self.operations:
            new = func(*args, **kwargs)
            for old, fresh in zip(tensors(out), tensors(new), strict=False) if out is not None else ():
                old.copy_(fresh)


def captured(device, step):
    """In place of ``decoding._captured``."""
    tape, state = Tape(), torch.get_rng_state()
    try:
        with tape:
            step()
    finally:
        tape.rewind()
        torch.set_rng_state(state)
    return tape.replay


def warm(device, step):
    """In place of ``decoding._warm``."""
    step()
    return []


def taped(monkeypatch):
    """Models on the CPU write as models on a GPU do. Gives the list of tapes that were made."""
    made = []

    def capture(device, step):
        made.append(captured(device, step))
        return made[-1]

    monkeypatch.setattr(decoding, "DEVICES", ("cuda", "cpu"))
    monkeypatch.setattr(decoding, "_warm", warm)
    monkeypatch.setattr(decoding, "_captured", capture)
    return made
