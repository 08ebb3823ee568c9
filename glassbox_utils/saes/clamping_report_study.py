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
from glassbox_utils.core.statistics import Interval, bootstrap_ci, exact_ci
from glassbox_utils.core.studies import SEED, read_table, resumed, write_table
from glassbox_utils.core.text import tokenize
from glassbox_utils.saes import clamping, clamping_choice_study, clamping_study, detection, read_write
from glassbox_utils.saes.clamping import Group
from glassbox_utils.steering import style

N_REPORT, N_SWEEP = 50, 25
"""report prompts: at the strength that was selected; at all others. They are spread over the list, because neighbours
in it are alike (the first twenty are about the model itself); the other half of the list has met nothing yet"""
SWEEP = (0.5, 0.75, 1.35, 1.8)
"""strengths of the clamp that is shown, as a share of the selected one: from nothing to word salad"""
ADVERSARIAL_TOKENS = 24


def report_sizes() -> tuple[int, int]:
    """``N_REPORT``, ``N_SWEEP`` at the size of the prepared folder, the second a part of the first."""
    sweep = prepared.sized(N_SWEEP, 4)
    return N_REPORT // N_SWEEP * sweep, sweep


def report_settings(
    selected: dict[str, Any], rows: Sequence[dict[str, Any]], there: Collection[str]
) -> list[tuple[str, float | None, int]]:
    """(method, strength, number of report prompts), what matters most first.

    ``rows``: what was tried on selection prompts; ``there``: the methods that this model has. Controls are pushed as
    the clamp that is shown, the control of the learned features holds their values.
    """
    n_report, n_sweep = report_sizes()
    shown = clamping_study.demonstrated(selected)
    strengths: dict[str, float | None] = {"none": None, shown: selected[shown]["strength"], "system prompt": None}
    strengths |= {method: row["strength"] for method, row in selected.items()}
    like = clamping_study.imitated(selected)
    for method in there:
        model_of = like.get(clamping_study.family(method))
        if method not in strengths and model_of:
            strengths[method] = selected[model_of]["strength"]
    settings = [(method, s, n_report) for method, s in strengths.items()]
    extra = {shown: [round(share * selected[shown]["strength"], 4) for share in prepared.thinned(SWEEP, 3)]}
    for m in CURVES:
        extra[m] = sorted({*extra.get(m, ()), *(r["strength"] for r in rows if r["method"] == m and m in selected)})
    return settings + [(m, s, n_sweep) for m, given in extra.items() for s in given if s != strengths[m]]


CURVES = (clamping_study.READERS, clamping_study.LEARNED, "learned vector", "mean difference")
"""methods whose other strengths are reported too, on fewer prompts"""


def _reported(
    model: Model, tools: clamping_study.Tools, method: str, strength: float | None, questions: Sequence[str]
) -> dict[str, Any]:
    texts = clamping_study.written_answers(model, tools, method, strength, questions)
    return {"answers": texts} | clamping_study.measured(model, questions, texts)


def reported(
    model: Model, tools: clamping_study.Tools, method: str, strength: float | None, questions: Sequence[str]
) -> dict[str, Any]:
    """One setting's answers and measures, from the cache if they are there."""
    key = ["report", questions, *clamping_study.cache_key(model, tools, method, strength)]
    return {"method": method, "strength": strength} | resumed(
        "clamp_report", key, _reported, model, tools, method, strength, questions
    )


def study_report() -> Path:
    """Report prompts under the selected settings and all controls, some of them over strengths; adversarial ones."""
    start, model = time.time(), load_subject()
    tools, selected = clamping_study.chosen(model)
    given = clamping_study.prompts()
    questions = clamping_study.spread(given["report"], report_sizes()[0])
    asked = clamping_study.spread(given["adversarial"], prepared.sized(len(given["adversarial"]), 10))
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
        adversarial.append(
            {"method": method, "strength": strength, "answers": texts, "later": clamping_study.later(model, texts)}
        )
    return write_table(
        "clamp_report", model, time.time() - start, prompts=questions, rows=rows, adversarial=adversarial
    )


