"""Take a group out of a decision, at the position where the decision is made, and only when asked to.

An ``Edit`` reads coordinates of the residual stream after one layer and sets them to a target, so that the decision
is what it would be for nobody in particular: affine concept editing (arXiv 2411.09003; for hiring decisions arXiv
2506.10922), with the mean difference of two groups, or with LEACE's oblique projection (arXiv 2306.03819), which
moves as little as the covariance of the states allows. Everything is fitted on one set of applicants, chosen on a
second and reported on a third. A ``Gate`` lets an edit act only where the state looks like a decision (conditional
steering, arXiv 2409.05907), so that an edit that is left on does not touch other text.

Only the decision position is edited, so its prefix is computed once, and a setting costs one token an application.
"""

import copy
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from torch import Tensor

from glassbox_utils.core import caches
from glassbox_utils.core.arguments import items, number, shown, whole
from glassbox_utils.core.devices import beside, exact, like, result
from glassbox_utils.core.errors import GlassboxError
from glassbox_utils.core.interventions import check_rows, edit, recording
from glassbox_utils.core.models import Model, Site, check_layer
from glassbox_utils.core.session import progress
from glassbox_utils.core.statistics import Interval, bootstrap_ci, cluster_bootstrap
from glassbox_utils.core.text import tokenize
from glassbox_utils.decisions import loans
from glassbox_utils.decisions.loans import Applicant

Kind = Literal["affine", "leace", "project_out", "add"]
KINDS: tuple[Kind, ...] = ("affine", "leace", "project_out", "add")
Setting = Callable[[], AbstractContextManager[Any]]
"""makes the context in which the decision position is computed"""


class MitigationError(GlassboxError, ValueError):
    """An attribute, kind or layer of an edit that does not exist; the message names what does."""


@dataclass(frozen=True, eq=False)
class Gate:
    """Where an edit acts: where the state is nearer to a decision than to ordinary text, by one linear score."""

    origin: Float[Tensor, " d_model"]
    """the mean state of ordinary text, whose score is 0"""
    read: Float[Tensor, " d_model"]
    """gives the mean decision state the score 1"""

    def score(self, x: Float[Tensor, "*place d_model"]) -> Float[Tensor, "*place"]:
        return (x.float() - beside(self.origin, x)) @ beside(self.read, x)

    def __call__(self, x: Float[Tensor, "*place d_model"]) -> Bool[Tensor, "*place"]:
        return self.score(x) > 0.5


@dataclass(frozen=True, eq=False)
class Edit:
    """``x + (target - (x - centre) read) write`` after one layer: k coordinates are set to a target."""

    layer: int
    read: Float[Tensor, "d_model k"]
    write: Float[Tensor, "k d_model"]
    centre: Float[Tensor, " d_model"]
    target: Float[Tensor, " k"]
    name: str = ""
    gate: Gate | None = None
    """None: wherever it is applied"""

    def __call__(self, x: Float[Tensor, "*place d_model"]) -> Float[Tensor, "*place d_model"]:
        read, write, centre, target = (beside(t, x) for t in (self.read, self.write, self.centre, self.target))
        changed = like(x + (target - (x.float() - centre) @ read) @ write, x)
        return changed if self.gate is None else torch.where(self.gate(x)[..., None], changed, x)


# --- pairs of applicants ------------------------------------------------------------------------------


def contrast(people: Sequence[Applicant], attribute: str) -> tuple[list[Applicant], list[Applicant]]:
    """Each applicant twice, identical but for the attribute: women and men, East and West, foreign and English
    first names, 60 and 30 years. MitigationError for another attribute, or for what is no applicant."""
    people = items("people", people, MitigationError, Applicant, word="Applicants")
    if attribute == "gender":
        return _both(people, {"gender": "female"}, {"gender": "male"})
    if attribute == "age":
        return _both(people, {"age": 60}, {"age": 30})
    if attribute == "district":
        return [_side(a, "East") for a in people], [_side(a, "West") for a in people]
    if attribute == "nationality":
        foreign = loans.ORIGINS[1:]
        worse = [loans.counterfactual(a, origin=foreign[i % len(foreign)]) for i, a in enumerate(people)]
        return worse, [loans.counterfactual(a, origin="english") for a in people]
    if attribute == "same group":  # the control: another name of the same gender and origin
        return [_neighbour(a) for a in people], list(people)
    raise MitigationError(
        f"There is no contrast {attribute!r}. Allowed: gender, age, district, nationality, same group."
    )


def _both(people: Sequence[Applicant], a: Mapping[str, Any], b: Mapping[str, Any]) -> tuple[list, list]:
    return [loans.counterfactual(p, **a) for p in people], [loans.counterfactual(p, **b) for p in people]


