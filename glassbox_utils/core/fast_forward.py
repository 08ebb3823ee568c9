"""The same forward pass, faster: the number type that this machine multiplies fastest, with what lies between the
matrix products (attention over short rows, gates) made nearly free."""

import copy
import os
import time
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.activations import SiLUActivation
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from glassbox_utils.core import identity
from glassbox_utils.core.errors import GlassboxError
from glassbox_utils.core.models import Model, wrap_model

BLOCK = 64
"""queries in one product: smaller ones skip more of the future, larger ones multiply faster (64 to 256 measured)"""


@cache
def fast_dtype(device: torch.device | str = "cpu") -> torch.dtype:
    """bfloat16 where this device multiplies it faster than float32 (measured once for each, 0.1 s), else float32.

    A CPU with bfloat16 units is two to three times as fast with it; one without them is a hundred times as slow. The
    environment variable GLASSBOX_DTYPE decides instead where runs on several machines must agree.
    """
    if chosen := os.environ.get("GLASSBOX_DTYPE"):
        if chosen not in ("float32", "bfloat16"):
            raise GlassboxError(f"GLASSBOX_DTYPE is {chosen!r}. Allowed: float32, bfloat16, or unset.")
        return getattr(torch, chosen)
    times = {}
    for dtype in (torch.float32, torch.bfloat16):
        x, w = (torch.ones(*shape, dtype=dtype, device=device) for shape in ((2048, 576), (576, 1536)))
        times[dtype] = min(_seconds(partial(torch.matmul, x, w), x.device) for _ in range(5))
    return torch.bfloat16 if times[torch.bfloat16] < times[torch.float32] else torch.float32


def _seconds(function: Callable[[], Any], device: torch.device) -> float:
    wait: Callable[[], Any] = {"cuda": torch.cuda.synchronize, "mps": torch.mps.synchronize}.get(device.type, int)
    wait()
    start = time.perf_counter()
    function()
    wait()
    return time.perf_counter() - start


def quick(model: Model, dtype: torch.dtype | None = None) -> Model:
    """The model in the type that its device is fastest with (``fast_dtype``), or in the given one.

    The peak of memory is the model and its copy: tensors are converted one by one while the modules are copied.
    """
    dtype = dtype or fast_dtype(model.device)
    if dtype == model.dtype:
        return model
    hf = copy.deepcopy(model.hf, {id(t): _converted(t, dtype) for t in [*model.hf.parameters(), *model.hf.buffers()]})
    if dtype == torch.bfloat16 and hf.device.type == "cpu":
        if hf.config._attn_implementation == "sdpa":
            hf.set_attn_implementation(_NAME)
        for module in hf.modules():
            if _is_gated(module):
                module.forward = partial(gated, module)
            elif isinstance(module, LlamaRMSNorm):  # others of this name add one to the weight
                module.forward = partial(rms_norm, module)  # type: ignore[method-assign]
    return wrap_model(hf, model.tokenizer, model.name, identity.converted(model.hf, model.origin, hf))


