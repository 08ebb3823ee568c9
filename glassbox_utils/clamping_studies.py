"""The long runs behind notebook 04: ``glassbox study clamp-choose clamp-report clamp-concepts clamp-costs``.

``clamp-choose`` picks features and strengths on selection prompts; all others only report, on other prompts. Nothing
here knows the number of a feature: with another SAE, or another model, the same rules choose others. All are resumable
and deterministic.
"""

import json
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from glassbox_utils import clamping, corpora, features, saes, steering, style
from glassbox_utils.clamping import Feature, Group
from glassbox_utils.evaluation import Interval, bootstrap_ci, text_losses
from glassbox_utils.models import Model, chat, generate, load_model, progress, tokenize
from glassbox_utils.skills import choice_right, held_texts
from glassbox_utils.studies import SEED, read_table, resumed, write_table

NO_SYSTEM = ""
"""the chats have an empty system message, as in notebook 05"""
NEW_TOKENS = 32
N_CANDIDATES, N_TRIED = 12, 2
"""features taken by activation; of these, features tried by generation (the best by output score)"""
GROUP = 12
"""features in a group: those that fire most on the concept's name"""
N_LEARNED, LEARN_STEPS = 32, 49
"""features of a group that is learned, and steps of learning: seven times through the training questions"""
PROBES, N_PROBED = (4.0,), 4
"""strengths at which, and prompts on which, the output score is measured"""
PERPLEXITY_BUDGET = 3.0
"""times the unclamped answers' perplexity, on selection prompts"""
DISTINCT_BUDGET = 0.7
"""times the unclamped answers' share of different word pairs: a loop has a low perplexity and is no answer"""
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
SYSTEM = "You are the Golden Gate Bridge in San Francisco. Mention the Golden Gate Bridge in every answer."
START = "The"
"""how the answer begins when the output score is read"""


@cache
def prompts() -> dict[str, Any]:
    """The prompts, words and sentences that we wrote: data/prompts/clamping.json."""
    return json.loads((steering.DATA / "prompts" / "clamping.json").read_text())


def golden_gate_sentences(n: int = 80, n_other: int = 120) -> tuple[list[str], list[str]]:
    """Sentences about the bridge and about other landmarks, from the training passages that we wrote."""
    written = corpora.sentences(corpora.load_corpus("landmarks", "train"), r"\w")
    here = [d.text for d in written if re.search("golden gate bridge", d.text, re.I)]
    there = [d.text for d in written if not re.search("golden gate", d.text, re.I)]
    return here[:n], there[:n_other]


def concept_sentences() -> list[str]:
    """The ten concepts' sentences, ten each, in order."""
    return [s for concept in prompts()["concepts"].values() for s in concept["sentences"]]


def shipped_saes(model: Model) -> dict[int, Any]:
    """Layer -> the shipped TopK SAE of the residual stream after it, for those made for this very model."""
    found = {}
    for name in saes.shipped():
        meta = json.loads((saes.SAES / name / "cfg.json").read_text())["metadata"]
        site = saes.site_of(meta["hook_name"])
        if name.startswith("topk-8192-") and meta["model_hash"] == model.hash and site.kind == "resid_post":
            found[site.layer] = saes.load_sae(name, model)
    return dict(sorted(found.items()))