def _side(applicant: Applicant, side: str) -> Applicant:
    return replace(applicant, district=f"{side} {applicant.district.partition(' ')[2]}")


def _neighbour(applicant: Applicant) -> Applicant:
    group = loans.group_of(applicant.name)
    if group is None:
        raise MitigationError(
            f"The name {shown(applicant.name)} is in none of our lists, so no other name of its group is known. Give "
            "applicants of loans.applications."
        )
    split = next(s for s in loans.SPLITS if applicant.name in loans.names(*group, s))
    known = loans.names(*group, split)
    return replace(applicant, name=known[(known.index(applicant.name) + 1) % len(known)])


# --- the decision position ----------------------------------------------------------------------------


@torch.no_grad()
def decide_under(
    model: Model,
    texts: Sequence[str],
    settings: Sequence[Setting] = (nullcontext,),
    batch_size: int = 32,
    asked: bool = True,
) -> Float[Tensor, "setting n"]:
    """``loans.decide_texts`` under several settings that act at the decision position only.

    Each text's prefix is computed once, without any setting; then the last token under each. Raises LoanError if the
    model does not decide, under one of the settings (``loans.check_decides``; ``asked=False``: NaN where it does not);
    MitigationError for no text or setting.
    """
    yes, no = loans.answer_tokens(model)
    texts = items("texts", texts, MitigationError)
    settings = items("settings", settings, MitigationError, Callable, word="functions, such as setting(...)")
    whole("batch_size", batch_size, 1, MitigationError)
    out = torch.zeros(len(settings), len(texts))
    for rows, last, cache in _prefixes(model, texts, batch_size):
        for i, setting in enumerate(settings):
            with setting():
                logits = model.hf(**last, **caches.handed(model.hf, copy.deepcopy(cache)), use_cache=True).logits[:, -1]
            found = result(logits[:, yes] - logits[:, no])
            if asked:
                loans.check_decides(model, logits)
            else:
                found[~(loans.answer_share(model, logits) >= loans.LEAST_SHARE)] = torch.nan
            out[i, rows] = found
    return out


@torch.no_grad()
def decision_states(
    model: Model, texts: Sequence[str], layers: Sequence[int], batch_size: int = 32
) -> Float[Tensor, "n layer d_model"]:
    """The residual stream after each of the layers, at the decision position. MitigationError for no text or layer."""
    texts = items("texts", texts, MitigationError)
    layers = items("layers", layers, MitigationError, object, word="layers")
    whole("batch_size", batch_size, 1, MitigationError)
    sites = [Site("resid_post", check_layer(model, layer)) for layer in layers]
    out = torch.zeros(len(texts), len(sites), model.d_model)
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    for start in progress(range(0, len(order), batch_size), "states"):
        rows = order[start : start + batch_size]
        with recording(model, sites, keep=lambda x: x[:, -1]) as store:
            loans.final_logits(model, tokenize(model, [texts[i] for i in rows]))
        out[rows] = result(torch.stack([store[site] for site in sites], 1))
    return out


def _prefixes(
    model: Model, texts: Sequence[str], batch_size: int
) -> Iterator[tuple[list[int], dict[str, Tensor], Any]]:
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    for start in progress(range(0, len(order), batch_size), "decisions"):
        rows = order[start : start + batch_size]
        batch = tokenize(model, [texts[i] for i in rows])
        inputs = batch.inputs
        before = {key: tensor[:, :-1] for key, tensor in inputs.items()}
        last = {key: tensor[:, -1:] for key, tensor in inputs.items()} | {"attention_mask": batch.attention_mask}
        yield rows, last, caches.left_by(model.hf(**before, use_cache=True, logits_to_keep=1))


# --- fitting ------------------------------------------------------------------------------------------


