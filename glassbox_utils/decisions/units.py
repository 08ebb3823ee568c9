"""Units of a model in three bases, read and written in one way: attention heads, MLP neurons, features of an SAE.

A *space* is one basis: the sites where its units stand, how many there are, and how many numbers each has. Heads are
slices of ``z``, neurons single numbers of ``mlp_post``, features the code of an SAE times its decoder rows (what the
SAE does not explain stays as it is). The whole residual stream is a fourth space with one unit a layer: it shows where
something is at all.

``attribute`` guesses what every unit would do, ``ranked`` orders them, ``alike`` draws others of like activity.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from glassbox_utils.core import coding
from glassbox_utils.core.arguments import shown, whole
from glassbox_utils.core.devices import array, beside, exact, like, result
from glassbox_utils.core.interventions import capture, edits
from glassbox_utils.core.losses import frozen_weights
from glassbox_utils.core.models import Model, Site, check_site
from glassbox_utils.core.session import progress
from glassbox_utils.core.text import Batch
from glassbox_utils.decisions.fields import DecisionError
from glassbox_utils.decisions.pairs import PLACES, Pairs, rows
from glassbox_utils.saes.config import width_of
from glassbox_utils.saes.reading import check_fits, site_of_sae

Basis = Literal["heads", "neurons", "features", "stream"]
Unit = tuple[int, int]
"""layer, and the number of the head, neuron or feature"""
NEAR = 30
"""units of the most similar activity, among which a control is drawn; of a small space a fiftieth, 3 at least"""


@dataclass(frozen=True, eq=False)
class Space:
    """Where the units of one basis stand."""

    basis: Basis
    sites: tuple[Site, ...]
    """one for each layer that has them"""
    n_units: int
    """at each site"""
    width: int = 1
    """numbers of each unit"""
    sae: Any = None

    @property
    def layers(self) -> dict[int, Site]:
        return {site.layer: site for site in self.sites}


def heads(model: Model) -> Space:
    """All attention heads. ModelError where they can't be reached."""
    return Space("heads", _sites(model, "z"), model.n_heads, model.d_head)


def neurons(model: Model) -> Space:
    """All MLP neurons, as the output projection reads them. ModelError where they can't be reached (a mixture of
    experts)."""
    sites = _sites(model, "mlp_post")
    widths = {width_of(model, site) for site in sites}
    if len(widths) > 1:
        raise DecisionError(f"The layers of {model.name} have {sorted(widths)} neurons. Allowed: equally many in each.")
    return Space("neurons", sites, widths.pop())


def features(model: Model, sae: Any, foreign: bool = False) -> Space:
    """The features of an SAE of this model, at its own place. DecisionError if it is none of this model's.

    ``foreign``: it may be one of other weights, such as those that an adapter was trained on: say beside the results
    how much of these activations it explains (``explained``).
    """
    if not foreign:
        return Space("features", (check_fits(model, sae, DecisionError),), sae.cfg.d_sae, 1, sae)
    site = check_site(model, site_of_sae(sae))
    if sae.cfg.d_in != (width := width_of(model, site)):
        raise DecisionError(f"This SAE reads {sae.cfg.d_in} numbers, {site.kind} of {model.name} has {width}. Load one "
                            "that was trained at a place of this width.")  # fmt: skip
    return Space("features", (site,), sae.cfg.d_sae, 1, sae)


@torch.no_grad()
def explained(model: Model, pairs: Pairs, space: Space) -> float:
    """Share of the variance of the activations at the carrier and after it that the SAE's code gives back."""
    kept, rest = [], []
    for some in rows(model, pairs):
        for batch in (some.own, some.donor):
            x = capture(model, batch, list(space.sites))[space.sites[0]][some.places["all"]]
            kept.append(exact(x))
            rest.append(exact(x) - exact(coding.decode(space.sae, coding.encode(space.sae, x))))
    x, error = torch.cat(kept), torch.cat(rest)
    return float(1 - error.pow(2).sum() / (x - x.mean(0)).pow(2).sum())


def stream(model: Model, layers: Sequence[int] | None = None) -> Space:
    """The residual stream after each layer (of some), as one unit."""
    sites = [Site("resid_post", i) for i in (range(model.n_layers) if layers is None else layers)]
    return Space("stream", tuple(sites), 1, model.d_model)


def _sites(model: Model, kind: Any) -> tuple[Site, ...]:
    found = tuple(Site(kind, layer) for layer in range(model.n_layers))
    for site in found:
        _ = model.sites[site]  # raises with the reason
    return found