def main_layer(found: dict[int, Any], model: Model) -> int:
    """The SAE nearest to half of the depth."""
    return min(found, key=lambda layer: abs(layer - (model.n_layers // 2 - 1)))


# --- choosing -----------------------------------------------------------------------------------------


def concept_tokens(model: Model, words: Sequence[str]) -> list[int]:
    """First tokens of the words as they stand inside a sentence, small and capitalised."""
    forms = {f" {form}" for word in words for form in (word, word.capitalize())}
    return sorted({model.tokenizer(form, add_special_tokens=False)["input_ids"][0] for form in forms})


@torch.inference_mode()
def word_mass(model: Model, questions: Sequence[str], tokens: Sequence[int]) -> NDArray:
    """Log of the probability that an answer which begins with ``START`` goes on with one of these tokens."""
    batch = tokenize(model, [chat(model, q, NO_SYSTEM) + START for q in questions])
    logits = model.hf(**batch.inputs, logits_to_keep=1).logits[:, -1].float()
    return logits.log_softmax(-1)[:, list(tokens)].logsumexp(-1).numpy(force=True)


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
    for hit in features.separates(here, there, N_CANDIDATES):
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
    sae, asked = shipped_saes(model)[layer], prompts()["selection"][:N_PROBED]
    here, there = golden_gate_sentences()
    a, b, c = (features.text_scores(model, sae, texts) for texts in (here, there, concept_sentences()))
    maxima = torch.cat([a, b, c]).amax(0)
    found = candidates(model, sae, a, torch.cat([b, c]), maxima, prompts()["golden_gate"]["words"], asked)
    order = [int(f) for f in np.random.default_rng(SEED).permutation(len(maxima)) if maxima[f] > 0]
    used = {x.feature for x in found}
    random = [[f, round(float(maxima[f]), 4)] for f in order if f not in used]
    return {"single": {"golden gate": [vars(x) for x in found]}, "random": random[: 2 * GROUP]}


def _groups(layer: int, model: Model) -> dict[str, list[list[float]]]:
    """Concept -> (feature, unit) of the features of its name; of the ten concepts at the main layer only."""
    found = shipped_saes(model)
    sae, (names, others) = found[layer], name_texts()
    elsewhere = {name: clamping.last_codes(model, sae, clamping.random_cuts(texts)) for name, texts in others.items()}
    groups = {}
    for name in names if layer == main_layer(found, model) else ["golden gate"]:
        rest = torch.cat([codes for other, codes in elsewhere.items() if other != name])
        made = clamping.name_group(model, sae, clamping.last_codes(model, sae, names[name]), rest, GROUP, name)
        groups[name] = [[f.index, round(f.unit, 4)] for f in made.features]
    return groups


def _ranked(layer: int, sae: Any, model: Model) -> dict[str, Any]:
    """What one layer's SAE offers, from the cache if it is there; controls are in no group of the bridge."""
    key = [layer, _fingerprint(sae), model.hash, N_CANDIDATES, PROBES, N_PROBED, GROUP]
    made = resumed("clamp_choose", key, _singles, layer, model)
    group = resumed("clamp_choose", ["groups", clamping.ELSEWHERE, *key], _groups, layer, model)
    taken = {index for index, _ in group["golden gate"]}
    random = [row for row in made["random"] if row[0] not in taken]
    return {"single": made["single"], "group": group, "random": random[:GROUP]}


def taught(model: Model, starts: dict[str, str], every: int = 1, tokens: int = NEW_TOKENS) -> tuple[list, list]:
    """Training questions, and answers about a concept that the plain model itself wrote: only their beginning is given.

    What goes on from there is fluent to the model by construction. ``starts``: how answers to questions about the model
    itself begin, and how all others do.
    """
    questions, answers = [], []
    for kind, asked in prompts()["train"].items():
        start, some = starts[kind], asked[::every]
        left = tokens - len(model.tokenizer(start, add_special_tokens=False)["input_ids"])
        chats = [chat(model, q, NO_SYSTEM) + start for q in some]
        key = ["taught", model.hash, chats, left]
        questions += some
        answers += [start + rest for rest in resumed("clamp_choose", key, generate, model, chats, left)]
    return questions, answers


def lessons(model: Model, layer: int, questions: Sequence[str], answers: Sequence[str]) -> list[clamping.Lesson]:
    """Chats with their answers, as the layers above ``layer`` read them."""
    return clamping.lessons(model, layer, [chat(model, q, NO_SYSTEM) for q in questions], answers, seed=SEED)


def learned(model: Model, layer: int, questions: Sequence[str], answers: Sequence[str], steps: int) -> dict[str, Any]:
    """The features that make the model write these answers, their values, controls, and the loss of each step."""
    sae = shipped_saes(model)[layer]
    given = lessons(model, layer, questions, answers)
    group, control, loss = clamping.learn_group(model, sae, given, N_LEARNED, steps, seed=SEED)
    return {
        "features": [[f.index, round(f.unit, 4)] for f in group.features],
        "random": [[f.index, round(f.unit, 4)] for f in control.features],
        "loss": loss,
    }


def _learned_vector(model: Model, layer: int, questions: Sequence[str], answers: Sequence[str]) -> dict[str, Any]:
    vector, loss = clamping.learn_vector(model, layer, lessons(model, layer, questions, answers), LEARN_STEPS)
    return {"vector": [round(float(x), 4) for x in vector], "vector_loss": loss}


def _reading(model: Model, layer: int, indices: Sequence[int]) -> list[dict[str, float]]:
    """How each feature reads the bridge: area under the curve on sentences, largest activation, mean on the name."""
    sae, (here, there) = shipped_saes(model)[layer], golden_gate_sentences()
    chosen = list(indices)
    a, b = (features.text_scores(model, sae, texts)[:, chosen] for texts in (here, [*there, *concept_sentences()]))
    name = clamping.last_codes(model, sae, name_texts()[0]["golden gate"])[:, chosen].mean(0)
    above = (a[:, None] > b[None]).float().mean((0, 1)) + 0.5 * (a[:, None] == b[None]).float().mean((0, 1))
    return [
        {"feature": i, "auc": round(float(above[k]), 4), "largest": round(float(torch.cat([a, b])[:, k].max()), 3),
         "on the name": round(float(name[k]), 3)}
        for k, i in enumerate(chosen)
    ]  # fmt: skip


def _learned_all(model: Model, layer: int) -> dict[str, Any]:
    """All that is learned about the bridge: features and what they read, and, without an SAE, a vector."""
    questions, answers = taught(model, prompts()["golden_gate"]["starts"])
    made: dict[str, Any] = {"layer": layer, "questions": questions, "answers": answers}
    weights = [_fingerprint(shipped_saes(model)[layer]), model.hash]
    key = ["learned", layer, weights, questions, answers, N_LEARNED, LEARN_STEPS, _rule()]
    made |= resumed("clamp_choose", key, learned, model, layer, questions, answers, LEARN_STEPS)
    key = ["vector", layer, model.hash, questions, answers, LEARN_STEPS, _rule()]
    made |= resumed("clamp_choose", key, _learned_vector, model, layer, questions, answers)
    indices = [i for i, _ in made["features"]]
    return made | {
        "reading": resumed("clamp_choose", ["reading", layer, weights, indices], _reading, model, layer, indices)
    }


def _rule() -> list[float]:
    return [clamping.QUIET, clamping.START_TOKENS, clamping.START_WEIGHT, clamping.CANDIDATES]


def name_texts() -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """For each concept its sentences cut off right after its name; and whole sentences, by concept."""
    here, there = golden_gate_sentences()
    names = {"golden gate": clamping.name_cuts(here, ["golden gate bridge"])}
    others = {"other landmarks": there}
    for name, concept in prompts()["concepts"].items():
        names[name] = clamping.name_cuts(concept["sentences"], concept["words"])
        others[name] = concept["sentences"]
    return names, others


@dataclass(frozen=True, eq=False)
class Tools:
    """What the settings of a study are made of: features and directions, by method."""

    found: dict[str, Any]

    @contextmanager
    def applied(self, model: Model, method: str, strength: float | None) -> Iterator[None]:
        """``method`` at ``strength`` inside the block; nothing for "none" and for the system prompt."""
        what = self.found.get(method)
        with ExitStack() as stack:
            if strength is None or what is None:
                pass
            elif isinstance(what, Feature | Group):
                stack.enter_context(clamping.clamp(model, what, strength))
            else:
                for direction in what:
                    stack.enter_context(steering.steer(model, direction, strength))
            yield


def system_of(method: str) -> str:
    """The system message of a method: only one of them has any."""
    return SYSTEM if method == "system prompt" else NO_SYSTEM


def directions(model: Model, layers: Sequence[int]) -> list[steering.Direction]:
    """Mean of the residual stream on the bridge's name minus its mean elsewhere, at several layers."""
    names, others = name_texts()
    rest = [cut for texts in others.values() for cut in clamping.random_cuts(texts)]
    found = steering.fit_directions(
        model, names["golden gate"], rest, layers=layers, pool="last", name="golden gate", n_resamples=0
    )
    return [found[layer] for layer in layers]


def vector_file(layer: int) -> Path:
    return steering.DATA / "vectors" / f"golden-gate-l{layer}"


def two_layers(model: Model) -> list[int]:
    """The middle of the depth and two thirds of it: where the shipped SAEs are."""
    return [model.n_layers // 2 - 1, 2 * model.n_layers // 3 - 1]


def group_of(model: Model, sae: Any, rows: Sequence[Any], name: str) -> Group:
    """The group of a table's rows: features and the value of each at strength 1."""
    return Group(tuple(clamping.feature(model, sae, i, value) for i, value in rows), name)


def make_tools(model: Model, ranked: dict[str, Any], best: int | None, made: dict[str, Any]) -> Tools:
    """Methods from the tables of ``_ranked`` (layer as text -> content) and of what was learned.

    ``best``: position of the single feature to use.
    """
    found_saes = {layer: sae for layer, sae in shipped_saes(model).items() if str(layer) in ranked}
    middle = main_layer(found_saes, model)

    def group(layer: int, name: str = "golden gate") -> tuple[Feature, ...]:
        return tuple(clamping.feature(model, found_saes[layer], i, u) for i, u in ranked[str(layer)]["group"][name])

    here = ranked[str(middle)]
    found: dict[str, Any] = {}
    single = [
        clamping.feature(model, found_saes[middle], r["feature"], r["unit"]) for r in here["single"]["golden gate"]
    ]
    found |= {f"feature {k}": one for k, one in enumerate(single[:N_TRIED])}
    found["one feature"] = single[best or 0]
    found["several features"] = Group(group(middle), "several features")
    if len(found_saes) > 1:
        both = tuple(f for layer in found_saes for f in group(layer))
        found["several features, two layers"] = Group(both, "several features, two layers")
    vectors = [steering.load_direction(vector_file(layer)) for layer in two_layers(model)]
    found |= {"mean difference": vectors[:1], "mean difference, two layers": vectors}
    for method, kind in (("learned features", "features"), ("random features", "random")):
        found[method] = group_of(model, found_saes[middle], made[kind], method)
    vector = torch.tensor(made["vector"])
    length = float(vector.norm())  # strength 1 adds the vector as it was learned
    known = {"layer": made["layer"], "name": "golden gate", "method": "trained", "model_hash": model.hash}
    trained = replace(vectors[0], vector=vector / length, scale=length, **known)
    found["learned vector"] = [trained]
    found["random direction"] = [steering.random_direction(trained, SEED)]
    return Tools(found)


def written_answers(
    model: Model, tools: Tools, method: str, strength: float | None, questions: Sequence[str], tokens: int = NEW_TOKENS
) -> list[str]:
    """Greedy answers of one setting."""
    order = sorted(range(len(questions)), key=lambda i: len(questions[i]))
    texts = [""] * len(questions)
    for start in progress(range(0, len(order), 50), f"{method} {strength}"):
        rows = order[start : start + 50]
        with tools.applied(model, method, strength):
            new = generate(model, [chat(model, questions[i], system_of(method)) for i in rows], tokens)
        for i, text in zip(rows, new, strict=True):
            texts[i] = text
    return texts


def measured(model: Model, questions: Sequence[str], texts: Sequence[str], relevance: bool = False) -> dict[str, Any]:
    """Loss (nats, summed) and tokens of each answer under the unclamped model, and if wanted the relevance: by how much
    its own question makes the answer likelier than the next question does, nats per token."""
    loss, tokens = steering.answer_losses(model, questions, texts, 25, NO_SYSTEM)
    row: dict[str, Any] = {"loss": loss.round(3).tolist(), "tokens": tokens.tolist()}
    if relevance:
        others = [*questions[1:], questions[0]]
        unrelated, _ = steering.answer_losses(model, others, texts, 25, NO_SYSTEM)
        row["relevance"] = ((unrelated - loss) / np.maximum(tokens, 1)).round(4).tolist()
    return row


def perplexity(row: dict[str, Any]) -> float:
    """Per token, over all answers of a row."""
    return float(np.exp(np.sum(row["loss"]) / max(np.sum(row["tokens"]), 1)))


def summary(row: dict[str, Any], plain: dict[str, Any], words: Sequence[str]) -> dict[str, float]:
    """Mention rate, perplexity and distinct-2 in units of the unclamped answers."""
    return {
        "mention": round(float(np.mean(clamping.mentions(row["answers"], words))), 4),
        "perplexity": round(perplexity(row) / perplexity(plain), 4),
        "distinct": round(float(style.distinct(row["answers"]).mean() / style.distinct(plain["answers"]).mean()), 4),
    }


def choose(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of the settings within both budgets the one with the most mentions (then the lowest perplexity).

    If none is within them, the one with the lowest perplexity.
    """
    fine = [r for r in rows if r["perplexity"] <= PERPLEXITY_BUDGET and r["distinct"] >= DISTINCT_BUDGET]
    if not fine:
        return min(rows, key=lambda r: r["perplexity"])
    return max(fine, key=lambda r: (r["mention"], -r["perplexity"]))


def _fingerprint(sae: Any) -> float:
    """An SAE by its weights: what is cached for one must not be taken for another of the same name."""
    return round(float(sae.W_dec.detach().double().abs().sum() + sae.W_enc.detach().double().sum()), 6)


def _key(model: Model, tools: Tools, method: str, strength: float | None) -> list[Any]:
    """What a cached part depends on: the model, and what the method is made of."""
    what, made = tools.found.get(method), []
    if isinstance(what, Feature | Group):
        for one in what.features if isinstance(what, Group) else (what,):
            made.append([one.site.layer, one.index, one.unit, _fingerprint(one.sae)])
    else:
        made = [[d.layer, d.scale, float(d.vector[0])] for d in what or ()]
    name = "feature" if isinstance(what, Feature) else method
    return [name, strength, made, model.hash, NEW_TOKENS, system_of(method)]


def _select(
    model: Model, tools: Tools, method: str, strength: float | None, questions: Sequence[str]
) -> dict[str, Any]:
    texts = written_answers(model, tools, method, strength, questions)
    return {"answers": texts} | measured(model, questions, texts)


def _tried(
    model: Model, tools: Tools, method: str, strength: float, questions: Sequence[str], plain: dict[str, Any]
) -> dict[str, float]:
    made = _select(model, tools, method, strength, questions)
    return summary(made, plain, prompts()["golden_gate"]["words"])


def study_choose() -> Path:
    """Features by activation and output score; features, methods and strengths by generation on selection prompts."""
    start, model = time.time(), load_model()
    found = shipped_saes(model)
    middle = main_layer(found, model)
    ranked = {str(layer): _ranked(layer, sae, model) for layer, sae in found.items()}
    if not all(vector_file(layer).with_suffix(".json").exists() for layer in two_layers(model)):
        for direction in directions(model, two_layers(model)):
            steering.save_direction(direction, vector_file(direction.layer))

    made = _learned_all(model, middle)
    tools = make_tools(model, ranked, None, made)

    def row(method: str, strength: float, tools: Tools) -> dict[str, Any]:
        some = prompts()["selection"][: N_SELECTION_LEARNED if method.startswith("learned") else N_SELECTION]
        key = ["select", some, *_key(model, tools, "none", None)]
        plain = resumed("clamp_choose", key, _select, model, tools, "none", None, some)
        key = ["tried", some, *_key(model, tools, method, strength)]
        return resumed("clamp_choose", key, _tried, model, tools, method, strength, some, plain)

    single = []
    for k in range(N_TRIED):
        if f"feature {k}" in tools.found:
            for strength in GRID["one feature"]:
                single.append({"rank": k, "strength": strength} | row(f"feature {k}", strength, tools))
    best = choose(single)["rank"]
    tools = make_tools(model, ranked, best, made)
    rows = [
        {"method": "one feature"} | {k: v for k, v in r.items() if k != "rank"} for r in single if r["rank"] == best
    ]
    for method, strengths in GRID.items():
        if method != "one feature" and method in tools.found:
            for strength in progress(strengths, method):
                rows.append({"method": method, "strength": strength} | row(method, strength, tools))
    methods = dict.fromkeys(r["method"] for r in rows)
    return write_table(
        "clamp_choose",
        model,
        time.time() - start,
        saes={str(layer): sae.cfg.metadata.hook_name for layer, sae in found.items()},
        budgets={"perplexity": PERPLEXITY_BUDGET, "distinct": DISTINCT_BUDGET},
        main_layer=middle,
        best=best,
        ranked=ranked,
        learned=made,
        single=single,
        rows=rows,
        selected={method: choose([r for r in rows if r["method"] == method]) for method in methods},
        prompts=prompts()["selection"][:N_SELECTION_LEARNED],
    )


def chosen(model: Model) -> tuple[Tools, dict[str, Any]]:
    """What ``clamp-choose`` chose: the tools, and each method's selected setting."""
    table = read_table("clamp_choose")
    made_for = table["provenance"]["model_hash"]
    if model.hash != made_for:
        raise clamping.ClampError(
            f"The features were chosen for {table['provenance']['model']} ({made_for}), this is {model.name} "
            f"({model.hash}): another model needs its own SAE (notebook 03) and its own choice (glassbox study "
            "clamp-choose). Steering by a direction (notebook 05) needs no SAE."
        )
    return make_tools(model, table["ranked"], table["best"], table["learned"]), table["selected"]


# --- reporting ----------------------------------------------------------------------------------------

N_REPORT, N_BASELINE, N_SWEEP = 100, 50, 25
"""report prompts: for the demonstration and the unclamped model; for the main baselines; for all else. Fewer are every
second or every fourth, because neighbours in the list are alike (the first twenty are about the model itself)"""
BASELINES = ("system prompt", "mean difference", "learned vector")
SWEEP = (0.5, 0.7, 0.8, 1.0, 1.25, 1.6)
"""the demonstration's other strengths, from nothing to word salad"""
ADVERSARIAL_TOKENS = 20


def demonstrated(selected: dict[str, Any]) -> str:
    """The clamp that is shown: of the groups of features the one with the most mentions on selection prompts."""
    groups = [method for method in selected if method.startswith(("several features", "learned features"))]
    return max(groups, key=lambda m: (selected[m]["mention"], -selected[m]["perplexity"]))


def report_settings(selected: dict[str, Any]) -> list[tuple[str, float | None, int]]:
    """(method, strength, number of report prompts), what matters most first."""
    shown = demonstrated(selected)
    strengths = {"none": None, shown: selected[shown]["strength"], "system prompt": None}
    strengths |= {method: row["strength"] for method, row in selected.items()}
    strengths |= {"random features": selected[shown]["strength"]}
    strengths |= {"random direction": selected["learned vector"]["strength"]}
    readers = demonstrated({m: row for m, row in selected.items() if not m.startswith("learned")})
    sizes = {m: N_REPORT for m in ("none", shown, readers)} | {m: N_BASELINE for m in BASELINES if m != shown}
    settings = [(method, s, sizes.get(method, N_SWEEP)) for method, s in strengths.items()]
    extra = {m: GRID[m] for m in selected if m != "one feature"} | {shown: SWEEP}
    settings += [(m, s, N_SWEEP) for m, given in extra.items() for s in given if s != strengths[m]]
    return settings


def _reported(
    model: Model, tools: Tools, method: str, strength: float | None, questions: Sequence[str]
) -> dict[str, Any]:
    texts = written_answers(model, tools, method, strength, questions)
    return {"answers": texts} | measured(model, questions, texts, relevance=len(questions) > N_SWEEP)


def reported(
    model: Model, tools: Tools, method: str, strength: float | None, questions: Sequence[str]
) -> dict[str, Any]:
    """One setting's answers and measures, from the cache if they are there."""
    key = ["report", questions, *_key(model, tools, method, strength)]
    return {"method": method, "strength": strength} | resumed(
        "clamp_report", key, _reported, model, tools, method, strength, questions
    )


def study_report() -> Path:
    """100 report prompts under the selected settings and all baselines; some of them over strengths; 50 adversarial."""
    start, model = time.time(), load_model()
    tools, selected = chosen(model)
    questions, asked = prompts()["report"], prompts()["adversarial"]
    rows = [
        reported(model, tools, method, strength, questions[:: N_REPORT // n])
        for method, strength, n in progress(report_settings(selected), "settings")
    ]
    adversarial = []
    for method in ("none", demonstrated(selected), "system prompt"):
        strength = selected.get(method, {}).get("strength")
        key = ["adversarial", asked, *_key(model, tools, method, strength)]
        settings = (method, strength, asked, ADVERSARIAL_TOKENS)
        texts = resumed("clamp_report", [*key, ADVERSARIAL_TOKENS], written_answers, model, tools, *settings)
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
        "coherence": np.minimum(1.0, perplexity(plain) / ppl) * style.distinct(row["answers"]),
        "relevance": np.clip(np.array(row["relevance"]) / np.mean(plain["relevance"]), 0, 1),
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
    words, landmarks = prompts()["golden_gate"]["words"], prompts()["golden_gate"]["landmarks"]
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

N_CONCEPT, N_CONCEPT_SELECTION, CONCEPT_TOKENS = 8, 4, 24
CONCEPT_STRENGTHS = (0.65, 1.0, 1.4)


def concept_of(name: str, model: Model, rows: Sequence[Any], plain: dict[str, Any]) -> dict[str, Any]:
    """One concept as the bridge's readers were chosen: features of its name, the strength by selection prompts."""
    words, found = prompts()["concepts"][name]["words"], shipped_saes(model)
    sae = found[main_layer(found, model)]
    tools = Tools({name: Group(tuple(clamping.feature(model, sae, i, unit) for i, unit in rows), name)})
    asked = concept_prompts()

    def run(split: str, strength: float) -> dict[str, Any]:
        texts = written_answers(model, tools, name, strength, asked[split], CONCEPT_TOKENS)
        row = {"answers": texts} | measured(model, asked[split], texts)
        return row | {"strength": strength} | summary(row, plain[split], words)

    best = choose([run("selection", strength) for strength in CONCEPT_STRENGTHS])
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
    """The few prompts that each of the ten concepts is chosen and reported on: spread over the lists."""
    given = prompts()
    return {
        "selection": given["selection"][:: len(given["selection"]) // N_CONCEPT_SELECTION],
        "report": given["report"][:: len(given["report"]) // N_CONCEPT][:N_CONCEPT],
    }


def _plain_concepts(model: Model) -> dict[str, Any]:
    rows = {}
    for split, asked in concept_prompts().items():
        texts = written_answers(model, Tools({}), "none", None, asked, CONCEPT_TOKENS)
        rows[split] = {"answers": texts} | measured(model, asked, texts)
    return rows


def study_concepts() -> Path:
    """Ten further concepts, written down before any was run, by their names' features; failures stay in the table."""
    start, model = time.time(), load_model()
    table, found = read_table("clamp_choose"), shipped_saes(model)
    prints = _fingerprint(found[main_layer(found, model)])
    ranked = table["ranked"][str(table["main_layer"])]["group"]
    plain = resumed("clamp_concepts", ["plain", model.hash, concept_prompts(), CONCEPT_TOKENS], _plain_concepts, model)
    rows = []
    for name in progress(list(prompts()["concepts"]), "concepts"):
        key = [name, prints, model.hash, ranked[name], CONCEPT_STRENGTHS, concept_prompts(), CONCEPT_TOKENS]
        rows.append(resumed("clamp_concepts", key, concept_of, name, model, ranked[name], plain))
    return write_table("clamp_concepts", model, time.time() - start, rows=rows)


# --- side effects, and ablation -----------------------------------------------------------------------


def fact_losses(model: Model, kind: str) -> list[float]:
    """Loss of each fact's ending given its beginning, nats per token. ``kind``: facts (the bridge) or other_facts."""
    values = []
    for start, end in prompts()[kind]:
        ids = tokenize(model, start + end)
        n = int(ids.attention_mask.sum() - tokenize(model, start).attention_mask.sum())
        with torch.no_grad():
            logp = model.hf(**ids.inputs).logits[0, -n - 1 : -1].float().log_softmax(-1)
        values.append(round(-float(logp.gather(-1, ids.input_ids[0, -n:, None]).mean()), 4))
    return values


def costs_of(model: Model, tools: Tools, method: str, strength: float | None) -> dict[str, Any]:
    """Losses on held-out text and right answers to multiple choice, under one setting."""
    with tools.applied(model, method, strength):
        loss, tokens = text_losses(model, held_texts(12), max_tokens=96)
        right = choice_right(model, 30)
    return {"loss": np.round(loss, 3).tolist(), "tokens": tokens.tolist(), "choice": right}


def ablations(model: Model, ranked: dict[str, Any], made: dict[str, Any]) -> list[dict[str, Any]]:
    """Facts about the bridge and about other landmarks, with features set to zero at all positions."""
    found = shipped_saes(model)
    middle = main_layer(found, model)
    here = ranked[str(middle)]
    sets = {
        "cleanest feature": [max(here["single"]["golden gate"], key=lambda r: r["auc"])["feature"]],
        "the name's features": [i for i, _ in here["group"]["golden gate"]],
        "the learned features": [i for i, _ in made["features"]],
        "random features": [i for i, _ in here["random"]],
    }
    result = [{"ablated": "nothing", "n": 0} | {kind: fact_losses(model, kind) for kind in ("facts", "other_facts")}]
    for name, chosen_features in sets.items():
        group = Group(tuple(clamping.feature(model, found[middle], i, 1.0) for i in chosen_features), name)
        with clamping.clamp(model, group, mode="ablate"):
            losses = {kind: fact_losses(model, kind) for kind in ("facts", "other_facts")}
        result.append({"ablated": name, "n": len(chosen_features)} | losses)
    return result


def study_costs() -> Path:
    """Held-out text and multiple choice at the sweet spot; what ablation does to facts."""
    start, model = time.time(), load_model()
    tools, selected = chosen(model)
    rows, shown = [], demonstrated(selected)
    settings = [("none", None)] + [(m, selected[m]["strength"]) for m in (shown, "learned vector", "mean difference")]
    for method, strength in [*settings, ("random features", selected[shown]["strength"])]:
        key = ["costs", *_key(model, tools, method, strength)]
        rows.append({"method": method, "strength": strength} | resumed(
            "clamp_costs", key, costs_of, model, tools, method, strength))  # fmt: skip
    table, found = read_table("clamp_choose"), shipped_saes(model)
    main, made = str(main_layer(found, model)), table["learned"]
    key = ["ablation", model.hash, _fingerprint(found[int(main)]), table["ranked"][main], made["features"]]
    ablated = resumed("clamp_costs", key, ablations, model, table["ranked"], made)
    return write_table("clamp_costs", model, time.time() - start, rows=rows, ablation=ablated)


STUDIES_OF_CLAMPING = {
    "clamp-choose": study_choose,
    "clamp-report": study_report,
    "clamp-concepts": study_concepts,
    "clamp-costs": study_costs,
}
