"""Has a unit one meaning? Held-out detection from what its own strongest texts have in common, and intruders.

A unit is anything with a number at every token of one place: a feature, a coordinate of the residual stream, a
principal component, a random direction. Whether it is *monosemantic* cannot be seen in its strongest texts alone: some
order is found in any twenty texts. So the description is fitted on the strongest texts of one half of the documents and
tested on the other half, against tokens of like frequency on which the unit is silent; no language model judges.

- ``words``: the words that recur in the strongest texts, with their weights, as a detector of the unit's activity.
- ``sense``: the mean of the texts' word vectors (the model's own input embeddings, which know nothing of the layer).
  A mean has one centre: a unit with several meanings lies around none of them.
- ``one_word``: the word at the token itself alone: what is left of a score when context is taken away.
- ``other``: the words of another unit of the same kind; the control, .5 if the score measures the unit.
- ``intruder``: of four held-out texts of the unit and one of another kind of token, is the stranger the one that is
  least like the rest? Chance is one in five (after Chang et al. 2009; Paulo & Belrose, arXiv 2507.08473).

Units that are never silent are counted as active as often as a feature is (``active_like``): the comparison is of what
they mean, not of how often they fire.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from torch import Tensor

from glassbox_utils.core import coding
from glassbox_utils.core.arguments import whole
from glassbox_utils.core.corpora import Rows
from glassbox_utils.core.devices import beside, exact, result
from glassbox_utils.core.models import Model, Site
from glassbox_utils.core.session import progress
from glassbox_utils.saes import quality
from glassbox_utils.saes.config import SaeError
from glassbox_utils.saes.harvest import activations, ordinary

BEFORE, AFTER = 10, 3
"""tokens of a text before and after the one at which a unit is active"""
SLOTS = {"here": [BEFORE], "near": [BEFORE - 2, BEFORE - 1]} | {
    "around": [i for i in range(BEFORE + AFTER + 1) if i not in (BEFORE - 2, BEFORE - 1, BEFORE)]
}
FITTED, TESTED, CONTROLS, TRIALS = 20, 20, 60, 10
"""texts of a description, held-out texts, silent tokens they are told from, and intruder trials, of each unit"""
Encoder = Callable[[Float[Tensor, "n d_model"]], Float[Tensor, "n unit"]]


class Texts(NamedTuple):
    """Packed rows as a reader sees them: words, and which document and half each token belongs to."""

    words: NDArray
    """[row, pos] number of the lower-cased word; -1 for the first token of a row"""
    names: NDArray
    """[word] its text"""
    owners: NDArray
    """[row, pos] document; -1 for the first token of a row"""
    usual: NDArray
    """[row, pos] boolean: neither first token nor outlier"""
    base: NDArray
    """[word] share of all tokens"""
    vectors: NDArray
    """[word, d_model] input embedding, centred, times the word's rarity"""

    @property
    def fit(self) -> NDArray:
        """Flat boolean: tokens of the documents with even numbers, from which descriptions are made."""
        return self.usual.ravel() & (self.owners.ravel() % 2 == 0) & (self.owners.ravel() >= 0)

    @property
    def test(self) -> NDArray:
        """Flat boolean: tokens of the other documents, on which descriptions are tested."""
        return self.usual.ravel() & (self.owners.ravel() % 2 == 1)

    @property
    def frequency(self) -> NDArray:
        """Flat: class of each token by how frequent its word is, by powers of two."""
        return np.floor(np.log2(np.maximum(self.base[self.words.ravel()], 1e-9))).astype(int)


def texts_of(model: Model, rows: Rows, usual: Bool[Tensor, "row pos"]) -> Texts:
    """Rows (``corpora.token_rows``) with their words and the words' vectors. ``usual``: the positions to use."""
    flat = rows.tokens.flatten().tolist()
    text = {i: model.tokenizer.decode([i]).strip().lower() for i in set(flat)}
    names, words = np.unique(np.array([text[i] for i in flat], dtype=str), return_inverse=True)
    owners = rows.documents.numpy()
    words = np.where(owners.ravel() >= 0, words, -1).reshape(owners.shape)
    counts = np.bincount(words[words >= 0], minlength=len(names))
    base = counts / counts.sum()
    embedding = result(model.hf.get_input_embeddings().weight.detach()).float()
    tokens = torch.tensor(flat)
    sums = torch.zeros(len(names), embedding.shape[1]).index_add_(0, torch.from_numpy(words.ravel().clip(0)),
                                                                  embedding[tokens])  # fmt: skip
    of_word = sums / torch.bincount(torch.from_numpy(words.ravel().clip(0)), minlength=len(names))[:, None].clamp(min=1)
    weights = torch.from_numpy(base).float()[:, None]
    of_word = F.normalize(of_word - (of_word * weights).sum(0), dim=-1)
    rarity = np.log(1 / np.maximum(base, 1 / counts.sum()))
    vectors = of_word.numpy() * rarity[:, None]
    return Texts(words, names, owners, usual.numpy().astype(bool), base, vectors.astype(np.float32))


