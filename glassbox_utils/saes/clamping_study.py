"""The long runs behind notebook 04: ``glassbox study clamp-choose clamp-report clamp-concepts clamp-costs``.

``clamp-choose`` picks features and strengths on selection prompts; all others only report, on other prompts. Nothing
here knows the number of a feature: with another SAE, or another model, the same rules choose others. All are resumable
and deterministic.
"""

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from glassbox_utils.core import corpora, prepared
from glassbox_utils.core.assets import DATA
from glassbox_utils.core.devices import exact
from glassbox_utils.core.identity import difference
from glassbox_utils.core.losses import answer_losses
from glassbox_utils.core.models import Model, Site
from glassbox_utils.core.session import progress
from glassbox_utils.core.studies import SEED, read_table, resumed
from glassbox_utils.core.text import chat, generate
from glassbox_utils.saes import clamping, learning
from glassbox_utils.saes.clamping import Feature, Group
from glassbox_utils.saes.reading import site_of_sae
from glassbox_utils.saes.recipes import layer_of
from glassbox_utils.saes.store import load_sae
from glassbox_utils.steering import style
from glassbox_utils.steering.apply import steer
from glassbox_utils.steering.fit import fit_directions
from glassbox_utils.steering.vectors import Direction, load_direction, random_direction

NO_SYSTEM = ""
"""the chats have an empty system message, as in notebook 05"""
NEW_TOKENS = 32
N_CANDIDATES, N_TRIED = 12, 2
"""features taken by activation; of these, features tried by generation (the best by output score)"""
GROUP = 12
"""features in a group: those that fire most on the concept's name"""
N_LEARNED, LEARN_STEPS = 32, 49
"""features of a group that is learned, and steps of learning: seven times through the training questions"""


PERPLEXITY_BUDGET = 3.0
"""times the unclamped answers' perplexity, on selection prompts"""
DISTINCT_BUDGET = 0.7
"""times the unclamped answers' share of different word pairs: a loop has a low perplexity and is no answer"""


NONE = (
    "No feature of this SAE fires on the bridge's name and hardly elsewhere, and none could be learned, so there is "
    "nothing to clamp. Train an SAE of more features on more text (glassbox prepare with a larger budget)."
)
SYSTEM = "You are the Golden Gate Bridge in San Francisco. Mention the Golden Gate Bridge in every answer."


@cache
def prompts() -> dict[str, Any]:
    """The prompts, words and sentences that we wrote: data/prompts/clamping.json."""
    return json.loads((DATA / "prompts" / "clamping.json").read_text(encoding="utf-8"))