def _converted(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy of a parameter or buffer, in the type if it is a number with a fraction."""
    copied = x.detach().to(dtype, copy=True) if x.is_floating_point() else x.detach().clone()
    return nn.Parameter(copied, x.requires_grad) if isinstance(x, nn.Parameter) else copied


def block_attention(
    query: Float[Tensor, "row head pos width"],
    key: Float[Tensor, "row kv_head pos width"],
    value: Float[Tensor, "row kv_head pos width"],
    scaling: float,
) -> Float[Tensor, "row pos head width"]:
    """Causal attention as plain matrix products over blocks of queries.

    In bfloat16 on a CPU this is about 1.7 times as fast as torch's flash kernel at a few hundred positions: the
    kernel multiplies in small tiles and repeats keys and values for every head of a group.
    """
    (rows, heads, length, width), groups = query.shape, query.shape[1] // key.shape[1]
    out = query.new_empty(rows, length, heads, width)
    future = torch.full((length, length), float("-inf"), dtype=query.dtype).triu(1)
    for start in range(0, length, BLOCK):
        end = min(start + BLOCK, length)
        asked = query[:, :, start:end].reshape(-1, groups * (end - start), width)
        bias = future[start:end, :end].repeat(groups, 1)
        scores = torch.baddbmm(bias, asked, _upto(key, end).mT, alpha=scaling)
        mixed = scores.softmax(-1) @ _upto(value, end)
        out[:, start:end] = mixed.view(rows, heads, end - start, width).transpose(1, 2)
    return out


def step_attention(
    query: Float[Tensor, "row head 1 width"],
    key: Float[Tensor, "row kv_head pos width"],
    value: Float[Tensor, "row kv_head pos width"],
    mask: Tensor | None,
    scaling: float,
) -> Float[Tensor, "row 1 head width"]:
    """Attention of one new token to all that were before it, while text is written.

    In bfloat16 on a CPU a tenth of the time of torch's kernel, which repeats keys and values for every head of a group.
    ``mask``: what may be seen (boolean), or what is added to scores.
    """
    (rows, heads, _, width), kv_heads, length = query.shape, key.shape[1], key.shape[2]
    asked = query.reshape(rows * kv_heads, heads // kv_heads, width)
    scores = torch.bmm(asked, key.reshape(-1, length, width).mT).view(rows, heads, 1, length).float() * scaling
    if mask is not None:
        seen = mask[..., :length]
        scores = scores.masked_fill(~seen, float("-inf")) if seen.dtype == torch.bool else scores + seen
    weights = scores.softmax(-1).to(query.dtype).view(rows * kv_heads, -1, length)
    return torch.bmm(weights, value.reshape(-1, length, width)).view(rows, 1, heads, width)


def _upto(x: Float[Tensor, "row kv_head pos width"], end: int) -> Float[Tensor, "row_head end width"]:
    return x[:, :, :end].reshape(-1, end, x.shape[-1])


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    scaling: float | None = None, is_causal: bool | None = None, **rest: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """``block_attention`` where rows are whole and causal, ``step_attention`` for one new token; for all else
    transformers' own."""
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    special = any(rest.get(name) is not None for name in ("softcap", "position_bias", "cache", "s_aux"))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if query.shape[2] == 1 and key.shape[2] > 1 and not special:
        return step_attention(query, key, value, attention_mask, scale), None
    if attention_mask is not None or special or not causal or key.shape[2] != query.shape[2]:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, is_causal=is_causal, **rest
        )
    return block_attention(query, key, value, scale), None


def gated(mlp: Any, x: Float[Tensor, "row pos d_model"]) -> Float[Tensor, "row pos d_model"]:
    """``down(silu(gate(x)) * up(x))`` with the gate's curve and the product done inside the matrix products.

    These are the operations that torch.compile chooses on a CPU, called by hand: it would need a C++ compiler.
    """
    gate = torch.ops.mkldnn._linear_pointwise(x, mlp.gate_proj.weight, None, "swish", [], "")
    return mlp.down_proj(torch.ops.mkldnn._linear_pointwise(x, gate, mlp.up_proj.weight, None, "mul"))


def rms_norm(norm: Any, x: Float[Tensor, "row pos d_model"]) -> Float[Tensor, "row pos d_model"]:
    """The same steps and roundings as ``LlamaRMSNorm``, in place: a quarter of its memory traffic."""
    exact = x.float()
    scale = torch.linalg.vector_norm(exact, dim=-1, keepdim=True).square_().div_(x.shape[-1])
    return exact.mul_(scale.add_(norm.variance_epsilon).rsqrt_()).to(x.dtype).mul_(norm.weight)


def _is_gated(module: Any) -> bool:
    parts: list[Any] = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    plain = all(type(part) is nn.Linear for part in parts) and all(part.bias is None for part in parts[:2])
    return (
        plain
        and isinstance(getattr(module, "act_fn", None), nn.SiLU | SiLUActivation)
        and torch.backends.mkldnn.is_available()
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()  # a CPU without AVX-512 has no such kernel, and would raise
    )


_NAME = "glassbox_blocks"
AttentionInterface.register(_NAME, _attention)
AttentionMaskInterface.register(_NAME, sdpa_mask)
