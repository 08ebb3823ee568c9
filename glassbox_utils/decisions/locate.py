"""Where a gap between two groups is in the model: one curve for heads, neurons and features, its controls, its chain.

*Carried*: the share of the gap that some units bring when they alone take the donor's values in the own prompt (what is
called faithfulness, or sufficiency). *Left*: the share that stays when they alone keep the own values in the donor's
prompt (completeness: what the rest can do without them). Units are chosen on one set of pairs and measured on another,
beside random ones of like activity; intervals are over the pairs of names. *Specific* is what carries the gap and
little of other effects: of merit fields, of other attributes.

Sources: activation patching, Meng et al., arXiv 2202.05262; circuits of neurons, arXiv 2601.22594; specificity, arXiv
2604.19764.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from glassbox_utils.core.arguments import items, number, whole
from glassbox_utils.core.devices import array, like, result
from glassbox_utils.core.interventions import recording
from glassbox_utils.core.models import Model
from glassbox_utils.core.session import progress
from glassbox_utils.core.statistics import Interval, cluster_bootstrap
from glassbox_utils.decisions import scoring
from glassbox_utils.decisions.fields import DecisionError
from glassbox_utils.decisions.pairs import PLACES, Pairs, Place, Rows, rows
from glassbox_utils.decisions.units import (
    Attribution,
    Space,
    Unit,
    activity_of,
    alike,
    check_units,
    moved,
    ranked,
    read,
)

Side = Literal["own", "donor"]
KS = (1, 3, 10, 30, 100, 300)
DRAWS = 3
"""random sets of units of like activity for each k"""
TARGET = 0.8
"""the share of the gap at which k is read off"""
Verdict = Literal["specific", "not specific", "undecided", "not tested"]


@dataclass(frozen=True, eq=False)
class Put:
    """Some units take one side's values, at one place."""

    space: Space
    units: Sequence[Unit]
    source: Side = "donor"
    place: Place = "all"
    axis: Float[Tensor, " width"] | None = None
    """of length 1: only the coordinate along it is taken, all else stays"""


@dataclass(frozen=True, eq=False)
class Condition:
    """A prompt of one side, with some units of the other (or held at their own)."""

    base: Side
    puts: tuple[Put, ...] = ()


@torch.no_grad()
def patched(
    model: Model, pairs: Pairs, conditions: Sequence[Condition], batch_size: int = 12
) -> Float[Tensor, "condition n"]:
    """Favourable minus unfavourable answer, logits, of every pair under every condition.

    Values are those of clean runs of both prompts. DecisionError for a unit that does not exist, or if the model does
    not decide one of the clean prompts (``scoring.check_share``).
    """
    conditions = items("conditions", conditions, DecisionError, Condition, word="Conditions")
    wanted = _wanted(conditions)
    out = torch.zeros(len(conditions), len(pairs))
    for some in progress(list(rows(model, pairs, batch_size)), "patching"):
        clean = {side: _clean(model, some, side, wanted, pairs) for side in ("own", "donor")}
        for i, condition in enumerate(conditions):
            if not condition.puts:
                out[i, some.rows] = clean[condition.base][0]
                continue
            with ExitStack() as stack:
                for put in condition.puts:
                    move = _values(put, clean[put.source][1], wanted)
                    stack.enter_context(moved(model, put.space, put.units, move, some.places[put.place]))
                logits = scoring.final_logits(model, some.own if condition.base == "own" else some.donor)
            out[i, some.rows] = result(logits[:, pairs.tokens[0]] - logits[:, pairs.tokens[1]])
    return out


Wanted = dict[int, tuple[Space, dict[int, list[int]]]]
"""of each space (by identity): the units of each layer whose clean values are needed"""


def _wanted(conditions: Iterable[Condition]) -> Wanted:
    found: Wanted = {}
    for put in (put for condition in conditions for put in condition.puts):
        _, layers = found.setdefault(id(put.space), (put.space, {}))
        for layer, index in check_units(put.space, put.units).items():
            layers[layer] = sorted({*layers.get(layer, []), *index})
    return found


def _clean(
    model: Model, some: Rows, side: Side, wanted: Wanted, pairs: Pairs
) -> tuple[Float[Tensor, " n"], dict[tuple[int, int], Tensor]]:
    """The clean scores of one side, and (space, layer) -> values [n, pos, unit, width] of the wanted units."""
    sites = list(dict.fromkeys(space.layers[layer] for space, layers in wanted.values() for layer in layers))
    batch, store = (some.own if side == "own" else some.donor), {}
    if sites:
        with recording(model, sites) as store:
            logits = scoring.final_logits(model, batch)
    else:
        logits = scoring.final_logits(model, batch)
    scoring.check_share(model, logits, pairs.tokens, pairs.answers)
    values = {
        (key, layer): read(space, store[space.layers[layer]], index)
        for key, (space, layers) in wanted.items()
        for layer, index in layers.items()
    }
    return result(logits[:, pairs.tokens[0]] - logits[:, pairs.tokens[1]]), values


