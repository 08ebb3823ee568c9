"""The long run on induction in training: ten seeds of four arms, with and without what induction needs."""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from glassbox_utils.attention import forming
from glassbox_utils.core import assets
from glassbox_utils.core.studies import resumed, write_table

SEEDS = 10
ARMS = {
    "two layers": forming.Setup(),
    "one layer": forming.Setup(n_layers=1),
    "one layer, fixed distance": forming.Setup(n_layers=1, shortest=12, longest=12),
    "two layers, positions in the stream": forming.Setup(positions="stream"),
}
"""name -> what is trained: the claim, the control that must fail, and two that say what it depends on"""


def study_forming(seeds: int = SEEDS, **changes: Any) -> Path:
    """Ten seeds of each arm (about 4 minutes); ``changes`` to every arm's setup, for a small run."""
    started, arms = time.time(), {}
    for name, setup in ARMS.items():
        setup = replace(setup, **changes)
        runs = [
            resumed("forming", [asdict(setup), seed], lambda s=seed, a=setup: forming.train(a, s).numbers())
            for seed in range(seeds)
        ]
        arms[name] = {"setup": asdict(setup), "runs": runs}
    return write_table("heads_forming", None, time.time() - started, arms=arms)


def forming_table() -> dict[str, Any]:
    """The table of ``heads-forming``, which is the same whatever model is looked at."""
    return json.loads((assets.DATA / "studies" / "heads_forming.json").read_text(encoding="utf-8"))


STUDIES_OF_FORMING: dict[str, Callable[[], Path]] = {"heads-forming": study_forming}
"""not repeated by ``glassbox prepare``: no model is asked anything"""
