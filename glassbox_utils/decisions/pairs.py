"""The same case twice, different in one thing: what is patched from one prompt into the other, and what is reported.

A contrast is two groups of an attribute, or two values of a field. A pair's two prompts have equally many tokens and
differ at the tokens of the changed value alone, so that every position means the same in both; pairs whose prompts do
not align are dropped and counted. The names of a list are paired with names of the other group that have equally many
tokens: more pairs align, and no name stands in two of them. Pairs to choose on and pairs to report on share neither
names nor cases.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from glassbox_utils.core.arguments import items, shown, whole
from glassbox_utils.core.devices import beside
from glassbox_utils.core.models import Model
from glassbox_utils.core.text import Batch, following, padded, tokenize
from glassbox_utils.decisions import placing, scoring
from glassbox_utils.decisions.cases import Case
from glassbox_utils.decisions.decision import PLACEHOLDER, Carrier, Decision, Template, swapped
from glassbox_utils.decisions.fields import Category, DecisionError, Field, Number, Text, Value, band_of

Part = Literal["choose", "report"]
Place = Literal["all", "carrier", "between", "decision"]
PLACES: tuple[Place, ...] = ("carrier", "between", "decision")
"""the tokens of the changed value, those after it up to the last one, and the last one, where the answer is read; the
tokens before the carrier are the same in both prompts"""
SPLITS = {"choose": ("train", "selection"), "report": ("report", "far")}
"""of names: which ones each part may use, where the decision says it"""


@dataclass(frozen=True)
class Contrast:
    """What differs: the ``own`` group or value is patched with the ``donor``'s."""

    what: str
    """a group of the decision, or a field"""
    own: Value
    donor: Value

    def __str__(self) -> str:
        return f"{self.what}: {self.own} / {self.donor}"


@dataclass(frozen=True)
class Twins:
    """One case as two."""

    case: Case
    """as it is in the table: what really happened is known of this one"""
    own: Case
    donor: Case
    cluster: str
    """what the effect may hang on, to be resampled as one: the two names, or the case"""
    others: tuple[tuple[str, str], ...] = ()
    """the other groups that both names carry"""


@dataclass(frozen=True, eq=False)
class Pairs:
    """Aligned prompts in one template, as rows of token ids."""

    contrast: Contrast
    template: str
    twins: tuple[Twins, ...]
    own: tuple[tuple[int, ...], ...]
    donor: tuple[tuple[int, ...], ...]
    carrier: tuple[tuple[bool, ...], ...]
    """which tokens hold the changed value"""
    answers: tuple[str, str]
    tokens: tuple[int, int]
    """of the two answers, the favourable one first"""
    dropped: int
    """pairs whose prompts do not align"""

    def __len__(self) -> int:
        return len(self.twins)

    @property
    def clusters(self) -> list[str]:
        return [one.cluster for one in self.twins]


class Rows(NamedTuple):
    """Some pairs as tensors: which ones, both prompts, and the positions of each place."""

    rows: list[int]
    own: Batch
    donor: Batch
    places: dict[Place, Bool[Tensor, "n pos"]]


# --- what differs -------------------------------------------------------------------------------------


def contrast(model: Model, decision: Decision, what: str, own: Any = None, donor: Any = None) -> Contrast:
    """Two groups of an attribute, or two values of a field.

    By default the first group and the one that has most names of as many tokens; of a field two values that lie far
    apart (a category's in their order, a number's within the middle four fifths of the cases, a free text's known ones)
    and have equally many tokens, so that prompts align. DecisionError for an
    attribute, group or value that does not exist, or where nothing says which two to take.
    """
    if what in decision.groups:
        first, second = decision.groups[what][0] if own is None else own, donor
        if donor is None:
            second = _nearest(model, decision, what, first)
    elif (rule := decision.fields.get(what)) is None:
        names = ", ".join([*decision.groups, *decision.fields])
        raise DecisionError(f"There is no attribute or field {shown(what)}. Allowed: {names}.")
    else:
        seen = [case[what] for case in decision.cases] if isinstance(rule, Number) else []
        first, second = _apart(model, rule, seen, what, own, donor)
    found = Contrast(what, first if own is None else own, second if donor is None else donor)
    if found.own == found.donor:
        raise DecisionError(f"Both members of each pair would have the {what} {shown(found.own)}. Give two values.")
    for value in (found.own, found.donor):
        if what in decision.groups and value not in decision.groups[what]:
            raise DecisionError(f"{what} is {shown(value)}. Allowed: {', '.join(decision.groups[what])}.")
        if what in decision.fields and decision.cases:
            swapped(decision, decision.cases[0], what, value)  # raises for a value that the field may not hold
    return found


