"""A device that is not there: real numbers, computed on the CPU, that behave as if they lay on a GPU.

``FarTensor`` holds a CPU tensor and says that its device is ``far``. Everything that a GPU refuses is refused: an
operation on tensors of two devices (but for numbers of no dimension and indices), ``numpy()`` without ``force``, and
float64, which Apple's GPUs do not have. ``with far():`` also catches the making of tensors (``torch.zeros(...,
device="far")``). So a CPU-only machine runs the whole code, data-dependent branches included, and compares its numbers.
Built on torch's Python backend for the private-use device (torch.utils.backend_registration).
"""

from contextlib import contextmanager
from functools import cache

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

NAME = "far"
aten = torch.ops.aten
COPIES = {aten.copy_.default, aten._to_copy.default, aten.copy.default}
INDEXED = {
    aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default,
    aten._unsafe_index.Tensor, aten._unsafe_index_put.default,
}  # fmt: skip


class _Module(_DummyBackendModule):
    """What torch asks a backend for: its random state (ours is the CPU's) and its one device."""

    def get_rng_state(self, device=0):
        return torch.zeros(1, dtype=torch.uint8)

    def set_rng_state(self, state, device=0):
        pass

    def manual_seed_all(self, seed):
        pass


@cache
def register():
    _setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
    return torch.device(NAME, 0)


class FarTensor(torch.Tensor):
    @staticmethod
    def __new__(cls, inner, requires_grad=False):
        if inner.dtype == torch.float64:
            raise TypeError("float64 on the far device: Apple's GPUs do not have it. Move to the CPU first.")
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            device=register(), requires_grad=requires_grad,
        )  # fmt: skip

    def __init__(self, inner, requires_grad=False):
        self.inner = inner

    def __repr__(self):
        return f"far({self.inner!r})"

    def __deepcopy__(self, memo):
        if id(self) not in memo:
            copied = FarTensor(self.inner.detach().clone(), self.requires_grad)
            memo[id(self)] = torch.nn.Parameter(copied, self.requires_grad) if hasattr(self, "_is_param") else copied
        return memo[id(self)]

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is torch.Tensor.tolist:
            return args[0].detach().cpu().tolist()
        if func is torch.Tensor.numpy:
            if (kwargs or {}).get("force"):
                return args[0].detach().cpu().numpy()
            raise TypeError(f"can't convert {NAME} device type tensor to numpy. Use Tensor.cpu() first.")
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


def is_far(device):
    return device is not None and torch.device(device).type == NAME


def run(func, args, kwargs):
    flat, spec = tree_flatten((args, kwargs))
    far = [x for x in flat if isinstance(x, FarTensor)]
    near = [x for x in flat if isinstance(x, torch.Tensor) and not isinstance(x, FarTensor)]
    if far and func not in COPIES:
        mixed = [x for x in near if x.dim()]
        if func in INDEXED:  # a GPU tensor may be indexed by CPU indices, but what is put must lie beside it
            indices = [x for x in args[1] if x is not None]
            mixed = [x for x in mixed if not any(x is i for i in indices)]
            if not isinstance(args[0], FarTensor) and any(isinstance(i, FarTensor) for i in indices):
                mixed.append(args[0])
        if mixed:
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but found {NAME} and cpu: {func}, "
                f"shapes {[tuple(x.shape) for x in [*far, *mixed]]}"
            )
    to_far = is_far(kwargs.get("device")) or (bool(far) and kwargs.get("device") is None)
    if func == aten.copy_.default or func == aten.copy.default:
        to_far = isinstance(args[0], FarTensor)
    inner = [x.inner if isinstance(x, FarTensor) else x for x in flat]
    inner = [torch.device("cpu") if isinstance(x, torch.device) and x.type == NAME else x for x in inner]
    inner_args, inner_kwargs = tree_unflatten(inner, spec)
    if far and "pin_memory" in inner_kwargs:
        inner_kwargs["pin_memory"] = False
    out = func(*inner_args, **inner_kwargs)
    known = {id(x.inner): x for x in far}

    def wrap(x):
        if not isinstance(x, torch.Tensor) or isinstance(x, FarTensor) or not to_far:
            return x
        return known[id(x)] if id(x) in known else FarTensor(x)

    return tree_map(wrap, out)


class _Making(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        flat, _ = tree_flatten((args, kwargs))
        if any(isinstance(x, FarTensor) for x in flat) or any(
            isinstance(x, torch.device) and x.type == NAME for x in flat
        ):
            return run(func, args, kwargs)
        return func(*args, **kwargs)


@contextmanager
def far():
    """Inside the block the device ``far`` exists."""
    device, before = register(), torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device="far") is made on the CPU, then moved
    swap = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)  # Module.to keeps tied weights tied, as on a GPU
    try:
        with _Making():
            yield device
    finally:
        torch._C._set_only_lift_cpu_tensors(before)
        torch.__future__.set_swap_module_params_on_conversion(swap)