def check_units(space: Space, units: Sequence[Unit]) -> dict[int, list[int]]:
    """Layer -> numbers of its units; DecisionError for one that the space does not have."""
    found: dict[int, list[int]] = {}
    for unit in units:
        pair = tuple(unit) if isinstance(unit, Sequence) and not isinstance(unit, str) else ()
        if len(pair) != 2 or pair[0] not in space.layers or not 0 <= pair[1] < space.n_units:
            where = ", ".join(map(str, space.layers)) if len(space.layers) < 6 else f"0 to {max(space.layers)}"
            raise DecisionError(
                f"There is no unit {shown(unit)} among the {space.basis}. Allowed: (layer, number) with the layers "
                f"{where} and the numbers 0 to {space.n_units - 1}."
            )
        found.setdefault(int(pair[0]), []).append(int(pair[1]))
    return found


# --- reading and writing ------------------------------------------------------------------------------


def read(space: Space, x: Float[Tensor, "*place d"], index: Sequence[int] | None = None) -> Tensor:
    """Values ``[*place, unit, width]`` of all units (or some) at a site, in what they write to it."""
    if space.sae is not None:
        values = (coding.encode(space.sae, x) * coding.gain(space.sae, x))[..., None]
    else:
        values = x.unflatten(-1, (space.n_units, space.width))
    return values if index is None else values[..., list(index), :]


def changed(
    space: Space,
    x: Float[Tensor, "*place d"],
    index: Sequence[int],
    move: Callable[[Tensor], Tensor],
    where: Bool[Tensor, "*place"] | None = None,
) -> Float[Tensor, "*place d"]:
    """``x`` with ``move(values)`` in the place of some units' values, at some places; all else stays to the bit."""
    chosen = list(index)
    if space.sae is not None:
        own = read(space, x, chosen)
        step = (move(own) - own)[..., 0] @ like(coding.rows(space.sae)[chosen], own)
        new = x + like(step, x)
    else:
        parts = x.unflatten(-1, (space.n_units, space.width)).clone()
        parts[..., chosen, :] = like(move(parts[..., chosen, :]), parts)
        new = parts.flatten(-2)
    return new if where is None else torch.where(beside(where[..., None], x), new, x)


@contextmanager
def moved(
    model: Model,
    space: Space,
    units: Sequence[Unit],
    move: Callable[[int, Tensor], Tensor],
    where: Bool[Tensor, "n pos"] | None = None,
) -> Iterator[None]:
    """Inside the block some units' values are ``move(layer, values)``; values are [n, pos, unit, width], the units of
    a layer in the order in which they are given. DecisionError for a unit that does not exist."""
    by_layer = check_units(space, units)

    def function(layer: int) -> Callable[[Tensor], Tensor]:
        return lambda x: changed(space, x, by_layer[layer], lambda v: move(layer, v), where)

    with edits(model, {space.layers[layer]: function(layer) for layer in by_layer}):
        yield


def sizes(model: Model, space: Space) -> Float[Tensor, "layer unit"]:
    """How long a vector one unit of activation writes into the stream; of a head, in the mean over directions."""
    if space.sae is not None:
        return result(coding.rows(space.sae).norm(dim=-1))[None]
    if space.basis == "stream":
        return torch.ones(len(space.sites), space.n_units)
    found = []
    for site in space.sites:
        part = model.sites[site][0]
        weight = result(
            part.get_parameter("weight")
        )  # Linear keeps [d_model, d_mlp], GPT-2's Conv1D the other way round
        each = weight.norm(dim=0 if isinstance(part, nn.Linear) else 1)  # of every number that the projection reads
        found.append(each.unflatten(0, (space.n_units, space.width)).pow(2).mean(-1).sqrt())
    return torch.stack(found)


# --- which ones ---------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Attribution:
    """First-order effects of all units of a space, means over pairs, in logits of the answers' difference."""

    space: Space
    effect: Float[Tensor, "place layer unit"]
    """of patching the donor's value in, summed over the positions of each of PLACES"""
    activity: Float[Tensor, "layer unit"]
    """how far the value moves times how long a vector it writes, summed over positions"""
    gap: float
    """donor minus own, logits"""


