"""Does attention predict what ablation does? Every head, with the predictors that a referee would put in its place.

*Looking* is the attention from the last position, where the answer is read off, to the word that decides it; *effect*
is the fall of ``logit(right) - logit(wrong)`` when the head's output there is replaced by its average. Opponents:
attention to another token, any, being *awake* (attention that does not rest on the first token), and the length of
what the head writes. What is resampled is the decisive word: prompts that share it are alike.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from glassbox_utils.attention.ablation import HeadMeans
from glassbox_utils.attention.attribution import logit_difference, replace_each_head_at_the_end
from glassbox_utils.attention.heads import attend, norm_matched
from glassbox_utils.attention.patterns import output_weights, project, top_heads
from glassbox_utils.attention.prompts import Decisive, DecisiveBatch, another_position, to_batch
from glassbox_utils.core.devices import array, beside, result
from glassbox_utils.core.interventions import Head, recording
from glassbox_utils.core.models import Model, ModelError, Site
from glassbox_utils.core.statistics import Interval, bootstrap_ci, mean_ci, reliability
from glassbox_utils.core.text import Batch

PREDICTORS = {
    "decisive": "attention to the decisive word",
    "weighted": "the same, times the length it moves",
    "another": "attention to another token, any",
    "awake": "attention not on the first token",
    "length": "length of what the head writes",
}
"""name -> in words; the first two are claims, the others their opponents"""
OPPONENTS = ("another", "awake", "length")
KINDS = ("size, ranks", "size, values", "sign, ranks", "sign, values")
"""the effect's size or the effect with its sign; Spearman's or Pearson's correlation over heads"""


@dataclass(frozen=True)
class Looking:
    """One family of prompts: what each head looks at, and what it does."""

    words: list[str]
    """the decisive word of each prompt"""
    base: Float[Tensor, " prompt"]
    """logit(right) - logit(wrong), unablated"""
    effect: Float[Tensor, "prompt layer head"]
    """how much of it goes when the head is ablated at the last position: above 0, the head helps"""
    predictors: Mapping[str, Float[Tensor, "prompt layer head"]]
    """names of ``PREDICTORS``"""

    def mean(self, name: str) -> Float[Tensor, "layer head"]:
        """A predictor, or ``effect``, averaged over words: each counts the same."""
        values = self.effect if name == "effect" else self.predictors[name]
        return by_word(values, self.words).mean(0)


def by_word(values: Float[Tensor, "prompt ..."], words: Sequence[str]) -> Float[Tensor, "word ..."]:
    """Means over the prompts that share a word, in the order of the alphabet."""
    rows = {word: [i for i, w in enumerate(words) if w == word] for word in sorted(set(words))}
    return torch.stack([values[group].mean(0) for group in rows.values()])


def looks(model: Model, prompts: DecisiveBatch, seed: int = 0, rows: int = 64) -> dict[str, Tensor]:
    """Every predictor of ``PREDICTORS`` for every prompt and head, [prompt, layer, head]. No ablation.

    ``seed`` draws the other token of each prompt. ModelError for an architecture whose values can't be read.
    """
    batch, last = prompts.batch, prompts.batch.input_ids.shape[1] - 1
    first = result(batch.attention_mask.int().argmax(-1))
    end = torch.full_like(first, last)
    another = another_position(prompts, seed)
    seen = attend(model, batch, end, torch.stack([prompts.decisive, another, first], -1))
    decisive, elsewhere, sink = seen.unbind(-1)
    moved, written = [], []
    for start in range(0, len(end), rows):
        where = slice(start, start + rows)
        part = Batch(*(t[where] for t in batch))
        values, lengths = _lengths(model, part, prompts.decisive[where])
        moved.append(values)
        written.append(lengths)
    return {
        "decisive": decisive,
        "weighted": decisive * torch.cat(moved),
        "another": elsewhere,
        "awake": 1 - sink,
        "length": torch.cat(written),
    }


