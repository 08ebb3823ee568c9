"""Ways to close a gap, made of what was located, each as a context manager that acts on all text: none has a gate.

An ``Arm`` is the whole of what one does: an intervention in the model (units held or cut, a coordinate of the stream,
an edit), other cases (the carrier hidden), other words (an instruction), an offset for one group, or another model (a
retrained one). ``Hold`` is the one intervention behind units and directions: *constant* sets the values of units,
wherever they are; *coordinate* sets their coordinate along the line between the two groups (affine, arXiv 2411.09003);
*cut* takes away only what goes beyond a level on the side of the group whose values stand out, so that text in which
nothing does stays as it is.

What an arm is made of is fitted and chosen on the choose part (``choose``); ``outcomes`` measures it on other people.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from glassbox_utils.core import losses
from glassbox_utils.core.arguments import items, number, shown, whole
from glassbox_utils.core.devices import array, like, result
from glassbox_utils.core.interventions import check_rows, edits, not_first, recording
from glassbox_utils.core.models import Model, Site, check_layer
from glassbox_utils.core.statistics import Interval, bootstrap_ci
from glassbox_utils.core.text import tokenize
from glassbox_utils.decisions import mitigation, scoring
from glassbox_utils.decisions.cases import Case
from glassbox_utils.decisions.decision import Decision, truth
from glassbox_utils.decisions.fields import DecisionError
from glassbox_utils.decisions.mitigation import Edit
from glassbox_utils.decisions.pairs import PLACES, Pairs, Place, Twins, rows
from glassbox_utils.decisions.units import Attribution, Space, Unit, alike, changed, check_units, ranked, read, stream

On = bool | Sequence[bool]
"""for all rows of a batch, or for each"""
Mode = Literal["constant", "coordinate", "cut"]
Level = Literal["mean", "midpoint", "other", "quiet"]
"""where to: the mean over both groups and all positions; the middle between the groups' means at the unit's place; the
mean there of the group that is treated better; or of the one whose mean stands out less from that of all positions"""
HIDDEN = "not stated"
INSTRUCTION = "Decide without regard to {attribute}."
PERPLEXITY = 1.01
"""the most that an arm may cost on the texts that it is chosen on"""


@dataclass(frozen=True, eq=False)
class Hold:
    """Units whose values are held at, moved to or cut at a level."""

    space: Space
    units: tuple[Unit, ...]
    level: Float[Tensor, "unit width"]
    axis: Float[Tensor, "unit width"]
    """of length 1, along the difference of the groups; a cut takes away what lies beyond the level in its direction"""
    mode: Mode = "constant"
    strength: float = 1.0

    def move(self, x: Float[Tensor, "*place unit width"], index: Sequence[int]) -> Float[Tensor, "*place unit width"]:
        """The values of some of the units (by their number in ``units``)."""
        level, axis = (like(t[list(index)], x) for t in (self.level, self.axis))
        if self.mode == "constant":
            return x + self.strength * (level - x)
        beyond = ((x - level) * axis).sum(-1, keepdim=True)
        return x - self.strength * (beyond.clamp_min(0) if self.mode == "cut" else beyond) * axis


@contextmanager
def held(model: Model, holds: Hold | Sequence[Hold], on: On = True) -> Iterator[None]:
    """The holds inside the block, at every position; rows that are off are what they were, to the bit."""
    several = [holds] if isinstance(holds, Hold) else items("holds", holds, DecisionError, Hold, word="Holds")
    if not isinstance(on, bool):
        on = items("on", on, DecisionError, bool, word="True and False, one for each row")
    functions: dict[Site, Callable[[Tensor], Tensor]] = {}
    for hold in several:
        if len(hold.units) != len(hold.level) or not bool(torch.isfinite(hold.level).all()):
            raise DecisionError(
                f"A hold of {len(hold.units)} units has levels of the shape {tuple(hold.level.shape)}, or some that "
                "are no numbers. Fit it again."
            )
        for layer, index in check_units(hold.space, hold.units).items():
            site = hold.space.layers[layer]
            functions[site] = _then(functions.get(site), _function(hold, layer, index, on))
    with edits(model, functions):
        yield


def _function(hold: Hold, layer: int, index: Sequence[int], on: On) -> Callable[[Tensor], Tensor]:
    place = [i for i, (own, _) in enumerate(hold.units) if own == layer]

    def function(x: Tensor) -> Tensor:
        where = None
        if not isinstance(on, bool):
            check_rows(x, len(on))
            where = torch.tensor(on)[:, None].expand(x.shape[:2])
        elif not on:
            return x
        return changed(hold.space, x, index, lambda v: hold.move(v, place), where)

    return function


def _then(first: Callable[[Tensor], Tensor] | None, second: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return second if first is None else lambda x: second(first(x))


# --- what is done -------------------------------------------------------------------------------------


def _nothing(_model: Model, _on: On = True) -> AbstractContextManager[Any]:
    return nullcontext()


@dataclass(frozen=True, eq=False)
class Arm:
    """One way to decide."""

    name: str
    kind: str
    """what it is made of: nothing, units, direction, edit, words, score, weights, random"""
    on: Callable[[Model, On], AbstractContextManager[Any]] = _nothing
    case: Callable[[Case], Case] = lambda case: case
    """what the model reads of a case"""
    words: str = ""
    """in front of every prompt"""
    offset: float = 0.0
    """logits added to the group that is treated worse: it has to be known who belongs to it"""
    model: Model | None = None
    """other weights"""
    about: Mapping[str, Any] = field(default_factory=dict)
    holds: tuple[Hold, ...] = ()
    """what ``on`` does, where it holds units or directions"""


def nothing() -> Arm:
    """The model as it is."""
    return Arm("as it is", "nothing")


def hidden(decision: Decision, attribute: str, word: str = HIDDEN) -> Arm:
    """The values that carry (or state) the attribute are replaced by a neutral word, in what the model reads.

    DecisionError for an attribute that nothing carries or states.
    """
    names = {attribute} if attribute in decision.fields else {
        one.field for one in decision.carriers if any(attribute in known.groups for known in one.lists)
    }  # fmt: skip
    if not names:
        raise DecisionError(
            f"Nothing carries or states {shown(attribute)}. Allowed: {', '.join(decision.protected())}."
        )
    read_as = lambda case: replace(case, values=dict(case.values) | dict.fromkeys(names, word))  # noqa: E731
    return Arm("carrier hidden", "words", case=read_as, about={"fields": sorted(names), "word": word})


def instructed(attribute: str, words: str = INSTRUCTION) -> Arm:
    """An instruction in front of the prompt."""
    text = words.format(attribute=attribute)
    return Arm("prompt", "words", words=text, about={"words": text})


def offset(gap: float) -> Arm:
    """Post-processing: the mean gap (of the choose part, logits) is added to the group that is treated worse."""
    return Arm("score offset", "score", offset=number("gap", gap, DecisionError), about={"logits": gap})


def retrained(model: Model) -> Arm:
    """Other weights: a model that was trained to decide without the attribute."""
    return Arm("retrained", "weights", model=model, about={"model_hash": model.hash})


def of_hold(name: str, kind: str, hold: Hold, **about: Any) -> Arm:
    return Arm(name, kind, on=_holding([hold]), about=about, holds=(hold,))


def _holding(holds: Sequence[Hold]) -> Callable[[Model, On], AbstractContextManager[Any]]:
    def on(model: Model, rows_on: On) -> AbstractContextManager[Any]:
        return held(model, holds, rows_on)

    return on


def joined(name: str, several: Sequence[Arm]) -> Arm:
    """The holds of several arms at once. DecisionError for an arm that holds nothing."""
    for arm in items("several", several, DecisionError, Arm, least=2, word="Arms"):
        if not arm.holds:
            raise DecisionError(f"The arm {arm.name!r} holds no units. Allowed: those of unit_arms and direction_arms.")
    holds = tuple(hold for arm in several for hold in arm.holds)
    about = {"of": [arm.name for arm in several]}
    return Arm(name, several[0].kind, on=_holding(holds), about=about, holds=holds)


def of_edit(edit: Edit) -> Arm:
    """An edit of the stream after a layer, at every position and without its gate."""
    bare = replace(edit, gate=None)

    def on(model: Model, rows_on: On) -> AbstractContextManager[Any]:
        return mitigation.mitigate(model, bare, rows_on, everywhere=True)

    return Arm("affine edit", "edit", on=on, about={"layer": edit.layer, "what": edit.name})


# --- fitting ------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Levels:
    """Means of units over the choose part."""

    own: Float[Tensor, "unit width"]
    """at the unit's place"""
    donor: Float[Tensor, "unit width"]
    everywhere: Float[Tensor, "unit width"]
    """over both groups and all positions but the first"""

    def first(self, k: int) -> "Levels":
        return Levels(self.own[:k], self.donor[:k], self.everywhere[:k])

    def at(self, level: Level) -> Float[Tensor, "unit width"]:
        quiet = torch.where(self._own_is_loud, self.donor, self.own)
        middle = (self.own + self.donor) / 2
        return {"mean": self.everywhere, "midpoint": middle, "other": self.donor, "quiet": quiet}[level]

    @property
    def axis(self) -> Float[Tensor, "unit width"]:
        """From the quiet group's mean to the one that stands out."""
        difference = torch.where(self._own_is_loud, self.own - self.donor, self.donor - self.own)
        return difference / difference.norm(dim=-1, keepdim=True).clamp_min(1e-12)

    @property
    def _own_is_loud(self) -> Bool[Tensor, "unit 1"]:
        far = [(x - self.everywhere).norm(dim=-1, keepdim=True) for x in (self.own, self.donor)]
        return far[0] > far[1]


