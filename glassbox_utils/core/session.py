"""One session: seeds, quiet libraries, printed versions, progress bars, timing."""

import os
import time
import warnings
from typing import Any

import torch
from tqdm.auto import tqdm

from glassbox_utils.core.arguments import whole
from glassbox_utils.core.errors import GlassboxError


class SessionError(GlassboxError, ValueError):
    """A seed or a number of threads that is none; the message says what is allowed."""


def setup(seed: int = 0, threads: int | None = None) -> None:
    """First line of every notebook: seed, quiet libraries, versions printed, figures that need no network.

    Raises SessionError for a seed outside 0 to 2^32 - 1 (numpy takes no larger one) or less than one thread.
    """
    import random
    from importlib.metadata import version

    import numpy as np
    import transformers

    whole("seed", seed, 0, SessionError, 2**32 - 1)
    if threads is not None:
        whole("threads", threads, 1, SessionError, 4096)
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
    """Best wall time of a call, seconds; of at least one call, or SessionError."""
    whole("repeats", repeats, 1, SessionError)
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        best = min(best, time.perf_counter() - start)
    return best