def attribute(model: Model, pairs: Pairs, spaces: Mapping[str, Space], batch_size: int = 8) -> dict[str, Attribution]:
    """What patching every unit of the spaces from the donor into the own prompt would do, to first order.

    (donor minus own value) times the gradient of the logit difference (attribution patching, Nanda 2023; Syed et al.,
    arXiv 2310.10348), with the mean of the gradients at both ends: a unit whose effect saturates at one of them is seen
    from the other (cf. AtP*, arXiv 2403.00745). Two passes forward and back. A guess, and a choice: ``locate`` patches.
    """
    sites = list(dict.fromkeys(site for space in spaces.values() for site in space.sites))
    effect = {k: torch.zeros(len(PLACES), len(s.sites), s.n_units) for k, s in spaces.items()}
    activity = {k: torch.zeros(len(s.sites), s.n_units) for k, s in spaces.items()}
    gap = 0.0
    for some in progress(list(rows(model, pairs, batch_size)), "attribution"):
        (own, own_grad, m_own), (donor, donor_grad, m_donor) = (
            _gradients(model, batch, sites, pairs.tokens) for batch in (some.own, some.donor)
        )
        gap += float((m_donor - m_own).sum())
        for name, space in spaces.items():
            for i, site in enumerate(space.sites):
                slope = (own_grad[site] + donor_grad[site]) / 2
                difference = read(space, donor[site]) - read(space, own[site])
                if space.sae is None:
                    guess = (difference * slope.unflatten(-1, (space.n_units, space.width))).sum(-1)
                else:
                    guess = difference[..., 0] * (slope @ like(coding.rows(space.sae), slope).T)
                far = difference.norm(dim=-1) * some.places["all"][..., None]
                activity[name][i] += result(far.sum((0, 1)))
                for j, place in enumerate(PLACES):
                    effect[name][j, i] += result((guess * some.places[place][..., None]).sum((0, 1)))
    n = len(pairs)
    return {k: Attribution(s, effect[k] / n, activity[k] / n * sizes(model, s), gap / n) for k, s in spaces.items()}


def _gradients(
    model: Model, batch: Batch, sites: Sequence[Site], tokens: tuple[int, int]
) -> tuple[dict[Site, Tensor], dict[Site, Tensor], Tensor]:
    """Activations, the gradients of the logit difference to them, and the difference of each row."""
    values: dict[Site, Tensor] = {}
    leaves: dict[Site, Tensor] = {}

    def leaf(site: Site) -> Callable[[Tensor], Tensor]:
        def function(x: Tensor) -> Tensor:
            values[site] = x.detach()
            leaves[site] = torch.zeros_like(x, requires_grad=True)  # the graph begins here, weights stay out
            return x + leaves[site]

        return function

    with torch.enable_grad(), frozen_weights(model), edits(model, {site: leaf(site) for site in sites}):
        logits = model.hf(**batch.inputs, logits_to_keep=1, use_cache=False).logits[:, -1].float()
        metric = logits[:, tokens[0]] - logits[:, tokens[1]]
        found = torch.autograd.grad(metric.sum(), [leaves[site] for site in sites])
    return values, dict(zip(sites, (g.detach() for g in found), strict=True)), result(metric)


def pooled(found: Sequence[Attribution]) -> Attribution:
    """The mean of several attributions of one space, of several templates."""
    effect, activity = (torch.stack([getattr(f, k) for f in found]).mean(0) for k in ("effect", "activity"))
    return Attribution(found[0].space, effect, activity, float(np.mean([f.gap for f in found])))


def ranked(found: Attribution, most: int | None = None) -> list[Unit]:
    """Units by what they are guessed to carry of the gap, the largest first; none that works against it."""
    scores = found.effect.sum(0) * (1 if found.gap >= 0 else -1)
    order = scores.flatten().argsort(descending=True, stable=True)
    order = order[: int((scores > 0).sum()) if most is None else min(most, int((scores > 0).sum()))]
    layers, n = list(found.space.layers), found.space.n_units
    return [(layers[i // n], i % n) for i in order.tolist()]


def alike(found: Attribution, units: Sequence[Unit], seed: int) -> list[Unit]:
    """As many other units of about the same activity, one for each: the control. None of ``units`` is among them.

    Each is drawn from the most similar ones that are left (NEAR). Where the chosen are the loudest of all, none is as
    loud: say how alike they are (``activity_of``). DecisionError if too few units are left.
    """
    layers = list(found.space.layers)
    check_units(found.space, units)
    activity = array(found.activity.flatten())
    place = [layers.index(layer) * found.space.n_units + i for layer, i in units]
    free = np.ones(len(activity), dtype=bool)
    free[place] = False
    if free.sum() < len(units):
        raise DecisionError(f"{len(units)} of {len(activity)} {found.space.basis} are chosen, so that no {len(units)} "
                            "others are left as a control. Choose fewer.")  # fmt: skip
    near = max(3, min(NEAR, len(activity) // 50))
    size = np.log(activity + activity.max() * 1e-9 + 1e-30)
    rng, drawn = np.random.default_rng(whole("seed", seed, 0, DecisionError)), dict[int, int]()
    for i in sorted(place, key=lambda j: -activity[j]):  # the loudest first: they have the fewest like them
        left = np.flatnonzero(free)
        like_it = left[np.argsort(np.abs(size[left] - size[i]), kind="stable")[:near]]
        drawn[i] = int(like_it[rng.integers(len(like_it))])
        free[drawn[i]] = False
    return [(layers[j // found.space.n_units], j % found.space.n_units) for j in (drawn[i] for i in place)]


def activity_of(found: Attribution, units: Sequence[Unit]) -> float:
    """Mean activity of some units."""
    layers = list(found.space.layers)
    return float(torch.stack([found.activity[layers.index(layer), i] for layer, i in units]).mean())
