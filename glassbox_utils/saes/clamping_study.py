"""The long runs behind notebook 04: ``glassbox study clamp-choose clamp-report clamp-concepts clamp-costs
clamp-controls``.

``clamp-choose`` picks features and strengths on selection prompts; all others only report, on other prompts. Nothing
here knows the number of a feature: with another SAE, or another model, the same rules choose others. All are resumable
and deterministic.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
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
from glassbox_utils.saes import clamping, learning, read_write, reading
from glassbox_utils.saes.clamping import Feature, Group
from glassbox_utils.saes.reading import site_of_sae
from glassbox_utils.saes.store import load_sae
from glassbox_utils.steering import style
from glassbox_utils.steering.apply import steer
from glassbox_utils.steering.fit import fit_directions
from glassbox_utils.steering.vectors import Direction, load_direction, random_direction

NO_SYSTEM = ""
"""the chats have an empty system message, as in notebook 05"""
NEW_TOKENS = 32
GROUP = 12
"""features in a group: those that fire most on the concept's name"""
LATER = 8
"""a mention counts after so many tokens of an answer: before that it may be a beginning learned by heart"""
N_LEARNED, LEARN_STEPS = 128, 98
"""features of a group that is learned, and steps of learning: fourteen times through the training questions"""
TURN = (2, 7)
"""an answer that turns to the concept does so after so many words of its own: at least, and less than"""


GOAL = {"mention": 0.9, "perplexity": 3.0, "distinct": 0.4, "relevance": 0.5}
"""what a clamp is to reach on prompts that chose nothing: share of answers that mention the bridge after ``LATER``
tokens; perplexity under the unclamped model, at most so many times the unclamped answers'; share of different word
pairs over *all* answers together; relevance, as a share of the unclamped answers'"""


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


def held_sae(model: Model) -> Any:
    """The SAE whose features are held: the main one of the prepared folder."""
    return load_sae(prepared.sae("main"), model)


def stream_layer(sae: Any) -> int:
    """The layer after which the residual stream stands nearest to what an SAE reads."""
    site = site_of_sae(sae)
    return site.layer - 1 if site.kind == "resid_pre" and site.layer else site.layer