def _nearest(model: Model, decision: Decision, what: str, own: str) -> str:
    """The other group whose names pair best with those of one."""

    def n_pairs(group: str) -> int:
        differs = Contrast(what, own, group)
        lists = [_names(model, one, differs, "report", 0, True) for one in decision.carriers]
        return sum(map(len, lists))

    return max((group for group in decision.groups[what] if group != own), key=n_pairs)


def _apart(model: Model, rule: Field, seen: Sequence[Any], what: str, own: Any, donor: Any) -> tuple[Any, Any]:
    """Two values of a field, far apart and of equally many tokens if there are such."""
    if own is not None and donor is not None:
        return own, donor
    if isinstance(rule, Number):
        low, high = np.quantile(seen, [0.1, 0.9]) if seen else rule.range
        known: list[Any] = sorted(v for v in set(seen or rule.range) if low <= v <= high)
    else:
        known = list(rule.values if isinstance(rule, Category) else rule.known)
    if len(known) < 2:
        raise DecisionError(f"Nothing says which two values of {what!r} to compare: there is {shown(known)}. Give own= "
                            "and donor=.")  # fmt: skip
    by_size: dict[int, list[int]] = {}
    for i, value in enumerate(known):
        by_size.setdefault(len(following(model, f" {value}")), []).append(i)
    place = known if isinstance(rule, Number) else range(len(known))
    spread = max(by_size.values(), key=lambda at: place[at[-1]] - place[at[0]])
    first, second = known[spread[0]], known[spread[-1]]
    one_band = isinstance(rule, Number) and rule.bands and band_of(rule, first) == band_of(rule, second)
    return (known[0], known[-1]) if first == second or one_band else (first, second)


def contrasts(model: Model, decision: Decision, but: str) -> list[Contrast]:
    """Every merit field and every protected attribute other than ``but``: what a cause of ``but`` should not carry.

    Left out are free text without two known values, fields that carry an attribute, whose groups stand for them, and
    fields of which no two values can be told apart.
    """
    carried = {one.field for one in decision.carriers}
    names = [name for name, f in decision.fields.items() if f.role in ("merit", "protected") and name not in carried]
    found = []
    for name in [*decision.groups, *names]:
        rule = decision.fields.get(name)
        if name != but and not (isinstance(rule, Text) and len(rule.known) < 2):
            with suppress(DecisionError):
                found.append(contrast(model, decision, name))
    return found


# --- who is compared ----------------------------------------------------------------------------------


