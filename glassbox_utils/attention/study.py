"""The long runs behind notebook 02, first part: ``glassbox study heads-induction`` and ``heads-semantic``.

Each ``*_content`` function measures one family of heads on any model at any size; the studies run them on the model of
the prepared folder at its size, resumably, and write ``studies/heads_*.json`` there with provenance. The part about
stereotypes, and the list of all studies, is in ``outcomes_study``.

Heads, how many of them, and pairs of heads are chosen on selection rows; what is reported comes from other rows.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from glassbox_utils.attention import heads, patterns
from glassbox_utils.attention.induction import (
    ablation_curve,
    circuit_scores,
    composition,
    cost_of_each,
    in_context_score,
    natural_repeats,
)
from glassbox_utils.attention.semantic import categories, category_preference, semantic_scores, word_lists
from glassbox_utils.core import prepared
from glassbox_utils.core.devices import array
from glassbox_utils.core.errors import GlassboxError
from glassbox_utils.core.interventions import Head
from glassbox_utils.core.models import Model, ModelError
from glassbox_utils.core.prepared import load_subject
from glassbox_utils.core.statistics import adjust, clustered_ci, mean_ci
from glassbox_utils.core.studies import has_table, read_table, resumed, write_table
from glassbox_utils.core.text import Batch


@dataclass(frozen=True)
class Size:
    """How many prompts each measurement uses."""

    rows: int = 100
    """of repeated tokens, for the map"""
    select_rows: int = 16
    ablation_rows: int = 12
    texts: int = 16
    text_tokens: int = 160
    path_rows: int = 16
    lists: int = 160
    preferences: int = 64
    swaps: int = 432
    referents: int = 24
    units: int = 36
    """pairs of prompts that ask for a pronoun"""
    receivers: int = 6
    """induction heads whose keys are patched"""
    draws: int = 20
    """random sets of heads beside a set that was found"""
    schemas: int = 400
    """WinoBias pairs of type 1 whose attention is measured"""
    winobias: int = 200
    """WinoBias pairs of each type whose probability is measured"""
    winogender: int = 152
    """sentences"""
    stereoset: int = 242
    """pairs of sentences"""


FULL = Size()
LEAST = Size(8, 4, 4, 4, 160, 4, 16, 16, 48, 8, 8, 2, 3, 24, 16, 152, 60)
"""what a study takes however small the budget: intervals need cases, counterparts all occupations"""
KS = (1, 2, 4, 6, 10)
SEMANTIC_K = 6
"""heads that are called semantic: a number of this project's, not chosen by its result"""
INDUCTION = 0.4
"""induction score on selection rows from which a head is called an induction head: the usual threshold"""


def size_here() -> Size:
    """How many prompts the prepared folder in use asks for: ``FULL`` in ``data/``."""
    return Size(**{f.name: prepared.sized(getattr(FULL, f.name), getattr(LEAST, f.name)) for f in fields(Size)})


def rounded(values: Tensor | NDArray | Sequence[float], digits: int = 4) -> Any:
    """Numbers as nested lists."""
    values = array(values) if isinstance(values, Tensor) else np.asarray(values, dtype=float)
    return np.round(values, digits).tolist()


def as_map(values: Tensor | NDArray, *clusters: Sequence[Any]) -> dict[str, Any]:
    """Mean and 95 % interval of every head. With ``clusters`` (what cases share, in one way or two) the interval and a
    p-value that respect it, with its BH correction; ``clusters`` in the result: how many of each."""
    if not clusters:
        mean, low, high = mean_ci(values)
        return {"n": len(values), "mean": rounded(mean), "low": rounded(low), "high": rounded(high)}
    mean, low, high, p = clustered_ci(values, *clusters)
    result = {"n": len(values), "clusters": [len(set(names)) for names in clusters]}
    result |= {"mean": rounded(mean), "low": rounded(low), "high": rounded(high)}
    return result | {"p": rounded(p, 5), "q": rounded(adjust(p, "bh"), 5)}


def leading(scores: Any, k: int) -> list[Head]:
    """The k heads with the largest scores, all of them where there are fewer."""
    table = torch.as_tensor(np.asarray(scores))
    return patterns.top_heads(table, min(k, table.numel()))


def part(model: Model, name: str, work: Callable[..., Any], *args: Any, **settings: Any) -> Any:
    """One resumable part: what was measured on these weights with these settings is not measured again."""
    return resumed("heads", [name, model.hash, args, settings], lambda: work(model, *args, **settings))


def stored(name: str, model: Model) -> dict[str, Any] | None:
    """The table of a study if there is one and it belongs to these weights, else None."""
    return read_table(name) if has_table(name, model) else None


def attempt(work: Callable[..., Any], *args: Any, **settings: Any) -> Any:
    """``work(*args)``, or None where this model can't be measured so: the reason is printed instead."""
    try:
        return work(*args, **settings)
    except GlassboxError as reason:
        print(f"Not measured on this model. {reason}")
        return None


# --- induction ----------------------------------------------------------------------------------------