def fit_edit(
    pairs: Mapping[str, tuple[Float[Tensor, "n d_model"], Float[Tensor, "n d_model"]]],
    layer: int,
    kind: Kind = "affine",
    strength: float = 1.0,
    ridge: float = 0.05,
    level: float = 0.0,
) -> Edit:
    """An edit from the states of pairs of identical applicants, for one or several attributes at once; pure.

    ``pairs``: attribute -> states of the one group and of the other. affine: the coordinates along the mean
    differences are set to their common mean; project_out: to zero; leace: the same as affine, but read and
    written so that the other coordinates move least (covariance shrunk by ``ridge`` times its mean variance);
    add: ``strength`` times the mean difference from the first group to the second is added to everybody.
    ``level``, of affine and leace: where between the groups everybody is put; 0 is the middle, 0.5 the second group.
    MitigationError for another kind, no pairs, states that are not finite numbers of one width, or groups that do not
    differ.
    """
    if kind not in KINDS:
        raise MitigationError(f"There is no kind {shown(kind)}. Allowed: {', '.join(KINDS)}.")
    two = isinstance(pairs, Mapping) and all(isinstance(p, tuple | list) and len(p) == 2 for p in pairs.values())
    if not two or not pairs:
        raise MitigationError(
            f"The pairs are {shown(pairs)}. Allowed: attribute -> (states of one group, the other's)."
        )
    for attribute, (a, b) in pairs.items():
        _check_states(f"{attribute}, first group", a, next(iter(pairs.values()))[0])
        _check_states(f"{attribute}, second group", b, a)
        if len(a) != len(b):
            raise MitigationError(f"{attribute} has {len(a)} states and {len(b)}. Give both members of each pair.")
        if not bool((b - a).mean(0).any()):
            raise MitigationError(f"The groups of {attribute} have the same mean state: there is nothing to take out.")
    for word, value in (("strength", strength), ("level", level)):
        number(word, value, MitigationError)
    number("ridge", ridge, MitigationError, above=0)
    whole("layer", layer, 0, MitigationError)
    difference = torch.stack([(b - a).mean(0) for a, b in pairs.values()])
    everything = torch.cat([x for pair in pairs.values() for x in pair])
    centre, k = everything.mean(0), len(difference)
    name = f"{kind} after layer {layer}" + (", to the better-treated" if level else "")
    if kind == "add":
        nothing = torch.zeros(len(centre), k)
        return Edit(layer, nothing, difference, centre, torch.full((k,), strength), name)
    if kind == "leace":
        z = everything - centre
        covariance = z.T @ z / len(z)
        covariance += ridge * covariance.diagonal().mean() * torch.eye(len(centre))
        inverse = torch.linalg.solve(exact(covariance), exact(difference.T)).float()  # [d_model, k]
        among = difference @ inverse  # [k, k]
        if torch.linalg.matrix_rank(among) < k:
            raise MitigationError(
                f"The differences of {', '.join(pairs)} lie along one direction, so they can't be set apart from each "
                "other. Fit one of them, or another kind than leace."
            )
        read = inverse @ torch.linalg.inv(among)
        return Edit(layer, read, difference * strength, centre, torch.full((k,), level), name)
    basis = torch.linalg.qr(difference.T).Q
    if kind == "project_out":
        return Edit(layer, basis, basis.T * strength, torch.zeros_like(centre), torch.zeros(k), name)
    return Edit(layer, basis, basis.T * strength, centre, level * difference.sum(0) @ basis, name)


def _check_states(name: str, x: Any, other: Any) -> None:
    """MitigationError unless these are states [n, d_model], as wide as others."""
    fine = isinstance(x, Tensor) and x.ndim == 2 and len(x) > 0 and x.is_floating_point()
    if not fine or not bool(torch.isfinite(x).all()) or x.shape[1:] != getattr(other, "shape", x.shape)[1:]:
        what = f"of shape {tuple(x.shape)}, or hold what is no number" if isinstance(x, Tensor) else shown(x)
        raise MitigationError(
            f"The states ({name}) are {what}. Allowed: finite numbers [n, d_model], as wide as the others; "
            "decision_states gives them."
        )


def fit_gate(decisions: Float[Tensor, "n d_model"], text: Float[Tensor, "m d_model"], ridge: float = 0.05) -> Gate:
    """Fisher's linear discriminant with the covariance of text (shrunk by ``ridge`` times its mean variance); pure.

    MitigationError if more than a hundredth of either lies on the wrong side, or for states that are no finite numbers
    of one width.
    """
    _check_states("decisions", decisions, decisions)
    _check_states("text", text, decisions)
    number("ridge", ridge, MitigationError, above=0)
    origin = text.mean(0)
    z = text - origin
    covariance = z.T @ z / len(z)
    covariance += ridge * covariance.diagonal().mean() * torch.eye(len(origin))
    apart = decisions.mean(0) - origin
    read = torch.linalg.solve(exact(covariance), exact(apart)).float()
    gate = Gate(origin, read / (apart @ read))
    shut, opened = (float(x.float().mean()) for x in (~gate(decisions), gate(text)))
    if max(shut, opened) > 0.01:
        raise MitigationError(
            f"A gate would miss {shut:.1%} of the decisions and let through {opened:.1%} of other text (allowed: 1 %). "
            "Take a later layer, or leave the edit without a gate and switch it by request."
        )
    return gate


def random_edit(like: Edit, seed: int) -> Edit:
    """The same kind of edit in random directions: the control. Coordinates are set to their mean.

    MitigationError for a seed that is none.
    """
    seed = whole("seed", seed, 0, MitigationError)
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(*like.read.shape, generator=generator)).Q
    return replace(like, read=basis, write=basis.T, target=torch.zeros_like(like.target), name=f"random {seed}")


