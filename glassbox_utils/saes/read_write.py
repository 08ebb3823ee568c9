"""Which features read a concept, which write it, and which do both: the candidates of a clamp on a single feature.

*Reading* is measured by activation on texts (mean on the name's last token, area under the curve on sentences),
*writing* by effect: the gradient of answers about the concept (``learning.effects``) ranks all features of a
dictionary at once. The output score (how much more likely the concept's words become as the next token when a feature
is held, Arad et al., arXiv 2505.20063) is reported beside it; alone it is misled, since a feature for capital letters
raises every name. The size of a hold is a share of a typical position's norm, so that features of all dictionaries are
pushed alike.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from glassbox_utils.core import coding
from glassbox_utils.core.arguments import some_texts
from glassbox_utils.core.devices import like, result
from glassbox_utils.core.models import Model
from glassbox_utils.core.text import chat, following, tokenize
from glassbox_utils.saes import clamping, detection, learning, reading
from glassbox_utils.saes.clamping import Feature, Group

START = "The"
"""how the answer begins when the output score is read"""
PROBE = 0.3
"""size of the hold, in typical norms, at which the output score is measured"""
BLIND = 0.1
"""a feature whose area under the curve on sentences is nearer than this to .5 does not tell them apart"""
N_NAME, N_SENTENCE = 24, 12
"""candidates: those that fire most on the concept's name, and those that best tell its sentences from others"""


def push_unit(model: Model, sae: Any, index: int) -> float:
    """The activation that adds one typical norm (the SAE's median) to a position of that norm: the unit of a push.

    ClampError for an unknown feature, or one whose decoder row is zero.
    """
    index = reading.check_index(index, sae.cfg.d_sae, clamping.ClampError)
    median = reading.median_norm(model, sae)
    row = coding.rows(sae)[index].detach().float()
    at = torch.nn.functional.normalize(torch.randn(len(row), generator=torch.Generator().manual_seed(0)), dim=-1)
    gain = coding.gain(sae, like(at * median, row))
    size = float(row.norm()) * float(gain.squeeze() if isinstance(gain, Tensor) else gain)
    if not size > 0:
        raise clamping.ClampError(f"Feature {index} writes nothing: its decoder row is zero. Choose another one.")
    return median / size


def pushed(model: Model, sae: Any, indices: Sequence[int], name: str = "") -> Feature | Group:
    """Features that together add about one typical norm at strength 1, each the same part of it."""
    share = len(indices) ** -0.5  # rows that are nearly at right angles
    found = tuple(clamping.feature(model, sae, i, share * push_unit(model, sae, i)) for i in indices)
    return found[0] if len(found) == 1 else Group(found, name)


def push_size(model: Model, what: Feature | Group) -> float:
    """How long a push of strength 1 is where none of the features is active, as a share of a typical norm."""
    parts = what.features if isinstance(what, Group) else (what,)
    shares = [(f, f.unit / push_unit(model, f.sae, f.index)) for f in parts]
    rows = [x * torch.nn.functional.normalize(coding.rows(f.sae)[f.index].detach().float(), dim=0) for f, x in shares]
    return float(torch.stack(rows).sum(0).norm())


def concept_tokens(model: Model, words: Sequence[str]) -> list[int]:
    """First tokens of the words as they stand inside a sentence, small and capitalised."""
    forms = {f" {form}" for word in words for form in (word, word.capitalize())}
    return sorted({ids[0] for form in forms if (ids := following(model, form))})


@torch.inference_mode()
def word_mass(model: Model, questions: Sequence[str], tokens: Sequence[int]) -> NDArray:
    """Log of the probability that an answer which begins with ``START`` goes on with one of these tokens."""
    batch = tokenize(model, [chat(model, q, "") + START for q in questions])
    logits = model.hf(**batch.inputs, logits_to_keep=1).logits[:, -1].float()
    return result(logits.log_softmax(-1)[:, list(tokens)].logsumexp(-1)).numpy()


class Concept(NamedTuple):
    """Codes of a concept's texts and of others: whole sentences (strongest activation) and names (last token)."""

    sentences: Float[Tensor, "text d_sae"]
    others: Float[Tensor, "other d_sae"]
    name: Float[Tensor, "cut d_sae"]
    elsewhere: Float[Tensor, "cut2 d_sae"]


@dataclass(frozen=True)
class Candidate:
    """A feature that reads a concept, and what holding it does to the next word."""

    feature: int
    auc: float
    """on sentences: chance that one about the concept makes it fire more than another one; .5 is blind"""
    on_name: float
    """mean activation on the name's last token, as a share of a typical norm"""
    gain: float
    """output score: rise of the log-probability of the concept's words, nats, held at ``PROBE`` typical norms"""
    rank: int
    """its place among all features of the dictionary by what it writes, by gradient: 0 is the best writer"""


