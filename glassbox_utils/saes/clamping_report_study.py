"""Reporting the clamp, on prompts that chose nothing: ``glassbox study clamp-report clamp-concepts clamp-costs
clamp-controls``."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from glassbox_utils.core import prepared
from glassbox_utils.core.losses import text_losses
from glassbox_utils.core.models import Model
from glassbox_utils.core.prepared import load_subject
from glassbox_utils.core.session import progress
from glassbox_utils.core.skills import choice_right, held_texts
from glassbox_utils.core.statistics import Interval, bootstrap_ci, exact_ci
from glassbox_utils.core.studies import SEED, read_table, resumed, write_table
from glassbox_utils.core.text import tokenize
from glassbox_utils.saes import clamping, clamping_choice_study, clamping_study, detection, learning, read_write
from glassbox_utils.saes.clamping import Group
from glassbox_utils.steering import style

N_REPORT, N_SWEEP = 50, 25
"""report prompts: at the strength that was selected; at all others. They are spread over the list, because neighbours
in it are alike (the first twenty are about the model itself); the other half of the list has met nothing yet"""
SWEEP = (0.5, 0.75, 1.35, 1.8)
"""strengths of the clamp that is shown, as a share of the selected one: from nothing to word salad; those above 1 for
all ``CURVES``"""


def report_sizes() -> tuple[int, int]:
    """``N_REPORT``, ``N_SWEEP`` at the size of the prepared folder, the second a part of the first."""
    sweep = prepared.sized(N_SWEEP, 4)
    return N_REPORT // N_SWEEP * sweep, sweep


def report_settings(
    selected: dict[str, Any], rows: Sequence[dict[str, Any]], sizes: Mapping[str, float]
) -> list[tuple[str, float | None, int]]:
    """(method, strength, number of report prompts), what matters most first.

    ``rows``: what was tried on selection prompts; ``sizes``: of each method's push at strength 1
    (``clamping_study.push_sizes``). Random draws are pushed as the method whose control they are.
    """
    n_report, n_sweep = report_sizes()
    shown = clamping_study.demonstrated(selected)
    strengths: dict[str, float | None] = {"none": None, shown: selected[shown]["strength"], "system prompt": None}
    strengths |= {method: row["strength"] for method, row in selected.items()}
    like = clamping_study.imitated(selected)
    for method in sizes:
        if method not in strengths and clamping_study.family(method) in like:
            strengths[method] = drawn_strength(selected, sizes, method)
    settings = [(method, s, n_report) for method, s in strengths.items()]
    shares = prepared.thinned(SWEEP, 3)
    for m, at in strengths.items():
        name = clamping_study.family(m)
        if at is None or name not in CURVES:
            continue
        extra = {round(share * at, 4) for share in shares if m == shown or share > 1}
        extra |= {r["strength"] for r in rows if r["method"] == like.get(name, m)}
        settings += [(m, s, n_sweep) for s in sorted(extra - {at})]
    return settings


SAME_LENGTH = ("random features", "random readers")
"""families of draws that are pushed as *far* as what they are the control of: their values are scaled, because as many
values along other rows add up to another length"""


def drawn_strength(selected: Mapping[str, Any], sizes: Mapping[str, float], method: str) -> float:
    """The strength of a random draw, by that of the method whose control it is."""
    name = clamping_study.family(method)
    model_of = clamping_study.imitated(selected)[name]
    strength = float(selected[model_of]["strength"])
    return round(strength * sizes[model_of] / sizes[method], 4) if name in SAME_LENGTH else strength


CURVES = (clamping_study.READERS, clamping_study.LEARNED, "learned vector", "mean difference", clamping_study.TWIN)
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
    sizes = clamping_study.push_sizes(model, tools)
    settings = report_settings(selected, read_table("clamp_choose")["rows"], sizes)
    rows = [
        reported(model, tools, method, strength, questions[:: len(questions) // n])
        for method, strength, n in progress(settings, "settings")
    ]
    adversarial = []
    for method in ("none", clamping_study.demonstrated(selected), "system prompt"):
        strength = selected.get(method, {}).get("strength")
        key = ["adversarial", asked, *clamping_study.cache_key(model, tools, method, strength)]
        how = (method, strength, asked)
        texts = resumed("clamp_report", key, clamping_study.written_answers, model, tools, *how)
        adversarial.append(
            {"method": method, "strength": strength, "answers": texts, "later": clamping_study.later(model, texts)}
        )
    return write_table(
        "clamp_report", model, time.time() - start, prompts=questions, rows=rows, adversarial=adversarial
    )


FOUR = ("mentions", "perplexity ×", "distinct-2 of the set", "relevance ×")
"""the four measures of the goal, by the names of ``measures``"""


def thinned(row: Mapping[str, Any], n: int) -> dict[str, Any]:
    """The row with every k-th answer only, so that ``n`` are left: settings are compared on the same prompts."""
    step = len(row["answers"]) // n
    return {k: v[::step] if isinstance(v, list) else v for k, v in row.items()}


def measures(row: Mapping[str, Any], plain: Mapping[str, Any]) -> dict[str, Interval]:
    """Every measure of one setting's answers with its interval over prompts (exact for shares, else bootstrap).

    ``mentions`` counts any of the concept's words after ``LATER`` tokens, ``names it`` only the first, its name.
    ``mentions and keeps half``: the answers that mention it *and* keep at least half of the relevance that the
    unclamped answer to the same question has; ``relevance of mentions ×``: of those that mention it, if there are any.
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
    own = np.array(row["relevance"]) >= np.array(base["relevance"]) / 2
    samples["mentions and keeps half"] = (np.array(samples["mentions"]) & own).tolist()
    found = {name: exact_ci(int(np.sum(x)), len(x)) for name, x in samples.items()}
    if (hits := np.array(samples["mentions"])).sum() > 1:
        own, usual = np.array(row["relevance"])[hits], max(float(np.mean(base["relevance"])), 1e-6)
        found["relevance of mentions ×"] = bootstrap_ci(own / usual, n_resamples=1000, seed=SEED)
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
    row |= {"feature": feature, "strength": strength, "related": row["relevance"]}
    return row | clamping_study.summary(row, plain[split], words)