@contextmanager
def mitigate(
    model: Model, edits: Edit | Sequence[Edit], on: Sequence[bool] | bool = True, everywhere: bool = False
) -> Iterator[None]:
    """Edit the newest position (or, ``everywhere``, all positions) inside the block; ``on`` switches it for each row
    (or for all).

    Rows that are off are what they were, to the bit. MitigationError, before anything is installed, for no edit, a
    width or a layer that is not the model's, numbers that are not finite, and for ``on`` that is neither True, False
    nor one of them for each row.
    """
    several = [edits] if isinstance(edits, Edit) else items("edits", edits, MitigationError, Edit, word="Edits")
    if not isinstance(on, bool):
        on = items("on", on, MitigationError, bool, word="True and False, one for each row")
    for one in several:
        _check_edit(model, one)
    with ExitStack() as stack:
        for one in several:
            placed = _placed(one, model.device)  # once, not at every step
            stack.enter_context(edit(model, Site("resid_post", one.layer), _function(placed, on, everywhere)))
        yield


def _check_edit(model: Model, one: Edit) -> None:
    if len(one.centre) != model.d_model:
        raise MitigationError(
            f"The edit has {len(one.centre)} numbers, but the residual stream of {model.name} has "
            f"{model.d_model}. Fit it on this model."
        )
    check_layer(model, one.layer)
    gate = [one.gate.origin, one.gate.read] if one.gate else []
    if not all(bool(torch.isfinite(t).all()) for t in [one.read, one.write, one.centre, one.target, *gate]):
        raise MitigationError(f"The edit {one.name!r} holds numbers that are not finite. Fit it again.")


def _placed(one: Edit, device: torch.device) -> Edit:
    gate = one.gate and Gate(beside(one.gate.origin, device), beside(one.gate.read, device))
    tensors = {name: beside(getattr(one, name), device) for name in ("read", "write", "centre", "target")}
    return replace(one, **tensors, gate=gate)


def _function(one: Edit, on: Sequence[bool] | bool, everywhere: bool) -> Callable[[Tensor], Tensor]:
    def function(x: Tensor) -> Tensor:
        changed = one(x) if everywhere else torch.cat([x[:, :-1], one(x[:, -1:])], 1)
        if isinstance(on, bool):
            return changed if on else x
        check_rows(x, len(on))
        return torch.where(beside(torch.tensor(on), x)[:, None, None], changed, x)

    return function


def setting(model: Model, edits: Edit | Sequence[Edit]) -> Setting:
    """``mitigate`` as a setting of ``decide_under``."""
    return lambda: mitigate(model, edits)


# --- what is reported ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """What a setting does to decisions. Points are percentage points of the approval rate, gaps are better minus worse
    within identical applicants."""

    gap: Interval
    """approval rate of the better-treated group minus the other's, points"""
    logit_gap: Interval
    merit: Interval
    """share of decisions that agree with the merit rule"""
    approved: float
    """share approved"""
    brier: Interval
    """mean squared error of P(approved | one of the two answers) against the merit rule: calibration and skill"""


def outcome(
    worse: NDArray, better: NDArray, merit: Sequence[bool], seed: int = 0, clusters: Sequence[Hashable] | None = None
) -> Outcome:
    """From the logit differences of both members of each pair. The unit of the bootstrap is the pair, or the cluster
    that several pairs share (the pair of names, which carries the effect).

    MitigationError for unequally many, for fewer than two, or for logits that are not finite.
    """
    right, sides = np.asarray(merit, dtype=bool), [np.asarray(x, dtype=float) for x in (worse, better)]
    if any(x.shape != right.shape or not np.isfinite(x).all() for x in sides) or right.ndim != 1 or len(right) < 2:
        raise MitigationError(
            f"There are logits of the shapes {sides[0].shape} and {sides[1].shape} and {right.shape} merits. Allowed: "
            "finite numbers, equally many of each, two at least."
        )
    agree = ((worse > 0) == right).astype(float) + ((better > 0) == right)
    square = sum((1 / (1 + np.exp(-np.clip(x, -50, 50))) - right) ** 2 for x in (worse, better))

    def interval(values: NDArray) -> Interval:
        return bootstrap_ci(values, seed=seed) if clusters is None else cluster_bootstrap(values, clusters, seed=seed)

    return Outcome(
        gap=interval(100 * ((better > 0).astype(float) - (worse > 0))),
        logit_gap=interval(better - worse),
        merit=interval(agree / 2),
        approved=float(((worse > 0).mean() + (better > 0).mean()) / 2),
        brier=interval(np.asarray(square) / 2),
    )