def length_of(model: Model) -> int:
    """Random tokens in a half of a row: 50 where every head can look that far back."""
    return min(50, (reach(model) - 1) // 2)


def reach(model: Model) -> int:
    """How far back every head can look: the context, or a sliding window that is shorter."""
    window = getattr(model.config, "sliding_window", None)
    return min(model.n_context, window or model.n_context)


def induction_found(model: Model, rows: int) -> dict[str, Any]:
    """On selection rows: the ranking, the heads above ``INDUCTION`` (one at least, ten at most), and whom a control may
    not hold: heads that score above .1 (above the median where most do), or look one token back most of the time (the
    one that does so most where none does)."""
    select = circuit_scores(model, patterns.repeated_tokens(model, rows, length_of(model), seed=10))
    induction, previous = (array(s.mean(0)) for s in (select.induction, select.previous))
    ranking = leading(induction, min(max(KS), max(1, induction.size // 3)))
    found = [h for h in ranking if induction[h] > INDUCTION] or ranking[:1]
    back = [(int(a), int(b)) for a, b in np.argwhere(previous > 0.5)] or leading(previous, 1)
    back = sorted(back, key=lambda h: -previous[h])[: max(1, induction.size // 10)]
    scoring = [(int(a), int(b)) for a, b in np.argwhere(induction > max(0.1, float(np.median(induction))))]
    return {"ranking": ranking, "found": found, "back": back, "avoid": sorted({*scoring, *back})}


def induction_content(model: Model, size: Size = FULL) -> dict[str, Any]:
    """Which heads were chosen, and maps of all heads on other rows."""
    length, chosen = length_of(model), induction_found(model, size.select_rows)
    report = circuit_scores(model, patterns.repeated_tokens(model, size.rows, length, seed=11))
    copy_rows = patterns.repeated_tokens(model, min(size.rows, 8), length, seed=11)
    copying = torch.stack(
        [
            patterns.copying_scores(model, Batch(*(t[i : i + 1, : length + 1] for t in copy_rows)))
            for i in range(len(copy_rows.input_ids))
        ]
    )
    tokens = min(40, model.n_context // 2 - 1)
    natural = patterns.induction_scores(model, natural_repeats(model, max(4, size.rows // 4), tokens))
    shown = chosen["ranking"][:6]
    return chosen | {
        "size": asdict(size),
        "length": length,
        "group_size": [heads.group_size(model, layer) for layer in range(model.n_layers)],
        "rows": {"heads": shown, "induction": rounded(torch.stack([report.induction[:, a, b] for a, b in shown]))},
        "induction": as_map(report.induction),
        "previous": as_map(report.previous),
        "duplicate": as_map(report.duplicate),
        "natural": as_map(natural),
        "copying": as_map(copying),
    }


def induction_ablation(
    model: Model, ranking: Sequence[Head], k: int, avoid: Sequence[Head], back: Sequence[Head], size: Size = FULL
) -> dict[str, Any]:
    """What ablation costs on repeated tokens: the top k with many controls, other k with few, previous-token heads one
    by one; and the in-context learning score on real text."""
    length, n, free = length_of(model), size.ablation_rows, model.n_layers * model.n_heads - len({*ranking, *avoid})
    if free < k:
        raise ModelError(
            f"{model.name} has too few heads for controls: {free} besides those that are chosen or shut out."
        )
    ks = [i for i in KS if i <= min(len(ranking), free)]
    few = ablation_curve(model, ranking, ks, n, length, min(5, size.draws), avoid=avoid, matched=False)
    main = ablation_curve(model, ranking, [k], n, length, size.draws, avoid=avoid)
    sets = [[], list(ranking[:k]), *heads.control_sets(model, ranking[:k], [*ranking, *avoid], min(8, size.draws), 50)]
    scores, losses = in_context_score(model, sets, size.texts, min(size.text_tokens, model.n_context))
    alone = [h for h in back if h not in ranking[:k]][:4]
    return {
        "k": k,
        "clean": rounded(main.clean),
        "top": rounded(main.top[0]),
        "random": rounded(main.random[0]),
        "matched": rounded(main.matched[0]),
        "curve": {"ks": few.ks, "top": rounded(few.top), "random": rounded(few.random)},
        "alone": {"heads": alone, "cost": rounded(cost_of_each(model, alone, n, length)) if alone else []},
        "text": {
            "sets": ["none", "top", *["random"] * (len(sets) - 2)],
            "score": rounded(scores),
            "loss": rounded(losses),
        },
    }


def key_heads(model: Model, found: Sequence[Head]) -> list[tuple[int, int, list[Head]]]:
    """The key heads that some query heads read: (layer, key head, its query heads among those given)."""
    groups: dict[tuple[int, int], list[Head]] = {}
    for layer, head in found:
        groups.setdefault((layer, head // heads.group_size(model, layer)), []).append((layer, head))
    return [(layer, key, members) for (layer, key), members in groups.items()]


def induction_paths(model: Model, found: Sequence[Head], back: Sequence[Head], size: Size = FULL) -> dict[str, Any]:
    """Path patching by key head: a screen of all earlier heads on two rows, and a report on other rows.

    The keys of a key head are all that its query heads have in common, so they are patched once, and the induction
    scores of the query heads are averaged. Reported for each key head: the two strongest senders of its screen, and
    random heads of their layers, none of which looks one token back. A key head whose query heads do not look at what
    they should, so that they have no score to lose, is left out. ModelError if that leaves none.
    """
    length, screens, reports = min(25, (reach(model) - 1) // 2), [], []
    receivers = [h for h in found if h[0] > 0][: size.receivers]
    if not receivers:
        raise ModelError(f"No head of {model.name} that scores for induction has heads before it: nobody feeds it.")

    def scores(senders: list[Head], members: Sequence[Head], n: int, seed: int) -> tuple[Tensor, Tensor]:
        of = [composition(model, senders, member, n, length, seed=seed) for member in members]
        return torch.stack([base for base, _ in of]).mean(0), torch.stack([cut for _, cut in of]).mean(0)

    for layer, key, members in key_heads(model, receivers):
        senders = [(i, h) for i in range(layer) for h in range(model.n_heads)]
        base, cut = scores(senders, members, 2, 13)
        lost = (base - cut).mean(1)
        name, score = {"layer": layer, "key": key, "heads": members}, rounded(base.mean())
        best = [senders[int(i)] for i in lost.argsort(descending=True)[:2]]
        drawn: list[Head] = []
        for sender in best:
            for draw in heads.control_sets(model, [sender], [*best, *back], max(2, size.draws // 4)):
                drawn += [h for h in draw if h[0] < layer and h not in [*best, *drawn]]
        drawn = drawn or [h for h in senders if h not in best]
        base, cut = scores([*best, *drawn], members, size.path_rows, 14)
        if not (score > 0 and rounded(base.mean()) > 0):
            continue
        screens.append(name | {"base": score, "lost": rounded(lost.view(layer, model.n_heads))})
        pairs = [
            {"sender": s, "found": s in best, "patched": rounded(x)} for s, x in zip([*best, *drawn], cut, strict=True)
        ]
        reports.append(name | {"base": rounded(base), "pairs": pairs})
    if not reports:
        raise ModelError(
            f"No head of {model.name} looks at what came after an earlier copy {length} tokens back (a window may be "
            "shorter than that), so none has an induction score that could be lost."
        )
    return {"length": length, "screens": screens, "reports": reports}


def study_induction() -> Path:
    """Maps, ablations and paths of the induction heads (about 8 minutes on 2 idle cores)."""
    started, model, size = time.time(), load_subject(), size_here()
    maps = part(model, "induction maps", induction_content, size)
    ranking, found, back, avoid = ([(a, b) for a, b in maps[n]] for n in ("ranking", "found", "back", "avoid"))
    curve = part(model, "induction ablation", induction_ablation, ranking, len(found), avoid, back, size)
    later = [h for h in found if h[0] > 0] or [h for h in ranking if h[0] > 0][:1]  # others have no head before them
    paths = part(model, "induction paths", induction_paths, later, back, size)
    return write_table("heads_induction", model, time.time() - started, maps=maps, curve=curve, paths=paths)


# --- semantic heads -----------------------------------------------------------------------------------


def semantic_content(model: Model, size: Size = FULL) -> dict[str, Any]:
    """Attention to words of the same category: all heads, two disjoint sets of categories, and what ablation does."""
    lists = {split: word_lists(model, split, size.lists) for split in ("selection", "report")}
    select, report = (semantic_scores(model, of) for of in lists.values())
    k = min(SEMANTIC_K, model.n_layers * model.n_heads // 4)
    if k < 1:
        raise ModelError(f"{model.name} has too few heads for a control: {model.n_layers * model.n_heads}.")
    chosen = array(select.mean(0))
    ranking = leading(chosen, k)
    alike = [(int(a), int(b)) for a, b in np.argwhere(np.abs(chosen) > max(0.1, float(np.median(np.abs(chosen)))))]
    sets = [[], ranking, *heads.control_sets(model, ranking, alike, size.draws, 60)]
    preference = category_preference(model, "report", sets, size.preferences)
    _, losses = in_context_score(model, sets[:8], size.texts, min(120, model.n_context))
    return {
        "size": asdict(size),
        "ranking": ranking,
        "selection": as_map(select, lists["selection"].category),
        "report": as_map(report, lists["report"].category),
        "rows": {"heads": ranking, "score": rounded(torch.stack([report[:, a, b] for a, b in ranking]))},
        "preference": rounded(preference),
        "preference_of": categories(model, "report", size.preferences),
        "text_loss": rounded(losses),
    }


def study_semantic() -> Path:
    """Maps and ablation of the semantic heads (about 3 minutes)."""
    started, model = time.time(), load_subject()
    content = part(model, "semantic lists", semantic_content, size_here())
    return write_table("heads_semantic", model, time.time() - started, **content)
