"""Choosing what to clamp: ``glassbox study clamp-choose``, on selection prompts only.

Features that *read* the bridge are ordered by how they *write* it, by gradient. The best are tried one by one while
whole answers are written, then two and three of them together. Beside them stand what needs no dictionary (a mean
difference, a learned vector), what fits one (``learning.learn_group``), and the same fit on a dictionary of random
rows.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from glassbox_utils.core import prepared
from glassbox_utils.core.models import Model
from glassbox_utils.core.prepared import load_subject
from glassbox_utils.core.session import progress
from glassbox_utils.core.studies import SEED, resumed, write_table
from glassbox_utils.saes import clamping, clamping_study, detection, learning, read_write
from glassbox_utils.saes.clamping import Group
from glassbox_utils.saes.reading import site_of_sae
from glassbox_utils.steering.vectors import save_direction

N_PROBED, N_SELECTION = 4, 16
"""selection prompts on which the output score is measured, and on which answers are written"""
N_TRIED, N_JOINED = 5, 3
"""features that are tried by generation (the best writers of those that read, and of all), and the best of the former
that are joined"""
N_TWINS, N_RANDOM = 3, 5
"""random dictionaries to learn on, and random draws beside the clamp that is shown"""
PUSHES = (0.2, 0.3, 0.4, 0.55)
"""sizes of the hold, as a share of a typical norm"""
GRID: dict[str, tuple[float, ...]] = {
    "one feature": PUSHES,
    "two features": PUSHES,
    "three features": PUSHES,
    "readers": (0.5, 0.8, 1.2),
    "mean difference": (0.2, 0.3, 0.4),
    "learned features": (0.6, 0.8, 1.0),
    clamping_study.TWIN: (0.6, 0.8, 1.0),
    "learned vector": (0.6, 0.8, 1.0),
}
"""method -> strengths that are tried: a share of a typical norm; for readers times their mean on the name; for what is
learned times the learned values"""
MORE = (0.7, 1.4, 3)
"""if no strength of a grid keeps to the price (perplexity, word pairs) the search goes on below it, each time at this
share of the last; if all do and the strongest mentions nothing, above it; so many times at most"""


def concept_codes(model: Model, sae: Any, name: str) -> read_write.Concept:
    """Codes of a concept's sentences and name, and of those of all other concepts and landmarks."""
    names, others = clamping_study.name_texts()
    whole = dict(others) | {"golden gate": clamping_study.golden_gate_sentences()[0]}
    rest = [text for other, texts in whole.items() if other != name for text in texts]
    cuts = [cut for other, texts in others.items() if other != name for cut in clamping.random_cuts(texts)]
    return read_write.Concept(
        detection.text_scores(model, sae, whole[name]),
        detection.text_scores(model, sae, rest),
        clamping.last_codes(model, sae, names[name]),
        clamping.last_codes(model, sae, cuts),
    )


def _candidates(
    model: Model, sae: Any, name: str, words: Sequence[str], questions: Sequence[str], answers: Sequence[str]
) -> dict[str, Any]:
    """A concept's features by reading and writing, the best writers whatever they read, and random ones; the group of
    its name.

    ``questions`` and ``answers``: about the concept; a feature writes it if it makes these answers likelier.
    """
    given = clamping_study.lessons(model, site_of_sae(sae), questions, answers)
    writes = learning.effects(model, sae, given)
    asked, codes = clamping_study.prompts()["selection"][:N_PROBED], concept_codes(model, sae, name)
    found = read_write.candidates(model, sae, codes, words, asked, writes)
    alive = (codes.others.amax(0) > 0).nonzero().flatten().tolist()
    left = sorted(set(alive) - {c.feature for c in found})
    drawn = np.random.default_rng(SEED).permutation(left)[: max(len(found), N_RANDOM * 3)].tolist()
    control = read_write.described(model, sae, codes, [int(i) for i in drawn], words, asked, writes) if drawn else []
    try:
        made = clamping.name_group(model, sae, codes.name, codes.elsewhere, clamping_study.GROUP, name)
        group = [[f.index, round(f.unit, 4)] for f in made.features]
    except clamping.ClampError:  # no feature is the name's
        group = []
    best = writes.argsort(descending=True)[:N_TRIED].tolist()
    return {
        "found": [vars(c) for c in found],
        "writers": [vars(c) for c in read_write.described(model, sae, codes, best, words, asked, writes)],
        "random": [vars(c) for c in control],
        clamping_study.READERS: group,
        "d_sae": len(writes),
    }


