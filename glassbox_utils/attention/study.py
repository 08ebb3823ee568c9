"""The long runs behind notebook 02: ``glassbox study heads-induction``, ``heads-semantic``, ``heads-bias`` and so on.

Each ``*_content`` function measures one family of heads on any model at any size; the studies run them on the model of
the prepared folder at its size, resumably, and write ``studies/heads_*.json`` there with provenance. ``heads-table``
joins them to ``heads/heads.csv``. ``content`` gives a notebook the stored table if it belongs to the model at
hand, and else measures a small one on the spot.
"""

import csv
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from glassbox_utils.attention import heads, patterns
from glassbox_utils.attention.ablation import head_means
from glassbox_utils.attention.bias import (
    Swap,
    attention_gap,
    by_occupations,
    pronoun_effects,
    pronoun_effects_guessed,
    pronoun_gap,
    referent_patching,
    swaps,
    winobias,
    winobias_gap,
    winobias_preference,
)
from glassbox_utils.attention.induction import (
    ablation_curve,
    circuit_scores,
    composition,
    in_context_score,
    natural_repeats,
)
from glassbox_utils.attention.semantic import category_preference, semantic_scores, word_lists
from glassbox_utils.core import prepared
from glassbox_utils.core.devices import array
from glassbox_utils.core.errors import GlassboxError
from glassbox_utils.core.interventions import Head
from glassbox_utils.core.models import Model, ModelError
from glassbox_utils.core.prepared import load_subject
from glassbox_utils.core.statistics import adjust, mean_ci, sign_flip_p, spearman
from glassbox_utils.core.studies import has_table, read_table, resumed, write_table
from glassbox_utils.core.text import Batch, following, tokenize


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
    referents: int = 36
    units: int = 36
    """pairs of prompts that ask for a pronoun"""
    receivers: int = 6
    """induction heads whose keys are patched"""
    draws: int = 4
    """of each kind of control for the ablation curve; with two or fewer it has ``FEW_KS``"""
    schemas: int = 400
    """WinoBias pairs of type 1 whose attention is measured"""
    winobias: int = 200
    """WinoBias pairs of each type whose probability is measured"""


FULL = Size()
LEAST = Size(8, 4, 4, 4, 160, 4, 16, 16, 48, 8, 8, 2, 2, 24, 16)
"""what a study takes however small the budget: intervals need cases"""
QUICK = Size(6, 4, 4, 4, 60, 3, 24, 16, 36, 4, 6, 2, 2, 12, 8)
"""for models without a stored study: seconds instead of minutes, and wide intervals"""
KS, FEW_KS = (1, 2, 4, 6, 8, 10), (1, 2, 6, 10)
SEMANTIC_KS = (2, 4, 6)
K = 5
"""heads in a set of the bias section"""


def size_here() -> Size:
    """How many prompts the prepared folder in use asks for: ``FULL`` in ``data/``."""
    return Size(**{f.name: prepared.sized(getattr(FULL, f.name), getattr(LEAST, f.name)) for f in fields(Size)})


def _round(values: Tensor | NDArray | Sequence[float], digits: int = 4) -> Any:
    values = array(values) if isinstance(values, Tensor) else np.asarray(values, dtype=float)
    return np.round(values, digits).tolist()


def _map(values: Tensor | NDArray, test: bool = False) -> dict[str, Any]:
    """Mean and 95 % interval of every head; with ``test`` also sign-flip p-values and their BH correction."""
    mean, low, high = mean_ci(values)
    result = {"n": len(values), "mean": _round(mean), "low": _round(low), "high": _round(high)}
    if test:
        p = sign_flip_p(values)
        result |= {"p": _round(p, 5), "q": _round(adjust(p, "bh"), 5)}
    return result


def _top(scores: Any, k: int) -> list[Head]:
    return patterns.top_heads(torch.as_tensor(np.asarray(scores)), k)


# --- induction ----------------------------------------------------------------------------------------


