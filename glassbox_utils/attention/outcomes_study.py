"""The long runs behind notebook 02, second part: stereotypes, and what carries them.

``heads-bias`` says where heads look and what each does alone, ``heads-outcomes`` what sets of heads carry in several
outcomes and what else goes with them, ``heads-crossed`` keeps what cases share (jobs, sentence by sentence),
``heads-table`` joins all to ``heads/heads.csv``.
"""

import csv
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from glassbox_utils.attention import heads, outcomes
from glassbox_utils.attention.bias import (
    Swap,
    attention_gap,
    by_job,
    by_occupations,
    job_pairs,
    job_parts,
    of_units,
    pronoun_choice,
    pronoun_effects,
    pronoun_effects_guessed,
    pronoun_gap,
    referent_patching,
    swaps,
    until_pronoun,
    winobias,
    winobias_gap,
    winobias_preference,
)
from glassbox_utils.attention.induction import in_context_score
from glassbox_utils.attention.study import (
    FULL,
    Size,
    as_map,
    leading,
    part,
    rounded,
    size_here,
    study_induction,
    study_semantic,
)
from glassbox_utils.core import prepared
from glassbox_utils.core.interventions import Head
from glassbox_utils.core.models import Model, ModelError
from glassbox_utils.core.prepared import load_subject
from glassbox_utils.core.statistics import spearman
from glassbox_utils.core.studies import read_table, write_table
from glassbox_utils.core.text import following

K = 5
"""heads in a set whose outcomes are measured: a number of this project's, not chosen by its result"""
LOOKS = 0.02
"""attention gap on selection prompts, in either direction, from which a head is kept out of every random set"""