def _values(put: Put, clean: Mapping[tuple[int, int], Tensor], wanted: Wanted) -> Callable[[int, Tensor], Tensor]:
    by_layer, known = check_units(put.space, put.units), wanted[id(put.space)][1]

    def values(layer: int, x: Tensor) -> Tensor:
        new = clean[id(put.space), layer][..., [known[layer].index(i) for i in by_layer[layer]], :]
        if put.axis is None:
            return new
        axis = like(put.axis, x)
        return x + ((new - x) * axis).sum(-1, keepdim=True) * axis

    return values


# --- shares -------------------------------------------------------------------------------------------


def share(
    part: ArrayLike | Tensor, whole_effect: ArrayLike | Tensor, clusters: Sequence[Any], seed: int = 0
) -> Interval:
    """Mean of ``part`` over mean of ``whole_effect``, with an interval over clusters (a ratio of means is resampled,
    not means of ratios: a pair without a gap has no share of its own)."""
    a, b = (array(x) if isinstance(x, Tensor) else np.asarray(x, dtype=float) for x in (part, whole_effect))

    def ratio(index: NDArray) -> float:
        chosen = index.astype(int)
        below = b[chosen].mean()
        return float(a[chosen].mean() / below) if below else math.copysign(math.inf, a[chosen].mean())

    found = cluster_bootstrap(np.arange(len(a)), clusters, ratio, seed=seed)
    return found


@dataclass(frozen=True)
class Point:
    """The first k units of one basis in one template. Shares of the gap."""

    basis: str
    template: str
    k: int
    carried: Interval
    left: Interval
    random_carried: tuple[float, ...]
    """each draw of as many other units of like activity"""
    random_left: tuple[float, ...]
    """of the first draw: what is kept by units that carry nothing is nearly nothing, so one says enough"""
    likeness: float
    """activity of the random units over that of the chosen"""


def gap_of(model: Model, pairs: Pairs, batch_size: int = 12) -> Float[Tensor, " n"]:
    """Donor minus own, logits, of every pair."""
    own, donor = patched(model, pairs, [Condition("own"), Condition("donor")], batch_size)
    return donor - own


def curve(
    model: Model,
    pairs: Pairs,
    found: Mapping[str, Attribution],
    ks: Sequence[int] = KS,
    draws: int = DRAWS,
    seed: int = 0,
    batch_size: int = 12,
) -> tuple[list[Point], Float[Tensor, " n"]]:
    """Carried and left for the first k units of every basis, and the gap of each pair in logits.

    ``found``: ``units.attribute`` on other pairs. A k larger than the units that a basis ranks is left out, and so are
    random ones where too few others are left. DecisionError if the pairs share names with each other only (one
    cluster), or show no gap: its interval holds 0.
    """
    for k in items("ks", ks, DecisionError, int, word="whole numbers"):
        whole("k", k, 1, DecisionError)
    whole("draws", draws, 0, DecisionError)
    plan: list[tuple[str, int, list[Unit], list[list[Unit]]]] = []
    for name, one in found.items():
        order = ranked(one, max(ks))
        for k in sorted({min(k, len(order)) for k in ks} - {0}):
            enough = one.space.n_units * len(one.space.sites) >= 2 * k
            others = [alike(one, order[:k], seed + i) for i in range(draws)] if enough else []
            plan.append((name, k, order[:k], others))
    conditions = [Condition("own"), Condition("donor")]
    for name, _, chosen, others in plan:
        space = found[name].space
        conditions += [c for some in (chosen, *others[:1]) for c in both_ways(space, some)]
        conditions += [both_ways(space, some)[0] for some in others[1:]]
    scores = patched(model, pairs, conditions, batch_size)
    gap, rest = scores[1] - scores[0], iter(scores[2:] - scores[0])
    check_gap(gap, pairs)
    points = []
    for name, k, chosen, others in plan:
        carried, left = (share(next(rest), gap, pairs.clusters, seed) for _ in range(2))
        drawn: tuple[list[float], list[float]] = ([], [])
        for i in range(len(others)):
            for side in (0, 1) if i == 0 else (0,):
                drawn[side].append(float(next(rest).mean() / gap.mean()))
        likeness = float(np.mean([activity_of(found[name], o) for o in others])) if others else math.nan
        likeness /= activity_of(found[name], chosen) or math.nan
        points.append(Point(name, pairs.template, k, carried, left, tuple(drawn[0]), tuple(drawn[1]), likeness))
    return points, gap


def both_ways(space: Space, units: Sequence[Unit], place: Place = "all") -> list[Condition]:
    """The units alone from the donor, and the units alone kept at the own values while all else is the donor's."""
    return [
        Condition("own", (Put(space, units, "donor", place),)),
        Condition("donor", (Put(space, units, "own", place),)),
    ]


def check_gap(gap: Float[Tensor, " n"], pairs: Pairs) -> Interval:
    """The mean gap, with its interval over clusters; DecisionError if it can't be told from nothing."""
    found = cluster_bootstrap(gap, pairs.clusters)
    if not found.excludes(0.0):
        raise DecisionError(
            f"In the template {pairs.template!r} there is no gap to locate: {pairs.contrast} differ by {found} logits "
            "(pairs of names). Give more pairs, another attribute, or a model that treats the groups differently."
        )
    return found