def readers(model: Model, sae: Any, concept: Concept) -> list[int]:
    """Features that read the concept: ``N_NAME`` by its name, then those by its sentences that are not among them."""
    named: list[int] = []
    with suppress(clamping.ClampError):  # no feature is the name's
        named = [f.index for f in clamping.name_group(model, sae, concept.name, concept.elsewhere, N_NAME).features]
    hits = detection.separates(concept.sentences, concept.others, N_SENTENCE)
    return list(dict.fromkeys([*named, *(hit.feature for hit in hits if hit.mean_here > 0)]))


def candidates(
    model: Model,
    sae: Any,
    concept: Concept,
    words: Sequence[str],
    questions: Sequence[str],
    writes: Float[Tensor, " d_sae"],
) -> list[Candidate]:
    """The features that read a concept, the best writers first. ``writes``: of ``learning.effects``."""
    return described(model, sae, concept, readers(model, sae, concept), words, questions, writes)


def described(
    model: Model,
    sae: Any,
    concept: Concept,
    indices: Sequence[int],
    words: Sequence[str],
    questions: Sequence[str],
    writes: Float[Tensor, " d_sae"],
) -> list[Candidate]:
    """How given features read and write a concept, the best writer first."""
    rank = writes.argsort(descending=True).argsort()
    tokens = concept_tokens(model, words)
    plain = word_mass(model, questions, tokens)
    found = []
    for index in indices:
        a, b = concept.sentences[:, index], concept.others[:, index]
        above = (a[:, None] > b).float().mean() + 0.5 * (a[:, None] == b).float().mean()
        unit = push_unit(model, sae, index)
        with clamping.clamp(model, clamping.feature(model, sae, index, unit), PROBE):
            gain = float((word_mass(model, questions, tokens) - plain).mean())
        on_name = float(concept.name[:, index].mean()) / unit
        found.append(Candidate(index, round(float(above), 4), round(on_name, 4), round(gain, 4), int(rank[index])))
    return sorted(found, key=lambda c: c.rank)


def search(
    model: Model,
    sae: Any,
    here: Sequence[str],
    there: Sequence[str],
    words: Sequence[str],
    questions: Sequence[str] = ("Who are you?", "How do I boil an egg?", "What is a computer?", "Tell me a story."),
) -> list[Candidate]:
    """Which features read a concept, the best writer first: what to hold.

    ``here``: sentences about the concept, some of which name it; ``there``: others; ``words``: its name and what counts
    as a mention; ``questions``: what is asked when the output score is read. ClampError for no text and for words that
    no sentence names.
    """
    concept = codes(model, sae, here, there, words)
    asked = list(some_texts("questions", questions, clamping.ClampError))
    return candidates(model, sae, concept, words, asked, written(model, sae, here, asked))


def codes(model: Model, sae: Any, here: Sequence[str], there: Sequence[str], words: Sequence[str]) -> Concept:
    """What all features do on a concept's sentences, on its name and elsewhere. Arguments and errors as ``search``."""
    here, there = (some_texts(k, v, clamping.ClampError) for k, v in (("here", here), ("there", there)))
    if not (named := clamping.name_cuts(here, words)):
        raise clamping.ClampError(
            f"None of the {len(here)} sentences names {', '.join(map(repr, words))} after its first word. Give some "
            "that do, or other words."
        )
    return Concept(
        detection.text_scores(model, sae, here),
        detection.text_scores(model, sae, there),
        clamping.last_codes(model, sae, named),
        clamping.last_codes(model, sae, clamping.random_cuts(there)),
    )


def as_active(concept: Concept, reads: Sequence[int]) -> list[int]:
    """For each reader of a concept another feature that fires as strongly on its sentences and does not tell them from
    others: what the concept's readers have to be compared with.

    Drawn from features whose area under the curve on sentences is within ``BLIND`` of .5 and that fire on the name at
    most twice as much as elsewhere; of those left the one whose mean on the concept's sentences is nearest.
    """
    size, auc = concept.sentences.mean(0), detection.areas(concept.sentences, concept.others)
    may = ((auc - 0.5).abs() <= BLIND) & (size > 0) & (concept.name.mean(0) <= 2 * concept.elsewhere.mean(0))
    may[list(reads)] = False
    found: list[int] = []
    for index in reads:
        if not may.any():
            break
        found.append(int((size - size[index]).abs().masked_fill(~may, float("inf")).argmin()))
        may[found[-1]] = False
    return found


def written(model: Model, sae: Any, answers: Sequence[str], questions: Sequence[str]) -> Float[Tensor, " d_sae"]:
    """How each feature raises the log-probability of these answers, given the questions in turn: by gradient."""
    chats = [chat(model, questions[i % len(questions)], "") for i in range(len(answers))]
    return learning.effects(model, sae, learning.lessons(model, reading.site_of_sae(sae), chats, answers))
