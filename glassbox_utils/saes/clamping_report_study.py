"""Reporting the clamp: ``glassbox study clamp-report clamp-concepts clamp-costs``, on prompts that chose nothing."""

import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from glassbox_utils.core import prepared
from glassbox_utils.core.losses import text_losses
from glassbox_utils.core.models import Model
from glassbox_utils.core.prepared import load_subject
from glassbox_utils.core.session import progress
from glassbox_utils.core.skills import choice_right, held_texts
from glassbox_utils.core.statistics import Interval, bootstrap_ci
from glassbox_utils.core.studies import SEED, read_table, resumed, write_table
from glassbox_utils.core.text import tokenize
from glassbox_utils.saes import clamping, clamping_choice_study, clamping_study
from glassbox_utils.saes.clamping import Group
from glassbox_utils.steering import style

N_REPORT, N_BASELINE, N_SWEEP = 100, 50, 25
"""report prompts: for the demonstration and the unclamped model; for the main baselines; for all else. Fewer are every
second or every fourth, because neighbours in the list are alike (the first twenty are about the model itself)"""
BASELINES = ("system prompt", "mean difference", "learned vector")
SWEEP = (0.5, 0.7, 0.8, 1.0, 1.25, 1.6)
"""the demonstration's other strengths, from nothing to word salad"""
ADVERSARIAL_TOKENS = 20


def report_sizes() -> tuple[int, int, int]:
    """``N_REPORT``, ``N_BASELINE``, ``N_SWEEP`` at the size of the prepared folder, each a part of the one before."""
    sweep = prepared.sized(N_SWEEP, 4)
    return N_REPORT // N_SWEEP * sweep, N_BASELINE // N_SWEEP * sweep, sweep


def report_settings(
    selected: dict[str, Any], rows: Sequence[dict[str, Any]], there: Collection[str]
) -> list[tuple[str, float | None, int]]:
    """(method, strength, number of report prompts), what matters most first.

    ``rows``: what was tried on selection prompts; ``there``: the methods that this model has.
    """
    n_report, n_baseline, n_sweep = report_sizes()
    shown = clamping_study.demonstrated(selected)
    strengths = {"none": None, shown: selected[shown]["strength"], "system prompt": None}
    strengths |= {method: row["strength"] for method, row in selected.items()}
    if "random features" in there:
        strengths["random features"] = selected[shown]["strength"]
    if "random direction" in there:
        strengths["random direction"] = selected["learned vector"]["strength"]
    read = {m: row for m, row in selected.items() if m.startswith("several features")}
    readers = [clamping_study.demonstrated(read)] if read else []
    sizes = {m: n_report for m in ("none", shown, *readers)} | {m: n_baseline for m in BASELINES if m != shown}
    settings = [(method, s, sizes.get(method, n_sweep)) for method, s in strengths.items()]
    extra = {m: [r["strength"] for r in rows if r["method"] == m] for m in selected if m != "one feature"}
    extra[shown] = prepared.thinned(SWEEP, 3)
    settings += [(m, s, n_sweep) for m, given in extra.items() for s in given if s != strengths[m]]
    return settings


def _reported(
    model: Model, tools: clamping_study.Tools, method: str, strength: float | None, questions: Sequence[str]
) -> dict[str, Any]:
    texts = clamping_study.written_answers(model, tools, method, strength, questions)
    many = len(questions) > report_sizes()[-1]
    return {"answers": texts} | clamping_study.measured(model, questions, texts, relevance=many)


def reported(
    model: Model, tools: clamping_study.Tools, method: str, strength: float | None, questions: Sequence[str]
) -> dict[str, Any]:
    """One setting's answers and measures, from the cache if they are there."""
    key = ["report", questions, *clamping_study.cache_key(model, tools, method, strength)]
    return {"method": method, "strength": strength} | resumed(
        "clamp_report", key, _reported, model, tools, method, strength, questions
    )