def k_for(points: Sequence[Point], target: float = TARGET) -> float | None:
    """How many units carry the target share: between two measured k by interpolation in log k; None: not reached."""
    number("target", target, DecisionError, above=0)
    ordered = sorted((p.k, p.carried.value) for p in points)
    if not ordered:
        return None
    if ordered[0][1] >= target:
        return float(ordered[0][0])
    for (k0, s0), (k1, s1) in pairwise(ordered):
        if s0 < target <= s1:
            along = (target - s0) / (s1 - s0)
            return float(k0 * (k1 / k0) ** along)
    return None


# --- specificity --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Specificity:
    """What the same units carry of another effect."""

    what: str
    basis: str
    k: int
    effect: Interval
    """of the other contrast, logits"""
    moved: Interval
    """by the units, logits"""
    carried: Interval | None
    """share; None where there is no effect to carry"""
    verdict: Verdict
    n: int
    dropped: int


def specificity(
    model: Model,
    others: Sequence[Pairs],
    chosen: Mapping[str, tuple[Space, Sequence[Unit], float]],
    batch_size: int = 12,
) -> list[Specificity]:
    """Do units that carry one gap carry other effects too?

    ``chosen``: basis -> (space, units, the share of their own gap that they carry). *specific*: the interval of the
    share lies below half of that, on both sides of nothing; *not specific*: all of it beyond half; *not tested*: the
    other contrast has no effect that could be carried.
    """
    found = []
    for pairs in others:
        clean = [Condition("own"), Condition("donor")]
        tests = [Condition("own", (Put(space, units),)) for space, units, _ in chosen.values()]
        scores = patched(model, pairs, [*clean, *tests], batch_size)
        effect = cluster_bootstrap(scores[1] - scores[0], pairs.clusters)
        for row, (basis, (_, units, own_share)) in zip(scores[2:], chosen.items(), strict=True):
            by_units = cluster_bootstrap(row - scores[0], pairs.clusters)
            carried = share(row - scores[0], scores[1] - scores[0], pairs.clusters) if effect.excludes(0.0) else None
            found.append(
                Specificity(
                    str(pairs.contrast), basis, len(units), effect, by_units, carried, verdict(carried, own_share),
                    len(pairs), pairs.dropped,
                )
            )  # fmt: skip
    return found


def verdict(carried: Interval | None, own_share: float) -> Verdict:
    """See ``specificity``."""
    if carried is None:
        return "not tested"
    bar = abs(own_share) / 2
    if -bar < carried.low and carried.high < bar:
        return "specific"
    return "not specific" if carried.low > bar or carried.high < -bar else "undecided"


# --- the chain ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Link:
    """The share of the gap that something carries at one place; ``frozen``: while other units keep their own values."""

    what: str
    place: Place
    carried: Interval
    frozen: str | None = None
    layer: int | None = None


def chain(
    model: Model,
    pairs: Pairs,
    streams: Space,
    parts: Mapping[str, tuple[Space, Sequence[Unit]]],
    seed: int = 0,
    batch_size: int = 12,
) -> list[Link]:
    """From the carrier over heads and neurons to the decision, as shares of the gap that each link carries.

    The stream after every layer of ``streams`` at every place says where the group is at each depth; the parts (their
    located units) say who carries it at which place; and each part at the places before the decision, while another
    keeps its own values at the places after, says what goes through whom: what is lost by the freezing went that way.
    """
    plan: list[tuple[Condition, str, Place, str | None, int | None]] = []
    for site in streams.sites:
        for place in PLACES:
            put = Put(streams, [(site.layer, 0)], "donor", place)
            plan.append((Condition("own", (put,)), "stream", place, None, site.layer))
    for name, (space, units) in parts.items():
        for place in ("all", *PLACES):
            plan.append((Condition("own", (Put(space, units, "donor", place),)), name, place, None, None))
    for name, (space, units) in parts.items():
        for other, (space_2, units_2) in parts.items():
            if name == other:
                continue
            first = Put(space, units, "donor", "carrier")
            for place in ("between", "decision"):
                frozen = Put(space_2, units_2, "own", place)
                plan.append((Condition("own", (first, frozen)), name, "carrier", f"{other} at {place}", None))
    scores = patched(model, pairs, [Condition("own"), Condition("donor"), *(row[0] for row in plan)], batch_size)
    gap = scores[1] - scores[0]
    return [
        Link(what, place, share(x - scores[0], gap, pairs.clusters, seed), frozen, layer)
        for x, (_, what, place, frozen, layer) in zip(scores[2:], plan, strict=True)
    ]


def sites_between(model: Model, n: int = 8) -> list[int]:
    """About ``n`` layers at even distances, the last one among them."""
    whole("n", n, 1, DecisionError)
    return sorted({round(i) for i in np.linspace(0, model.n_layers - 1, min(n, model.n_layers))})


def located(found: Attribution, k: int) -> tuple[Space, list[Unit]]:
    """A space with its first k units."""
    return found.space, ranked(found, k)
