"""Do features stand for whole concepts? The first-letter test for splitting and absorption (arXiv 2409.14507).

"Begins with s" is a concept whose truth is known for every word. A *split* concept needs several features; an
*absorbed* one has a feature that goes silent on some words, where a feature for the very word carries the letter along.
"""

import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from glassbox_utils.core import coding
from glassbox_utils.core.arguments import whole
from glassbox_utils.core.corpora import Rows
from glassbox_utils.core.devices import result
from glassbox_utils.core.models import Model, Site
from glassbox_utils.core.session import progress
from glassbox_utils.saes.config import SaeError, hook_of
from glassbox_utils.saes.harvest import activations, ordinary
from glassbox_utils.saes.reading import site_of_sae

FEWEST = 10
"""words, below which no probe is fitted"""
SPLIT_GAIN = 0.03
"""in F1: a further feature that adds more than this is a split"""
MIN_COSINE, MIN_SHARE = 0.025, 0.4
"""of the absorbing feature with the probe, and of the probe's projection that it carries; as in the paper"""


@dataclass(frozen=True)
class LetterReport:
    """One letter, on words that the probe and the choice of features have not seen."""

    letter: str
    n: int
    probe_f1: float
    f1: tuple[float, ...]
    """of the best feature, of the two best together, ..."""
    control_f1: float
    """of the best feature for permuted letters"""
    n_split: int
    """features that the concept is split over: 1 is whole"""
    absorbed: float
    """share of the words that the probe knows on which the chosen features are silent and another one takes over"""


def first_letters(model: Model, tokens: Int[Tensor, "row pos"]) -> Int[Tensor, "row pos"]:
    """0 to 25 where a token begins a word with an ASCII letter, -1 elsewhere."""
    texts = {i: model.tokenizer.convert_ids_to_tokens(i) for i in set(tokens.flatten().tolist())}
    letters = {i: _letter(text) for i, text in texts.items()}
    return torch.tensor([[letters[i] for i in row] for row in tokens.tolist()])


def _letter(text: str) -> int:
    if len(text) > 2 and text[0] in "Ġ▁" and text[1].lower() in string.ascii_lowercase:
        return string.ascii_lowercase.index(text[1].lower())
    return -1


@dataclass(frozen=True, eq=False)
class Words:
    """Ordinary word beginnings of some rows at one site, and a probe for their first letter."""

    x: Float[Tensor, "word d_model"]
    letters: Int[Tensor, " word"]
    permuted: Int[Tensor, " word"]
    """the control: letters permuted over words, so that a word keeps one (wrong) letter"""
    train: Float[Tensor, " word"]
    """boolean; split by token, so that no word is in both halves"""
    probe: Float[Tensor, "26 d_model_and_one"]
    site: Site | None = None
    """where they were read"""


def letter_words(model: Model, site: Site, median_norm: float, rows: Rows, seed: int = 0) -> Words:
    """Activations of all word beginnings at ``site``; the probe is fitted on the train half."""
    letters = first_letters(model, rows.tokens)
    kept = []
    with torch.inference_mode():
        for start in progress(range(0, len(rows.tokens), 8), "words"):
            part = slice(start, start + 8)
            x = activations(model, rows.tokens[part].long(), [site])[site].float()
            keep = result(ordinary(x, median_norm)) & (letters[part] >= 0)
            kept.append((result(x)[keep], letters[part][keep], rows.tokens[part][keep]))
    x, letter, token = (torch.cat(parts).clone() for parts in zip(*kept, strict=True))
    if len(token.unique()) < FEWEST:
        raise SaeError(
            f"{len(token.unique())} different words of these texts begin with an ASCII letter and are one token of "
            f"{model.name}'s tokenizer (behind a space). The test needs {FEWEST}: give more rows."
        )
    generator = torch.Generator().manual_seed(seed)
    vocabulary = int(token.max()) + 1
    train = (torch.rand(vocabulary, generator=generator) < 0.5)[token]
    of_kind = torch.full((vocabulary,), -1)
    of_kind[token] = letter
    kinds, permuted = token.unique(), of_kind.clone()
    permuted[kinds] = of_kind[kinds][torch.randperm(len(kinds), generator=generator)]
    return Words(x, letter, permuted[token], train, fit_probe(x[train], letter[train]), site)


