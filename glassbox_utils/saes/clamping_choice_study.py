"""Choosing what to clamp: ``glassbox study clamp-choose``, on selection prompts only."""

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from glassbox_utils.core import prepared
from glassbox_utils.core.devices import result
from glassbox_utils.core.models import Model
from glassbox_utils.core.prepared import load_subject
from glassbox_utils.core.session import progress
from glassbox_utils.core.studies import SEED, resumed, write_table
from glassbox_utils.core.text import chat, following, tokenize
from glassbox_utils.saes import clamping, clamping_study, detection, learning
from glassbox_utils.saes.reading import site_of_sae
from glassbox_utils.steering.vectors import save_direction

PROBES, N_PROBED = (4.0,), 4
"""strengths at which, and prompts on which, the output score is measured"""


MORE = (0.7, 1.4, 3)
"""if no strength of the grid keeps within both budgets the search goes on below it, each time at this share of the
last; if all do and the strongest mentions nothing, above it; so many times at most. The grid itself fits the embedded
model"""
N_SELECTION, N_SELECTION_LEARNED = 10, 24
"""selection prompts: for what is learned all of them, since it comes close to the goal and a coarse choice is a bet"""
GRID: dict[str, tuple[float, ...]] = {
    "one feature": (2.0, 3.5),
    "several features": (0.5, 0.65, 0.8),
    "several features, two layers": (0.4, 0.45, 0.5),
    "mean difference": (0.3, 0.36),
    "mean difference, two layers": (0.14, 0.18),
    "learned features": (0.85, 0.9, 0.95, 1.0),
    "learned vector": (0.8, 0.9, 1.0),
}
"""method -> strengths that are tried: times the natural unit, or (mean difference) the typical residual norm, or the
learned values"""


START = "The"
"""how the answer begins when the output score is read"""


def concept_tokens(model: Model, words: Sequence[str]) -> list[int]:
    """First tokens of the words as they stand inside a sentence, small and capitalised."""
    forms = {f" {form}" for word in words for form in (word, word.capitalize())}
    return sorted({ids[0] for form in forms if (ids := following(model, form))})


@torch.inference_mode()
def word_mass(model: Model, questions: Sequence[str], tokens: Sequence[int]) -> NDArray:
    """Log of the probability that an answer which begins with ``START`` goes on with one of these tokens."""
    batch = tokenize(model, [chat(model, q, clamping_study.NO_SYSTEM) + START for q in questions])
    logits = model.hf(**batch.inputs, logits_to_keep=1).logits[:, -1].float()
    return result(logits.log_softmax(-1)[:, list(tokens)].logsumexp(-1)).numpy()


@dataclass(frozen=True)
class Candidate:
    """A feature that fires for a concept, and what holding it does to the next word."""

    feature: int
    auc: float
    unit: float
    """largest activation on all sentences"""
    gain: float
    """output score: rise of the log-probability of the concept's words, nats, the best of the strengths tried"""


def candidates(
    model: Model,
    sae: Any,
    here: Float[Tensor, "text d_sae"],
    there: Float[Tensor, "other d_sae"],
    maxima: Float[Tensor, " d_sae"],
    words: Sequence[str],
    questions: Sequence[str],
) -> list[Candidate]:
    """Features by activation (area under the curve), then ordered by output score (arXiv 2505.20063)."""
    tokens = concept_tokens(model, words)
    plain = word_mass(model, questions, tokens)
    found = []
    for hit in detection.separates(here, there, clamping_study.N_CANDIDATES):
        if hit.mean_here == 0:
            continue
        one = clamping.feature(model, sae, hit.feature, float(maxima[hit.feature]))
        gains = []
        for strength in PROBES:
            with clamping.clamp(model, one, strength):
                gains.append(float((word_mass(model, questions, tokens) - plain).mean()))
        found.append(Candidate(hit.feature, round(hit.auc, 4), round(one.unit, 4), round(max(gains), 4)))
    return sorted(found, key=lambda c: -c.gain)


def _singles(layer: int, model: Model) -> dict[str, Any]:
    """The bridge's single features at one layer, by output score, and random features as controls (with maxima)."""
    sae, asked = clamping_study.role_saes(model)[layer], clamping_study.prompts()["selection"][:N_PROBED]
    here, there = clamping_study.golden_gate_sentences()
    a, b, c = (detection.text_scores(model, sae, texts) for texts in (here, there, clamping_study.concept_sentences()))
    maxima = torch.cat([a, b, c]).amax(0)
    found = candidates(
        model, sae, a, torch.cat([b, c]), maxima, clamping_study.prompts()["golden_gate"]["words"], asked
    )
    order = [int(f) for f in np.random.default_rng(SEED).permutation(len(maxima)) if maxima[f] > 0]
    used = {x.feature for x in found}
    random = [[f, round(float(maxima[f]), 4)] for f in order if f not in used]
    return {"single": {"golden gate": [vars(x) for x in found]}, "random": random[: 2 * clamping_study.GROUP]}


