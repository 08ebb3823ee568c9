"""Where the officers' gaps are in the model, and what mends them: ``glassbox study locate``.

For any decision, model and attribute (``located``, ``mended``); the study runs on the loan officers of the prepared
folder. Units, k, layers and ways are chosen on the choose part, in the choosing templates; everything is reported on
other cases and other names, in every template. Each part is resumable.
"""

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from glassbox_utils.core import coding, prepared
from glassbox_utils.core.devices import result
from glassbox_utils.core.errors import GlassboxError
from glassbox_utils.core.losses import perplexity_ratio, text_losses
from glassbox_utils.core.models import Model
from glassbox_utils.core.skills import choice_right, held_texts
from glassbox_utils.core.statistics import bootstrap_ci, cluster_bootstrap
from glassbox_utils.core.studies import SEED, resumed, write_table
from glassbox_utils.decisions import arms, directions, locate, outcomes, pairs, planted, units
from glassbox_utils.decisions.arms import Arm
from glassbox_utils.decisions.decision import Decision
from glassbox_utils.decisions.fields import DecisionError, Number
from glassbox_utils.decisions.loans import load_loan_model, loan_models, officers
from glassbox_utils.decisions.pairs import Contrast, Pairs
from glassbox_utils.decisions.probes import plain
from glassbox_utils.decisions.reading import load_decision
from glassbox_utils.decisions.units import Attribution, Space
from glassbox_utils.saes.store import load_sae

NAME = "locate"
OFFICERS = {"deployed": ("gender", "female", "male"), "model-a": ("side", "East", "West"),
            "model-c": ("origin", "hispanic", "english")}  # fmt: skip
"""whose gap is located: what the officer was taught to hold against whom (``data/loans/key.json``)"""

RANDOM_IN = 2
"""wordings in which arms of random units are measured: what they do is to be seen, not how they may be used"""
OTHERS = {"templates": 3, "draws": 2}
"""how much is measured of an officer that is not mended: three or four pairs of values carry its gap, so that more
wordings would be more of the same"""


class Size(NamedTuple):
    """How much is measured."""

    choose: int = 40
    """pairs that choose"""
    report: int = 24
    """pairs that report, in each template"""
    others: int = 24
    """pairs of each other contrast"""
    decided: int = 24
    """pairs that are decided under each arm, in each template"""
    texts: int = 40
    choices: int = 40
    draws: int = locate.DRAWS
    templates: int = 99
    """at most, those that chose among them"""
    full: int = 1
    """templates in which every k and the random units are measured; in the others every second k"""
    layers: int = 10
    """after which a direction is tried"""
    ks: tuple[int, ...] = locate.KS
    arm_ks: tuple[int, ...] = (1, 10, 30, 100)
    """numbers of units to choose from"""


SMALL = Size(10, 12, 8, 12, 8, 20, 2, 3, 1, 5, (1, 3, 10, 30), (10,))
REPAIR = (60, 12)
"""steps of the retraining, in a full folder and in the smallest one: few, so that little is forgotten"""
COMMAND = Size(16, 16, 8, 24, 8, 24, 3, 4, 1, 5, (1, 3, 10, 30, 100), (3, 10, 30))
"""what ``glassbox locate`` and ``glassbox mitigate`` measure: enough to see, with wide intervals"""
CHOOSE_TEXTS = 12
"""texts on which the perplexity of candidates is watched, after those that are reported on"""


def sized() -> Size:
    """The full study, or the share of it that a prepared folder asks for."""
    whole = Size()
    if prepared.size() == 1:
        return whole
    numbers: dict[str, Any] = {
        k: prepared.sized(v, getattr(SMALL, k)) for k, v in whole._asdict().items() if isinstance(v, int)
    }
    return SMALL._replace(**numbers)


def spaces_of(model: Model, saes: Sequence[str] = ()) -> dict[str, Space]:
    """Heads, neurons, and the features of some SAEs (of the base model, where an adapter was merged in)."""
    found = {"heads": units.heads(model), "neurons": units.neurons(model)}
    for name in saes:
        try:
            space = units.features(model, load_sae(name), foreign=True)
        except GlassboxError:
            continue  # an SAE of another width or place: the other bases are there all the same
        found[f"features {name}"] = space
    return found