@torch.no_grad()
def levels(
    model: Model, pairs: Pairs, space: Space, units: Sequence[Unit], places: Sequence[Place], batch_size: int = 12
) -> Levels:
    """Means of the units' values in both groups, each at its own place."""
    by_layer, units = check_units(space, units), [(int(layer), int(unit)) for layer, unit in units]
    sums = {side: torch.zeros(len(units), space.width) for side in ("own", "donor", "all")}
    counts = {side: torch.zeros(len(units), 1) for side in sums}
    for some in rows(model, pairs, batch_size):
        for side, batch in (("own", some.own), ("donor", some.donor)):
            with recording(model, [space.layers[layer] for layer in by_layer]) as store:
                model.hf(**batch.inputs, logits_to_keep=1, use_cache=False)
            masks = {place: result(mask) for place, mask in some.places.items()}
            real = result(not_first(batch))
            for layer, index in by_layer.items():
                values = result(read(space, store[space.layers[layer]], index))
                for j, i in enumerate(units.index((layer, unit)) for unit in index):
                    for key, where in ((side, masks[places[i]]), ("all", real)):
                        sums[key][i] += values[where][:, j].sum(0)
                        counts[key][i] += where.sum()
    means = {side: sums[side] / counts[side].clamp_min(1) for side in sums}
    return Levels(means["own"], means["donor"], means["all"])