def thinned(row: dict[str, Any], n: int) -> dict[str, Any]:
    """The row with every k-th answer only, so that ``n`` are left: settings are compared on the same prompts."""
    step = len(row["answers"]) // n
    return {k: v[::step] if isinstance(v, list) else v for k, v in row.items()}


def measures(row: dict[str, Any], plain: dict[str, Any]) -> dict[str, Interval]:
    """Every measure of one setting's answers with its interval over prompts (exact for shares, else bootstrap).

    ``mentions`` counts any of the concept's words after ``LATER`` tokens, ``names it`` only the first, its name.
    ``perplexity ×``: under the unclamped model, times that of the unclamped answers to the same prompts; ``relevance
    ×``: nats by which an answer's own question makes it likelier than another one, times the unclamped answers'.
    ``distinct-2 of the set`` falls with the number of answers, and a resample of prompts repeats some of them, so its
    interval comes from halves of the prompts: between the lowest and the highest of twenty.
    """
    page = clamping_study.prompts()["golden_gate"]
    base = thinned(plain, len(row["answers"]))

    def price(a: NDArray, b: NDArray, c: NDArray, d: NDArray) -> float:
        return float(np.exp(a.sum() / max(b.sum(), 1) - c.sum() / max(d.sum(), 1)))

    def times(a: NDArray, b: NDArray) -> float:
        return float(a.mean() / max(b.mean(), 1e-6))

    samples = {
        "mentions": clamping.mentions(row["later"], page["words"]),
        "names it": clamping.mentions(row["later"], page["words"][:1]),
        "speaks as it": clamping.identifies(row["answers"], page["words"]),
        "other landmarks": clamping.mentions(row["answers"], page["landmarks"]),
    }
    found = {name: exact_ci(int(np.sum(x)), len(x)) for name, x in samples.items()}
    words = np.asarray(style.length(row["answers"]), dtype=float)
    losses = tuple(np.array(x, dtype=float) for x in (row["loss"], row["tokens"], base["loss"], base["tokens"]))
    related = tuple(np.array(x["relevance"], dtype=float) for x in (row, base))
    return found | {
        "words": bootstrap_ci(words, n_resamples=1000, seed=SEED),
        "perplexity ×": bootstrap_ci(losses, price, n_resamples=1000, seed=SEED),
        "relevance ×": bootstrap_ci(related, times, n_resamples=1000, seed=SEED),
        "distinct-2 of the set": _over_halves(row["answers"]),
    }


