"""Side by side: rivals take turns, so that a busy machine slows all of them alike; what was measured is noted.

``conftest.py`` writes what was noted to build/bench.json, beside the limits of the machine, and prints it as a table.
"""

import os
import platform
import time
from contextlib import nullcontext

import psutil
import torch

from glassbox_utils.core import devices
from glassbox_utils.core.text import generate, tokenize

NOTED: list[dict] = []


def noted(name, unit, values, ratio, promise):
    """Print and keep one comparison; returns the ratio.

    ``values``: what was measured by name, in ``unit``, ours first; ``ratio``: ours against the rival, in the direction
    that the name says; ``promise``: what is asserted about it, in words.
    """
    NOTED.append({"name": name, "unit": unit, "values": values, "ratio": ratio, "promise": promise})
    shown = ", ".join(f"{who} {value:,.4g}" for who, value in values.items())
    print(f"\n{name} ({unit}): {shown}; ratio {ratio:.3g} ({promise})")
    return ratio


def device():
    return devices.choose(None)


def wait(place):
    """Until a device has done what it was given."""
    if place.type == "cuda":
        torch.cuda.synchronize(place)
    elif place.type == "mps":
        torch.mps.synchronize()


def _per_second(work, amount, place, rounds=4):
    best = float("inf")
    for turn in range(rounds + 1):
        wait(place)
        start = time.perf_counter()
        work()
        wait(place)
        if turn:
            best = min(best, time.perf_counter() - start)
    return amount / best


def limits():
    """What this machine can do: its name, cores, memory, and measured matrix products and memory traffic."""
    place = device()
    found = {
        "device": torch.cuda.get_device_name(place) if place.type == "cuda" else place.type,
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_GB": round(psutil.virtual_memory().total / 1e9, 1),
        "load": round(os.getloadavg()[0], 1),
        "torch": torch.__version__,
    }
    n = 1024 if place.type == "cpu" else 8192
    for dtype in (torch.float32, torch.bfloat16):
        slow = place.type == "cpu" and dtype == torch.bfloat16  # a hundred times as slow without units for it
        size = n // 4 if slow else n
        x = torch.ones(size, size, dtype=dtype, device=place)
        rate = _per_second(lambda x=x: x @ x, 2 * size**3, place)
        found[f"matmul_{str(dtype).removeprefix('torch.')}_GFLOPs"] = round(rate / 1e9, 1)
    x = torch.ones(2**26 if place.type == "cpu" else 2**29, device=place)
    y = torch.empty_like(x)
    found["memory_GB_per_s"] = round(_per_second(lambda: y.copy_(x), 2 * x.nbytes, place) / 1e9, 1)
    return found


def best_times(*functions, rounds):
    """Best time of each function in seconds over the rounds, after one round of warm-up."""
    best = [float("inf")] * len(functions)
    for turn in range(rounds + 1):
        for i, function in enumerate(functions):
            wait(device())
            start = time.perf_counter()
            function()
            wait(device())
            if turn:
                best[i] = min(best[i], time.perf_counter() - start)
    return best


def per_token(model, prompts, edited, new_tokens, rounds):
    """Milliseconds for a generated token: plain, and inside the context that ``edited()`` gives."""
    batch = tokenize(model, prompts)
    options = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False, "pad_token_id": 0}

    def run(context):
        with context(), torch.inference_mode():
            model.hf.generate(**batch._asdict(), **options)

    generate(model, prompts, 2)
    return [1e3 * t / new_tokens for t in best_times(lambda: run(nullcontext), lambda: run(edited), rounds=rounds)]