def window(texts: Texts, positions: NDArray) -> NDArray:
    """Words around flat positions: [n, BEFORE + 1 + AFTER], -1 beyond the row or in another document."""
    width = texts.words.shape[1]
    row, at = np.divmod(positions, width)
    column = at[:, None] + np.arange(-BEFORE, AFTER + 1)
    inside = (column >= 0) & (column < width)
    column = column.clip(0, width - 1)
    same = texts.owners[row[:, None], column] == texts.owners[row, at][:, None]
    return np.where(inside & same, texts.words[row[:, None], column], -1)


# --- which tokens -------------------------------------------------------------------------------------


def one_a_document(texts: Texts, positions: NDArray, n: int) -> NDArray:
    """The first ``n`` of some positions in their order, none from a document that was there before."""
    _, first = np.unique(texts.owners.ravel()[positions], return_index=True)
    return positions[np.sort(first)[:n]]


def strongest(texts: Texts, values: NDArray, where: NDArray, n: int) -> NDArray:
    """Flat positions of the ``n`` strongest values in a part of the text, one from each document."""
    places = np.flatnonzero(where & (values > 0))
    return one_a_document(texts, places[np.argsort(-values[places], kind="stable")], n)


def controls(
    texts: Texts, active: NDArray, like: NDArray, where: NDArray, n: int, draw: np.random.Generator
) -> NDArray:
    """Silent positions whose words are about as frequent as those at the positions ``like``."""
    silent = np.flatnonzero(where & ~active)
    classes = texts.frequency
    of_silent, found = classes[silent], []
    per = -(-n // max(1, len(like)))
    for position in like:
        distance = np.abs(of_silent - classes[position])
        pool = silent[distance == distance.min()]
        found.append(draw.choice(pool, min(per, len(pool)), replace=False))
    return np.unique(np.concatenate(found))


def active_like(values: Float[Tensor, "n unit"], density: Float[Tensor, " unit"], fit: NDArray) -> NDArray:
    """Boolean [n, unit]: where each unit is above the quantile that makes it active as often as ``density`` says.

    The quantile is that of the fitting half; a feature's own density gives about its own activity.
    """
    part = values[torch.from_numpy(fit)]
    bounds = torch.stack([torch.quantile(part[:, u], 1 - float(density[u])) for u in range(values.shape[1])])
    return ((values > bounds) & (values > 0)).numpy()


# --- description and tests ----------------------------------------------------------------------------


class Description(NamedTuple):
    """What a unit's strongest texts have in common."""

    words: dict[str, dict[int, float]]
    """slot -> word -> log of how many times more often it stands there than anywhere"""
    sense: NDArray
    """mean vector of the texts, of length 1"""

    def shown(self, texts: Texts, n: int = 6) -> list[tuple[str, str, float]]:
        """The heaviest (slot, word, weight)."""
        rows = [(slot, str(texts.names[w]), value) for slot, some in self.words.items() for w, value in some.items()]
        return sorted(rows, key=lambda row: -row[2])[:n]


def describe(texts: Texts, positions: NDArray) -> Description:
    """The words that recur at, just before and around some positions, and the mean of the texts' vectors."""
    around = window(texts, positions)
    words: dict[str, dict[int, float]] = {}
    for slot, columns in SLOTS.items():
        present = [np.unique(row[row >= 0]) for row in around[:, columns]]
        names, counts = np.unique(np.concatenate(present), return_counts=True)
        usual = 1 - (1 - texts.base[names]) ** len(columns)
        weight = np.log(counts / len(around) / np.maximum(usual, 1e-9))
        kept = (counts >= 2) & (weight > 0)
        words[slot] = dict(zip(names[kept].tolist(), weight[kept].tolist(), strict=True))
    mean = vectors(texts, positions).mean(0)
    return Description(words, mean / max(float(np.linalg.norm(mean)), 1e-9))


def vectors(texts: Texts, positions: NDArray) -> NDArray:
    """The texts around some positions as vectors of length 1: the word itself counts as much as all around it."""
    around = window(texts, positions)
    rest = [i for i in range(around.shape[1]) if i != BEFORE]
    other = np.where(around[:, rest, None] >= 0, texts.vectors[around[:, rest]], 0).sum(1)
    parts = [x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-9)
             for x in (texts.vectors[around[:, BEFORE]], other)]  # fmt: skip
    both = parts[0] + parts[1]
    return both / np.maximum(np.linalg.norm(both, axis=-1, keepdims=True), 1e-9)