def study_report() -> Path:
    """100 report prompts under the selected settings and all baselines; some of them over strengths; 50 adversarial."""
    start, model = time.time(), load_subject()
    tools, selected = clamping_study.chosen(model)
    given = clamping_study.prompts()
    questions = clamping_study.spread(given["report"], report_sizes()[0])
    asked = clamping_study.spread(given["adversarial"], prepared.sized(50, 10))
    settings = report_settings(selected, read_table("clamp_choose")["rows"], tools.found)
    rows = [
        reported(model, tools, method, strength, questions[:: len(questions) // n])
        for method, strength, n in progress(settings, "settings")
    ]
    adversarial = []
    for method in ("none", clamping_study.demonstrated(selected), "system prompt"):
        strength = selected.get(method, {}).get("strength")
        key = ["adversarial", asked, *clamping_study.cache_key(model, tools, method, strength)]
        how = (method, strength, asked, ADVERSARIAL_TOKENS)
        texts = resumed("clamp_report", [*key, ADVERSARIAL_TOKENS], clamping_study.written_answers, model, tools, *how)
        adversarial.append({"method": method, "strength": strength, "answers": texts})
    return write_table(
        "clamp_report", model, time.time() - start, prompts=questions, rows=rows, adversarial=adversarial
    )


def scores(row: dict[str, Any], plain: dict[str, Any], words: Sequence[str]) -> dict[str, NDArray]:
    """Each answer's concept, coherence and relevance in 0 to 1, and their harmonic mean (AxBench, arXiv 2501.17148).

    Concept: is a word mentioned? Coherence: the unclamped answers' perplexity over this answer's, at most 1, times its
    share of different word pairs. Relevance: the answer's, over the unclamped answers' mean, cut to 0 to 1.
    """
    ppl = np.exp(np.array(row["loss"]) / np.maximum(row["tokens"], 1))
    parts = {
        "concept": np.array(clamping.mentions(row["answers"], words), dtype=float),
        "coherence": np.minimum(1.0, clamping_study.perplexity(plain) / ppl) * style.distinct(row["answers"]),
        "relevance": np.clip(np.array(row["relevance"]) / max(np.mean(plain["relevance"]), 1e-6), 0, 1),
    }
    stacked = np.stack(list(parts.values()))
    harmonic = np.where((stacked > 0).all(0), 3 / (1 / np.maximum(stacked, 1e-9)).sum(0), 0.0)
    return parts | {"harmonic mean": harmonic}


def thinned(row: dict[str, Any], n: int) -> dict[str, Any]:
    """The row with every k-th answer only, so that ``n`` are left: settings are compared on the same prompts."""
    step = len(row["answers"]) // n
    return {k: v[::step] if isinstance(v, list) else v for k, v in row.items()}


def measures(row: dict[str, Any], plain: dict[str, Any]) -> dict[str, Interval]:
    """Every measure of one setting's answers with its bootstrap interval over prompts.

    ``perplexity ×``: under the unclamped model, times that of the unclamped answers to the same prompts. The component
    scores (see ``scores``) are there for settings whose relevance was measured.
    """
    words, landmarks = (
        clamping_study.prompts()["golden_gate"]["words"],
        clamping_study.prompts()["golden_gate"]["landmarks"],
    )
    base = thinned(plain, len(row["answers"]))

    def ratio(a: NDArray, b: NDArray, c: NDArray, d: NDArray) -> float:
        return float(np.exp(a.sum() / max(b.sum(), 1) - c.sum() / max(d.sum(), 1)))

    samples = {
        "mentions": clamping.mentions(row["answers"], words),
        "speaks as it": clamping.identifies(row["answers"], words),
        "other landmarks": clamping.mentions(row["answers"], landmarks),
        "distinct-2": style.distinct(row["answers"]),
        "words": style.length(row["answers"]),
    }
    if "relevance" in row:
        samples |= {"relevance (nats)": np.array(row["relevance"])} | scores(row, base, words)
    found = {name: bootstrap_ci(np.asarray(x, dtype=float), n_resamples=1000, seed=SEED) for name, x in samples.items()}
    losses = tuple(np.array(x, dtype=float) for x in (row["loss"], row["tokens"], base["loss"], base["tokens"]))
    return found | {"perplexity ×": bootstrap_ci(losses, ratio, n_resamples=1000, seed=SEED)}


# --- ten further concepts -----------------------------------------------------------------------------

N_CONCEPTS, N_CONCEPT, N_CONCEPT_SELECTION, CONCEPT_TOKENS = 10, 8, 4, 24
CONCEPT_STRENGTHS = (0.65, 1.0, 1.4)


def concept_of(name: str, model: Model, rows: Sequence[Any], plain: dict[str, Any]) -> dict[str, Any]:
    """One concept as the bridge's readers were chosen: features of its name, the strength by selection prompts."""
    words, found = clamping_study.prompts()["concepts"][name]["words"], clamping_study.role_saes(model)
    sae = found[clamping_study.main_layer(found, model)]
    tools = clamping_study.Tools({name: Group(tuple(clamping.feature(model, sae, i, unit) for i, unit in rows), name)})
    asked = concept_prompts()

    def run(split: str, strength: float) -> dict[str, Any]:
        texts = clamping_study.written_answers(model, tools, name, strength, asked[split], CONCEPT_TOKENS)
        row = {"answers": texts} | clamping_study.measured(model, asked[split], texts)
        return row | {"strength": strength} | clamping_study.summary(row, plain[split], words)

    best = clamping_choice_study.choose([run("selection", strength) for strength in CONCEPT_STRENGTHS])
    row = run("report", best["strength"])
    return {
        "concept": name,
        "features": [i for i, _ in rows],
        "strength": best["strength"],
        "mentioned": [float(x) for x in clamping.mentions(row["answers"], words)],
        "unclamped": [float(x) for x in clamping.mentions(plain["report"]["answers"], words)],
        **{k: row[k] for k in ("perplexity", "distinct", "answers")},
    }


def concept_prompts() -> dict[str, list[str]]:
    """The few prompts that each of the concepts is chosen and reported on: spread over the lists."""
    given, sizes = clamping_study.prompts(), {"selection": N_CONCEPT_SELECTION, "report": N_CONCEPT}
    return {split: clamping_study.spread(given[split], n) for split, n in sizes.items()}


def _plain_concepts(model: Model) -> dict[str, Any]:
    rows = {}
    for split, asked in concept_prompts().items():
        texts = clamping_study.written_answers(model, clamping_study.Tools({}), "none", None, asked, CONCEPT_TOKENS)
        rows[split] = {"answers": texts} | clamping_study.measured(model, asked, texts)
    return rows


def study_concepts() -> Path:
    """Further concepts, written down before any was run, by their names' features; failures stay in the table."""
    start, model = time.time(), load_subject()
    table, found = read_table("clamp_choose"), clamping_study.role_saes(model)
    prints = clamping_study.fingerprint(found[clamping_study.main_layer(found, model)])
    ranked = table["ranked"][str(table["main_layer"])]["group"]
    plain = resumed("clamp_concepts", ["plain", model.hash, concept_prompts(), CONCEPT_TOKENS], _plain_concepts, model)
    rows, silent = [], []
    written = list(clamping_study.prompts()["concepts"])
    for name in progress(written[: prepared.sized(N_CONCEPTS, 3)], "concepts"):
        if not ranked[name]:
            silent.append(name)
            continue
        key = [name, prints, model.hash, ranked[name], CONCEPT_STRENGTHS, concept_prompts(), CONCEPT_TOKENS]
        rows.append(resumed("clamp_concepts", key, concept_of, name, model, ranked[name], plain))
    if not rows:
        raise clamping.ClampError(f"Of the concepts {', '.join(silent)} none has a feature that is its words' own.")
    return write_table("clamp_concepts", model, time.time() - start, rows=rows, without_features=silent)


# --- side effects, and ablation -----------------------------------------------------------------------


def fact_losses(model: Model, kind: str) -> list[float]:
    """Loss of each fact's ending given its beginning, nats per token. ``kind``: facts (the bridge) or other_facts."""
    values = []
    for start, end in clamping_study.prompts()[kind]:
        ids = tokenize(model, start + end)
        n = int(ids.attention_mask.sum() - tokenize(model, start).attention_mask.sum())
        with torch.no_grad():
            logp = model.hf(**ids.inputs).logits[0, -n - 1 : -1].float().log_softmax(-1)
        values.append(round(-float(logp.gather(-1, ids.input_ids[0, -n:, None]).mean()), 4))
    return values


def costs_of(model: Model, tools: clamping_study.Tools, method: str, strength: float | None) -> dict[str, Any]:
    """Losses on held-out text and right answers to multiple choice, under one setting."""
    with tools.applied(model, method, strength):
        loss, tokens = text_losses(model, held_texts(prepared.sized(12, 4)), max_tokens=96)
        right = choice_right(model, prepared.sized(30, 12))
    return {"loss": np.round(loss, 3).tolist(), "tokens": tokens.tolist(), "choice": right}


def ablations(model: Model, ranked: dict[str, Any], made: dict[str, Any]) -> list[dict[str, Any]]:
    """Facts about the bridge and about other landmarks, with features set to zero at all positions."""
    found = clamping_study.role_saes(model)
    middle = clamping_study.main_layer(found, model)
    here = ranked[str(middle)]
    single = here["single"]["golden gate"]
    sets = {
        "cleanest feature": [max(single, key=lambda r: r["auc"])["feature"]] if single else [],
        "the name's features": [i for i, _ in here["group"]["golden gate"]],
        "the learned features": [i for i, _ in made["features"]],
        "random features": [i for i, _ in here["random"]],
    }
    result = [{"ablated": "nothing", "n": 0} | {kind: fact_losses(model, kind) for kind in ("facts", "other_facts")}]
    for name, chosen_features in sets.items():
        if not chosen_features:
            continue
        group = Group(tuple(clamping.feature(model, found[middle], i, 1.0) for i in chosen_features), name)
        with clamping.clamp(model, group, mode="ablate"):
            losses = {kind: fact_losses(model, kind) for kind in ("facts", "other_facts")}
        result.append({"ablated": name, "n": len(chosen_features)} | losses)
    return result


def study_costs() -> Path:
    """Held-out text and multiple choice at the sweet spot; what ablation does to facts."""
    start, model = time.time(), load_subject()
    tools, selected = clamping_study.chosen(model)
    rows, shown = [], clamping_study.demonstrated(selected)
    methods = [m for m in (shown, "learned vector", "mean difference") if m in selected]
    settings = [("none", None)] + [(m, selected[m]["strength"]) for m in methods]
    if "random features" in tools.found:
        settings.append(("random features", selected[shown]["strength"]))
    for method, strength in settings:
        key = ["costs", *clamping_study.cache_key(model, tools, method, strength)]
        rows.append({"method": method, "strength": strength} | resumed(
            "clamp_costs", key, costs_of, model, tools, method, strength))  # fmt: skip
    table, found = read_table("clamp_choose"), clamping_study.role_saes(model)
    main, made = str(clamping_study.main_layer(found, model)), table["learned"]
    key = [
        "ablation",
        model.hash,
        clamping_study.fingerprint(found[int(main)]),
        table["ranked"][main],
        made["features"],
    ]
    ablated = resumed("clamp_costs", key, ablations, model, table["ranked"], made)
    return write_table("clamp_costs", model, time.time() - start, rows=rows, ablation=ablated)


STUDIES_OF_CLAMPING = {
    "clamp-choose": clamping_choice_study.study_choose,
    "clamp-report": study_report,
    "clamp-concepts": study_concepts,
    "clamp-costs": study_costs,
}
