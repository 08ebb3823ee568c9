"""One decision, followed through the model: what it looks at, what moves it, along which path, through which features.

Each step is a function of a model and applicants, and says which rung it reaches: attention is observed, swaps and
patches are causal. Pairs are identical applicants with names of the two genders; only pairs whose texts have equally
many tokens are patched, so that every position means the same in both.
"""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from glassbox_utils.attention.attribution import attribution_patching, logit_difference, replace_each_head, resume
from glassbox_utils.attention.patterns import over_patterns
from glassbox_utils.core import coding
from glassbox_utils.core.arguments import items, whole
from glassbox_utils.core.devices import beside, like, result
from glassbox_utils.core.interventions import capture
from glassbox_utils.core.models import Model, Site
from glassbox_utils.core.session import progress
from glassbox_utils.core.text import Batch, tokenize
from glassbox_utils.decisions import loans
from glassbox_utils.decisions.loans import Applicant
from glassbox_utils.decisions.mitigation import contrast

FIELDS = tuple(f.name for f in fields(Applicant))
PLACES = ("name", "between", "decision")
"""where activations are patched: the name's tokens, all that follows it up to the decision, the decision position"""


class Pairs(NamedTuple):
    """Aligned texts of identical applicants, and the positions of the name."""

    worse: Batch
    better: Batch
    name: Tensor
    """Boolean [n, pos]"""


def part_of(pairs: Pairs, rows: slice) -> Pairs:
    """Some of the pairs."""
    worse, better = (Batch(*(t[rows] for t in batch)) for batch in (pairs.worse, pairs.better))
    return Pairs(worse, better, pairs.name[rows])


# --- where the fields stand ---------------------------------------------------------------------------


def spans(applicant: Applicant, layout: str) -> dict[str, tuple[int, int]]:
    """Field -> (first character, one past the last) of its value in the text; (0, 0) if the layout lacks it."""
    found = {}
    for name in FIELDS:
        values = {f: getattr(applicant, f) for f in FIELDS} | {name: "\x00"}
        start = loans.as_text(Applicant(**values), layout).find("\x00")
        found[name] = (start, start + len(str(getattr(applicant, name)))) if start >= 0 else (0, 0)
    return found


def field_masks(model: Model, people: Sequence[Applicant], layout: str) -> tuple[Batch, Tensor]:
    """The batch, and Boolean [n, field, pos]: which tokens hold (a part of) the value of each field."""
    texts = [loans.as_text(a, layout) for a in people]
    batch = tokenize(model, texts)
    mask = torch.zeros(len(people), len(FIELDS), batch.input_ids.shape[1], dtype=torch.bool)
    for i, (a, text) in enumerate(zip(people, texts, strict=True)):
        offsets = model.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        shift = batch.input_ids.shape[1] - len(offsets)
        for j, (start, end) in enumerate(spans(a, layout).values()):
            for k, (left, right) in enumerate(offsets):
                mask[i, j, shift + k] = left < end and right > start
    return batch, mask


# --- 2: attention -------------------------------------------------------------------------------------


def attention_to_fields(model: Model, people: Sequence[Applicant], layout: str) -> Float[Tensor, "n layer head field"]:
    """Attention from the decision position, summed over the tokens of each field. Rung 1: a weight, not a reason."""
    batch, mask = field_masks(model, people, layout)

    def reduce(pattern: Tensor, where: slice) -> Tensor:
        return torch.einsum("bhp,bfp->bhf", pattern[:, :, -1].float(), beside(mask[where], pattern).float())

    return over_patterns(model, batch, reduce)


# --- 3: cause -----------------------------------------------------------------------------------------