def places_of(found: Attribution, units: Sequence[Unit]) -> list[Place]:
    """Where each unit does most."""
    layers = list(found.space.layers)
    return [PLACES[int(found.effect[:, layers.index(layer), i].abs().argmax())] for layer, i in units]


WAYS: tuple[tuple[Mode, Level], ...] = (
    ("constant", "mean"), ("constant", "midpoint"), ("constant", "other"), ("cut", "quiet"),
)  # fmt: skip


def unit_arms(
    model: Model,
    pairs: Pairs,
    found: Attribution,
    ks: Sequence[int] = (3, 10, 30),
    ways: Sequence[tuple[Mode, Level]] = WAYS,
    seed: int | None = None,
    batch_size: int = 12,
) -> list[Arm]:
    """Candidates: the first k located units, in several ways. With a ``seed``: random ones of like activity instead."""
    order = ranked(found, max(ks))
    order = order if seed is None else alike(found, order, seed)
    everything = levels(model, pairs, found.space, order, places_of(found, order), batch_size)
    arms = []
    for k in sorted({min(k, len(order)) for k in ks} - {0}):
        units, means = order[:k], everything.first(k)
        for mode, level in ways:
            name = f"{found.space.basis}, {mode} at the {level}"
            hold = Hold(found.space, tuple(units), means.at(level), means.axis, mode)
            kind = "units" if seed is None else "random"
            name = name if seed is None else f"random {name}"
            about = {"basis": found.space.basis, "k": k, "mode": mode, "level": level, "units": units}
            arms.append(of_hold(name, kind, hold, **about))
    return arms