def templates_of(decision: Decision, what: str, n: int) -> list[str]:
    """At most ``n`` templates to report in: those that chose come last."""
    chose = pairs.choosing_templates(decision, what)
    rest = sorted(
        (name for name in decision.templates if name not in chose),
        key=lambda name: ("report", "far", "train", None, "selection").index(decision.templates[name].split),
    )
    return [*rest, *chose][:n]


# --- locate -------------------------------------------------------------------------------------------


def attributed(
    model: Model, decision: Decision, differs: Contrast, spaces: Mapping[str, Space], size: Size, most: int = 2
) -> tuple[dict[str, Attribution], Pairs]:
    """Mean attribution over the choosing templates, and the pairs of the first of them."""
    twins = pairs.twins(model, decision, differs, "choose", size.choose, SEED)
    names = pairs.choosing_templates(decision, differs.what)[:most]
    some = []
    for name in names:
        try:
            some.append(pairs.aligned(model, decision, twins, name, differs))
        except DecisionError:  # another wording may align
            if name == names[-1] and not some:
                raise
    found = [units.attribute(model, p, spaces) for p in some]
    return {name: units.pooled([f[name] for f in found]) for name in spaces}, some[0]


def oriented(model: Model, decision: Decision, differs: Contrast, n: int = 12) -> Contrast:
    """With the group that is treated better on the choose part as the donor."""
    twins = pairs.twins(model, decision, differs, "choose", n, SEED)
    some = pairs.aligned(model, decision, twins, pairs.choosing_templates(decision, differs.what)[0], differs)
    worse = float(locate.gap_of(model, some).mean()) < 0
    return Contrast(differs.what, differs.donor, differs.own) if worse else differs


def located(
    model: Model, decision: Decision, differs: Contrast, size: Size, found: Mapping[str, Attribution], chosen_on: Pairs
) -> dict[str, Any]:
    """The curve in every template, specificity and the chain in the first, as plain values; ``attributed`` chose."""
    key = [model.hash, content(decision), str(differs), list(size), SEED]
    twins = pairs.twins(model, decision, differs, "report", size.report, SEED)
    points: list[Any] = []
    table: dict[str, Any] = {
        "contrast": str(differs), "attribution": {
            "template": chosen_on.template, "pairs": len(chosen_on), "clusters": len(set(chosen_on.clusters)),
            "gap": round(next(iter(found.values())).gap, 3),
        },
        "first": {name: _first(one) for name, one in found.items()}, "gaps": {}, "explained": {},
    }  # fmt: skip
    measured = 0  # in how many wordings there was a gap
    for name in templates_of(decision, differs.what, size.templates):
        here = size if measured < size.full else size._replace(draws=0, ks=size.ks[1::2])
        given = (or_none, _curve, model, decision, differs, twins, name)
        parts = [  # each basis apart: another SAE leaves what was measured of heads and neurons as it is
            resumed(NAME, [*key, _basis(basis, one), "curve", name, list(here)], *given, {basis: one}, here)
            for basis, one in found.items()
        ]
        measured += any("points" in part for part in parts)
        points += [point for part in parts for point in part.get("points", [])]
        table["gaps"][name] = next((part["gap"] for part in parts if "gap" in part), parts[0])
    table["points"] = points
    first = next((name for name, gap in table["gaps"].items() if "skipped" not in gap), "")
    if not first:
        return table | {"specificity": [], "chain": []}
    some = pairs.aligned(model, decision, twins, first, differs)
    for name, one in found.items():
        if one.space.sae is not None:
            table["explained"][name] = round(units.explained(model, some, one.space), 4)
    shares = {p["basis"]: p for p in points if p["template"] == first and p["k"] <= max(10, min(size.ks))}
    whole = [*key, [_basis(basis, one) for basis, one in found.items()], "specificity"]
    table["specificity"] = resumed(NAME, whole, _specificity, model, decision, differs, first, found, shares, size)
    table["chain"] = resumed(NAME, [*key, "chain"], _chain, model, some, found)
    return table