KEPT = ("feature", "strength", "perplexity", "distinct", "relevance", "related", "answers")
"""of a concept's answers; ``related``: each one's relevance, in nats a token"""


def concept_of(name: str, model: Model, plain: dict[str, Any], found: Sequence[int]) -> dict[str, Any]:
    """One concept by the bridge's rule: of the features that read it the best writers, one of them and its strength by
    generation on selection prompts, then report prompts."""
    page = clamping_study.prompts()["concepts"]
    words = page[name]["words"]
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
        "others": {other: float(np.mean(clamping.mentions(row["later"], page[other]["words"]))) for other in page},
        **{k: row[k] for k in KEPT},
    }


def random_of(name: str, model: Model, plain: dict[str, Any], feature: int, strength: float) -> dict[str, Any]:
    """A concept's random feature, pushed as much as the one that was chosen, on its report prompts."""
    row, words = held_for(name, model, plain, "report", feature, strength), clamping_study.prompts()["concepts"][name]
    mentioned = [float(x) for x in clamping.mentions(row["later"], words["words"])]
    return {"mentioned": mentioned} | {k: row[k] for k in ("mention", *KEPT)}


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
            "clamp_concepts", model, time.time() - start, rows=rows, without_features=silent, d_sae=d_sae,
            unclamped_related=plain["report"]["relevance"],
        )  # fmt: skip
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


N_ACTIVE = 5
"""random draws beside the features of the name that are taken away"""


def active_controls(mean: Float[Tensor, " d_sae"], n: int, like: float, without: Sequence[int], seed: int) -> list[int]:
    """``n`` features whose mean activation is about as large as ``like``, drawn among the nearest, none of ``without``.

    ``mean``: on the facts' texts; a random feature is silent there, and taking it away could not change anything.
    """
    barred = mean == 0
    barred[list(without)] = True
    near = (mean - like).abs().masked_fill(barred, float("inf")).argsort()[: 8 * n].tolist()
    return sorted(np.random.default_rng(seed).permutation(near)[:n].tolist())


