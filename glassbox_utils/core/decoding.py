"""Write token by token: plain greedy choice or sampling, whatever a checkpoint's generation_config.json asks for.

On the CPU and on Apple's GPUs transformers' own loop runs. On a CUDA GPU one step of a small model is a thousand
kernels that each take less time than Python needs to launch them. So there the step is recorded once in a call, as a
CUDA graph, and replayed for every further token: keys and values lie in buffers of fixed size, and the hooks that are
active (steering, clamping, any ``interventions.edit``) are part of what is recorded. Their Python code therefore runs
for the prompt, for the first two steps and for the recording, but not for each later token. Where it has to (it counts,
or keeps what it sees) ``with unrecorded():`` sees to it.

A recording costs about what one step in Python costs, belongs to one call of ``write`` and ends with it, so it never
meets other hooks than those that it was made with. A step that can't be recorded (a hook that waits for the device, or
makes a tensor of Python numbers) runs in Python, with one warning. CUDA graphs:
https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
"""

import copy
import inspect
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import cache, partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import GenerationConfig
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer, StaticLayer

from glassbox_utils.core import caches
from glassbox_utils.core.errors import GlassboxError
from glassbox_utils.core.models import Model

DEVICES = ("cuda",)
"""kinds of device on which steps are recorded"""
WORTH_IT = 8
"""fewer new tokens than this are written without a recording"""
BLOCK = 16
"""buffers are a multiple of this many tokens long, which the fast attention kernels ask of a mask"""

Step = Callable[[], None]
Record = Callable[[Step], Step | None]
"""Runs a step once, and gives what repeats it without its Python code, or None if that is impossible."""

_in_python: ContextVar[bool] = ContextVar("in_python", default=False)
_recording = threading.Lock()


@contextmanager
def unrecorded() -> Iterator[None]:
    """Inside the block every generated token runs the hooks' Python code, on every device."""
    before = _in_python.set(True)
    try:
        yield
    finally:
        _in_python.reset(before)


def write(
    model: Model,
    input_ids: Int[Tensor, "batch pos"],
    attention_mask: Int[Tensor, "batch pos"],
    max_new_tokens: int,
    temperature: float = 0.0,
) -> Int[Tensor, "batch new"]:
    """New tokens for left-padded prompts, until every row has ended or ``max_new_tokens`` are written.

    ``temperature`` 0 is greedy; sampling draws from torch's global generator of the model's device. Rows that ended are
    filled with the padding token. The tokens that end a row come from the checkpoint's generation config, all else that
    it says (repetition penalty, top-k, beams, a minimum length) is left aside.
    """
    new = None
    if can_be_static(model):
        with recorder(input_ids.device, max_new_tokens) as record:
            new = decode(model, input_ids, attention_mask, max_new_tokens, temperature, record)
    if new is None:
        new = by_transformers(model, input_ids, attention_mask, max_new_tokens, temperature)
    return new


def by_transformers(
    model: Model, input_ids: Tensor, attention_mask: Tensor, max_new_tokens: int, temperature: float
) -> Int[Tensor, "batch new"]:
    """``write`` with the loop of transformers."""
    # Its generate() fills what a caller leaves open from the model's own configuration, so the model gets a plain one:
    # a shallow copy shares modules and hooks, and other threads never see another configuration.
    plain = copy.copy(model.hf)
    plain.generation_config = GenerationConfig(eos_token_id=ends(model) or None, pad_token_id=model.padding)
    options: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if temperature > 0:
        options = {"do_sample": True, "temperature": temperature, "top_p": None, "top_k": 0}
    out = plain.generate(
        input_ids=input_ids, attention_mask=attention_mask, max_new_tokens=max_new_tokens,
        pad_token_id=model.padding, **options,
    )  # fmt: skip
    return out[:, input_ids.shape[1] :]


def ends(model: Model) -> list[int]:
    """Tokens that end a text."""
    found = getattr(model.hf.generation_config, "eos_token_id", None)
    return [found] if isinstance(found, int) else list(found or ())


# --- a step of fixed shape ----------------------------------------------------------------------------


def can_be_static(model: Model) -> bool:
    """Is the model on a device that records, and does its decode step depend on nothing but tensors of fixed shape?

    That is what transformers' own flag for whole-graph compilation says; and masks and positions must be ours to give
    (no ALiBi, no attention in chunks, no flash attention, one device).
    """
    hf, config = model.hf, model.config
    return (
        model.device.type in DEVICES
        and getattr(hf, "_can_compile_fullgraph", False)
        and "position_ids" in inspect.signature(hf.forward).parameters
        and config._attn_implementation in ("eager", "sdpa")
        and set(getattr(config, "layer_types", None) or ()) <= {"full_attention", "sliding_attention"}
        and not getattr(config, "attention_chunk_size", None)
        and not getattr(config, "alibi", False)
        and len(set(getattr(hf, "hf_device_map", {}).values())) <= 1
    )