def induction_content(model: Model, size: Size = FULL) -> dict[str, Any]:
    """Maps, ablation curve, real text, and which heads feed the keys of the induction heads."""
    length = min(50, (model.n_context - 1) // 2)
    select = circuit_scores(model, patterns.repeated_tokens(model, size.select_rows, length, seed=10))
    ranking = _top(select.induction.mean(0), min(max(KS), model.n_layers * model.n_heads // 3))
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
    return {
        "size": asdict(size),
        "length": length,
        "ranking": ranking,
        "rows": {
            "heads": ranking[:6],
            "induction": _round(torch.stack([report.induction[:, a, b] for a, b in ranking[:6]])),
        },
        "induction": _map(report.induction),
        "previous": _map(report.previous),
        "duplicate": _map(report.duplicate),
        "natural": _map(natural),
        "copying": _map(copying),
    }


def induction_ablation(
    model: Model, ranking: Sequence[Head], avoid: Sequence[Head], size: Size = FULL
) -> dict[str, Any]:
    """The ablation curve on repeated tokens, and the in-context learning score on real text."""
    length = min(50, (model.n_context - 1) // 2)
    free = model.n_layers * model.n_heads - len({*map(tuple, ranking), *map(tuple, avoid)})
    ks = [k for k in (KS if size.draws > 2 else FEW_KS) if k <= min(len(ranking), free)]
    if not ks:
        raise ModelError(f"{model.name} has too few heads for a control of one: {model.n_layers * model.n_heads}.")
    curve = ablation_curve(model, ranking, ks, size.ablation_rows, length, size.draws, seed=12, avoid=avoid)
    some: list[int] = [k for k in ks if k in (4, 10)] or [ks[-1]]
    sets: list[list[Head]] = [[]]
    names = ["none"]
    for k in some:
        sets.append(list(ranking[:k]))
        names.append(f"top {k}")
        for draw in range(2):
            sets.append(heads.random_heads(model, ranking[:k], 50 + draw, [*ranking, *avoid]))
            names.append(f"random {k}")
    scores, losses = in_context_score(model, sets, size.texts, min(size.text_tokens, model.n_context))
    return {
        "ks": curve.ks,
        "clean": _round(curve.clean),
        "top": _round(curve.top),
        "random": _round(curve.random),
        "matched": _round(curve.matched),
        "matched_heads": curve.matched_heads,
        "text": {"sets": names, "heads": sets, "score": _round(scores), "loss": _round(losses)},
    }


def induction_paths(model: Model, receivers: Sequence[Head], size: Size = FULL) -> dict[str, Any]:
    """Path patching into the receivers' keys: a screen of all earlier heads, and a report on other rows.

    Reported for each receiver: the two strongest of the screen, and six random heads of their layers.
    """
    length = min(25, (model.n_context - 1) // 2)
    screens, pairs = {}, []
    for receiver in receivers:
        senders = [(i, h) for i in range(receiver[0]) for h in range(model.n_heads)]
        if not senders:
            continue
        base, patched = composition(model, senders, receiver, 2, length, seed=13)
        lost = (base - patched).mean(1)
        screens[patterns.head_name(receiver)] = {
            "base": _round(base.mean(), 4),
            "lost": _round(lost.view(receiver[0], model.n_heads)),
        }
        found = [senders[int(i)] for i in lost.argsort(descending=True)[:2]]
        control: list[Head] = []
        for draw in range(3):
            if model.n_layers * model.n_heads < 2 * len(found) + len(control):
                break
            free = heads.random_heads(model, found, draw, control)
            control += [h for h in free if h[0] < receiver[0]]
        control = control or [h for h in senders if h not in found]
        base, patched = composition(model, [*found, *control], receiver, size.path_rows, length, seed=14)
        for index, sender in enumerate([*found, *control]):
            pairs.append(
                {
                    "sender": sender,
                    "receiver": receiver,
                    "found": index < len(found),
                    "base": _round(base),
                    "patched": _round(patched[index]),
                }
            )
    return {"length": length, "screens": screens, "pairs": pairs}


# --- semantic heads -----------------------------------------------------------------------------------


def semantic_content(model: Model, size: Size = FULL) -> dict[str, Any]:
    """Attention to words of the same category: all heads, two disjoint sets of categories, and what ablation does."""
    select = semantic_scores(model, word_lists(model, "selection", size.lists))
    report = semantic_scores(model, word_lists(model, "report", size.lists))
    ks = [k for k in SEMANTIC_KS if 2 * k <= model.n_layers * model.n_heads]  # as many must remain as controls
    if not ks:
        raise ModelError(f"{model.name} has too few heads for a control of two: {model.n_layers * model.n_heads}.")
    ranking = _top(select.mean(0), ks[-1])
    sets: list[list[Head]] = [[]]
    names = ["none"]
    for k in ks:
        sets.append(ranking[:k])
        names.append(f"top {k}")
        for draw in range(4):
            sets.append(heads.random_heads(model, ranking[:k], 10 * k + draw, ranking))
            names.append(f"random {k}")
    preference = category_preference(model, "report", sets, size.preferences)
    _, losses = in_context_score(model, [sets[0], sets[-5], sets[-4], sets[-3]], size.texts, min(120, model.n_context))
    return {
        "size": asdict(size),
        "ranking": ranking,
        "selection": _map(select, test=True),
        "report": _map(report, test=True),
        "rows": {"heads": ranking, "score": _round(torch.stack([report[:, a, b] for a, b in ranking]))},
        "preference": {"sets": names, "heads": sets, "value": _round(preference)},
        "text_loss": {"sets": ["none", f"top {ks[-1]}", *[f"random {ks[-1]}"] * 2], "value": _round(losses)},
    }


# --- bias heads ---------------------------------------------------------------------------------------


def _some(items: Sequence[Any], n: int) -> list[Any]:
    """n items, evenly spread."""
    return list(items) if n >= len(items) else [items[i * len(items) // n] for i in range(n)]


def bias_looks(model: Model, n_swaps: int, n_schemas: int) -> dict[str, Any]:
    """The stereotype gap of attention: our templates (both splits) and WinoBias type 1 (dev and test)."""
    result: dict[str, Any] = {}
    for split in ("selection", "report"):
        pairs = _some(swaps(split), n_swaps)
        gaps = attention_gap(model, pairs)
        result[split] = _map(by_occupations(gaps, pairs), test=True) | {"pairs": len(pairs)}
        if split == "report":
            ranking = _leading(model, result["selection"]["mean"])
            result["rows"] = {"heads": ranking, "gap": _round(torch.stack([gaps[:, a, b] for a, b in ranking]))}
    for half in ("dev", "test"):
        gaps = winobias_gap(model, _some(winobias(1, half), n_schemas))
        result[f"winobias_{half}"] = _map(gaps, test=True)
    return result | {"ranking": _leading(model, result["selection"]["mean"])}


def bias_chosen(model: Model, units: int = FULL.units) -> list[Head]:
    """The heads that carry most of the pronoun gap on selection prompts, by a first-order guess."""
    return _leading(model, pronoun_effects_guessed(model, "selection", units).mean(0))


def _leading(model: Model, scores: Any) -> list[Head]:
    return _top(scores, min(10, model.n_layers * model.n_heads))


def bias_acts(model: Model, units: int = FULL.units) -> dict[str, Any]:
    """Pronoun choice after one occupation, report prompts: exact mean ablation of every head, direct attribution."""
    gap, ablated, direct = pronoun_effects(model, "report", units=units)
    guess = pronoun_effects_guessed(model, "report", units)
    return {
        "gap": _round(gap),
        "ablation": _map(ablated, test=True),
        "direct": _map(direct, test=True),
        "gradient_agreement": asdict(spearman(guess.mean(0), ablated.mean(0)).rho),
    }


def _asked(model: Model, split: heads.Split) -> list[Swap]:
    """The pairs that can be patched and read: as many tokens with either pronoun, and two occupations that begin with
    different tokens."""
    pairs = swaps(split)
    counts = [[len(following(model, text)) for text in p.full] for p in pairs]
    first = [[heads.first_id(model, word) for word in (p.male, p.female)] for p in pairs]
    found = [p for p, (a, b), (x, y) in zip(pairs, counts, first, strict=True) if a == b and x != y]
    if len(found) < 2:
        raise ModelError(
            f"The tokenizer of {model.name} writes the pronouns of our pairs with different numbers of tokens, or "
            "begins the names of all occupations with the same one: who was meant can't be read off one logit. Take a "
            "model with larger tokens."
        )
    return found


def bias_refers(model: Model, n: int) -> dict[str, Any]:
    """Who was meant? Pronoun-swap patching: first-order on selection pairs, exact on report pairs."""
    chosen = heads.shuffled(_asked(model, "selection"), n, seed=3)
    total, guess = referent_patching(model, chosen, "gradient")
    result = {"selection": {"total": _round(total), "effect": _map(guess, test=True)}}
    reported = heads.shuffled(_asked(model, "report"), n, seed=4)
    total, effect = referent_patching(model, reported, "exact")
    _, guess = referent_patching(model, reported, "gradient")
    agreement = spearman(guess.mean(0), effect.mean(0))
    result["report"] = {"total": _round(total), "effect": _map(effect, test=True)}
    result["gradient_agreement"] = asdict(agreement.rho)
    return result | {"ranking": _leading(model, result["selection"]["effect"]["mean"])}


def bias_sets(
    model: Model, looks: Sequence[Head], acts: Sequence[Head], refers: Sequence[Head]
) -> dict[str, list[Head]]:
    """The sets of heads whose loss is compared: found by looking, by acting, by referring, and random ones."""
    k = max(1, min(K, model.n_layers * model.n_heads // 4))  # three sets, and as many heads again as controls
    found: list[list[Head]] = [[(a, b) for a, b in x[:k]] for x in (looks, acts, refers)]
    sets: dict[str, list[Head]] = dict(zip(("none", "looking", "acting", "referring"), ([], *found), strict=True))
    everything = [h for heads_ in found for h in heads_]
    for draw in range(2):
        sets[f"random as looking {draw}"] = heads.random_heads(model, found[0], 70 + draw, everything)
        sets[f"random as acting {draw}"] = heads.random_heads(model, found[1], 80 + draw, everything)
    return sets


def winobias_behaviour(model: Model, sets: dict[str, list[Head]], kind: Literal[1, 2], n: int) -> Any:
    """WinoBias preference on the test half, with each set mean-ablated: [set][pair], nats."""
    reference = head_means(model, [tokenize(model, [s.pro for s in _some(winobias(1, "dev"), 48)])])
    chosen = _some(winobias(kind, "test"), n)
    return _round(winobias_preference(model, chosen, list(sets.values()), reference))


def other_behaviour(model: Model, sets: dict[str, list[Head]], size: Size = FULL) -> dict[str, Any]:
    """Pronoun gap on report prompts, and the cost on held-out text, with each set mean-ablated."""
    _, text = in_context_score(model, list(sets.values()), size.texts, min(120, model.n_context))
    gap = pronoun_gap(model, list(sets.values()), units=size.units)
    return {"pronoun_gap": _round(gap), "text_loss": _round(text)}


def _behaviour(model: Model, sets: dict[str, list[Head]], size: Size) -> dict[str, Any]:
    kinds: tuple[Literal[1, 2], ...] = (1, 2)
    return {
        "sets": sets,
        **_part(model, "bias other behaviour", other_behaviour, sets, size),
        "winobias": {str(k): _part(model, "bias winobias", winobias_behaviour, sets, k, size.winobias) for k in kinds},
    }


# --- the studies --------------------------------------------------------------------------------------


def _part(model: Model, name: str, work: Callable[..., Any], *args: Any, **settings: Any) -> Any:
    """One resumable part: what was measured on these weights with these settings is not measured again.

    On a model that has no prepared folder nothing is kept: a notebook measures on the spot.
    """
    if not prepared.is_for(model):
        return work(model, *args, **settings)
    return resumed("heads", [name, model.hash, args, settings], lambda: work(model, *args, **settings))


def _avoided(induction: dict[str, Any]) -> list[Head]:
    """Heads that no control may contain: above 0.1 in the map (above the median where most heads are)."""
    mean = np.asarray(induction["mean"])
    return [(int(a), int(b)) for a, b in np.argwhere(mean > max(0.1, float(np.median(mean))))]


def _received(ranking: Sequence[Head], size: Size) -> list[Head]:
    """The induction heads whose keys are patched: the first that have heads before them."""
    return [(a, b) for a, b in ranking if a > 0][: size.receivers]


def study_induction() -> Path:
    """Maps, curve and paths of the induction heads (about 10 minutes on 2 idle cores)."""
    started, model, size = time.time(), load_subject(), size_here()
    maps = _part(model, "induction maps", induction_content, size)
    ranking = [(a, b) for a, b in maps["ranking"]]
    curve = _part(
        model, "induction ablation, 4 matched", induction_ablation, ranking, _avoided(maps["induction"]), size
    )
    paths = _part(model, "induction paths", induction_paths, _received(ranking, size), size)
    return write_table("heads_induction", model, time.time() - started, maps=maps, curve=curve, paths=paths)


def study_semantic() -> Path:
    """Maps and ablation of the semantic heads (about 3 minutes)."""
    started, model = time.time(), load_subject()
    part = _part(model, "semantic", semantic_content, size_here())
    return write_table("heads_semantic", model, time.time() - started, **part)


def _bias_parts(model: Model, size: Size) -> dict[str, Any]:
    looks = _part(model, "bias looks", bias_looks, size.swaps, size.schemas)
    chosen = _part(model, "bias chosen", bias_chosen, size.units)
    acts = _part(model, "bias acts", bias_acts, size.units)
    refers = _part(model, "bias refers", bias_refers, size.referents)
    sets = bias_sets(model, looks["ranking"], chosen, refers["ranking"])
    return {"looks": looks, "chosen": chosen, "acts": acts, "refers": refers, "sets": sets}


def study_bias() -> Path:
    """Attention gaps and causal effects of every head (about 15 minutes)."""
    started, model = time.time(), load_subject()
    return write_table("heads_bias", model, time.time() - started, **_bias_parts(model, size_here()))


def study_winobias() -> Path:
    """Behaviour before and after ablating the sets of heads that the bias study chose (about 15 minutes)."""
    started, model, size = time.time(), load_subject(), size_here()
    behaviour = _behaviour(model, _bias_parts(model, size)["sets"], size)
    return write_table("heads_winobias", model, time.time() - started, **behaviour)


def study_table() -> Path:
    """One row per head: every score with its interval, and q-values where there was a test."""
    induction, semantic, bias = (read_table(f"heads_{n}") for n in ("induction", "semantic", "bias"))
    maps = induction["maps"]
    columns = {name: maps[name] for name in ("previous", "duplicate", "induction", "natural", "copying")}
    columns |= {
        "semantic": semantic["report"],
        "bias_attention": bias["looks"]["report"],
        "winobias_attention": bias["looks"]["winobias_test"],
        "pronoun_ablation": bias["acts"]["ablation"],
        "pronoun_direct": bias["acts"]["direct"],
        "referent_patching": bias["refers"]["report"]["effect"],
    }
    shape = np.shape(columns["induction"]["mean"])
    table = prepared.path("heads", "heads.csv")
    table.parent.mkdir(parents=True, exist_ok=True)
    with open(table, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        parts = [(name, part) for name, m in columns.items() for part in ("mean", "low", "high", "q") if part in m]
        writer.writerow(["layer", "head", *(name if part == "mean" else f"{name}_{part}" for name, part in parts)])
        for layer, head in np.ndindex(*shape):
            writer.writerow([layer, head, *(columns[name][part][layer][head] for name, part in parts)])
    return table


STUDIES_OF_HEADS: dict[str, Callable[[], Path]] = {
    "heads-induction": study_induction,
    "heads-semantic": study_semantic,
    "heads-bias": study_bias,
    "heads-winobias": study_winobias,
    "heads-table": study_table,
}


def stored(name: str, model: Model) -> dict[str, Any] | None:
    """The table of a study if there is one and it belongs to these weights, else None."""
    return read_table(name) if has_table(name, model) else None


def content(name: str, model: Model, bias: dict[str, Any] | None = None) -> dict[str, Any]:
    """The stored study, or for another model the same measurements at ``QUICK`` size (one or two minutes).

    ``bias``: the content of that name, whose sets of heads ``winobias`` ablates; without it they are chosen again.
    """
    if table := stored(f"heads_{name}", model):
        return table
    if name == "semantic":
        return semantic_content(model, QUICK)
    if name == "induction":
        maps = induction_content(model, QUICK)
        ranking = maps["ranking"]
        return {
            "maps": maps,
            "curve": induction_ablation(model, ranking, _avoided(maps["induction"]), QUICK),
            "paths": induction_paths(model, _received(ranking, QUICK), QUICK),
        }
    if name == "winobias":
        sets = (bias or _bias_parts(model, QUICK))["sets"]
        return _behaviour(model, {n: [(a, b) for a, b in found] for n, found in sets.items()}, QUICK)
    return _bias_parts(model, QUICK)


def attempt(name: str, model: Model, bias: dict[str, Any] | None = None) -> dict[str, Any] | None:
    """``content``, or None where this model can't be measured so: the reason is printed instead."""
    try:
        return content(name, model, bias)
    except GlassboxError as reason:
        print(f"{name}: not measured on {model.name}. {reason}")
        return None
