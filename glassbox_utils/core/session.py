"""One session: seeds, quiet libraries, printed versions, progress bars, timing."""

import os
import time
import warnings
from typing import Any

import torch
from tqdm.auto import tqdm


def setup(seed: int = 0, threads: int | None = None) -> None:
    """First line of every notebook: seed, quiet libraries, versions printed, figures that need no network."""
    import random
    from importlib.metadata import version

    import numpy as np
    import transformers

    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    if threads is not None:
        torch.set_num_threads(threads)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    packages = ("torch", "transformers", "transformer_lens", "sae_lens", "circuitsvis")
    print(" · ".join(f"{p} {version(p).split('+')[0]}" for p in packages), f"· seed {seed}")


def progress(items: Any, label: str, **options: Any) -> Any:
    """A tqdm bar that is silent under tests and when output is not wanted (``GLASSBOX_QUIET=1``)."""
    quiet = bool(os.environ.get("GLASSBOX_QUIET") or os.environ.get("PYTEST_CURRENT_TEST"))
    return tqdm(items, desc=label, disable=quiet, leave=False, **options)


def timed(function: Any, repeats: int = 3) -> float:
    """Best wall time of a call, seconds."""
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        best = min(best, time.perf_counter() - start)
    return best