def ablations(model: Model, features: dict[str, Any], single: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Facts about the bridge and about other landmarks, with features set to zero at all positions.

    ``fires``: in how many sentences of each kind any of them does. The control of the name's features are features
    that are as active on these texts, drawn several times.
    """
    sae, kinds = clamping_study.held_sae(model), ("facts", "other_facts")
    named = [i for i, _ in features["readers"]]
    sets = {
        "cleanest reader": [max(single, key=lambda r: r["auc"])["feature"]] if single else [],
        "best writer among readers": [single[0]["feature"]] if single else [],
        "the name's features": named,
        "the learned features": [i for i, _ in features["learned features"]],
    }
    texts = {kind: [start + end for start, end in clamping_study.prompts()[kind]] for kind in kinds}
    codes = {kind: detection.text_scores(model, sae, texts[kind]) for kind in kinds}
    if named:
        mean, usual = torch.cat(list(codes.values())).mean(0), float(codes["facts"][:, named].mean())
        without = [*named, *sets["the learned features"], *(r["feature"] for r in single)]
        for k in range(prepared.sized(N_ACTIVE, 2)):
            sets[f"features as active {k}"] = active_controls(mean, len(named), usual, without, k)
    result: list[dict[str, Any]] = [{"ablated": "nothing", "n": 0} | {kind: fact_losses(model, kind) for kind in kinds}]
    for name, chosen_features in sets.items():
        if not chosen_features:
            continue
        group = Group(tuple(clamping.feature(model, sae, i, 1.0) for i in chosen_features), name)
        with clamping.clamp(model, group, mode="ablate"):
            losses = {kind: fact_losses(model, kind) for kind in kinds}
        fires = {kind: int((codes[kind][:, chosen_features] > 0).any(-1).sum()) for kind in kinds}
        row = {"ablated": name, "n": len(chosen_features), "features": chosen_features, "fires": fires}
        result.append(row | losses)
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
    sizes = clamping_study.push_sizes(model, tools)
    first = [f"{k} 0" for k, m in like.items() if m == shown and f"{k} 0" in tools.found]
    settings += [(method, drawn_strength(selected, sizes, method)) for method in first]
    for method, strength in settings:
        key = ["costs", *clamping_study.cache_key(model, tools, method, strength)]
        rows.append({"method": method, "strength": strength} | resumed(
            "clamp_costs", key, costs_of, model, tools, method, strength))  # fmt: skip
    table = read_table("clamp_choose")
    weights = [model.hash, clamping_study.fingerprint(clamping_study.held_sae(model))]
    key = [
        "ablation, none of the found ones among the controls",
        N_ACTIVE,
        *weights,
        table["features"],
        table["candidates"],
    ]
    ablated = resumed("clamp_costs", key, ablations, model, table["features"], table["candidates"])
    return write_table("clamp_costs", model, time.time() - start, rows=rows, ablation=ablated)


# --- harder controls ----------------------------------------------------------------------------------

N_FITS = 1
"""fits on the SAE's rows, each with the lessons in another order, and on random rows, each on its own draw; one is what
``clamp-choose`` makes. With five the notebook could say whether the rows matter (minutes each)"""


def refits() -> list[tuple[int | None, int]]:
    """(draw of the random rows, None for the SAE's; order of the lessons) of the fits that ``clamp-choose`` lacks."""
    n, drawn = prepared.sized(N_FITS, 1), prepared.sized(clamping_choice_study.N_TWINS, 1)
    return [(None, order) for order in range(1, n)] + [(twin, SEED) for twin in range(drawn, n)]


def refitted(model: Model, made: Mapping[str, Any], twin: int | None, order: int) -> dict[str, Any]:
    """One more fit, and its answers to the report prompts at the strength that was selected for the first."""
    sae, selected = clamping_study.held_sae(model), read_table("clamp_choose")["selected"]
    questions = clamping_study.spread(clamping_study.prompts()["report"], report_sizes()[0])
    fit = clamping_choice_study.fitted(model, sae, made, twin, order)
    method = clamping_study.LEARNED if twin is None else f"{clamping_study.TWIN} {twin}"
    first = method if twin is None else f"{clamping_study.TWIN} 0"
    row = {"twin": twin, "order": order, "features": fit["features"], "losses": fit["loss"]}
    if first not in selected or not fit["features"]:
        return row | {"method": method, "answers": []}
    dictionary = sae if twin is None else learning.random_dictionary(sae, twin)
    tools = clamping_study.Tools({method: clamping_study.group_of(model, dictionary, fit["features"], method)})
    return row | reported(model, tools, method, selected[first]["strength"], questions)


def study_controls() -> Path:
    """The fits again, and what the readers' opponents write: features as active that don't tell the bridge apart."""
    start, model = time.time(), load_subject()
    table, made = read_table("clamp_choose"), clamping_choice_study.taught(model)
    key = ["active", clamping_study.fingerprint(clamping_study.held_sae(model)), model.hash, table["candidates"]]
    reads = [c["feature"] for c in table["candidates"]]
    active = resumed("clamp_controls", [*key, read_write.BLIND], clamping_choice_study.as_active, model, made, reads)
    fits = [refitted(model, made, twin, order) for twin, order in progress(refits(), "fits")]
    return write_table("clamp_controls", model, time.time() - start, active=active, d_sae=table["d_sae"], fits=fits)


STUDIES_OF_CLAMPING = {
    "clamp-choose": clamping_choice_study.study_choose,
    "clamp-report": study_report,
    "clamp-concepts": study_concepts,
    "clamp-costs": study_costs,
    "clamp-controls": study_controls,
}