@torch.no_grad()
def _lengths(
    model: Model, batch: Batch, src: Int[Tensor, " prompt"]
) -> tuple[Float[Tensor, "prompt layer head"], Float[Tensor, "prompt layer head"]]:
    """Length of ``v[src] W_O``, and of what each head writes at the last position (before a norm that follows)."""
    rows, src = torch.arange(len(src), device=model.device), beside(src, model.device)
    sites = [Site(kind, layer) for layer in range(model.n_layers) for kind in ("resid_pre", "z")]
    with recording(model, sites, keep=lambda x: torch.stack([x[rows, src], x[:, -1]])) as store:
        model.hf(**batch.inputs, logits_to_keep=1, use_cache=False)
    moved: list[Tensor] = []
    written: list[Tensor] = []
    for layer in range(model.n_layers):
        out = output_weights(model, layer)
        v = project(model, layer, store[Site("resid_pre", layer)][0]).v
        v = v.repeat_interleave(model.n_heads // v.shape[-2], dim=-2)
        z = store[Site("z", layer)][1].unflatten(-1, (model.n_heads, model.d_head))
        for values, lengths in ((v, moved), (z, written)):
            lengths.append(result(torch.einsum("bhd,hdm->bhm", values, out).norm(dim=-1)))
    return torch.stack(moved, 1), torch.stack(written, 1)


def looking(model: Model, prompts: Sequence[Decisive], means: HeadMeans, seed: int = 0) -> Looking:
    """Predictors and effects of every head on these prompts; ``means`` come from other prompts."""
    batch = to_batch(model, prompts)
    effects = replace_each_head_at_the_end(model, batch.batch, means, logit_difference(batch.answer, batch.foil))
    return Looking([p.decisive for p in prompts], effects.base, -effects.effect, looks(model, batch, seed))


# --- which predictor ----------------------------------------------------------------------------------


def agreement(found: Looking, n_resamples: int = 1000, seed: int = 0) -> dict[str, dict[str, NDArray]]:
    """Correlation over heads of each predictor with the effect: predictor -> kind of ``KINDS`` -> draws.

    The first draw is that of all words, the others are bootstrap samples of the words, the same for all predictors:
    differences are taken draw by draw.
    """
    y = array(by_word(found.effect, found.words).flatten(1))
    if len(y) < 3:
        raise ModelError(f"There are {len(y)} decisive words to resample. Give prompts about at least 3.")
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(len(y), np.full(len(y), 1 / len(y)), size=n_resamples)
    weights = np.concatenate([np.ones((1, len(y))), counts]) / len(y)
    effect = weights @ y
    sides = {"size": np.abs(effect), "sign": effect}
    ranked = {name: stats.rankdata(side, axis=1) for name, side in sides.items()}
    table = {}
    for name, values in found.predictors.items():
        x = weights @ array(by_word(values, found.words).flatten(1))
        ranks = stats.rankdata(x, axis=1)
        table[name] = {f"{side}, ranks": _correlation(ranks, ranked[side]) for side in sides}
        table[name] |= {f"{side}, values": _correlation(x, sides[side]) for side in sides}
    return {name: {kind: row[kind] for kind in KINDS} for name, row in table.items()}


def _correlation(x: NDArray, y: NDArray) -> NDArray:
    """Row by row; 0 where one of the two does not vary."""
    a, b = (v - v.mean(1, keepdims=True) for v in (x, y))
    size = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return np.divide((a * b).sum(1), size, out=np.zeros_like(size), where=size > 0)


def interval(draws: NDArray, n: int) -> Interval:
    """The first draw with the 95 % interval of the others."""
    low, high = np.quantile(draws[1:], [0.025, 0.975])
    return Interval(float(draws[0]), float(low), float(high), n)


def comparison(
    families: Mapping[str, Looking], n_resamples: int = 1000, seed: int = 0
) -> dict[str, dict[str, dict[str, Interval]]]:
    """Family (and ``mean`` of all) -> row -> kind of ``KINDS`` -> correlation over heads with the effect.

    Rows: every predictor; ``decisive - another`` and so on, the lead of the claim over each opponent (of the weighted
    claim over the length that it is weighted with); and for ranks
    ``half`` (random halves of the words against each other) and ``ceiling`` (what a predictor without error could
    reach). ``n`` is the number of decisive words.
    """
    draws = {name: agreement(found, n_resamples, seed + i) for i, (name, found) in enumerate(families.items())}
    words = {name: len(set(found.words)) for name, found in families.items()}
    first = next(iter(draws.values()))
    draws["mean"] = {p: {k: np.mean([d[p][k] for d in draws.values()], axis=0) for k in KINDS} for p in first}
    words["mean"] = sum(words.values())
    table = {}
    for name, rows in draws.items():
        pairs = [*(("decisive", p) for p in OPPONENTS), ("weighted", "length")]
        gaps = {f"{a} - {b}": {k: rows[a][k] - rows[b][k] for k in KINDS} for a, b in pairs}
        table[name] = {
            row: {k: interval(values[k], words[name]) for k in KINDS} for row, values in {**rows, **gaps}.items()
        }
    limits: dict[str, dict[str, list[Interval]]] = {"half": {}, "ceiling": {}}
    for name, found in families.items():
        for side in ("size", "sign"):
            repeats = reliability(by_word(found.effect, found.words), magnitude=side == "size", seed=seed)
            for row, x in (("half", repeats.half), ("ceiling", repeats.ceiling)):
                table[name].setdefault(row, {})[f"{side}, ranks"] = x
                limits[row].setdefault(f"{side}, ranks", []).append(x)
    for row, kinds in limits.items():
        table["mean"][row] = {kind: _mean(x) for kind, x in kinds.items()}
    return table


def ahead(table: Mapping[str, Mapping[str, Mapping[str, Interval]]], opponent: str, kind: str) -> int:
    """In how many families attention to the decisive word leads this opponent, with the whole interval."""
    return sum(rows[f"decisive - {opponent}"][kind].low > 0 for name, rows in table.items() if name != "mean")


def lines(rows: Mapping[str, Mapping[str, Interval]]) -> list[str]:
    """One family of a ``comparison`` as text, a line for each row."""
    shown = [" " * 38 + "".join(kind.rjust(22) for kind in KINDS)]
    for row, kinds in rows.items():
        cells = [f"{x.value:+.2f} [{x.low:+.2f}, {x.high:+.2f}]" if (x := kinds.get(k)) else "" for k in KINDS]
        shown.append(PREDICTORS.get(row, row).ljust(38) + "".join(cell.rjust(22) for cell in cells).rstrip())
    return shown


def _mean(x: Sequence[Interval]) -> Interval:
    """Of independent families: half widths add up as squares."""
    value = float(np.mean([i.value for i in x]))
    half = float(np.sqrt(np.sum([((i.high - i.low) / 2) ** 2 for i in x])) / len(x))
    return Interval(value, value - half, value + half, sum(i.n for i in x))


def without_strongest(found: Looking) -> tuple[Looking, Head]:
    """The same without the head that acts most, and which one it was: is a correlation more than one head? The rest
    stand in one row, [prompt, 1, head]."""
    size = found.mean("effect").abs()
    (head,) = top_heads(size, 1)
    others = [i for i in range(size.numel()) if divmod(i, size.shape[1]) != head]

    def rest(x: Float[Tensor, "prompt layer head"]) -> Float[Tensor, "prompt one rest"]:
        return x.flatten(1)[:, None, others]

    predictors = {name: rest(x) for name, x in found.predictors.items()}
    return Looking(found.words, found.base, rest(found.effect), predictors), head


# --- the heads that look most -------------------------------------------------------------------------


@dataclass(frozen=True)
class Lookers:
    """Heads that were chosen on selection prompts for looking at the decisive word, and others that write as much."""

    heads: list[Head]
    alike: list[list[Head]]
    """draws of as many heads that write about as much, none of which looks hard at the word (``HARD``)"""


HARD, NEAREST = 0.9, 4
"""heads above this quantile of looking are in no control; a control head is drawn from so many of nearest length"""


def lookers(found: Mapping[str, Float[Tensor, "prompt layer head"]], k: int, draws: int = 20) -> Lookers:
    """The k heads that look most at the decisive word on these (selection) prompts, and their controls."""
    look, length = found["decisive"].mean(0), found["length"].mean(0)
    chosen = top_heads(look, k)
    hard = [(int(a), int(b)) for a, b in (look > look.quantile(HARD)).nonzero()]
    longest = sorted(chosen, key=lambda head: -float(length[head]))  # they have the fewest like them: drawn for first
    return Lookers(chosen, [norm_matched(length, longest, hard, draw, NEAREST) for draw in range(draws)])


@dataclass(frozen=True)
class BothSides:
    """What speaks for "who looks, acts" in one family, and the heads that speak against it."""

    place: int
    """of the first looker among all heads by their effect: 1 helps the right answer most"""
    lookers: list[Interval]
    """what each of them takes away from the right answer, the one that looks most first; words are drawn"""
    base_rate: float
    """share of all heads that help"""
    sure: tuple[float, float]
    """share of all heads that help, and that work against the answer, with the whole interval"""
    actors: list[Head]
    """as many heads as there are lookers, by the size of their effect on one half of the words"""
    effect: Float[Tensor, "layer head"]
    """on the other half: what may be said about the actors"""
    idle: list[Head]
    """lookers that act less than the typical head"""
    blind: list[Head]
    """actors that look less than the typical head"""


def both_sides(found: Looking, heads: Sequence[Head], seed: int = 0) -> BothSides:
    """Count for and against, on report prompts, for heads that were chosen on others, strongest first."""
    look, effect, by = found.mean("decisive"), found.mean("effect"), by_word(found.effect, found.words)
    size, actors = effect.abs(), top_heads(by[::2].mean(0).abs(), len(heads))
    _, low, high = mean_ci(by, seed=seed)
    return BothSides(
        1 + int((effect > effect[heads[0]]).sum()),
        [bootstrap_ci(by[:, layer, head], seed=seed) for layer, head in heads],
        float((effect > 0).float().mean()),
        (float((low > 0).mean()), float((high < 0).mean())),
        actors,
        by[1::2].mean(0),
        [h for h in heads if size[h] < size.median()],
        [h for h in actors if look[h] < look.median()],
    )


def push(found: Looking, heads: Sequence[Head]) -> Float[Tensor, " word"]:
    """How much these heads help the right answer, mean of their effects one by one: one number for each word."""
    effect = by_word(found.effect, found.words)
    return torch.stack([effect[:, layer, head] for layer, head in heads], 1).mean(1)


def pooled(values: Sequence[Float[Tensor, " word"]], n_resamples: int = 2000, seed: int = 0) -> Interval:
    """Mean of the families' means; words are drawn within each family."""
    rng = np.random.default_rng(seed)
    parts = [array(v) for v in values]
    counts = [rng.multinomial(len(v), np.full(len(v), 1 / len(v)), size=n_resamples) / len(v) for v in parts]
    draws = np.mean([c @ v for c, v in zip(counts, parts, strict=True)], axis=0)
    point = float(np.mean([v.mean() for v in parts]))
    return interval(np.concatenate([[point], draws]), sum(map(len, parts)))