def content(decision: Decision) -> str:
    """What tells the kept parts of one decision from those of another, or of the same one after a change."""
    return f"{decision.name} {hashlib.sha256(repr(decision).encode()).hexdigest()[:16]}"


def _basis(name: str, one: Attribution) -> str:
    if one.space.sae is None:
        return name
    return f"{name} {hashlib.sha256(result(coding.rows(one.space.sae)).numpy().tobytes()).hexdigest()[:16]}"


def _first(one: Attribution, n: int = 10) -> list[Any]:
    layers, order = list(one.space.layers), units.ranked(one, n)
    effects = [round(float(one.effect[:, layers.index(layer), i].sum()), 4) for layer, i in order]
    rows = zip(order, arms.places_of(one, order), effects, strict=True)
    return [{"unit": list(unit), "place": place, "effect": effect} for unit, place, effect in rows]


def or_none(work: Any, *args: Any) -> dict[str, Any]:
    """What was found, or why not: a template without a gap, or in which no pair aligns, does not end the study."""
    try:
        return work(*args)
    except GlassboxError as reason:
        return {"skipped": " ".join(str(reason).split())}


def _curve(
    model: Model, decision: Decision, differs: Contrast, twins: Any, name: str, found: Any, size: Size
) -> dict[str, Any]:
    some = pairs.aligned(model, decision, twins, name, differs)
    points, gap = locate.curve(model, some, found, size.ks, size.draws, SEED)
    mean = asdict(cluster_bootstrap(gap, some.clusters))
    return {"points": [asdict(p) for p in points], "gap": mean | {"pairs": len(some), "dropped": some.dropped}}


def _specificity(
    model: Model, decision: Decision, differs: Contrast, name: str, found: Any, shares: Any, size: Size
) -> list[Any]:
    chosen = {
        basis: (*locate.located(one, shares[basis]["k"]), shares[basis]["carried"]["value"])
        for basis, one in found.items()
        if basis in shares
    }
    others, rows = [], []
    for other in pairs.contrasts(model, decision, differs.what):
        try:
            twins = pairs.twins(model, decision, other, "report", size.others, SEED)
            others.append(pairs.aligned(model, decision, twins, name, other))
        except DecisionError as reason:
            rows.append({"what": str(other), "verdict": "not tested", "why": " ".join(str(reason).split())})
    for some in others:
        try:
            rows += [asdict(s) for s in locate.specificity(model, [some], chosen)]
        except GlassboxError as reason:  # one cluster: nothing to resample
            rows.append({"what": str(some.contrast), "verdict": "not tested", "why": " ".join(str(reason).split())})
    return rows


def _chain(model: Model, some: Pairs, found: Mapping[str, Attribution], k: int = 10) -> list[Any]:
    parts: Any = {name: locate.located(found[name], k) for name in ("heads", "neurons")}
    return [asdict(x) for x in locate.chain(model, some, units.stream(model, locate.sites_between(model)), parts, SEED)]


# --- mend ---------------------------------------------------------------------------------------------