def field_swaps(
    model: Model, people: Sequence[Applicant], layout: str, donors: Sequence[Applicant]
) -> Float[Tensor, "n field"]:
    """How far the decision moves (absolute, logits) when one field's value comes from another applicant. Rung 3.

    LoanError unless there is one donor for each of the people.
    """
    people, donors = (
        items(name, some, loans.LoanError, Applicant, word="Applicants")
        for name, some in (("people", people), ("donors", donors))
    )
    if len(people) != len(donors):
        raise loans.LoanError(f"There are {len(people)} people and {len(donors)} donors. Give one donor for each.")
    changed = [
        Applicant(**{f: getattr(donor if f == name else a, f) for f in FIELDS})
        for a, donor in zip(people, donors, strict=True)
        for name in FIELDS
    ]
    base = loans.decide(model, people, layout)
    return (loans.decide(model, changed, layout).view(len(people), len(FIELDS)) - base[:, None]).abs()


def aligned_pairs(
    model: Model, people: Sequence[Applicant], layout: str, attribute: str = "gender", most: int | None = None
) -> Pairs:
    """Pairs of ``mitigation.contrast`` whose texts have equally many tokens, and differ in one field of one width; the
    first ``most`` of them."""
    worse, better = contrast(people, attribute)
    changed = "name" if attribute in ("gender", "nationality") else attribute
    kept: list[tuple[Applicant, Applicant]] = []
    for a, b in zip(worse, better, strict=True):
        if most is not None and len(kept) == most:
            break
        (ba, ma), (bb, mb) = (field_masks(model, [x], layout) for x in (a, b))
        index = FIELDS.index(changed)
        if ba.input_ids.shape == bb.input_ids.shape and torch.equal(ma[0, index], mb[0, index]):
            kept.append((a, b))
    if not kept:
        raise loans.LoanError("No pair has equally many tokens in both texts. Give more applicants.")
    first, mask = field_masks(model, [a for a, _ in kept], layout)
    second, _ = field_masks(model, [b for _, b in kept], layout)
    return Pairs(first, second, mask[:, FIELDS.index(changed)])


def _metric(model: Model, pairs: Pairs) -> Any:
    """What is read at the decision position, after the question whether the model decides these pairs at all."""
    yes, no = loans.answer_tokens(model)
    with torch.no_grad():
        for batch in (pairs.worse, pairs.better):
            loans.check_decides(model, loans.final_logits(model, batch))
    n = len(pairs.name)
    return logit_difference(torch.full((n,), yes), torch.full((n,), no))


@torch.no_grad()
def patch_places(model: Model, pairs: Pairs, layers: Sequence[int]) -> Float[Tensor, "n layer place"]:
    """Logits by which the worse-treated applicant gains when what enters a layer at one place comes from the other.

    Activation patching (arXiv 2202.05262) of the residual stream at the name, at all later positions but the last,
    and at the decision position. The last entry of ``gains(...)`` shows where the group is at each depth. Rung 3.
    """
    sites = [Site("resid_pre", layer) for layer in layers]
    clean, donor = (capture(model, b, sites) for b in (pairs.worse, pairs.better))
    metric = _metric(model, pairs)
    base = metric(loans.final_logits(model, pairs.worse))
    decision = torch.zeros_like(pairs.name)
    decision[:, -1] = True
    after = (pairs.name.cumsum(-1) > 0) & ~pairs.name & ~decision
    out = torch.zeros(len(base), len(layers), len(PLACES))
    for i, site in enumerate(progress(sites, "patching")):
        for j, where in enumerate((pairs.name, after, decision)):
            resid = torch.where(beside(where[..., None], base), donor[site], clean[site])
            with resume(model, site.layer, resid):
                out[:, i, j] = result(metric(loans.final_logits(model, pairs.worse)) - base)
    return out


def total_effect(model: Model, pairs: Pairs) -> Float[Tensor, " n"]:
    """Better minus worse, logits, for each pair."""
    metric = _metric(model, pairs)
    with torch.no_grad():
        better, worse = (metric(loans.final_logits(model, batch)) for batch in (pairs.better, pairs.worse))
        return result(better - worse)