def _groups(layer: int, model: Model) -> dict[str, list[list[float]]]:
    """Concept -> (feature, unit) of the features of its name; of the ten concepts at the main layer only."""
    found = clamping_study.role_saes(model)
    sae, (names, others) = found[layer], clamping_study.name_texts()
    elsewhere = {name: clamping.last_codes(model, sae, clamping.random_cuts(texts)) for name, texts in others.items()}
    groups: dict[str, list[list[float]]] = {}
    for name in names if layer == clamping_study.main_layer(found, model) else ["golden gate"]:
        rest = torch.cat([codes for other, codes in elsewhere.items() if other != name])
        here, groups[name] = clamping.last_codes(model, sae, names[name]), []
        with suppress(clamping.ClampError):  # no feature is the name's
            made = clamping.name_group(model, sae, here, rest, clamping_study.GROUP, name)
            groups[name] = [[f.index, round(f.unit, 4)] for f in made.features]
    return groups


def _ranked(layer: int, sae: Any, model: Model) -> dict[str, Any]:
    """What one layer's SAE offers, from the cache if it is there; controls are in no group of the bridge."""
    key = [
        layer,
        clamping_study.fingerprint(sae),
        model.hash,
        clamping_study.N_CANDIDATES,
        PROBES,
        N_PROBED,
        clamping_study.GROUP,
    ]
    made = resumed("clamp_choose", key, _singles, layer, model)
    group = resumed("clamp_choose", ["groups", clamping.ELSEWHERE, *key], _groups, layer, model)
    taken = {index for index, _ in group["golden gate"]}
    random = [row for row in made["random"] if row[0] not in taken]
    return {"single": made["single"], "group": group, "random": random[: clamping_study.GROUP]}


def learn_steps() -> int:
    """Steps of learning at the size of the prepared folder."""
    return prepared.sized(clamping_study.LEARN_STEPS, 16)