def twins(
    model: Model, decision: Decision, differs: Contrast, part: Part, n: int, seed: int = 0, alike: bool = True
) -> list[Twins]:
    """``n`` cases as two each, for one part of the work; cases and names by turns.

    The cases are halved by ``seed``. Names come from the lists of the part's splits (SPLITS); lists that the decision
    does not part so are halved too. ``alike``: only names that have a partner of equally many tokens (else
    the others are paired in their order). For a field, the case is what varies. DecisionError for no case or names.
    """
    if part not in SPLITS:
        raise DecisionError(f"There is no part {shown(part)}. Allowed: {', '.join(SPLITS)}.")
    whole("n", n, 1, DecisionError)
    rng = np.random.default_rng(whole("seed", seed, 0, DecisionError))
    order = rng.permutation(len(decision.cases))
    half = [decision.cases[i] for i in (order[::2] if part == "choose" else order[1::2])]
    if not half:
        raise DecisionError(f"{decision.title!r} has {len(decision.cases)} cases. Allowed: two or more. Add cases.")
    cases = [half[i % len(half)] for i in range(n)]
    if differs.what in decision.fields:
        put = lambda c, value: swapped(decision, c, differs.what, value)  # noqa: E731
        return [Twins(c, put(c, differs.own), put(c, differs.donor), c.id) for c in cases[: len(half)]]
    by_field = {
        one.field: _names(model, one, differs, part, seed, alike)
        for one in decision.carriers
        if any(differs.what in known.groups for known in one.lists)
    }
    if not by_field or not all(by_field.values()):
        raise DecisionError(
            f"No list of names carries {differs} with a partner{' of equally many tokens' if alike else ''} for the "
            f"part {part!r}. Add lists below `carriers:` in which only {differs.what!r} differs, with their `split`."
        )
    scarce = min(by_field, key=lambda name: len(by_field[name]))  # where two fields carry it: no more vary than that
    found = []
    for i, case in enumerate(cases):
        here = {name: pairs[i % len(pairs)] for name, pairs in by_field.items()}
        values = [{name: getattr(pair, side) for name, pair in here.items()} for side in ("own", "donor")]
        own, donor = (replace(case, values=dict(case.values) | v, outcome=None) for v in values)
        others = {k: v for pair in here.values() for k, v in pair.groups.items() if k != differs.what}
        pair = here[scarce]
        cluster = f"{pair.own}, {pair.donor}"
        found.append(Twins(case, own, donor, cluster, tuple(others.items())))
    return found


class _Pair(NamedTuple):
    """A value of a list, and one of the other group's list."""

    own: str
    donor: str
    groups: dict[str, str]


def _names(model: Model, carrier: Carrier, differs: Contrast, part: Part, seed: int, alike: bool) -> list[_Pair]:
    """Pairs of one part, the lists by turns, so that the first few have all origins."""
    both = []
    for mine in carrier.lists:
        wanted = {**mine.groups, differs.what: differs.donor}
        if mine.groups.get(differs.what) == differs.own:
            both += [(mine, one) for one in carrier.lists if (one.groups, one.split) == (wanted, mine.split)][:1]
    splits = {mine.split for mine, _ in both}
    parted = all(splits & set(SPLITS[name]) for name in SPLITS)
    by_list = []
    for mine, other in both:
        a, b = mine.values, other.values
        if not parted or mine.split is None:
            a, b = _half(a, part, seed), _half(b, part, seed)
        elif mine.split not in SPLITS[part]:
            continue
        by_list.append([_Pair(*names, dict(mine.groups)) for names in _matched(model, a, b, alike)])
    return [pair for some in zip_longest(*by_list) for pair in some if pair]


def _half(values: Sequence[str], part: Part, seed: int) -> tuple[str, ...]:
    """One part's half of a list: the same one whoever the names are matched with, so that none is in both parts."""
    order = np.random.default_rng(seed).permutation(len(values))
    return tuple(values[i] for i in sorted(order[::2] if part == "choose" else order[1::2]))


def _matched(model: Model, a: Sequence[str], b: Sequence[str], alike: bool) -> list[tuple[str, str]]:
    """Values with partners of equally many tokens, alone and after a space, then after a space only; and the rest in
    their order unless ``alike``."""
    alone, spaced = ({v: len(following(model, f"{lead}{v}")) for v in (*a, *b)} for lead in ("", " "))
    found: list[tuple[str, str]] = []
    mine, other = list(a), list(b)
    keys: list[Callable[[str], Any]] = [lambda v: (alone[v], spaced[v]), lambda v: spaced[v]]
    for key in keys if alike else [*keys, lambda _: 0]:
        for value in list(mine):
            if (partner := next((v for v in other if key(v) == key(value)), None)) is not None:
                found.append((value, partner))
                mine.remove(value)
                other.remove(partner)
    return found


# --- their prompts ------------------------------------------------------------------------------------