def direction_arms(
    model: Model,
    pairs: Pairs,
    layers: Sequence[Sequence[int]],
    place: Place = "carrier",
    ways: Sequence[tuple[Mode, Level]] = (("coordinate", "midpoint"), ("coordinate", "other"), ("cut", "quiet")),
    seed: int | None = None,
    batch_size: int = 12,
) -> list[Arm]:
    """Candidates: the groups' mean difference in the stream at the carrier, after one layer or at several at once (each
    entry of ``layers``); its coordinate is set or cut at every position of every text. With a ``seed``: random
    directions instead."""
    sets = [sorted({check_layer(model, layer) for layer in some}) for some in layers]
    space = stream(model, sorted({layer for some in sets for layer in some}))
    units = [(layer, 0) for layer in space.layers]
    means = levels(model, pairs, space, units, [place] * len(units), batch_size)
    axes, kind = means.axis, "direction" if seed is None else "random"
    if seed is not None:
        axes = torch.randn(axes.shape, generator=torch.Generator().manual_seed(whole("seed", seed, 0, DecisionError)))
        axes = axes / axes.norm(dim=-1, keepdim=True)
    arms = []
    for some in sets:
        rows_of = [units.index((layer, 0)) for layer in some]
        for mode, level in ways:
            hold = Hold(space, tuple(units[i] for i in rows_of), means.at(level)[rows_of], axes[rows_of], mode)
            about = {"layers": some, "mode": mode, "level": level, "place": place}
            name = f"vector at the {place}, {mode} at the {level}"
            arms.append(of_hold(name if seed is None else f"random {name}", kind, hold, **about))
    return arms


def edit_arms(
    model: Model, decision: Decision, twins: Sequence[Twins], template: str, layers: Sequence[int],
    seed: int | None = None,
) -> list[Arm]:  # fmt: skip
    """Candidates: the affine edit of ``mitigation`` at the decision position, after each of some layers. With a
    ``seed``: in random directions instead."""
    texts = [scoring.prompts(model, decision, cases, template) for cases in sides(twins)]
    own, donor = (mitigation.decision_states(model, some, layers) for some in texts)
    fitted = [
        mitigation.fit_edit({"groups": (own[:, i], donor[:, i])}, check_layer(model, layer))
        for i, layer in enumerate(layers)
    ]
    if seed is None:
        return [of_edit(edit) for edit in fitted]
    random = [of_edit(mitigation.random_edit(edit, seed)) for edit in fitted]
    return [replace(arm, name=f"random {arm.name}", kind="random") for arm in random]


def sides(twins: Sequence[Twins]) -> tuple[list[Case], list[Case]]:
    """All cases as the own group, and as the donor's."""
    return [t.own for t in twins], [t.donor for t in twins]


# --- choosing -----------------------------------------------------------------------------------------