def head_guesses(model: Model, pairs: Pairs) -> Float[Tensor, "n layer head"]:
    """First-order effect of every head's output at the decision position, patched from the other applicant."""
    return attribution_patching(model, pairs.worse, pairs.better, _metric(model, pairs), positions=-1)


def head_effects(model: Model, pairs: Pairs, layers: Sequence[int]) -> Float[Tensor, "n layer head"]:
    """The exact effect of every head of some layers, patched at the decision position. Rung 3. Other layers: 0."""
    found = replace_each_head(model, pairs.worse, pairs.better, _metric(model, pairs), positions=-1, layers=layers)
    return found.effect


# --- 4: features --------------------------------------------------------------------------------------


@torch.no_grad()
def name_states(
    model: Model, pairs: Pairs, layer: int
) -> tuple[Float[Tensor, "n d_model"], Float[Tensor, "n d_model"]]:
    """The residual stream after a layer at the last token of the name: worse, better."""
    site = Site("resid_post", layer)
    last = (pairs.name * torch.arange(1, pairs.name.shape[1] + 1)).argmax(-1)
    rows = torch.arange(len(last))
    return tuple(result(capture(model, b, [site])[site][rows, last]) for b in (pairs.worse, pairs.better))  # type: ignore[return-value]


def group_features(sae: Any, worse: Tensor, better: Tensor, k: int = 5) -> tuple[Tensor, Tensor]:
    """The k features of an SAE whose activation differs most between the groups, and the differences (worse first).

    LoanError for more features than the SAE has.
    """
    k = whole("k", k, 1, loans.LoanError, sae.cfg.d_sae)
    codes = (result(coding.encode(sae, x)) for x in (worse, better))
    difference = (next(codes) - next(codes)).mean(0)
    top = difference.abs().topk(k).indices
    return top, difference[top]


def like_features(sae: Any, states: Float[Tensor, "n d_model"], features: Tensor, seed: int) -> Tensor:
    """As many other features of about the same mean activation on these states: the control of an ablation."""
    mean = result(coding.encode(sae, states)).mean(0)
    generator = torch.Generator().manual_seed(seed)
    found: list[int] = []
    for feature in features.tolist():
        taken = {*found, *features.tolist()}
        order = (mean - mean[feature]).abs().argsort().tolist()
        near = [f for f in order if f not in taken and mean[f] > 0][:10]
        if not near:
            raise loans.LoanError(
                f"No feature is left that is active on these {len(states)} states and could stand beside feature "
                f"{feature}. Give more states, or fewer features."
            )
        found.append(near[int(torch.randint(len(near), (1,), generator=generator))])
    return torch.tensor(found)


@torch.no_grad()
def ablate_at_name(model: Model, pairs: Pairs, sae: Any, features: Tensor, layer: int) -> Float[Tensor, " n"]:
    """The gap (better minus worse, logits) of each pair with these features taken out at the name, in both texts.

    The SAE's error term is kept: only the features' own contributions are subtracted.
    """
    metric, site, found = _metric(model, pairs), Site("resid_post", layer), []
    for batch in (pairs.worse, pairs.better):
        x = capture(model, batch, [site])[site]
        code = coding.encode(sae, x)[..., features]
        part = code @ like(coding.rows(sae)[features], code) * coding.gain(sae, x)
        resid = torch.where(beside(pairs.name[..., None], x), x - like(part, x), x)
        with resume(model, layer + 1, resid):
            found.append(metric(loans.final_logits(model, batch)))
    return result(found[1] - found[0])


def permuted(n: int, seed: int = 0) -> list[int]:
    """A permutation without fixed points: whose value each applicant gets. LoanError for fewer than two."""
    loans.check_count("n", n, 2)
    loans.check_count("seed", seed, 0)
    shift = int(np.random.default_rng(seed).integers(1, n))
    return [(i + shift) % n for i in range(n)]