def some(items: Sequence[Any], n: int) -> list[Any]:
    """n items, evenly spread."""
    return list(items) if n >= len(items) else [items[i * len(items) // n] for i in range(n)]


# --- where heads look, what each does alone -----------------------------------------------------------


def bias_looks(model: Model, n_swaps: int, n_schemas: int) -> dict[str, Any]:
    """The stereotype gap of attention: our templates (both splits) and WinoBias type 1 (dev and test).

    ``ranking``: heads that look at the stereotype's occupation, ``against``: at the other one, by selection prompts.
    """
    result: dict[str, Any] = {}
    for split in ("selection", "report"):
        pairs = some(swaps(split), n_swaps)
        gaps = attention_gap(model, pairs)
        shared = zip(*job_pairs(pairs), strict=True)
        result[split] = as_map(by_occupations(gaps, pairs), *shared) | {"pairs": len(pairs)}
        if split == "report":
            chosen = np.array(result["selection"]["mean"])
            result |= {"ranking": leading(chosen, 10), "against": leading(-chosen, 10)}
            shown = [*result["ranking"][:6], *result["against"][:6]]
            result["rows"] = {"heads": shown, "gap": rounded(torch.stack([gaps[:, a, b] for a, b in shown]))}
    for half in ("dev", "test"):
        schemas = [s for *_, s in until_pronoun(some(winobias(1, half), n_schemas))]
        jobs = [s.referent for s in schemas], [s.other for s in schemas]
        result[f"winobias_{half}"] = as_map(winobias_gap(model, schemas), *jobs)
    return result


def bias_chosen(model: Model, units: int = FULL.units) -> list[Head]:
    """The heads that carry most of the pronoun gap on selection prompts, by a first-order guess."""
    return leading(pronoun_effects_guessed(model, "selection", units).mean(0), 10)


def bias_acts(model: Model, units: int = FULL.units) -> dict[str, Any]:
    """Pronoun choice after one occupation, fresh prompts: exact mean ablation of every head, direct attribution.

    Pairs of jobs are what varies. The templates are the same for each, and no claim goes beyond them.
    """
    gap, ablated, direct = pronoun_effects(model, "fresh", units=units)
    guess = pronoun_effects_guessed(model, "fresh", units)
    jobs = of_units(pronoun_choice(model, "fresh", units))[0]
    return {
        "gap": rounded(gap),
        "ablation": as_map(ablated, jobs),
        "direct": as_map(direct, jobs),
        "gradient_agreement": asdict(spearman(guess.mean(0), ablated.mean(0)).rho),
    }


def asked(model: Model, split: heads.Split | Literal["fresh"]) -> list[Swap]:
    """The pairs that can be patched and read: as many tokens with either pronoun, and two occupations that begin with
    different tokens. ModelError where the tokenizer leaves fewer than two."""
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


def jobs_of(pairs: Sequence[Swap]) -> tuple[list[str], list[str]]:
    """What pairs of sentences share: the man's and the woman's job."""
    return [p.male for p in pairs], [p.female for p in pairs]


def bias_refers(model: Model, n: int) -> dict[str, Any]:
    """Who was meant? Pronoun-swap patching: first-order on selection pairs, exact on twice as many of fresh jobs."""
    chosen = heads.shuffled(asked(model, "selection"), n, seed=3)
    total, guess = referent_patching(model, chosen, "gradient")
    result = {"selection": {"total": rounded(total), "effect": as_map(guess, *jobs_of(chosen))}}
    reported = heads.shuffled(asked(model, "fresh"), 2 * n, seed=4)
    total, effect = referent_patching(model, reported, "exact")
    _, guess = referent_patching(model, reported, "gradient")
    agreement = spearman(guess.mean(0), effect.mean(0))
    result["report"] = {"total": rounded(total), "effect": as_map(effect, *jobs_of(reported))}
    result["gradient_agreement"] = asdict(agreement.rho)
    return result | {"ranking": leading(result["selection"]["effect"]["mean"], 10)}


def bias_parts(model: Model, size: Size) -> dict[str, Any]:
    """All that ``heads_bias`` holds, from the parts that are kept or measured now."""
    return {
        "looks": part(model, "stereotype: looks", bias_looks, size.swaps, size.schemas),
        "chosen": part(model, "stereotypes: chosen", bias_chosen, size.units),
        "acts": part(model, "stereotype: acts, fresh", bias_acts, 2 * size.units),
        "refers": part(model, "stereotype: refers, fresh", bias_refers, size.referents),
    }


def study_bias() -> Path:
    """Attention gaps and causal effects of every head (about 6 minutes)."""
    started, model = time.time(), load_subject()
    return write_table("heads_bias", model, time.time() - started, **bias_parts(model, size_here()))


# --- what sets of heads carry -------------------------------------------------------------------------


def outcome_sets(model: Model, bias: dict[str, Any], draws: int) -> dict[str, list[Head]]:
    """The sets whose outcomes are measured: chosen on selection prompts in four ways, and random ones.

    No random set holds a chosen head, a head that looks either way by more than ``LOOKS``, or one that shares a
    key-value head with any of these.
    """
    looks = bias["looks"]
    ways = {"looking": looks["ranking"], "against": looks["against"], "acting": bias["chosen"]}
    ways["referring"] = bias["refers"]["ranking"]
    k = max(1, min(K, model.n_layers * model.n_heads // 8))
    sets: dict[str, list[Head]] = {"none": []}
    sets |= {name: [(a, b) for a, b in ranking[:k]] for name, ranking in ways.items()}
    gap = np.abs(np.array(looks["selection"]["mean"]))
    least = max(LOOKS, float(np.quantile(gap, 0.9)))
    avoid = [(int(a), int(b)) for a, b in np.argwhere(gap > least)] + [h for found in sets.values() for h in found]
    for name, n in (("acting", draws), ("looking", max(2, draws // 3))):
        drawn = heads.control_sets(model, sets[name], avoid, n, 70)
        sets |= {f"random as {name} {i}": found for i, found in enumerate(drawn)}
    return sets


def outcome(model: Model, name: str, sets: Sequence[Sequence[Head]], size: Size) -> Any:
    """One outcome with each set mean-ablated, [set][unit]: see ``UNITS``."""
    units = 2 * size.units if name in ("fresh", "said") else size.units  # twice as many fresh jobs
    if name in ("report", "fresh", "defined"):
        gap = pronoun_gap(model, sets, name, units)  # type: ignore[arg-type]
        return rounded(by_job(gap, pronoun_choice(model, name, units)))  # type: ignore[arg-type]
    if name == "said":
        said = outcomes.pronouns_said(model, sets, "fresh", units)
        jobs = sorted(set(zip(said.is_male, said.job, strict=True)), reverse=True)
        rows = [[i for i, pair in enumerate(zip(said.is_male, said.job, strict=True)) if pair == job] for job in jobs]
        leaning, together = (np.stack([x[:, r].mean(1) for r in rows], 1) for x in (said.leaning, said.together))
        is_male = [male for male, _ in jobs]
        return {
            "leaning": {"values": rounded(leaning), "is_male": is_male},
            "together": {"values": rounded(together, 5), "is_male": is_male},
        }
    if name == "text":
        return rounded(in_context_score(model, sets, size.texts, min(120, model.n_context))[1])
    reference = outcomes.sentence_means(model)
    if name == "winogender":
        return rounded(outcomes.winogender_gap(model, sets, reference, some(outcomes.winogender(), size.winogender)))
    if name == "stereoset":
        return rounded(outcomes.stereoset_gap(model, sets, reference, some(outcomes.stereoset(), size.stereoset)))
    kind: Literal[1, 2] = 1 if name == "winobias 1" else 2
    schemas = some(winobias(kind, "test"), size.winobias)
    values = winobias_preference(model, schemas, sets, reference)
    jobs = sorted({s.referent for s in schemas})
    by = [[i for i, s in enumerate(schemas) if s.referent == job] for job in jobs]
    return rounded(np.stack([values[:, i].mean(1) for i in by], 1))


UNITS = {
    "report": "pairs of jobs",
    "fresh": "pairs of jobs",
    "winogender": "pairs of jobs",
    "winobias 1": "jobs",
    "winobias 2": "jobs",
    "stereoset": "target words",
    "defined": "pairs of words",
    "leaning": "jobs",
    "together": "jobs",
    "text": "texts",
}
"""outcome -> what varies in it, and is resampled"""


def study_outcomes() -> Path:
    """Ten outcomes with every set ablated (about an hour of one core)."""
    started, model, size = time.time(), load_subject(), size_here()
    sets = outcome_sets(model, bias_parts(model, size), size.draws)
    measured = [name for name in UNITS if name not in ("leaning", "together")]
    found = {name: part(model, "outcome", outcome, name, list(sets.values()), size) for name in [*measured, "said"]}
    found |= found.pop("said")
    return write_table(
        "heads_outcomes", model, time.time() - started, size=asdict(size), sets=sets, units=UNITS, outcomes=found
    )


def crossed_looks(model: Model, n_swaps: int) -> dict[str, Any]:
    """Each job's part in the attention gap of every head, both splits: what deals jobs to two sides by lot needs."""
    found: dict[str, Any] = {}
    for split in ("selection", "report"):
        pairs = some(swaps(split), n_swaps)
        gaps, of = by_occupations(attention_gap(model, pairs), pairs), job_pairs(pairs)
        men, women, parts = job_parts(gaps, of)
        alone = np.stack([parts[men.index(a)] - parts[len(men) + women.index(b)] for a, b in of])
        left = float(((gaps - alone) ** 2).sum() / ((gaps - gaps.mean(0)) ** 2).sum())
        found[split] = {"men": men, "women": women, "parts": rounded(parts), "explained": round(1 - left, 4)}
    return found


def crossed_sentences(model: Model, kind: Literal[1, 2], sets: Sequence[Sequence[Head]], n: int) -> dict[str, Any]:
    """WinoBias sentence by sentence [set][sentence], with both jobs of each: they are crossed."""
    schemas = some(winobias(kind, "test"), n)
    values = winobias_preference(model, schemas, sets, outcomes.sentence_means(model))
    return {"referent": [s.referent for s in schemas], "other": [s.other for s in schemas], "values": rounded(values)}


def study_crossed() -> Path:
    """What cases share: each job's part in the attention gaps, and WinoBias sentence by sentence (about 5 minutes)."""
    started, model, size = time.time(), load_subject(), size_here()
    every = read_table("heads_outcomes")["sets"]
    sets: dict[str, list[Head]] = {name: [(a, b) for a, b in every[name]] for name in ("none", "acting", "looking")}
    content: dict[str, Any] = {"sets": sets, "looks": part(model, "crossed: looks", crossed_looks, size.swaps)}
    for kind in (1, 2):
        values = part(model, "crossed: winobias", crossed_sentences, kind, list(sets.values()), size.winobias)
        content[f"winobias {kind}"] = values
    return write_table("heads_crossed", model, time.time() - started, **content)


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
    "heads-outcomes": study_outcomes,
    "heads-crossed": study_crossed,
    "heads-table": study_table,
}
