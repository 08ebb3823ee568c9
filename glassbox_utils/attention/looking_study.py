"""The long run behind notebook 01: ``glassbox study heads-looking``, does attention predict what ablation does?

All report prompts of the three families (the notebook takes a part), resumable family by family. Heads are chosen on
selection prompts, which have other words and other templates, and mean ablation takes its averages from there.
"""

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from glassbox_utils.attention.ablation import head_means
from glassbox_utils.attention.looking import Lookers, Looking, by_word, comparison, lookers, looking, looks, push
from glassbox_utils.attention.prompts import FAMILIES, Decisive, Split, decisive_prompts, measurable, to_batch
from glassbox_utils.core import prepared
from glassbox_utils.core.devices import array
from glassbox_utils.core.models import Model, ModelError
from glassbox_utils.core.prepared import load_subject
from glassbox_utils.core.statistics import mean_ci
from glassbox_utils.core.studies import SEED, resumed, write_table

PROMPTS, LEAST = 150, 24
"""report prompts of a family at full size, and however small the budget"""
SELECT = 60
STRONGEST = 10
"""heads of a list: a number of this project's, not chosen by its result"""


def some_prompts(model: Model, family: str, split: Split, n: int, seed: int = SEED) -> list[Decisive]:
    """Up to n prompts that this tokenizer can tell the answers of apart; ModelError if fewer than 10 are left."""
    every = decisive_prompts(family, split, None, seed)
    found = measurable(model, every)[:n]
    if len(found) < min(10, n):
        raise ModelError(
            f"The tokenizer of {model.name} begins answer and foil of {family} with the same token in all but "
            f"{len(found)} of {len(every)} prompts. Take a model with larger tokens."
        )
    return found


def usable(model: Model) -> list[str]:
    """The families that this tokenizer can be asked about."""
    found = []
    for family in FAMILIES:
        with suppress(ModelError):
            some_prompts(model, family, "report", 10)
            found.append(family)
    return found


def measure(model: Model, family: str, n: int, seed: int = SEED) -> tuple[Looking, Lookers]:
    """One family: predictors and effects on n report prompts, and the heads that look most on selection prompts."""
    select = to_batch(model, some_prompts(model, family, "select", SELECT, seed))
    k = max(1, min(STRONGEST, model.n_layers * model.n_heads // 4))
    chosen = lookers(looks(model, select, seed), k)
    means = head_means(model, [select.batch])
    return looking(model, some_prompts(model, family, "report", n, seed), means, seed), chosen


def _rounded(x: Tensor | Any) -> Any:
    return np.round(array(x) if isinstance(x, Tensor) else np.asarray(x), 4).tolist()


def _part(model: Model, family: str, n: int) -> dict[str, Any]:
    """One family as plain values, averaged by word: what is resampled later."""
    found, chosen = measure(model, family, n)
    values = {"effect": found.effect, **found.predictors}
    return {
        "prompts": len(found.words),
        "words": sorted(set(found.words)),
        "right": float((found.base > 0).float().mean()),
        "base": _rounded(by_word(found.base, found.words)),
        "chosen": asdict(chosen),
        "by_word": {name: _rounded(by_word(x, found.words)) for name, x in values.items()},
    }


def _read(part: dict[str, Any]) -> Looking:
    values = {name: torch.tensor(x) for name, x in part["by_word"].items()}
    return Looking(part["words"], torch.tensor(part["base"]), values.pop("effect"), values)


def looking_content(model: Model, n: int = PROMPTS) -> dict[str, Any]:
    """All families: maps of every head, correlations with their opponents, and what the strongest lookers do."""
    parts, refused = {}, {}
    for family in FAMILIES:
        try:
            parts[family] = resumed("heads", ["looking", model.hash, family, n], _part, model, family, n)
        except ModelError as reason:
            refused[family] = str(reason)
    if not parts:
        raise ModelError(next(iter(refused.values())))
    founds = {family: _read(part) for family, part in parts.items()}
    families = {}
    for family, part in parts.items():
        found, chosen = founds[family], part["chosen"]
        mean, low, high = mean_ci(found.effect)
        families[family] = {
            **{key: part[key] for key in ("prompts", "words", "right", "chosen")},
            "effect": {"mean": _rounded(mean), "low": _rounded(low), "high": _rounded(high)},
            "predictors": {name: _rounded(x.mean(0)) for name, x in found.predictors.items()},
            "push": _rounded(push(found, chosen["heads"])),
            "alike": [_rounded(push(found, draw)) for draw in chosen["alike"]],
        }
    table = comparison(founds, seed=SEED)
    correlations = {
        name: {row: {kind: _rounded([x.value, x.low, x.high]) for kind, x in kinds.items()} for row, kinds in t.items()}
        for name, t in table.items()
    }
    return {"size": {"prompts": n, "select": SELECT}, "families": families, "refused": refused,
            "correlations": correlations}  # fmt: skip


def study_looking() -> Path:
    """Three families of prompts, every head ablated at the last position (about 5 minutes on 2 idle cores)."""
    started, model = time.time(), load_subject()
    content = looking_content(model, prepared.sized(PROMPTS, LEAST))
    return write_table("heads_looking", model, time.time() - started, **content)


STUDIES_OF_LOOKING: dict[str, Callable[[], Path]] = {"heads-looking": study_looking}