def word_scores(texts: Texts, description: Description, positions: NDArray, slots: Sequence[str] = ()) -> NDArray:
    """Sum of the weights of a description's words that stand where they should, at each position."""
    around, found = window(texts, positions), np.zeros(len(positions))
    for slot in slots or SLOTS:
        weights = description.words[slot]
        for i, row in enumerate(around[:, SLOTS[slot]]):
            found[i] += sum(weights.get(w, 0.0) for w in set(row.tolist()))
    return found


def sense_scores(texts: Texts, description: Description, positions: NDArray) -> NDArray:
    """How near the text around each position is to the mean of a description's texts."""
    return vectors(texts, positions) @ description.sense


def auc(yes: NDArray, no: NDArray) -> float:
    """Chance that one of the first scores above one of the second; ties count half."""
    above = (yes[:, None] > no[None]).mean()
    return float(above + 0.5 * (yes[:, None] == no[None]).mean())


def intruders(texts: Texts, members: NDArray, strangers: NDArray, trials: int, draw: np.random.Generator) -> float:
    """Share of trials in which, of four members and a stranger, the stranger is least like the others; ties are half
    found."""
    inside, outside, hits = vectors(texts, members), vectors(texts, strangers), 0.0
    for _ in range(trials):
        chosen = np.concatenate(
            [inside[draw.choice(len(inside), 4, replace=False)], outside[[draw.integers(len(outside))]]]
        )
        alike = (chosen @ chosen.T).sum(1)
        lowest = alike == alike.min()
        hits += float(lowest[-1]) / lowest.sum()
    return float(hits / trials)


@dataclass(frozen=True)
class Meaning:
    """How one unit did. All but ``unit``, ``density`` and ``intruder`` are areas under the curve: .5 is chance."""

    unit: int
    density: float
    """share of the tokens on which it counts as active"""
    words: float
    """any held-out activity, against silent tokens of like frequency"""
    words_top: float
    """the strongest held-out activity only"""
    sense: float
    sense_top: float
    one_word: float
    other: float
    intruder: float


SCORES = tuple(f.name for f in fields(Meaning) if f.name not in ("unit", "density"))


def meanings(
    texts: Texts, values: Float[Tensor, "n unit"], active: NDArray, seed: int = 0, names: Sequence[int] | None = None
) -> list[Meaning]:
    """The scores of every unit that is active in enough documents of both halves (twice four of them at least).

    ``values``: what each unit does at every token, flat; ``active``: where that counts as activity.
    """
    if len(values) != texts.words.size or active.shape != tuple(values.shape):
        raise SaeError(
            f"values and active have the shapes {tuple(values.shape)} and {active.shape}. Allowed: both one row for "
            f"each of the {texts.words.size:,} tokens."
        )
    draw, table = np.random.default_rng(seed), values.numpy()
    fit, test, numbers = texts.fit, texts.test, range(values.shape[1]) if names is None else names
    fitted = [strongest(texts, np.where(active[:, u], table[:, u], 0), fit, FITTED) for u in range(table.shape[1])]
    known = [u for u, places in enumerate(fitted) if len(places) >= 4]
    described = {u: describe(texts, fitted[u]) for u in known}
    found = []
    for turn, u in enumerate(known):
        mine = np.where(active[:, u], table[:, u], 0)
        top = strongest(texts, mine, test, TESTED)
        anywhere = one_a_document(texts, draw.permutation(np.flatnonzero(test & active[:, u])), TESTED)
        if len(top) < 4:
            continue
        no = controls(texts, active[:, u], anywhere, test, CONTROLS, draw)
        no_top = controls(texts, active[:, u], top, test, CONTROLS, draw)
        own, stranger = described[u], described[known[(turn + 1) % len(known)]]
        words, sense = partial(word_scores, texts, own), partial(sense_scores, texts, own)
        found.append(
            Meaning(
                unit=int(numbers[u]),
                density=float(active[:, u].sum() / texts.usual.sum()),
                words=auc(words(anywhere), words(no)),
                words_top=auc(words(top), words(no_top)),
                sense=auc(sense(anywhere), sense(no)),
                sense_top=auc(sense(top), sense(no_top)),
                one_word=auc(words(anywhere, ("here",)), words(no, ("here",))),
                other=auc(word_scores(texts, stranger, anywhere), word_scores(texts, stranger, no)),
                intruder=intruders(texts, top, no_top, TRIALS, draw),
            )
        )
    return found