def as_active(model: Model, made: Mapping[str, Any], reads: Sequence[int]) -> list[dict[str, Any]]:
    """What features write that are as active on the bridge's sentences as its readers, and don't tell them apart."""
    sae, words = clamping_study.held_sae(model), clamping_study.prompts()["golden_gate"]["words"]
    given = clamping_study.lessons(model, site_of_sae(sae), made["questions"], made["answers"])
    asked, codes = clamping_study.prompts()["selection"][:N_PROBED], concept_codes(model, sae, "golden gate")
    writes, found = learning.effects(model, sae, given), read_write.as_active(codes, reads)
    return [vars(c) for c in read_write.described(model, sae, codes, found, words, asked, writes)] if found else []


def learn_steps() -> int:
    """Steps of learning at the size of the prepared folder."""
    return prepared.sized(clamping_study.LEARN_STEPS, 16)


def _lessons(
    model: Model, sae: Any, made: Mapping[str, Any], order: int
) -> tuple[list[learning.Lesson], list[learning.Lesson]]:
    """What is taught, and what the model says by itself, as the SAE reads it; ``order`` draws the lessons' order."""
    where = site_of_sae(sae)
    return (
        clamping_study.lessons(model, where, made["questions"], made["answers"], order),
        clamping_study.lessons(model, where, made["questions"], made["usual"], order),
    )


def _rows(group: Group) -> list[list[float]]:
    """Features and values as a table keeps them."""
    return [[f.index, round(f.unit, 4)] for f in group.features]