def aligned(model: Model, decision: Decision, some: Sequence[Twins], template: str, differs: Contrast) -> Pairs:
    """The twins' prompts in one template, without the pairs that do not align.

    DecisionError if none does; ModelError for a tokenizer that does not say where its tokens stand, and a chat template
    that changes the words.
    """
    some = items("twins", some, DecisionError, Twins, word="Twins")
    sides = []
    for cases in ([t.own for t in some], [t.donor for t in some]):
        texts = scoring.prompts(model, decision, cases, template)
        batch = tokenize(model, texts)
        offsets, found = placing.offsets(model, texts), []
        for i, (text, case) in enumerate(zip(texts, cases, strict=True)):
            ids = batch.input_ids[i, batch.attention_mask[i].bool()].tolist()
            changed = {k for k in case.values if some[i].own[k] != some[i].donor[k]}
            here = [(a, b) for k, a, b in placing.in_prompt(model, decision, case, template, text) if k in changed]
            holds = [any(left < b and right > a for a, b in here) for left, right in offsets[i]]
            found.append((tuple(ids), (*[False] * (len(ids) - len(holds)), *holds)))
        sides.append(found)
    kept = [i for i, (a, b) in enumerate(zip(*sides, strict=True)) if _fit(a, b)]
    if not kept:
        raise DecisionError(
            f"In the template {template!r} none of {len(some)} pairs ({differs}) has prompts of equally many tokens "
            "that differ in the changed value alone. Give more cases or names, or other values."
        )
    text = scoring.prompts(model, decision, [some[kept[0]].own], template)[0]
    return Pairs(
        differs,
        template,
        tuple(some[i] for i in kept),
        tuple(sides[0][i][0] for i in kept),
        tuple(sides[1][i][0] for i in kept),
        tuple(sides[0][i][1] for i in kept),
        decision.answers,
        scoring.answer_tokens(model, decision, text),
        len(some) - len(kept),
    )


def drawn(
    model: Model, decision: Decision, differs: Contrast, part: Part, template: str, n: int, seed: int = 0
) -> Pairs:
    """``twins`` of one part, ``aligned`` in one template."""
    return aligned(model, decision, twins(model, decision, differs, part, n, seed), template, differs)


def _fit(a: tuple[tuple[int, ...], tuple[bool, ...]], b: tuple[tuple[int, ...], tuple[bool, ...]]) -> bool:
    if len(a[0]) != len(b[0]) or a[1] != b[1] or a[0] == b[0] or a[1][-1]:
        return False
    return all(x == y for x, y, held in zip(a[0], b[0], a[1], strict=True) if not held)


def rows(model: Model, pairs: Pairs, batch_size: int = 12) -> Iterator[Rows]:
    """The pairs in batches of prompts of like length, on the model's device."""
    whole("batch_size", batch_size, 1, DecisionError)
    order = sorted(range(len(pairs)), key=lambda i: len(pairs.own[i]))
    for start in range(0, len(order), batch_size):
        index = order[start : start + batch_size]
        own, donor = (padded(model, [side[i] for i in index]) for side in (pairs.own, pairs.donor))
        width = own.input_ids.shape[1]
        carrier = torch.tensor([[False] * (width - len(pairs.own[i])) + list(pairs.carrier[i]) for i in index])
        last = torch.zeros_like(carrier)
        last[:, -1] = True
        between = (carrier.cumsum(-1) > 0) & ~carrier & ~last
        places: dict[Place, Tensor] = {"carrier": carrier, "between": between, "decision": last}
        places["all"] = carrier | between | last
        yield Rows(index, own, donor, {k: beside(v, model.device) for k, v in places.items()})


# --- templates ----------------------------------------------------------------------------------------


def choosing_templates(decision: Decision, what: str) -> list[str]:
    """Templates to choose on: those of the split ``selection``, else ``train``, else the first of all.

    Templates that open with the value that differs come last: the first positions of a text hold activations many times
    the usual size, in which an SAE's features mean nothing. ``what``: the attribute or field of the contrast.
    """
    differing = {what} | {one.field for one in decision.carriers if any(what in known.groups for known in one.lists)}
    apart = [name for name, t in decision.templates.items() if not _opens_with(t, differing)]
    for names in (apart, list(decision.templates)):
        for split in ("selection", "train"):
            if found := [name for name in names if decision.templates[name].split == split]:
                return found
    return (apart or list(decision.templates))[:1]


def _opens_with(form: Template, names: set[str]) -> bool:
    """Is a value of these fields the first word of a raw text? A chat opens with its own tokens."""
    first = PLACEHOLDER.match(form.text or "")
    return first is not None and first[1] in names