def fit_probe(
    x: Float[Tensor, "word d_model"], letters: Int[Tensor, " word"], penalty: float = 1e-2
) -> Float[Tensor, "26 d_model_and_one"]:
    """Multinomial logistic regression on standardised activations, folded back to the raw ones."""
    mean, scale = x.mean(0), x.std(0).clamp(min=1e-9)
    inputs = (x - mean) / scale
    weights = torch.zeros(26, x.shape[1] + 1, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=60, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(inputs @ weights[:, :-1].t() + weights[:, -1], letters)
        value = value + penalty * weights[:, :-1].square().sum() / 26
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)
    fitted = weights.detach()
    raw = fitted[:, :-1] / scale
    return torch.cat([raw, (fitted[:, -1] - raw @ mean)[:, None]], 1)


def _f1(predicted: Tensor, true: Tensor) -> Tensor:
    """F1 of boolean predictions [word, ...] of ``true`` [word]."""
    hit = (predicted & true.view(-1, *[1] * (predicted.ndim - 1))).sum(0).float()
    return 2 * hit / (predicted.sum(0) + true.sum()).clamp(min=1)


@torch.no_grad()
def first_letter_test(sae: Any, words: Words, n_features: int = 5, minimum: int = 60) -> list[LetterReport]:
    """Test anything with ``encode`` and ``W_dec`` on every letter that has ``minimum`` words in each half.

    SaeError for an SAE that reads at another place than the words were read.
    """
    if words.site and hasattr(sae, "cfg") and (own := site_of_sae(sae)) != words.site:
        raise SaeError(f"The words were read at {hook_of(words.site)}, this SAE reads {hook_of(own)}. Read them there.")
    whole("n_features", n_features, 1, SaeError), whole("minimum", minimum, 1, SaeError)
    x, letters, half, probe = words.x, words.letters, words.train, words.probe
    said = (x @ probe[:, :-1].t() + probe[:, -1]).argmax(-1)
    code = torch.cat([result(coding.encode(sae, part)) for part in x.split(2048)])
    active, decoder = code > 0, result(coding.rows(sae))
    reports = []
    for index, letter in enumerate(string.ascii_lowercase):
        true, fake = letters == index, words.permuted == index
        if min(int((true & half).sum()), int((true & ~half).sum())) < minimum:
            continue
        chosen = _greedy(active[half], true[half], n_features)
        steps = [active[~half][:, chosen[: k + 1]].any(-1) for k in range(len(chosen))]
        f1 = tuple(float(_f1(step, true[~half])) for step in steps)
        n_split = 1
        while n_split < len(f1) and f1[n_split] - f1[n_split - 1] > SPLIT_GAIN:
            n_split += 1
        control = _greedy(active[half], fake[half], 1)
        known = true & ~half & (said == index)
        direction = F.normalize(probe[index, :-1] - probe[:, :-1].mean(0), dim=0)
        reports.append(
            LetterReport(
                letter,
                int((true & ~half).sum()),
                float(_f1(said[~half] == index, true[~half])),
                f1,
                float(_f1(active[~half][:, control[0]], fake[~half])),
                n_split,
                _absorbed(x, code, decoder, direction, known, chosen[:n_split]),
            )
        )
    return reports


def _greedy(active: Tensor, true: Tensor, n: int) -> list[int]:
    """Features whose union predicts best, one after the other."""
    chosen: list[int] = []
    union = torch.zeros(len(active), dtype=torch.bool)
    positives = active[true].sum(0)
    likely = torch.topk(2 * positives / (active.sum(0) + true.sum()), min(64, active.shape[1])).indices
    for _ in range(n):
        f1 = _f1(active[:, likely] | union[:, None], true)
        best = int(likely[int(f1.argmax())])
        chosen.append(best)
        union |= active[:, best]
    return chosen


def _absorbed(
    x: Tensor, code: Tensor, decoder: Tensor, direction: Tensor, known: Tensor, chosen: Sequence[int]
) -> float:
    silent = known & ~(code[:, list(chosen)] > 0).any(-1)
    if not int(known.sum()):
        return 0.0
    along = decoder @ direction
    cosine = along / decoder.norm(dim=-1).clamp(min=1e-9)
    parts = code[silent] * along * (cosine > MIN_COSINE)
    total = ((x[silent] - x.mean(0)) @ direction).clamp(min=1e-9)
    takes_over = (parts.max(-1).values / total >= MIN_SHARE) if len(parts) else torch.zeros(0, dtype=torch.bool)
    return float(takes_over.sum()) / int(known.sum())