def _learned(model: Model, made: Mapping[str, Any], steps: int, twin: int | None, order: int = SEED) -> dict[str, Any]:
    """The features that make the model write the lessons' answers, their values, controls, and each step's loss.

    ``twin``: on a dictionary of random rows, drawn by this seed, instead of the SAE; ``order``: of the lessons.
    """
    sae = clamping_study.held_sae(model)
    given, usual = _lessons(model, sae, made, order)
    sae = sae if twin is None else learning.random_dictionary(sae, twin)
    n = min(clamping_study.N_LEARNED, max(1, sae.cfg.d_sae // 16))
    try:
        group, control, loss = learning.learn_group(model, sae, given, n, steps, seed=SEED, usual=usual)
    except clamping.ClampError:  # too few of its features are quiet on the answers
        return {"features": [], "random": [], "loss": []}
    return {"features": _rows(group), "random": _rows(control), "loss": loss}


def _learned_vector(model: Model, layer: int, made: Mapping[str, Any]) -> dict[str, Any]:
    given = clamping_study.lessons(model, layer, made["questions"], made["answers"])
    vector, loss = learning.learn_vector(model, layer, given, learn_steps())
    return {"vector": [round(float(x), 4) for x in vector], "vector_loss": loss}


def taught(model: Model) -> dict[str, Any]:
    """Questions, answers about the bridge that the plain model wrote, and its answers to the same questions."""
    page = clamping_study.prompts()["golden_gate"]
    questions, answers, usual = clamping_study.taught(model, page["starts"], page["turns"])
    return {"questions": questions, "answers": answers, "usual": usual}


RULE = [learning.QUIET, learning.START_TOKENS, learning.START_WEIGHT, learning.CANDIDATES, clamping_study.N_LEARNED]
"""what a fit depends on beside the lessons"""


def fitted(model: Model, sae: Any, made: Mapping[str, Any], twin: int | None, order: int = SEED) -> dict[str, Any]:
    """One fit of ``_learned``, from the cache if it is there."""
    texts, steps = [made[k] for k in ("questions", "answers", "usual")], learn_steps()
    key = ["learned", twin, clamping_study.fingerprint(sae), model.hash, *texts, steps, RULE]
    key += [] if order == SEED else [order]
    found = resumed("clamp_choose", key, _learned, model, made, steps, twin, order)
    # a value that is rounded to nothing holds nothing
    return found | {"features": [row for row in found["features"] if row[1] > 0]}


def _learned_all(model: Model, sae: Any, made: dict[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """All that is learned about the bridge: features, the same on random dictionaries, and a vector."""
    twins = [fitted(model, sae, made, twin) for twin in (None, *range(prepared.sized(N_TWINS, 1)))]
    layer = clamping_study.stream_layer(sae)
    key = ["vector", layer, model.hash, made["questions"], made["answers"], learn_steps(), RULE]
    return made | twins.pop(0) | resumed("clamp_choose", key, _learned_vector, model, layer, made), twins


def choose(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The setting that comes nearest to the goal (then the one with the most mentions, then the cheapest)."""
    return max(rows, key=_order)


def _order(row: Mapping[str, Any]) -> tuple[float, float, float]:
    return clamping_study.reached(row), row["mention"], -row["perplexity"]


def further(rows: Sequence[dict[str, Any]], grid: Sequence[float]) -> float | None:
    """A strength beyond those that were tried, if all of them cost too much (or loop), or none does and nothing is
    mentioned."""
    down, up, most = MORE
    tried = sorted(rows, key=lambda r: r["strength"])
    if len(tried) >= len(grid) + most:
        return None
    goal = clamping_study.GOAL  # a loop is cheap: its perplexity is low, and it is no answer
    fine = [r["perplexity"] <= goal["perplexity"] and r["distinct"] >= goal["distinct"] for r in tried]
    if not any(fine):
        return round(tried[0]["strength"] * down, 4)
    if all(fine) and tried[-1]["mention"] == 0:
        return round(tried[-1]["strength"] * up, 4)
    return None


def _select(
    model: Model, tools: clamping_study.Tools, method: str, strength: float | None, questions: Sequence[str]
) -> dict[str, Any]:
    texts = clamping_study.written_answers(model, tools, method, strength, questions)
    return {"answers": texts} | clamping_study.measured(model, questions, texts)


def tried(
    model: Model, method: str, what: Any, strengths: Sequence[float], questions: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """``what`` at each strength, and beyond them where ``further`` says so, by the measures of the goal."""
    tools, rows = clamping_study.Tools({method: what}), list[dict[str, Any]]()
    key = ["select", questions, *clamping_study.cache_key(model, tools, "none", None)]
    plain = resumed("clamp_choose", key, _select, model, tools, "none", None, questions)
    words = clamping_study.prompts()["golden_gate"]["words"]
    left = list(strengths)
    while left or (more := further(rows, strengths)) is not None:
        strength = left.pop(0) if left else more
        key = ["select", questions, *clamping_study.cache_key(model, tools, method, strength)]
        row = resumed("clamp_choose", key, _select, model, tools, method, strength, questions)
        rows.append({"method": method, "strength": strength} | clamping_study.summary(row, plain, words))
        yield rows[-1]


def _singles(
    model: Model, sae: Any, method: str, some: Sequence[Mapping[str, Any]], asked: Sequence[str]
) -> list[dict[str, Any]]:
    """The first of some features, the best writers, one by one at every push, while answers are written."""
    rows = list[dict[str, Any]]()
    for index in progress([c["feature"] for c in some][: prepared.sized(N_TRIED, 2)], "single features"):
        one = read_write.pushed(model, sae, [index])
        rows += [r | {"features": [index]} for r in tried(model, method, one, prepared.thinned(PUSHES, 3), asked)]
    return rows


def _held(model: Model, sae: Any, row: Mapping[str, Any]) -> list[list[float]]:
    """Features of a row of ``_singles`` or ``_joined``, and their units, as a table keeps them."""
    made = read_write.pushed(model, sae, row["features"])
    return _rows(made if isinstance(made, Group) else Group((made,)))


def _joined(
    model: Model, sae: Any, singles: Sequence[dict[str, Any]], asked: Sequence[str]
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows of what was tried of two and three of the best single features; the features of each method."""
    rows = list(singles)
    by_feature = {r["features"][0]: [s for s in singles if s["features"] == r["features"]] for r in singles}
    order = sorted(by_feature, key=lambda i: _order(choose(by_feature[i])), reverse=True)[:N_JOINED]
    for size, method in ((2, "two features"), (3, "three features")):
        for several in combinations(order, size):
            group = read_write.pushed(model, sae, several, method)
            found = tried(model, method, group, prepared.thinned(PUSHES, 3), asked)
            rows += [r | {"features": list(several)} for r in found]
    methods = dict.fromkeys(r["method"] for r in rows)
    return rows, {m: _held(model, sae, choose([r for r in rows if r["method"] == m])) for m in methods}


def _ranked(model: Model, sae: Any, made: Mapping[str, Any]) -> dict[str, Any]:
    rule = [read_write.N_NAME, read_write.N_SENTENCE, read_write.PROBE, N_PROBED, N_TRIED]
    key = ["by gradient, and the best writers", clamping_study.fingerprint(sae), model.hash, *rule]
    words, about = clamping_study.prompts()["golden_gate"]["words"], (made["questions"], made["answers"])
    return resumed("clamp_choose", [*key, *about], _candidates, model, sae, "golden gate", words, *about)


def study_choose() -> Path:
    """Features by reading and writing; features, methods and strengths by generation on selection prompts."""
    start, model = time.time(), load_subject()
    sae, page = clamping_study.held_sae(model), clamping_study.prompts()
    asked = page["selection"][: prepared.sized(N_SELECTION, 8)]
    made = taught(model)
    ranked = _ranked(model, sae, made)
    layer = clamping_study.stream_layer(sae)
    if not clamping_study.vector_file(layer).with_suffix(".json").exists():
        save_direction(clamping_study.mean_difference(model, layer), clamping_study.vector_file(layer))
    made, twins = _learned_all(model, sae, made)
    drawn_features = [c["feature"] for c in ranked["random"]]
    rows, features = _joined(model, sae, _singles(model, sae, "one feature", ranked["found"], asked), asked)
    writers = _singles(model, sae, clamping_study.WRITER, ranked["writers"], asked)
    features[clamping_study.WRITER] = _held(model, sae, choose(writers))
    rows += writers
    fitted = {"random features": made["features"], "random readers": ranked[clamping_study.READERS]}
    features |= {clamping_study.READERS: ranked[clamping_study.READERS], clamping_study.LEARNED: made["features"]}
    shown = [r for r in rows if r["method"] in features]
    size = len(choose(shown)["features"]) if shown else 1
    named = {int(i) for like in fitted.values() for i, _ in like} | {c["feature"] for c in ranked["found"]}
    pool = sorted(set(range(sae.cfg.d_sae)) - named)
    for k in range(prepared.sized(N_RANDOM, 2)):  # as many random features as are held, pushed as much
        drawn = drawn_features[k * size : (k + 1) * size]
        if len(drawn) == size:
            control = read_write.pushed(model, sae, drawn, "random")
            features[f"random push {k}"] = _rows(control if isinstance(control, Group) else Group((control,)))
        for name, like in fitted.items():
            others = np.random.default_rng([SEED, k]).permutation(pool)[: len(like)].tolist()
            if like and len(others) == len(like):
                features[f"{name} {k}"] = [[i, value] for i, (_, value) in zip(others, like, strict=True)]
    table = {
        "features": features,
        "twins": [twin["features"] for twin in twins],
        "vector": made["vector"],
    }
    tools = clamping_study.make_tools(model, table)
    first = f"{clamping_study.TWIN} 0"
    for method in (clamping_study.READERS, "mean difference", clamping_study.LEARNED, first, "learned vector"):
        if method in tools.found:
            grid = prepared.thinned(GRID[method.removesuffix(" 0")])
            rows += list(tried(model, method, tools.found[method], grid, asked))
    methods = dict.fromkeys(r["method"] for r in rows)
    selected = {method: choose([r for r in rows if r["method"] == method]) for method in methods}
    clamping_study.demonstrated(selected)  # ClampError if there is nothing to clamp
    return write_table(
        "clamp_choose",
        model,
        time.time() - start,
        sae=sae.cfg.metadata.hook_name,
        goal=clamping_study.GOAL,
        candidates=ranked["found"],
        writers=ranked["writers"],
        random=ranked["random"],
        d_sae=ranked["d_sae"],
        **table,
        learned={k: made[k] for k in ("questions", "answers", "features", "loss", "vector_loss")},
        twin_loss=[twin["loss"] for twin in twins],
        rows=rows,
        selected=selected,
        prompts=asked,
    )