class _Slots(StaticLayer):
    """Keys and values of one layer in buffers of fixed length. The slot of the newest token is one tensor for all
    layers, and the mask says which slots are seen; so layers with a sliding window are as long as the others."""

    def __init__(self, length: int, filled: int, slot: Int[Tensor, "1"], keys: Tensor, values: Tensor) -> None:
        super().__init__(length)
        self.slot, self.filled = slot, filled
        self.keys: Tensor = keys.new_zeros(*keys.shape[:2], length, keys.shape[-1])
        self.values: Tensor = values.new_zeros(*values.shape[:2], length, values.shape[-1])
        for buffer, prompt in ((self.keys, keys), (self.values, values)):  # with a window only its last tokens are kept
            buffer[:, :, filled - prompt.shape[2] : filled] = prompt
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        self.keys.index_copy_(2, self.slot, key_states)
        self.values.index_copy_(2, self.slot, value_states)
        return self.keys, self.values

    def get_seq_length(self, *_: Any) -> int:
        return self.filled

    def get_mask_sizes(self, *_: Any) -> tuple[int, int]:
        return self.max_cache_len, 0


def _static(past: Any, length: int, filled: int, slot: Tensor) -> Cache | None:
    """What a prompt left behind, moved to buffers of fixed length; None for a cache of another kind."""
    layers: list[Any] = []
    for layer in getattr(past, "layers", ()):
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) or layer.keys is None or layer.keys.ndim != 4:
            return None
        layers.append(_Slots(length, filled, slot, layer.keys, layer.values))
        layer.keys = layer.values = None  # one layer at a time is there twice
    return Cache(layers=layers) if layers else None