def taught(
    model: Model, starts: Mapping[str, Sequence[str]], turns: Sequence[str], tokens: int = NEW_TOKENS
) -> tuple[list[str], list[str], list[str]]:
    """Training questions, answers about a concept that the plain model itself wrote, and the answers that it gives by
    itself.

    Every second answer begins with the concept (``starts``: answers to questions about the model itself, and all
    others), the others turn to it after a few words of the model's own answer (``turns``), each in turn: one beginning
    for all would be learned by heart. The model goes on from there, so it is fluent to it by construction.
    """
    page = prompts()["train"]
    asked = [(kind, q) for kind, some in page.items() for q in spread(some, prepared.sized(len(some), 8))]
    chats = [chat(model, q, NO_SYSTEM) for _, q in asked]
    usual = resumed("clamp_choose", ["taught", model.hash, chats, tokens], generate, model, chats, tokens)
    begun, rng = [], np.random.default_rng(SEED)
    for i, (kind, _) in enumerate(asked):
        own = " ".join(usual[i].split()[: rng.integers(*TURN)]).rstrip(",.;:")
        begun.append(own + turns[i // 2 % len(turns)] if i % 2 else starts[kind][i // 2 % len(starts[kind])])
    longest = max(len(model.tokenizer(start, add_special_tokens=False)["input_ids"]) for start in begun)
    given, left = [text + start for text, start in zip(chats, begun, strict=True)], max(tokens // 2, tokens - longest)
    rest = resumed("clamp_choose", ["taught", model.hash, given, left], generate, model, given, left)
    answers = [start + more for start, more in zip(begun, rest, strict=True)]
    return [q for _, q in asked], answers, [text or " " for text in usual]


def lessons(
    model: Model, where: int | Site, questions: Sequence[str], answers: Sequence[str], order: int = SEED
) -> list[learning.Lesson]:
    """Chats with their answers in an ``order``, as what comes after ``where`` reads them (a number: that layer)."""
    return learning.lessons(model, where, [chat(model, q, NO_SYSTEM) for q in questions], answers, seed=order)


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


def mean_difference(model: Model, layer: int) -> Direction:
    """Mean of the residual stream on the bridge's name minus its mean elsewhere: a constant vector, without an SAE."""
    names, others = name_texts()
    rest = [cut for texts in others.values() for cut in clamping.random_cuts(texts)]
    found = fit_directions(
        model, names["golden gate"], rest, layers=[layer], pool="last", name="golden gate", n_resamples=0
    )
    return found[layer]


def vector_file(layer: int) -> Path:
    return prepared.path("vectors", f"golden-gate-l{layer}")


def group_of(model: Model, sae: Any, rows: Sequence[Any], name: str) -> Group:
    """The group of a table's rows: features and the value of each at strength 1."""
    return Group(tuple(clamping.feature(model, sae, i, value) for i, value in rows), name)


def make_tools(model: Model, table: Mapping[str, Any]) -> Tools:
    """The methods of ``clamp-choose``'s table: what it found of features, and what it learned."""
    sae = held_sae(model)
    found: dict[str, Any] = {}
    for method, rows in table["features"].items():
        if rows:
            group = group_of(model, sae, rows, method)
            found[method] = group.features[0] if len(rows) == 1 else group
    for seed, rows in enumerate(table["twins"]):
        if rows:
            found[f"{TWIN} {seed}"] = group_of(model, learning.random_dictionary(sae, seed), rows, TWIN)
    layer = stream_layer(sae)
    if vector_file(layer).with_suffix(".json").exists():
        plain = load_direction(vector_file(layer))
        found["mean difference"] = [plain]
        vector = torch.tensor(table["vector"])
        if length := float(vector.norm()):  # strength 1 adds the vector as it was learned
            known: dict[str, Any] = {
                "layer": layer,
                "name": "golden gate",
                "method": "trained",
                "model_hash": model.hash,
            }
            trained = replace(plain, vector=vector / length, scale=length, **known)
            found["learned vector"] = [trained]
            found["random direction"] = [random_direction(trained, SEED)]
    return Tools(found)


TWIN = "learned on random rows"
"""what ``learn_group`` finds in a dictionary of random rows of the same shapes and norms"""


def push_sizes(model: Model, tools: Tools) -> dict[str, float]:
    """Method -> how long its push is at strength 1, as a share of a typical norm; only methods that push."""
    median, found = reading.median_norm(model, held_sae(model)), dict[str, float]()
    for method, what in tools.found.items():
        if isinstance(what, Feature | Group):
            found[method] = read_write.push_size(model, what)
        else:
            found[method] = sum(abs(d.scale) for d in what) / median
    return found


def family(method: str) -> str:
    """A method without the number of its draw: ``random push 3`` is one of several random pushes."""
    return re.sub(r" \d+$", "", method)


WRITER = "one writer"
"""the best writer of the whole dictionary, whether it reads the bridge or not"""
OF_FEATURES = ("one feature", WRITER, "two features", "three features")
"""methods that push features which were found, not fitted: their strength is a share of a typical norm"""
READERS, LEARNED = "readers", "learned features"
"""the features that fire most on the name, at their mean there; those that were fitted, at the fitted values"""
HELD = (*OF_FEATURES, READERS, LEARNED)


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


def measured(model: Model, questions: Sequence[str], texts: Sequence[str]) -> dict[str, Any]:
    """Each answer under the unclamped model: its loss (nats, summed) and tokens; its relevance, by how much its own
    question makes it likelier than the next question does (nats per token); and what is left after ``LATER`` tokens."""
    loss, tokens = answer_losses(model, questions, texts, 25, NO_SYSTEM)
    unrelated, _ = answer_losses(model, [*questions[1:], questions[0]], texts, 25, NO_SYSTEM)
    return {
        "loss": loss.round(3).tolist(),
        "tokens": tokens.tolist(),
        "relevance": ((unrelated - loss) / np.maximum(tokens, 1)).round(4).tolist(),
        "later": later(model, texts),
    }


def later(model: Model, texts: Sequence[str], tokens: int = LATER) -> list[str]:
    """What is left of each text after its first tokens."""
    ids = [model.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    return [str(model.tokenizer.decode(row[tokens:])) for row in ids]


def perplexity(row: Mapping[str, Any]) -> float:
    """Per token, over all answers of a row."""
    return float(np.exp(np.sum(row["loss"]) / max(np.sum(row["tokens"]), 1)))


def summary(row: Mapping[str, Any], plain: Mapping[str, Any], words: Sequence[str]) -> dict[str, float]:
    """A setting by the four measures of ``GOAL``."""
    usual = max(float(np.mean(plain["relevance"])), 1e-6)
    return {
        "mention": round(float(np.mean(clamping.mentions(row["later"], words))), 4),
        "perplexity": round(perplexity(row) / perplexity(plain), 4),
        "distinct": round(style.distinct_over(row["answers"]), 4),
        "relevance": round(float(np.mean(row["relevance"])) / usual, 4),
    }


def reached(row: Mapping[str, float]) -> float:
    """How near a setting comes to ``GOAL``: the worst of its four measures as a share of what is wanted, 0 to 1."""
    parts = [row[k] / GOAL[k] for k in ("mention", "distinct", "relevance")]
    return float(np.clip(min([*parts, GOAL["perplexity"] / max(row["perplexity"], 1e-9)]), 0, 1))


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
    name = "features" if isinstance(what, Feature | Group) else method
    return [name, strength, made, model.hash, NEW_TOKENS, LATER, system_of(method)]


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
    return make_tools(model, table), table["selected"]


def demonstrated(selected: Mapping[str, Any], among: Sequence[str] = HELD) -> str:
    """The clamp that is shown: of the methods that hold features the one that comes nearest to the goal."""
    found = [method for method in selected if method in among]
    if not found:
        raise clamping.ClampError(NONE)
    return max(found, key=lambda m: (reached(selected[m]), selected[m]["mention"], -selected[m]["perplexity"]))


def imitated(selected: Mapping[str, Any]) -> dict[str, str]:
    """Family of random draws -> the method whose size they have: they are its control."""
    like = {"random features": LEARNED, "random readers": READERS}
    like |= {"random direction": "learned vector", TWIN: f"{TWIN} 0"}
    if any(method in OF_FEATURES for method in selected):
        like["random push"] = demonstrated(selected, OF_FEATURES)
    return {draws: method for draws, method in like.items() if method in selected}