# --- units in the same space --------------------------------------------------------------------------


def of_directions(directions: Float[Tensor, "unit d_model"], mean: Float[Tensor, " d_model"]) -> Encoder:
    """Units that read how far an activation goes along a direction from the mean; negative values are silence."""
    return lambda x: ((x - beside(mean, x)) @ beside(directions, x).t()).relu()


def of_sae(sae: Any, units: Sequence[int]) -> Encoder:
    """Some features of an SAE, or of anything with ``encode``."""
    return lambda x: coding.encode(sae, x)[:, list(units)]


def opponents(x: Float[Tensor, "sample d_model"], n: int, k: int, d_sae: int, seed: int = 0) -> dict[str, Encoder]:
    """``n`` units of each kind that knows nothing of concepts, in the space of ``x``.

    ``coordinates``: single numbers of the residual stream (its neurons), either sign; ``pca``: the first principal
    components, either sign; ``random``: random directions; ``random_sae``: features of an SAE that was never trained.
    """
    draw = torch.Generator().manual_seed(seed)
    mean, width = x.mean(0), x.shape[1]
    whole("n", n, 1, SaeError, 2 * width)
    signed = torch.randperm(2 * width, generator=draw)[:n]
    one_hot = F.one_hot(signed % width, width).float() * torch.where(signed < width, 1.0, -1.0)[:, None]
    centred = exact(x - mean)
    _, axes = torch.linalg.eigh(centred.t() @ centred)
    top = axes.flip(1)[:, : -(-n // 2)].t().float()
    directions = F.normalize(torch.randn(n, width, generator=draw), dim=-1)
    untrained = quality.baselines(x, k, d_sae, seed)["random"]
    chosen = torch.randperm(d_sae, generator=draw)[:n].tolist()
    return {
        "coordinates": of_directions(one_hot, mean),
        "pca": of_directions(torch.cat([top, -top])[:n], mean),
        "random": of_directions(directions, mean),
        "random_sae": of_sae(untrained, chosen),
    }


def of_any_rank(x: Float[Tensor, "sample d_model"], n: int, draw: torch.Generator) -> Encoder:
    """``n`` principal components drawn from all of them, weak ones too: PCA without the choice of the strongest."""
    axes = torch.linalg.eigh(torch.cov(x.t())).eigenvectors.t()
    return of_directions(axes[torch.randperm(len(axes), generator=draw)[:n]], x.mean(0))


class Seen(NamedTuple):
    """What stands at one place of the model while it reads some rows; computed once, used by every unit."""

    x: Float[Tensor, "n d_model"]
    """activations, flat"""
    usual: Bool[Tensor, "row pos"]
    """neither first token nor outlier"""


@torch.inference_mode()
def see(model: Model, site: Site, rows: Rows, median_norm: float, batch: int = 8) -> Seen:
    """Run the model over packed rows (``corpora.token_rows``) and keep its activations at a site."""
    parts, usual = [], []
    for some in progress(rows.tokens.split(batch), "read"):
        x = activations(model, some.long(), [site])[site].float()
        usual.append(result(ordinary(x, median_norm)))
        parts.append(result(x.flatten(0, 1)))
    return Seen(torch.cat(parts), torch.cat(usual))


@torch.inference_mode()
def values_of(seen: Seen, encode: Encoder, batch: int = 2048) -> Float[Tensor, "n unit"]:
    """What every unit does at every token, flat, zero at first tokens and outliers."""
    parts = zip(seen.x.split(batch), seen.usual.flatten().split(batch), strict=True)
    return torch.cat([result((encode(x) * keep[:, None]).float()) for x, keep in parts])


def compared(
    texts: Texts,
    seen: Seen,
    encoders: Mapping[str, Encoder | Float[Tensor, "n unit"]],
    densities: Mapping[str, Tensor],
    seed: int = 0,
) -> dict[str, list[dict[str, float]]]:
    """The scores of all units of several kinds at one place, on the same texts.

    ``encoders``: what reads the place, or the values themselves at every token (of units that stand elsewhere).
    ``densities``: for each kind how often its units count as active; a kind without is active where it is above zero.
    """
    found = {}
    for name, encode in encoders.items():
        table = encode if isinstance(encode, Tensor) else values_of(seen, encode)
        density = densities.get(name)
        active = (table > 0).numpy() if density is None else active_like(table, density, texts.fit)
        found[name] = [rounded(one) for one in meanings(texts, table, active, seed)]
    return found


def rounded(one: Meaning) -> dict[str, float]:
    """A unit's scores for a table."""
    return {k: v if isinstance(v, int) or math.isnan(v) else round(v, 4) for k, v in asdict(one).items()}