def decode(
    model: Model,
    input_ids: Int[Tensor, "batch pos"],
    attention_mask: Int[Tensor, "batch pos"],
    max_new_tokens: int,
    temperature: float = 0.0,
    record: Record | None = None,
) -> Int[Tensor, "batch new"] | None:
    """``write`` with a step of fixed shape, which ``record`` may record; None if this model has none.

    The prompt and the first step run as they are; ``record`` gets the second, and gives what repeats it if it can.
    """
    hf, (rows, filled) = model.hf, input_ids.shape
    last = torch.tensor(ends(model), dtype=torch.long, device=input_ids.device)
    pad = model.padding
    positions = (attention_mask.cumsum(-1) - 1).clamp_min(0)
    short = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(hf.forward).parameters else {}
    out = hf(
        input_ids=input_ids, attention_mask=attention_mask, position_ids=positions, use_cache=True, return_dict=True,
        **short,
    )  # fmt: skip

    written = torch.full((rows, max_new_tokens), pad, dtype=torch.long, device=input_ids.device)
    at, slot = (torch.full((1,), i, dtype=torch.long, device=input_ids.device) for i in (0, filled))
    done = torch.zeros(rows, dtype=torch.bool, device=input_ids.device)
    newest, position = input_ids[:, -1:].clone(), positions[:, -1:] + 1

    def accept(logits: Float[Tensor, "batch vocab"]) -> None:
        new = choose(logits, temperature).masked_fill(done, pad)
        done.logical_or_((new[:, None] == last).any(-1))
        newest.copy_(new[:, None])
        written.index_copy_(1, at, newest)

    accept(out.logits[:, -1])
    length = -(-(filled + max_new_tokens) // BLOCK) * BLOCK
    kept = _static(caches.left_by(out), length, filled, slot) if max_new_tokens > 1 else None
    if kept is None:
        return _ended(written, last) if max_new_tokens == 1 else None
    seen, slots = _prompt_mask(attention_mask, length, model.dtype), torch.arange(length, device=input_ids.device)
    del out

    def step() -> None:
        seen.index_fill_(-1, slot, 0.0)
        logits = hf(
            input_ids=newest, attention_mask=_masks(model, seen, slots, slot), position_ids=position,
            use_cache=True, return_dict=True, **caches.handed(hf, kept),
        ).logits  # fmt: skip
        for counter in (at, slot, position):
            counter.add_(1)
        accept(logits[:, -1])

    run = step
    for count in range(1, max_new_tokens):
        if len(last) and (count < 4 or count % 8 == 0) and bool(done.all()):  # asking waits for the device
            break
        if count == 1:
            try:
                step()
            except GlassboxError:
                raise
            except (AttributeError, IndexError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
                _warn(f"{model.name} can't be run with keys and values of fixed size", error)
                return None
        elif count == 2 and record is not None:
            run = record(step) or step
        else:
            run()
    return _ended(written, last)


def choose(logits: Float[Tensor, "batch vocab"], temperature: float) -> Int[Tensor, " batch"]:
    """The likeliest token of each row, or a drawn one: the same draw as ``torch.multinomial``'s, without its checks,
    for which the GPU would have to be waited for."""
    if temperature == 0:
        return logits.float().argmax(-1)
    p = (logits.float() / temperature).softmax(-1)
    return (p / torch.empty_like(p).exponential_(1)).argmax(-1)


def _prompt_mask(attention_mask: Tensor, length: int, dtype: torch.dtype) -> Float[Tensor, "batch 1 1 slot"]:
    """What is added to attention scores: 0 at the prompt's tokens, the lowest number at padding and what is to come."""
    seen = torch.zeros(len(attention_mask), 1, 1, length, dtype=torch.bool, device=attention_mask.device)
    seen[..., : attention_mask.shape[1]] = attention_mask[:, None, None].bool()
    return torch.zeros_like(seen, dtype=dtype).masked_fill_(~seen, torch.finfo(dtype).min)


def _masks(model: Model, seen: Tensor, slots: Tensor, slot: Tensor) -> Tensor | dict[str, Tensor]:
    """The mask as the model takes it, or one for each kind of layer: transformers' ``create_masks_for_generate``."""
    window, kinds = getattr(model.config, "sliding_window", None), getattr(model.config, "layer_types", None)

    def mask(kind: str) -> Tensor:
        if kind == "full_attention" or window is None:
            return seen
        return seen.masked_fill(slots <= slot - window, torch.finfo(seen.dtype).min)

    return {kind: mask(kind) for kind in sorted(set(kinds))} if kinds else mask("sliding_attention")


def _ended(written: Tensor, last: Tensor) -> Tensor:
    """Without the columns that come after the last row's end."""
    ended = ((written[..., None] == last).any(-1).cumsum(-1) > 0).all(0)
    return written[:, : len(ended) - max(int(ended.sum()) - 1, 0)]


# --- recording ----------------------------------------------------------------------------------------


@contextmanager
def recorder(device: torch.device, max_new_tokens: int) -> Iterator[Record | None]:
    """What records a step on this device, for the length of the block; None where that gains nothing, inside
    ``unrecorded``, or while another thread records."""
    if (
        device.type not in DEVICES or max_new_tokens < WORTH_IT or _in_python.get()
        or not _recording.acquire(blocking=False)
    ):  # fmt: skip
        yield None
        return
    try:
        yield partial(graphed, device)
    finally:
        if device.type == "cuda":
            with suppress(RuntimeError):
                torch.cuda.synchronize(device)  # nothing is replayed any more when the buffers go
        _recording.release()


def graphed(device: torch.device, step: Step) -> Step | None:
    """Run the step once, then record it as a CUDA graph: gives its replay; None, with a warning, if it has none."""
    waited = _warm(device, step)
    if waited:
        _warn("The step waits for the device (.item(), a copy to or from the CPU, a tensor made of numbers)", waited[0])
        return None
    try:
        return _captured(device, step)
    except RuntimeError as error:
        _warn("The step can't be recorded as a CUDA graph", error)
        return None


def _warn(what: str, why: Any) -> None:
    reason = str(why).strip().split("\n")[0][:200] or type(why).__name__
    warnings.warn(
        f"{what}: {reason}. Tokens are written all the same, more slowly; a hook is recorded if it only computes with "
        "tensors that lie on the device.",
        stacklevel=2,
    )


@cache
def _studio(index: int) -> tuple[Any, Any, Any]:
    """A device's side stream and memory pool for recordings. The empty graph, the third, keeps the pool from one
    recording to the next: without it each would take new memory from the driver."""
    stream, pool, empty = torch.cuda.Stream(index), torch.cuda.graph_pool_handle(), torch.cuda.CUDAGraph()
    with warnings.catch_warnings(), torch.cuda.stream(stream):
        warnings.simplefilter("ignore")  # it says that the graph is empty
        empty.capture_begin(pool=pool, capture_error_mode="thread_local")
        empty.capture_end()
    return stream, pool, empty


def _warm(device: torch.device, step: Step) -> list[str]:
    """Run the step where it will be recorded, so that libraries have their workspaces there; and say what waited for
    the device: such a step can't be recorded, and to try would leave torch in a bad state."""
    stream, here = _studio(device.index or 0)[0], torch.cuda.current_stream(device)
    before = torch.cuda.get_sync_debug_mode()
    stream.wait_stream(here)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with torch.cuda.stream(stream):
                step()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    here.wait_stream(stream)
    for other in (w for w in caught if "synchronizing" not in str(w.message)):
        warnings.warn_explicit(other.message, other.category, other.filename, other.lineno)
    return [f"{w.filename}, line {w.lineno}" for w in caught if "synchronizing" in str(w.message)]


def _captured(device: torch.device, step: Step) -> Step:
    """The replay of a recorded step. RuntimeError if it can't be recorded."""
    stream, pool, _ = _studio(device.index or 0)
    graph, here = torch.cuda.CUDAGraph(), torch.cuda.current_stream(device)
    stream.wait_stream(here)
    try:
        with torch.cuda.stream(stream):
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                step()  # Python runs, the device does not
            finally:
                graph.capture_end()
    except BaseException:
        _settle(device)
        raise
    here.wait_stream(stream)
    return graph.replay


def _settle(device: torch.device) -> None:
    """After a recording that broke off: torch does not undo what it began (CUDAGraph.cpp, ``reset``)."""
    stream, pool, _ = _studio(device.index or 0)
    with suppress(Exception):
        torch._C._cuda_endAllocateToPool(device.index or 0, pool)  # raises if the recording was ended properly
        torch._C._cuda_releasePool(device.index or 0, pool)
    with suppress(Exception), torch.cuda.stream(stream):  # older versions: the random numbers still think it goes on
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        torch.zeros(1, device=device)
        graph.capture_end()