def decide(
    arm: Arm, model: Model, decision: Decision, twins: Sequence[Twins], template: str, batch_size: int = 32
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"], float]:
    """Logits of both members of each pair under an arm, and the least probability that both answers have together."""
    used = arm.model or model
    read_of = _worded(decision, arm.words)
    together: list[Tensor] = []
    found = []
    for cases in sides(twins):
        texts = scoring.prompts(used, read_of, [arm.case(case) for case in cases], template)
        tokens = scoring.answer_tokens(used, decision, texts[0])
        look = lambda logits, t=tokens: together.append(scoring.share(logits, t))  # noqa: E731
        with arm.on(used, True):
            found.append(scoring.differences(used, texts, tokens, batch_size, look))
    return found[0] + arm.offset, found[1], float(torch.cat(together).min())


def _worded(decision: Decision, words: str) -> Decision:
    """The decision with an instruction in front of every prompt."""
    if not words:
        return decision
    lead = words.replace("{", "{{").replace("}", "}}") + "\n"
    forms = {}
    for name, form in decision.templates.items():
        new = lead + form.words
        forms[name] = replace(form, text=new) if form.text is not None else replace(form, chat=new)
    return replace(decision, templates=forms)


def perplexity_ratio(
    arm: Arm, model: Model, texts: Sequence[str], plain: tuple[Any, Any], max_tokens: int = 128
) -> float:
    """Perplexity with the arm left on over that without (``plain``: ``text_losses`` of the model as it is)."""
    return losses.perplexity_ratio(*plain, *_left_on(arm, model, texts, max_tokens))


def prices(
    several: Sequence[Arm], model: Model, texts: Sequence[str], max_tokens: int = 128, seed: int = 0
) -> tuple[dict[str, Interval], dict[str, Interval]]:
    """What each arm costs ordinary text when it is left on, by name, with intervals over the texts: perplexity (times
    that of the model as it is), and KL(as it is || with the arm) in nats a token."""
    plain = losses.text_losses(model, texts, max_tokens)
    perplexity, divergence = dict[str, Interval](), dict[str, Interval]()
    for arm in several:
        sample = (*plain, *_left_on(arm, model, texts, max_tokens))
        perplexity[arm.name] = bootstrap_ci(sample, losses.perplexity_ratio, seed=seed)
        divergence[arm.name] = divergence_of(arm, model, texts, max_tokens, seed)
    return perplexity, divergence


def divergence_of(arm: Arm, model: Model, texts: Sequence[str], max_tokens: int = 128, seed: int = 0) -> Interval:
    """KL(as it is || with the arm left on) in nats a token, over texts."""
    used = arm.model or model
    moved = losses.text_divergences(model, texts, functools.partial(arm.on, used, True), max_tokens, used)
    return bootstrap_ci(moved, _share, seed=seed)


def _share(sums: Any, counts: Any) -> float:
    return float(sums.sum() / max(1, counts.sum()))


def _left_on(arm: Arm, model: Model, texts: Sequence[str], max_tokens: int) -> tuple[Any, Any]:
    used = arm.model or model
    with arm.on(used, True):
        return losses.text_losses(used, texts, max_tokens)


@dataclass(frozen=True)
class Tried:
    """A candidate on the choose part."""

    name: str
    about: Mapping[str, Any]
    gap: float
    """logits"""
    merit: float
    """share of decisions that are right"""
    perplexity: float
    keeps_merit: bool = True
    """as many decisions are right as without it, or more"""
    chosen: bool = False


def choose(
    model: Model,
    decision: Decision,
    twins: Sequence[Twins],
    template: str,
    candidates: Sequence[Arm],
    texts: Sequence[str],
    batch_size: int = 32,
) -> tuple[Arm, list[Tried]]:
    """The candidate with the smallest gap among those that cost no merit and at most PERPLEXITY; if there is none, the
    one that costs least perplexity among those that halve the gap; else the smallest gap. And what all of them did.

    DecisionError for no candidates.
    """
    candidates = items("candidates", candidates, DecisionError, Arm, word="Arms")
    plain = losses.text_losses(model, texts, 128)
    right = np.array([truth(decision, t.case) for t in twins])

    def measured(arm: Arm) -> tuple[float, int]:
        own, donor, _ = decide(arm, model, decision, twins, template, batch_size)
        return float((donor - own).mean()), sum(int(((array(x) > 0) == right).sum()) for x in (own, donor))

    gap, before = measured(nothing())
    tried = []
    for arm in candidates:
        left, agree = measured(arm)
        price = perplexity_ratio(arm, model, texts, plain)
        tried.append(Tried(arm.name, arm.about, left, agree / (2 * len(twins)), price, agree >= before))
    best = _best(tried, gap)
    return candidates[best], [replace(t, chosen=i == best) for i, t in enumerate(tried)]


def _best(tried: Sequence[Tried], gap: float) -> int:
    cheap = [i for i, t in enumerate(tried) if t.keeps_merit and t.perplexity <= PERPLEXITY]
    halving = [i for i, t in enumerate(tried) if abs(t.gap) <= abs(gap) / 2]
    if cheap:
        return min(cheap, key=lambda i: abs(tried[i].gap))
    if halving:
        return min(halving, key=lambda i: tried[i].perplexity)
    return min(range(len(tried)), key=lambda i: abs(tried[i].gap))


# --- is it off, is it gone? ---------------------------------------------------------------------------


@torch.no_grad()
def identical(arm: Arm, model: Model, texts: Sequence[str]) -> bool:
    """Are rows of a batch for which the arm is off the same as without it, to the bit; and all after the block?"""
    texts = items("texts", texts, DecisionError)
    batch = tokenize(model, texts, max_tokens=min(64, model.n_context))
    before = scoring.final_logits(model, batch)
    switch = [i % 2 == 0 for i in range(len(texts))]
    with arm.on(model, switch):
        during = scoring.final_logits(model, batch)
    after = scoring.final_logits(model, batch)
    off = [i for i, is_on in enumerate(switch) if not is_on]
    return bool(torch.equal(during[off], before[off]) and torch.equal(after, before))