def learned(model: Model, layer: int, questions: Sequence[str], answers: Sequence[str], steps: int) -> dict[str, Any]:
    """The features that make the model write these answers, their values, controls, and the loss of each step."""
    sae = clamping_study.role_saes(model)[layer]
    given = clamping_study.lessons(model, site_of_sae(sae), questions, answers)
    n = min(clamping_study.N_LEARNED, max(1, sae.cfg.d_sae // 16))
    try:
        group, control, loss = learning.learn_group(model, sae, given, n, steps, seed=SEED)
    except clamping.ClampError:  # too few of its features are quiet on the answers
        return {"features": [], "random": [], "loss": []}
    return {
        "features": [[f.index, round(f.unit, 4)] for f in group.features],
        "random": [[f.index, round(f.unit, 4)] for f in control.features],
        "loss": loss,
    }


def _learned_vector(model: Model, layer: int, questions: Sequence[str], answers: Sequence[str]) -> dict[str, Any]:
    vector, loss = learning.learn_vector(
        model, layer, clamping_study.lessons(model, layer, questions, answers), learn_steps()
    )
    return {"vector": [round(float(x), 4) for x in vector], "vector_loss": loss}


def _reading(model: Model, layer: int, indices: Sequence[int]) -> list[dict[str, float]]:
    """How each feature reads the bridge: area under the curve on sentences, largest activation, mean on the name."""
    sae, (here, there) = clamping_study.role_saes(model)[layer], clamping_study.golden_gate_sentences()
    chosen = list(indices)
    a, b = (
        detection.text_scores(model, sae, texts)[:, chosen]
        for texts in (here, [*there, *clamping_study.concept_sentences()])
    )
    name = clamping.last_codes(model, sae, clamping_study.name_texts()[0]["golden gate"])[:, chosen].mean(0)
    above = (a[:, None] > b[None]).float().mean((0, 1)) + 0.5 * (a[:, None] == b[None]).float().mean((0, 1))
    return [
        {"feature": i, "auc": round(float(above[k]), 4), "largest": round(float(torch.cat([a, b])[:, k].max()), 3),
         "on the name": round(float(name[k]), 3)}
        for k, i in enumerate(chosen)
    ]  # fmt: skip


def _learned_all(model: Model, layer: int) -> dict[str, Any]:
    """All that is learned about the bridge: features and what they read, and, without an SAE, a vector."""
    questions, answers = clamping_study.taught(model, clamping_study.prompts()["golden_gate"]["starts"])
    sae, steps = clamping_study.role_saes(model)[layer], learn_steps()
    after = clamping_study.stream_layer(sae)
    made: dict[str, Any] = {"layer": after, "questions": questions, "answers": answers}
    weights = [clamping_study.fingerprint(sae), model.hash]
    key = ["learned", layer, weights, questions, answers, clamping_study.N_LEARNED, steps, _rule()]
    made |= resumed("clamp_choose", key, learned, model, layer, questions, answers, steps)
    key = ["vector", after, model.hash, questions, answers, steps, _rule()]
    made |= resumed("clamp_choose", key, _learned_vector, model, after, questions, answers)
    indices = [i for i, _ in made["features"]]
    return made | {
        "reading": resumed("clamp_choose", ["reading", layer, weights, indices], _reading, model, layer, indices)
    }


def _rule() -> list[float]:
    return [learning.QUIET, learning.START_TOKENS, learning.START_WEIGHT, learning.CANDIDATES]


def choose(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of the settings within both budgets the one with the most mentions (then the lowest perplexity).

    If none is within them, the one with the lowest perplexity.
    """
    if not (fine := [r for r in rows if _fine(r)]):
        return min(rows, key=lambda r: r["perplexity"])
    return max(fine, key=lambda r: (r["mention"], -r["perplexity"]))


def _fine(row: dict[str, Any]) -> bool:
    """Does a setting keep within both budgets?"""
    return row["perplexity"] <= clamping_study.PERPLEXITY_BUDGET and row["distinct"] >= clamping_study.DISTINCT_BUDGET


def further(rows: Sequence[dict[str, Any]], grid: Sequence[float]) -> float | None:
    """A strength beyond those that were tried, if none of them keeps within the budgets or all do and do nothing."""
    down, up, most = MORE
    tried = sorted(rows, key=lambda r: r["strength"])
    if len(tried) >= len(grid) + most:
        return None
    if not any(map(_fine, tried)):
        return round(tried[0]["strength"] * down, 4)
    if all(map(_fine, tried)) and tried[-1]["mention"] == 0:
        return round(tried[-1]["strength"] * up, 4)
    return None


def _select(
    model: Model, tools: clamping_study.Tools, method: str, strength: float | None, questions: Sequence[str]
) -> dict[str, Any]:
    texts = clamping_study.written_answers(model, tools, method, strength, questions)
    return {"answers": texts} | clamping_study.measured(model, questions, texts)


def _tried(
    model: Model,
    tools: clamping_study.Tools,
    method: str,
    strength: float,
    questions: Sequence[str],
    plain: dict[str, Any],
) -> dict[str, float]:
    made = _select(model, tools, method, strength, questions)
    return clamping_study.summary(made, plain, clamping_study.prompts()["golden_gate"]["words"])


def study_choose() -> Path:
    """Features by activation and output score; features, methods and strengths by generation on selection prompts."""
    start, model = time.time(), load_subject()
    found = clamping_study.role_saes(model)
    middle = clamping_study.main_layer(found, model)
    ranked = {str(layer): _ranked(layer, sae, model) for layer, sae in found.items()}
    if not all(
        clamping_study.vector_file(layer).with_suffix(".json").exists() for layer in clamping_study.two_layers(model)
    ):
        for direction in clamping_study.directions(model, clamping_study.two_layers(model)):
            save_direction(direction, clamping_study.vector_file(direction.layer))

    made = _learned_all(model, middle)
    tools = clamping_study.make_tools(model, ranked, None, made)

    def row(method: str, strength: float, tools: clamping_study.Tools) -> dict[str, Any]:
        learns = method.startswith("learned")
        n = prepared.sized(N_SELECTION_LEARNED, 8) if learns else prepared.sized(N_SELECTION, 4)
        some = clamping_study.prompts()["selection"][:n]
        key = ["select", some, *clamping_study.cache_key(model, tools, "none", None)]
        plain = resumed("clamp_choose", key, _select, model, tools, "none", None, some)
        key = ["tried", some, *clamping_study.cache_key(model, tools, method, strength)]
        return resumed("clamp_choose", key, _tried, model, tools, method, strength, some, plain)

    single = []
    for k in range(clamping_study.N_TRIED):
        if f"feature {k}" in tools.found:
            for strength in prepared.thinned(GRID["one feature"]):
                single.append({"rank": k, "strength": strength} | row(f"feature {k}", strength, tools))
    best = choose(single)["rank"] if single else None
    tools = clamping_study.make_tools(model, ranked, best, made)
    rows = [
        {"method": "one feature"} | {k: v for k, v in r.items() if k != "rank"} for r in single if r["rank"] == best
    ]
    for method, strengths in ((name, prepared.thinned(grid)) for name, grid in GRID.items()):
        if method not in tools.found:
            continue
        if method != "one feature":
            for strength in progress(strengths, method):
                rows.append({"method": method, "strength": strength} | row(method, strength, tools))
        while (more := further([r for r in rows if r["method"] == method], strengths)) is not None:
            rows.append({"method": method, "strength": more} | row(method, more, tools))
    methods = dict.fromkeys(r["method"] for r in rows)
    selected = {method: choose([r for r in rows if r["method"] == method]) for method in methods}
    clamping_study.demonstrated(selected)  # ClampError if there is nothing to clamp
    return write_table(
        "clamp_choose",
        model,
        time.time() - start,
        saes={str(layer): sae.cfg.metadata.hook_name for layer, sae in found.items()},
        budgets={"perplexity": clamping_study.PERPLEXITY_BUDGET, "distinct": clamping_study.DISTINCT_BUDGET},
        main_layer=middle,
        best=best,
        ranked=ranked,
        learned=made,
        single=single,
        rows=rows,
        selected=selected,
        prompts=clamping_study.prompts()["selection"][: prepared.sized(N_SELECTION_LEARNED, 8)],
    )