def spread(items: Sequence[str], n: int) -> list[str]:
    """``n`` of them, evenly over the list: neighbours are alike."""
    return list(items[:: max(1, len(items) // n)][:n])


def golden_gate_sentences() -> tuple[list[str], list[str]]:
    """Sentences about the bridge and about other landmarks, from the training passages that we wrote."""
    n, n_other = prepared.sized(80, 24), prepared.sized(120, 36)
    written = corpora.sentences(corpora.load_corpus("landmarks", "train"), r"\w")
    here = [d.text for d in written if re.search("golden gate bridge", d.text, re.I)]
    there = [d.text for d in written if not re.search("golden gate", d.text, re.I)]
    return here[:n], there[:n_other]


def concept_sentences() -> list[str]:
    """The ten concepts' sentences, ten each, in order."""
    return [s for concept in prompts()["concepts"].values() for s in concept["sentences"]]


def role_saes(model: Model) -> dict[int, Any]:
    """Layer -> SAE, for the roles that the prepared folder has one for; PreparedError if it has none at all."""
    named = prepared.card().saes
    names = [named[role] for role in reversed(prepared.ROLES) if role in named] or [prepared.sae("main")]
    found = {site_of_sae(sae).layer: sae for sae in (load_sae(name, model) for name in names)}  # of one layer: main
    return dict(sorted(found.items()))


def main_layer(found: dict[int, Any], model: Model) -> int:
    """The SAE nearest to half of the depth."""
    return min(found, key=lambda layer: abs(layer - layer_of(model, "main")))


def stream_layer(sae: Any) -> int:
    """The layer after which the residual stream stands nearest to what an SAE reads."""
    site = site_of_sae(sae)
    return site.layer - 1 if site.kind == "resid_pre" and site.layer else site.layer


def taught(model: Model, starts: dict[str, str], tokens: int = NEW_TOKENS) -> tuple[list, list]:
    """Training questions, and answers about a concept that the plain model itself wrote: only their beginning is given.

    What goes on from there is fluent to the model by construction. ``starts``: how answers to questions about the model
    itself begin, and how all others do.
    """
    questions, answers = [], []
    for kind, asked in prompts()["train"].items():
        start, some = starts[kind], spread(asked, prepared.sized(len(asked), 8))
        left = max(tokens // 2, tokens - len(model.tokenizer(start, add_special_tokens=False)["input_ids"]))
        chats = [chat(model, q, NO_SYSTEM) + start for q in some]
        key = ["taught", model.hash, chats, left]
        questions += some
        answers += [start + rest for rest in resumed("clamp_choose", key, generate, model, chats, left)]
    return questions, answers


def lessons(model: Model, where: int | Site, questions: Sequence[str], answers: Sequence[str]) -> list[learning.Lesson]:
    """Chats with their answers, as what comes after ``where`` reads them (a number: after that layer)."""
    return learning.lessons(model, where, [chat(model, q, NO_SYSTEM) for q in questions], answers, seed=SEED)


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
                    stack.enter_context(steer(model, direction, strength))
            yield


def system_of(method: str) -> str:
    """The system message of a method: only one of them has any."""
    return SYSTEM if method == "system prompt" else NO_SYSTEM


def directions(model: Model, layers: Sequence[int]) -> list[Direction]:
    """Mean of the residual stream on the bridge's name minus its mean elsewhere, at several layers."""
    names, others = name_texts()
    rest = [cut for texts in others.values() for cut in clamping.random_cuts(texts)]
    found = fit_directions(
        model, names["golden gate"], rest, layers=layers, pool="last", name="golden gate", n_resamples=0
    )
    return [found[layer] for layer in layers]


def vector_file(layer: int) -> Path:
    return prepared.path("vectors", f"golden-gate-l{layer}")


def two_layers(model: Model) -> list[int]:
    """The middle of the depth and two thirds of it (of a model of two layers these are one)."""
    return sorted({layer_of(model, role) for role in prepared.ROLES})


def group_of(model: Model, sae: Any, rows: Sequence[Any], name: str) -> Group:
    """The group of a table's rows: features and the value of each at strength 1."""
    return Group(tuple(clamping.feature(model, sae, i, value) for i, value in rows), name)


def make_tools(model: Model, ranked: dict[str, Any], best: int | None, made: dict[str, Any]) -> Tools:
    """Methods from the tables of ``_ranked`` (layer as text -> content) and of what was learned: those that there are.

    ``best``: position of the single feature to use.
    """
    found_saes = {layer: sae for layer, sae in role_saes(model).items() if str(layer) in ranked}
    middle = main_layer(found_saes, model)

    def group(layer: int, name: str = "golden gate") -> tuple[Feature, ...]:
        return group_of(model, found_saes[layer], ranked[str(layer)]["group"][name], name).features

    here = ranked[str(middle)]
    found: dict[str, Any] = {}
    single = [
        clamping.feature(model, found_saes[middle], r["feature"], r["unit"]) for r in here["single"]["golden gate"]
    ]
    found |= {f"feature {k}": one for k, one in enumerate(single[:N_TRIED])}
    if single:
        found["one feature"] = single[best or 0]
    groups = {"several features": group(middle)}
    if all(parts := [group(layer) for layer in found_saes]) and len(parts) > 1:
        groups["several features, two layers"] = tuple(f for part in parts for f in part)
    for method, kind in (("learned features", "features"), ("random features", "random")):
        groups[method] = group_of(model, found_saes[middle], made[kind], method).features
    vectors = [load_direction(vector_file(layer)) for layer in two_layers(model)]
    found["mean difference"] = vectors[:1]
    if len(vectors) > 1:
        found["mean difference, two layers"] = vectors
    found |= {method: Group(features, method) for method, features in groups.items() if features}
    vector = torch.tensor(made["vector"])
    length = float(vector.norm())  # strength 1 adds the vector as it was learned
    if not length:
        return Tools(found)
    known = {"layer": made["layer"], "name": "golden gate", "method": "trained", "model_hash": model.hash}
    trained = replace(vectors[0], vector=vector / length, scale=length, **known)
    found["learned vector"] = [trained]
    found["random direction"] = [random_direction(trained, SEED)]
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
    loss, tokens = answer_losses(model, questions, texts, 25, NO_SYSTEM)
    row: dict[str, Any] = {"loss": loss.round(3).tolist(), "tokens": tokens.tolist()}
    if relevance:
        others = [*questions[1:], questions[0]]
        unrelated, _ = answer_losses(model, others, texts, 25, NO_SYSTEM)
        row["relevance"] = ((unrelated - loss) / np.maximum(tokens, 1)).round(4).tolist()
    return row


def perplexity(row: dict[str, Any]) -> float:
    """Per token, over all answers of a row."""
    return float(np.exp(np.sum(row["loss"]) / max(np.sum(row["tokens"]), 1)))


def summary(row: dict[str, Any], plain: dict[str, Any], words: Sequence[str]) -> dict[str, float]:
    """Mention rate, perplexity and distinct-2 in units of the unclamped answers."""
    usual = max(float(style.distinct(plain["answers"]).mean()), 1e-9)
    return {
        "mention": round(float(np.mean(clamping.mentions(row["answers"], words))), 4),
        "perplexity": round(perplexity(row) / perplexity(plain), 4),
        "distinct": round(float(style.distinct(row["answers"]).mean()) / usual, 4),
    }


def fingerprint(sae: Any) -> float:
    """An SAE by its weights: what is cached for one must not be taken for another of the same name."""
    return round(float(exact(sae.W_dec).abs().sum() + exact(sae.W_enc).sum()), 6)


def cache_key(model: Model, tools: Tools, method: str, strength: float | None) -> list[Any]:
    """What a cached part depends on: the model, and what the method is made of."""
    what, made = tools.found.get(method), []
    if isinstance(what, Feature | Group):
        for one in what.features if isinstance(what, Group) else (what,):
            made.append([one.site.layer, one.index, one.unit, fingerprint(one.sae)])
    else:
        made = [[d.layer, d.scale, float(d.vector[0])] for d in what or ()]
    name = "feature" if isinstance(what, Feature) else method
    return [name, strength, made, model.hash, NEW_TOKENS, system_of(method)]


def chosen(model: Model) -> tuple[Tools, dict[str, Any]]:
    """What ``clamp-choose`` chose: the tools, and each method's selected setting."""
    table = read_table("clamp_choose")
    made_for = table["provenance"]["model_hash"]
    if why := difference(made_for, model.hash):
        raise clamping.ClampError(
            f"The features were chosen for {table['provenance']['model']} ({made_for}), this is {model.name} "
            f"({model.hash}): {why}. Another model needs its own SAE (notebook 03) and its own choice: `glassbox "
            "prepare MODEL` makes both. Steering by a direction (notebook 05) needs no SAE."
        )
    return make_tools(model, table["ranked"], table["best"], table["learned"]), table["selected"]


def demonstrated(selected: dict[str, Any]) -> str:
    """The clamp that is shown: of the groups of features the one with the most mentions on selection prompts."""
    groups = [method for method in selected if method.startswith(("several features", "learned features"))]
    if not groups:
        raise clamping.ClampError(NONE)
    return max(groups, key=lambda m: (selected[m]["mention"], -selected[m]["perplexity"]))