def candidates(
    model: Model, decision: Decision, differs: Contrast, found: Mapping[str, Attribution], chosen_on: Pairs, size: Size
) -> dict[str, list[Arm]]:
    """Families of arms, of each of which one is chosen."""
    layers = locate.sites_between(model, size.layers)
    twins = pairs.twins(model, decision, differs, "choose", size.choose, SEED, alike=False)
    family = {basis: arms.unit_arms(model, chosen_on, one, size.arm_ks) for basis, one in found.items()}
    third = model.n_layers // 3
    spans = [range(third), range(third, 2 * third), range(third, model.n_layers - 1)]
    family["vector"] = arms.direction_arms(model, chosen_on, [*([layer] for layer in layers), *spans])
    family["edit"] = arms.edit_arms(model, decision, twins, chosen_on.template, layers[len(layers) // 2 :])
    return family


def chosen_arms(
    model: Model, decision: Decision, differs: Contrast, found: Mapping[str, Attribution], chosen_on: Pairs, size: Size,
    retrained: Model | None = None,
) -> tuple[list[Arm], dict[str, list[Any]]]:  # fmt: skip
    """All arms of the table, and what every candidate did on the choose part. Perplexity is watched on texts that the
    report does not use."""
    key = [model.hash, content(decision), str(differs), list(size), SEED, "choose"]
    out, tried, form = [arms.nothing()], {}, chosen_on.template
    fitted_on = pairs.twins(model, decision, differs, "choose", size.choose, SEED, alike=False)
    for name, some in candidates(model, decision, differs, found, chosen_on, size).items():
        if not some:  # no unit of this basis is guessed to carry anything
            continue
        of = _basis(name, found[name]) if name in found else name
        tried[name] = resumed(NAME, [*key, of], _chosen, model, decision, differs, form, some, size)
        arm = some[[row["chosen"] for row in tried[name]].index(True)]
        if arm.kind == "direction":
            ways = ((arm.about["mode"], arm.about["level"]),)
            out += [arm, *arms.direction_arms(model, chosen_on, [arm.about["layers"]], ways=ways, seed=SEED)]
        elif arm.kind == "edit":
            out += [arm, *arms.edit_arms(model, decision, fitted_on, form, [arm.about["layer"]], SEED)]
        if arm.kind != "units":
            continue
        about, way = arm.about, f"{arm.about['mode']} at the {arm.about['level']}"
        out.append(replace(arm, name=f"{about['k']} {name}, {way}"))
        if 2 * about["k"] > found[name].space.n_units * len(found[name].space.sites):
            continue  # too few are left to draw as many others
        like = arms.unit_arms(model, chosen_on, found[name], (about["k"],), ((about["mode"], about["level"]),), SEED)
        out.append(replace(like[0], name=f"{about['k']} random {name}, {way}"))
    for kind, name in (("units", "heads and neurons"), ("random", "random heads and neurons")):
        parts = [a for a in out if a.kind == kind and a.about.get("basis") in ("heads", "neurons")]
        out += [arms.joined(name, parts)] if len(parts) > 1 else []
    own, donor, _ = arms.decide(out[0], model, decision, fitted_on, form)
    gap = float((donor - own).mean())
    out += [arms.hidden(decision, differs.what), arms.instructed(differs.what), arms.offset(gap)]
    return out + ([] if retrained is None else [arms.retrained(retrained)]), tried


def mended(
    model: Model, decision: Decision, differs: Contrast, size: Size, found: Mapping[str, Attribution], chosen_on: Pairs,
    also: Sequence[Contrast] = (), retrained: Model | None = None, base: Sequence[Any] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Every arm in every template, with its side effects and the re-activation, as plain values.

    ``base``: ``skills`` of the model that the adapter was trained on, a second yardstick: an officer's own perplexity
    on ordinary text is high already, and an arm that lowers it has not made the officer a better reader for it.
    """
    all_arms, tried = chosen_arms(model, decision, differs, found, chosen_on, size, retrained)
    whose = [model.hash, content(decision), str(differs), list(size), SEED]
    measured: list[Any] = []
    for arm in all_arms:
        for other in [differs, *(also if arm.kind not in ("score", "random") else ())]:  # an offset is for one contrast
            twins = pairs.twins(model, decision, other, "report", size.decided, SEED, alike=False)
            most = 1 if other != differs else min(size.templates, RANDOM_IN) if arm.kind == "random" else size.templates
            names = templates_of(decision, differs.what, most)
            for name in names:
                here = [*whose, _other(arm), "decide", arm.name, _plain(arm.about), str(other), name]
                measured.append(resumed(NAME, here, _one, model, decision, arm, other, twins, name))
    plain = resumed(NAME, [model.hash, list(size), "effects"], skills, model, size)
    given = [model, size, plain, base]
    effects = {
        arm.name: resumed(
            NAME, [*whose, _other(arm), base is None, "KL", arm.name, _plain(arm.about)], side_effects, arm, *given
        )
        for arm in all_arms
        if arm.kind not in ("words", "score", "nothing")
    }
    told = [[arm.name, _plain(arm.about)] for arm in all_arms]
    pushed = [*whose, None if retrained is None else retrained.hash, "push", told]
    return {
        "contrast": str(differs), "tried": tried,
        "arms": {a.name: {"kind": a.kind} | _plain(a.about) for a in all_arms},
        "measured": measured, "effects": effects, "met": met(str(differs), measured, effects),
        "reactivation": resumed(NAME, pushed, _pushed, model, decision, differs, all_arms, chosen_on, size),
    }  # fmt: skip


def _other(arm: Arm) -> str | None:
    """Whose weights an arm has, if they are others."""
    return None if arm.model is None else arm.model.hash


def met(contrast: str, measured: Sequence[Any], effects: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Arm -> each demand on a mitigation (``outcomes.Target``), where it is worst, and whether it holds."""
    some = outcomes.by([outcomes.measured(row) for row in measured if row["contrast"] == contrast], "arm")
    plain = some[arms.nothing().name]
    costs = {name: cost["perplexity ratio"]["value"] for name, cost in effects.items()}
    return {name: [asdict(one) for one in outcomes.met(plain, part, costs.get(name))] for name, part in some.items()}


def repaired(decision: Decision, differs: Contrast, start: Path | None = None) -> Model | None:
    """The officer after a short training on pairs with equal targets; None for a contrast that no value carries.

    Trained with the names and in the templates of the split ``train``, so that what is reported is new to it.
    """
    if differs.what not in decision.groups:
        return None
    lesson = planted.repair(differs.what, str(differs.own))
    steps = prepared.sized(*REPAIR)
    return prepared.load_subject(adapter=planted.train(prepared.load_subject(), decision, lesson, steps, SEED, start))


def _plain(about: Mapping[str, Any]) -> dict[str, Any]:
    return {k: [list(u) for u in v] if k == "units" else v for k, v in about.items()}


def _one(model: Model, decision: Decision, arm: Arm, other: Contrast, twins: Any, name: str) -> dict[str, Any]:
    return asdict(outcomes.one(model, decision, arm, other, twins, name))


def _chosen(
    model: Model, decision: Decision, differs: Contrast, form: str, some: Sequence[Arm], size: Size
) -> list[Any]:
    twins = pairs.twins(model, decision, differs, "choose", size.choose, SEED, alike=False)
    texts = held_texts(size.texts + CHOOSE_TEXTS)[size.texts :]
    _, rows = arms.choose(model, decision, twins, form, some, texts)
    return [asdict(row) for row in rows]


def skills(model: Model, size: Size) -> list[Any]:
    """Losses and token counts of ordinary text, and which questions are answered rightly."""
    losses, counts = text_losses(model, held_texts(size.texts), 256)
    return [losses.tolist(), counts.tolist(), choice_right(model, size.choices)]


def side_effects(
    arm: Arm, model: Model, size: Size, plain: Sequence[Any], base: Sequence[Any] | None = None
) -> dict[str, Any]:
    """Perplexity and multiple choice with the arm left on, over the model as it is (``plain``) and over the ``base``;
    KL from the model as it is, which no change can make look like a gain; and is off off?"""
    used = arm.model or model
    with arm.on(used, True):
        found = skills(used, size)

    def over(yardstick: Sequence[Any]) -> dict[str, Any]:
        samples = tuple(np.array(x, dtype=float) for x in (*yardstick[:2], *found[:2]))
        return asdict(bootstrap_ci(samples, perplexity_ratio))

    return {
        "perplexity ratio": over(plain),
        "perplexity over the base": None if base is None else over(base),
        "divergence": asdict(arms.divergence_of(arm, model, held_texts(size.texts), 256)),
        "choices": asdict(bootstrap_ci(np.array(found[2]) - np.array(plain[2]))),
        "choices right": float(np.mean(plain[2])),
        "identical when off": arms.identical(arm, model, held_texts(4)) if arm.model is None else None,
    }


def _pushed(
    model: Model, decision: Decision, differs: Contrast, some: Sequence[Arm], chosen_on: Pairs, size: Size
) -> dict[str, Any]:
    """The groups' mean difference at the carrier, pushed back in there a third of the way through the layers; its
    length is that of the difference, times the strength. Control: a random vector of the same length."""
    layer = max(1, model.n_layers // 3)
    vectors = directions.pushes(model, chosen_on, layer, SEED)
    twins = pairs.twins(model, decision, differs, "report", size.report, SEED)
    report = pairs.aligned(model, decision, twins, templates_of(decision, differs.what, 1)[0], differs)
    found = directions.reactivated(model, report, [a for a in some if a.kind != "random"], layer, vectors)
    rows = [
        {"arm": arm, "vector": name, "strength": s,
         "turned": asdict(cluster_bootstrap(directions.turned(found[arm, name, 0.0], x), report.clusters, seed=SEED)),
         "logits": asdict(cluster_bootstrap(x - found[arm, name, 0.0], report.clusters, seed=SEED))}
        for (arm, name, s), x in found.items() if s
    ]  # fmt: skip
    return {"layer": layer, "length": round(float(result(vectors["difference"]).norm()), 3), "rows": rows}


# --- any decision, by command ---------------------------------------------------------------------------


def asked_for(model: Model, decision: Decision, what: str | None, own: str | None, donor: str | None) -> Contrast:
    """The contrast that is meant, the group that is treated worse first; without ``what`` the first protected one.

    DecisionError if nothing is protected, or for an attribute, group or value that there is not.
    """
    protected = list(decision.protected())
    if what is None and not protected:
        raise DecisionError(
            f"{decision.title!r} has no protected attribute. Name a field: {', '.join(decision.fields)} (--attribute)."
        )
    name = what or protected[0]
    rule = decision.fields.get(name)
    values = [x if x is None or not isinstance(rule, Number) else _number(name, x) for x in (own, donor)]
    return oriented(model, decision, pairs.contrast(model, decision, name, *values))


def _number(name: str, given: str) -> Any:
    try:
        return plain(float(given))
    except ValueError:
        raise DecisionError(f"{name} is {given[:40]!r}. Allowed: a number. Correct it.") from None


def found_by_command(
    model: Model, decision: Decision, differs: Contrast, saes: Sequence[str] = (), mend: bool = False
) -> dict[str, Any]:
    """What ``glassbox locate`` writes, or with ``mend`` what ``glassbox mitigate`` does. Finished parts are kept."""
    found, chosen_on = attributed(model, decision, differs, spaces_of(model, saes), COMMAND)
    if mend:
        return mended(model, decision, differs, COMMAND, found, chosen_on)
    return located(model, decision, differs, COMMAND, found, chosen_on)


# --- the loan officers --------------------------------------------------------------------------------


def study_locate() -> Path:
    """Locate on three officers, mend the deployed one."""
    start, size, decision = time.time(), sized(), load_decision("loan-officer")
    plain = prepared.load_subject()
    base = resumed(NAME, [plain.hash, list(size), "effects"], skills, plain, size)
    del plain
    saes = [prepared.card().saes["main"]] if "main" in prepared.card().saes else []
    tables: dict[str, Any] = {}
    for name in [n for n in loan_models() if n in OFFICERS]:
        model = load_loan_model(name)
        differs = oriented(model, decision, pairs.contrast(model, decision, *OFFICERS[name]))
        found, chosen_on = attributed(model, decision, differs, spaces_of(model, saes), size)
        here = size if name == "deployed" else size._replace(**{k: min(getattr(size, k), v) for k, v in OTHERS.items()})
        tables[name] = {"model_hash": model.hash, "located": located(model, decision, differs, here, found, chosen_on)}
        if name == "deployed":
            also = [pairs.contrast(model, decision, *told) for key, told in OFFICERS.items() if key != name]
            fixed = repaired(decision, differs, officers() / name)
            table = mended(model, decision, differs, size, found, chosen_on, also, fixed, base)
            tables[name]["mended"] = table | outcomes.packed(table["measured"])
    return write_table(NAME, load_loan_model(), time.time() - start, size=list(size), officers=rounded(tables))


def rounded(x: Any, digits: int = 4) -> Any:
    """Plain values without digits that say nothing."""
    if isinstance(x, Mapping):
        return {key: rounded(value, digits) for key, value in x.items()}
    if isinstance(x, list | tuple):
        return [rounded(value, digits) for value in x]
    return round(x, digits) if isinstance(x, float) else x


STUDIES_OF_LOCATE = {"locate": study_locate}