def _over_halves(answers: Sequence[str]) -> Interval:
    """Share of different word pairs over all answers, between the lowest and highest of twenty halves, which repeat
    themselves less: shifted so that their mean is the whole's."""
    rng, whole = np.random.default_rng(SEED), style.distinct_over(answers)
    halves = [
        style.distinct_over([answers[i] for i in rng.permutation(len(answers))[: max(1, len(answers) // 2)]])
        for _ in range(20)
    ]
    shift = whole - float(np.mean(halves))
    return Interval(whole, min(halves) + shift, max(halves) + shift, len(answers))


# --- ten further concepts -----------------------------------------------------------------------------

N_CONCEPTS, N_CONCEPT, N_CONCEPT_SELECTION, CONCEPT_TRIED = 10, 20, 8, 2
"""concepts; report and selection prompts of each; features of each that are tried by generation"""
CONCEPT_PUSHES = (0.3, 0.4, 0.55)


def ranked_for(name: str, model: Model) -> dict[str, Any]:
    """The features that read a concept, the best writers first, and a random one of those that fire on other texts,
    another one for each concept."""
    page, sae = clamping_study.prompts(), clamping_study.held_sae(model)
    words, sentences = (page["concepts"][name][k] for k in ("words", "sentences"))
    codes = clamping_choice_study.concept_codes(model, sae, name)
    probed = concept_prompts()["selection"][: clamping_choice_study.N_PROBED]
    writes = read_write.written(model, sae, sentences, page["train"]["other"])
    found = [vars(c) for c in read_write.candidates(model, sae, codes, words, probed, writes)]
    alive = set((codes.others.amax(0) > 0).nonzero().flatten().tolist()) - {c["feature"] for c in found}
    rng = np.random.default_rng([SEED, list(page["concepts"]).index(name)])
    drawn = int(rng.choice(sorted(alive))) if alive else None
    return {"found": found, "random": drawn}


def held_for(
    name: str, model: Model, plain: dict[str, Any], split: str, feature: int, strength: float
) -> dict[str, Any]:
    """Answers with one feature pushed, and their measures for a concept."""
    words, asked = clamping_study.prompts()["concepts"][name]["words"], concept_prompts()[split]
    tools = clamping_study.Tools({
        name: read_write.pushed(model, clamping_study.held_sae(model), [feature], name)
    })  # fmt: skip
    texts = clamping_study.written_answers(model, tools, name, strength, asked)
    row = {"answers": texts} | clamping_study.measured(model, asked, texts)
    return row | {"feature": feature, "strength": strength} | clamping_study.summary(row, plain[split], words)


KEPT = ("feature", "strength", "perplexity", "distinct", "relevance", "answers")


def concept_of(name: str, model: Model, plain: dict[str, Any], found: Sequence[int]) -> dict[str, Any]:
    """One concept by the bridge's rule: of the features that read it the best writers, one of them and its strength by
    generation on selection prompts, then report prompts."""
    words = clamping_study.prompts()["concepts"][name]["words"]
    pushes, first = prepared.thinned(CONCEPT_PUSHES, 2), found[: prepared.sized(CONCEPT_TRIED, 1)]
    tried = [held_for(name, model, plain, "selection", i, s) for i in first for s in pushes]
    if not tried:
        return {"concept": name, "feature": None}
    best = clamping_choice_study.choose(tried)
    row = held_for(name, model, plain, "report", best["feature"], best["strength"])
    return {
        "concept": name,
        "selection": {k: best[k] for k in clamping_study.GOAL},
        "mentioned": [float(x) for x in clamping.mentions(row["later"], words)],
        "unclamped": [float(x) for x in clamping.mentions(plain["report"]["later"], words)],
        **{k: row[k] for k in KEPT},
    }


def random_of(name: str, model: Model, plain: dict[str, Any], feature: int, strength: float) -> dict[str, Any]:
    """A concept's random feature, pushed as much as the one that was chosen, on its report prompts."""
    row = held_for(name, model, plain, "report", feature, strength)
    return {k: row[k] for k in ("mention", *KEPT)}


def concept_prompts() -> dict[str, list[str]]:
    """The few prompts that each of the concepts is chosen and reported on: spread over the lists."""
    given = clamping_study.prompts()
    sizes = {"selection": prepared.sized(N_CONCEPT_SELECTION, 4), "report": prepared.sized(N_CONCEPT, 8)}
    return {split: clamping_study.spread(given[split], n) for split, n in sizes.items()}


def _plain_concepts(model: Model) -> dict[str, Any]:
    rows = {}
    for split, asked in concept_prompts().items():
        texts = clamping_study.written_answers(model, clamping_study.Tools({}), "none", None, asked)
        rows[split] = {"answers": texts} | clamping_study.measured(model, asked, texts)
    return rows


def study_concepts() -> Path:
    """Further concepts, written down before any was run, by the bridge's rule; failures stay in the table."""
    start, model = time.time(), load_subject()
    prints = clamping_study.fingerprint(clamping_study.held_sae(model))
    plain = resumed("clamp_concepts", ["plain", model.hash, concept_prompts()], _plain_concepts, model)
    rows, d_sae = list[dict[str, Any]](), clamping_study.held_sae(model).cfg.d_sae
    written = list(clamping_study.prompts()["concepts"])
    for name in progress(written[: prepared.sized(N_CONCEPTS, 3)], "concepts"):
        shape = [read_write.N_NAME, read_write.N_SENTENCE, read_write.PROBE, CONCEPT_TRIED, CONCEPT_PUSHES]
        key = [name, prints, model.hash, "by gradient", shape, concept_prompts(), clamping_study.LATER, "selection"]
        ranked = resumed("clamp_concepts", ["ranked", *key], ranked_for, name, model)
        found, drawn = [c["feature"] for c in ranked["found"]], ranked["random"]
        row = resumed("clamp_concepts", key, concept_of, name, model, plain, found)
        row["candidate"] = next((c for c in ranked["found"] if c["feature"] == row["feature"]), None)
        row["random"] = None
        if row["candidate"] and drawn is not None:
            given = (name, model, plain, drawn, row["strength"])
            row["random"] = resumed("clamp_concepts", ["random", drawn, row["strength"], *key], random_of, *given)
        rows.append(row)
    silent = [row["concept"] for row in rows if row["feature"] is None]
    if rows := [row for row in rows if row["feature"] is not None]:
        return write_table(
            "clamp_concepts", model, time.time() - start, rows=rows, without_features=silent, d_sae=d_sae
        )
    raise clamping.ClampError(f"Of the concepts {', '.join(silent)} none has a feature that is its words' own.")


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


def active_controls(model: Model, sae: Any, n: int, like: float, seed: int = SEED) -> list[int]:
    """``n`` features that fire on the facts' texts about as much as ``like`` (mean activation), drawn among the next.

    A random feature is silent there, and taking it away could not change anything.
    """
    texts = [start + end for kind in ("facts", "other_facts") for start, end in clamping_study.prompts()[kind]]
    mean = detection.text_scores(model, sae, texts).mean(0)
    near = (mean - like).abs().masked_fill(mean == 0, float("inf")).argsort()[: 8 * n].tolist()
    return sorted(np.random.default_rng(seed).permutation(near)[:n].tolist())


def ablations(model: Model, features: dict[str, Any], single: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Facts about the bridge and about other landmarks, with features set to zero at all positions.

    The control of the name's features are features that are as active on these texts.
    """
    sae = clamping_study.held_sae(model)
    named = [i for i, _ in features["readers"]]
    sets = {
        "cleanest feature": [max(single, key=lambda r: r["auc"])["feature"]] if single else [],
        "best single writer": [i for i, _ in features.get("one feature", [])],
        "the name's features": named,
        "the learned features": [i for i, _ in features["learned features"]],
    }
    if named:
        texts = [start + end for start, end in clamping_study.prompts()["facts"]]
        usual = float(detection.text_scores(model, sae, texts)[:, named].mean())
        sets["features as active"] = active_controls(model, sae, len(named), usual)
    result = [{"ablated": "nothing", "n": 0} | {kind: fact_losses(model, kind) for kind in ("facts", "other_facts")}]
    for name, chosen_features in sets.items():
        if not chosen_features:
            continue
        group = Group(tuple(clamping.feature(model, sae, i, 1.0) for i in chosen_features), name)
        with clamping.clamp(model, group, mode="ablate"):
            losses = {kind: fact_losses(model, kind) for kind in ("facts", "other_facts")}
        result.append({"ablated": name, "n": len(chosen_features)} | losses)
    return result


def study_costs() -> Path:
    """Held-out text and multiple choice at the selected strength; what ablation does to facts."""
    start, model = time.time(), load_subject()
    tools, selected = clamping_study.chosen(model)
    rows, shown = [], clamping_study.demonstrated(selected)
    like = clamping_study.imitated(selected)
    costly = dict.fromkeys((shown, like.get("random push"), clamping_study.LEARNED, "mean difference"))
    settings: list[tuple[str, float | None]] = [("none", None)]
    settings += [(m, selected[m]["strength"]) for m in costly if m in selected]
    settings += [(f"{k} 0", selected[m]["strength"]) for k, m in like.items() if m == shown and f"{k} 0" in tools.found]
    for method, strength in settings:
        key = ["costs", *clamping_study.cache_key(model, tools, method, strength)]
        rows.append({"method": method, "strength": strength} | resumed(
            "clamp_costs", key, costs_of, model, tools, method, strength))  # fmt: skip
    table = read_table("clamp_choose")
    weights = [model.hash, clamping_study.fingerprint(clamping_study.held_sae(model))]
    key = ["ablation", *weights, table["features"], table["candidates"]]
    ablated = resumed("clamp_costs", key, ablations, model, table["features"], table["candidates"])
    return write_table("clamp_costs", model, time.time() - start, rows=rows, ablation=ablated)


STUDIES_OF_CLAMPING = {
    "clamp-choose": clamping_choice_study.study_choose,
    "clamp-report": study_report,
    "clamp-concepts": study_concepts,
    "clamp-costs": study_costs,
}
