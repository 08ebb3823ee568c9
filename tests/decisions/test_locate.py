"""Pairs, units and the curve: on a planted llama whose units are known, and on random models of three architectures."""

import ast
import importlib
from dataclasses import replace
from pathlib import Path

import planted
import pytest
import tiny
import torch
from refusals import refused
from transformers import AutoTokenizer

from glassbox_utils.core.interventions import capture
from glassbox_utils.core.models import Site, embedded_folder, wrap_model
from glassbox_utils.core.text import tokenize
from glassbox_utils.decisions import locate, pairs, scoring, units
from glassbox_utils.decisions.fields import Text
from glassbox_utils.decisions.locate import Condition, Put
from glassbox_utils.decisions.reading import load_decision

LOAN, HIRING, GERMAN = (load_decision(name) for name in ("loan-officer", "hiring", "german-credit"))


@pytest.fixture(scope="module")
def clans(tmp_path_factory):
    return planted.decision(tmp_path_factory.mktemp("decisions") / "planted")


@pytest.fixture(scope="module")
def model():
    return planted.model()


def halves(model, decision, what="clan", n=24):
    """Pairs to choose on and pairs to report on, in two templates."""
    differs = pairs.contrast(model, decision, what)
    names = pairs.choosing_templates(decision, what)[0], list(decision.templates)[-1]
    parts = zip(("choose", "report"), names, strict=True)
    return [pairs.aligned(model, decision, pairs.twins(model, decision, differs, p, n), t, differs) for p, t in parts]


def spaces(model):
    return {"heads": units.heads(model), "neurons": units.neurons(model)}


def untouched(model):
    modules = [*model.hf.modules(), *model.twin.modules()]
    return not any(m._forward_hooks or m._forward_pre_hooks for m in modules)


# --- pairs --------------------------------------------------------------------------------------------


def test_no_name_and_no_case_is_in_both_parts(model, clans):
    choose, report = halves(model, clans)
    names = [
        {t[side]["person"] for t in map(vars, some.twins) for side in ("own", "donor")} for some in (choose, report)
    ]
    assert len(names[0]) == len(names[1]) == 6 and not names[0] & names[1]
    assert not {t.own.id for t in choose.twins} & {t.own.id for t in report.twins}
    assert len(set(report.clusters)) == 3 and report.dropped == 0
    for t in report.twins:
        assert {k for k in t.own.values if t.own[k] != t.donor[k]} == {"person"} and t.own.outcome is None


def test_prompts_differ_at_the_carrier_alone(model, clans):
    _, report = halves(model, clans)
    for some in pairs.rows(model, report, 5):
        differ = some.own.input_ids != some.donor.input_ids
        assert torch.equal(differ, some.places["carrier"]) and some.places["decision"][:, -1].all()
        assert torch.equal(
            some.places["all"], some.places["carrier"] | some.places["between"] | some.places["decision"]
        )
        assert not (some.places["all"] & ~some.own.attention_mask.bool()).any()


@pytest.mark.parametrize("decision", [LOAN, HIRING, GERMAN], ids=lambda d: d.name)
def test_every_attribute_and_merit_field_of_the_decisions_that_ship_has_pairs(decision):
    words = AutoTokenizer.from_pretrained(embedded_folder())
    model = wrap_model(tiny.network("llama", len(words), 2, positions=512), words, "random")
    first = next(iter(decision.protected()))
    some = [pairs.contrast(model, decision, first), *pairs.contrasts(model, decision, first)]
    assert {c.what for c in some} >= set(decision.groups)
    for differs in some:
        twins = pairs.twins(model, decision, differs, "report", 30)
        for template in (next(iter(decision.templates)), list(decision.templates)[-1]):
            found = pairs.aligned(model, decision, twins, template, differs)
            assert len(found) + found.dropped == len(twins) and len(found) > 5, (differs, template)
            held = [i for i, h in zip(found.own[0], found.carrier[0], strict=True) if h]
            (name,) = {k for k in found.twins[0].own.values if found.twins[0].own[k] != found.twins[0].donor[k]}
            assert str(found.twins[0].own[name]) in words.decode(held)


def test_a_chats_carrier_is_found_behind_its_system_prompt():
    model = wrap_model(tiny.network("llama", len(tiny.tokenizer()), positions=1024), tiny.tokenizer(), "random")
    differs = pairs.contrast(model, HIRING, "gender")
    found = pairs.aligned(model, HIRING, pairs.twins(model, HIRING, differs, "report", 12), "chat", differs)
    for twins, ids, held in zip(found.twins, found.own, found.carrier, strict=True):
        words = model.tokenizer.decode([i for i, h in zip(ids, held, strict=True) if h])
        assert str(twins.own[HIRING.carriers[0].field]) in words


def test_what_is_no_pair_is_refused_in_words(model, clans):
    assert "no attribute or field 'clam'" in refused(lambda: pairs.contrast(model, clans, "clam"))
    assert "Allowed: first, second" in refused(lambda: pairs.contrast(model, clans, "clan", "third"))
    assert "Give two values" in refused(lambda: pairs.contrast(model, clans, "clan", "second", "second"))
    bare = replace(clans, fields={**clans.fields, "note": Text("other")})
    assert "which two values of 'note'" in refused(lambda: pairs.contrast(model, bare, "note"))
    differs = pairs.contrast(model, clans, "clan")
    assert "no part 'train'" in refused(lambda: pairs.twins(model, clans, differs, "train", 4))
    assert "no template 'back'" in refused(
        lambda: pairs.aligned(model, clans, pairs.twins(model, clans, differs, "report", 4), "back", differs)
    )


# --- units --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_units_are_read_and_moved_alone(kind):
    model = wrap_model(tiny.build(kind), tiny.tokenizer(), kind)
    batch = tokenize(model, ["The doctor asked", "A nurse came in"])
    put = torch.tensor([[7.0], [8.0]], device=model.device)
    for space, site in ((units.heads(model), Site("z", 1)), (units.neurons(model), Site("mlp_post", 1))):
        before = capture(model, batch, [site])[site]
        where = torch.zeros(batch.input_ids.shape, dtype=torch.bool)
        where[:, -1] = True
        with units.moved(model, space, [(1, 2), (1, 0)], lambda _, v: v * 0 + put, where):
            after = capture(model, batch, [site])[site]
        values = units.read(space, after)
        assert (values[:, -1, 2] == 7).all() and (values[:, -1, 0] == 8).all()
        same = units.read(space, before)
        assert torch.equal(values[:, :-1], same[:, :-1]) and torch.equal(values[:, -1, 3:], same[:, -1, 3:])
        assert torch.equal(capture(model, batch, [site])[site], before) and untouched(model)
        assert units.sizes(model, space).shape == (3, space.n_units)


def test_the_planted_units_are_ranked_first(model, clans):
    choose, _ = halves(model, clans)
    found = units.attribute(model, choose, spaces(model), batch_size=7)
    assert set(units.ranked(found["neurons"], 2)) == {planted.READER, planted.WRITER}
    assert units.ranked(found["heads"], 1) == [planted.MOVER]
    at = found["neurons"].effect[:, [0, 2], [planted.READER[1], planted.WRITER[1]]]
    assert at.abs().argmax(0).tolist() == [0, 2]  # the reader at the carrier, the writer at the decision
    for name, one in found.items():
        assert one.gap == pytest.approx(float(locate.gap_of(model, choose).mean()), rel=1e-4), name
    assert untouched(model)


def test_control_units_are_others_of_like_activity(model, clans):
    choose, _ = halves(model, clans)
    found = units.attribute(model, choose, {"neurons": units.neurons(model)})["neurons"]
    found = units.Attribution(found.space, found.effect, torch.arange(72.0).view(3, 24), found.gap)
    chosen = [(1, 3), (1, 4), (2, 0)]
    drawn = [units.alike(found, chosen, seed) for seed in range(20)]
    assert all(len(set(d)) == 3 and not set(d) & set(chosen) for d in drawn) and len(set(map(tuple, drawn))) > 5
    assert abs(units.activity_of(found, [unit for d in drawn for unit in d]) - units.activity_of(found, chosen)) < 8
    assert "no 72 others" in refused(lambda: units.alike(found, [(a, b) for a in range(3) for b in range(24)], 0))
    assert "no unit (0, 24) among the neurons" in refused(lambda: units.check_units(found.space, [(0, 24)]))


def test_the_control_of_the_loudest_units_is_the_loudest_of_the_others(model, clans):
    """270 heads of which three are far louder than the rest: what is drawn comes from the next, not from the middle."""
    choose, _ = halves(model, clans)
    found = units.attribute(model, choose, {"neurons": units.neurons(model)})["neurons"]
    loud = torch.arange(72.0).view(3, 24)
    loud[2, 21:] *= 10
    found = units.Attribution(found.space, found.effect, loud, found.gap)
    drawn = [units.alike(found, [(2, 21), (2, 22), (2, 23)], seed) for seed in range(10)]
    assert min(units.activity_of(found, some) for some in drawn) > 60


def test_one_direction_may_be_taken_and_all_else_stays(model, clans):
    _, report = halves(model, clans)
    stream, axis = units.stream(model, [1]), torch.zeros(model.d_model)
    axis[0] = 1.0
    own, whole, none = (Condition("own", (Put(stream, [(1, 0)], axis=a),)) for a in (axis, None, axis * 0))
    scores = locate.patched(model, report, [Condition("own"), own, whole, none])
    assert torch.allclose(scores[0], scores[3]) and not torch.allclose(scores[0], scores[2])
    assert not torch.allclose(scores[1], scores[2]) and untouched(model)


@pytest.mark.parametrize("alike", [True, False])
def test_lists_without_a_split_are_halved_before_they_are_matched(alike):
    """Who is matched with whom depends on tokens, on ``alike`` and on who is own; who is in which half must not."""
    template, seen = load_decision("template"), {}
    words = wrap_model(tiny.network("llama", len(tiny.tokenizer()), positions=1024), tiny.tokenizer(), "random")
    for own, donor in (("female", "male"), ("male", "female")):
        differs = pairs.Contrast("gender", own, donor)
        for part in ("choose", "report"):
            some = pairs.twins(words, template, differs, part, 40, alike=alike)
            seen.setdefault(part, set()).update(getattr(t, s)["customer"] for t in some for s in ("own", "donor"))
    assert seen["choose"] and seen["report"] and not seen["choose"] & seen["report"]


# --- the curve ----------------------------------------------------------------------------------------


def test_the_planted_units_carry_the_gap_and_others_do_not(model, clans):
    choose, report = halves(model, clans)
    points, gap = locate.curve(model, report, units.attribute(model, choose, spaces(model)), ks=(1, 2), draws=3)
    assert float(gap.mean()) > 1 and untouched(model)
    for p in points:
        assert p.carried.low > 0.9 and p.left.high < 0.1 and p.template == "behind" and p.carried.n == 3
        assert max(map(abs, p.random_carried)) < 0.05 and min(p.random_left) > 0.95
    assert {locate.k_for([p for p in points if p.basis == b]) for b in ("heads", "neurons")} == {1.0}


def test_the_control_carries_as_much_where_many_units_share_the_work(clans):
    model = planted.model(writers=20)
    choose, report = halves(model, clans)
    found = units.attribute(model, choose, {"neurons": units.neurons(model)})
    writers = [u for u in units.ranked(found["neurons"], 21) if u[0] == planted.WRITER[0]]
    assert len(writers) == 20
    only = {
        "neurons": units.Attribution(*(getattr(found["neurons"], k) for k in ("space", "effect", "activity", "gap")))
    }
    only["neurons"].effect[:, :2] = 0  # the reader alone would do
    (point,), _ = locate.curve(model, report, only, ks=(4,), draws=5)
    assert 0.02 < point.carried.value < 0.5 and max(point.random_carried) > point.carried.value / 2


def test_all_heads_carry_everything_and_the_same_prompt_nothing(clans):
    for kind in tiny.KINDS:
        model = deciding(kind)
        differs = pairs.contrast(model, HIRING, "gender")
        some = pairs.aligned(model, HIRING, pairs.twins(model, HIRING, differs, "report", 10), "slashes", differs)
        space, neurons = units.heads(model), units.neurons(model)
        every = [(layer, h) for layer in range(model.n_layers) for h in range(model.n_heads)]
        wide = [(layer, i) for layer in range(model.n_layers) for i in range(neurons.n_units)]
        own, donor, heads, kept, none, both, left = locate.patched(
            model, some,
            [
                Condition("own"), Condition("donor"), Condition("own", (Put(space, every),)),
                Condition("donor", (Put(space, every, "own"),)), Condition("own", (Put(space, every, "own"),)),
                Condition("own", (Put(space, every), Put(neurons, wide))),
                Condition("donor", (Put(neurons, wide, "donor"),)),
            ],
            batch_size=4,
        )  # fmt: skip
        assert (donor - own).abs().max() > 1e-3
        for found, wanted in ((heads, donor), (kept, own), (none, own), (both, donor), (left, donor)):
            assert torch.allclose(found, wanted, atol=2e-4), kind
        assert untouched(model)


def deciding(kind):
    """A random model that answers with the two words only."""
    hf = tiny.network(kind, len(tiny.tokenizer()), positions=512, sharpen=3)
    model = wrap_model(hf, tiny.tokenizer(), kind)
    keep = list(scoring.answer_tokens(model, HIRING, scoring.prompts(model, HIRING, HIRING.cases[:1], "line")[0]))
    head = torch.nn.Linear(model.d_model, hf.config.vocab_size)
    with torch.no_grad():
        head.bias.fill_(-1e4)
        head.bias[keep] = 0.0
    hf.lm_head = head.to(model.device)
    return model


def test_units_of_an_sae_leave_its_error_alone(model, clans):
    from sae_lens import StandardSAE, StandardSAEConfig

    _, report = halves(model, clans)
    sae = StandardSAE(StandardSAEConfig(d_in=64, d_sae=20))
    with torch.no_grad():
        sae.W_enc.normal_(0, 0.3)
        sae.W_dec.normal_(0, 0.3)
        sae.W_enc[:, 5] = sae.W_dec[5] = torch.eye(64)[planted.GROUP]  # the feature of the group
        sae.W_enc[planted.GROUP] *= torch.arange(20) == 5
    meta = sae.cfg.metadata
    meta.hook_name, meta.model_hash, meta.model_name = "blocks.0.hook_resid_post", model.hash, model.name
    meta.median_norm = 1.0
    space = units.features(model, sae)
    found = units.attribute(model, report, {"features": space})["features"]
    assert units.ranked(found, 1) == [(0, 5)]
    points, _ = locate.curve(model, report, {"features": found}, ks=(1,), draws=2)
    assert points[0].carried.low > 0.9 and points[0].left.high < 0.1
    site, batch = Site("resid_post", 0), next(pairs.rows(model, report)).own
    x = capture(model, batch, [site])[site]
    same = units.changed(space, x, [5, 6], lambda v: v)
    assert torch.equal(same, x)
    assert units.explained(model, report, space) < 1
    meta.model_hash = "another"
    assert "was trained on planted" in refused(lambda: units.features(model, sae))
    assert units.features(model, sae, foreign=True).sites == space.sites
    meta.hook_name = "blocks.0.mlp.hook_post"
    assert "reads 64 numbers, mlp_post of planted has 24" in refused(lambda: units.features(model, sae, foreign=True))


def test_a_gap_that_is_not_there_is_refused(clans):
    model = planted.model(bias=0.0, noise=0.0)
    with torch.no_grad():
        model.hf.model.layers[0].mlp.down_proj.weight[:, planted.READER[1]] = 0
    choose, report = halves(model, clans)
    found = units.attribute(model, choose, {"heads": units.heads(model)})
    words = refused(lambda: locate.curve(model, report, found, ks=(1,), draws=1))
    assert "no gap to locate" in words and "clan: first / second" in words


def test_k_is_read_off_between_two_points():
    def point(k, carried):
        whole = locate.Interval(carried, carried, carried, 3)
        return locate.Point("neurons", "t", k, whole, whole, (), (), 1.0)

    some = [point(1, 0.2), point(10, 0.6), point(100, 1.0)]
    assert locate.k_for(some) == pytest.approx(10 * 10**0.5) and locate.k_for(some[:2]) is None
    assert locate.k_for(some, 0.1) == 1.0 and locate.k_for([]) is None


# --- specificity and chain ----------------------------------------------------------------------------


def test_what_carries_the_merit_too_is_called_so(model, clans):
    choose, _ = halves(model, clans)
    found = units.attribute(model, choose, spaces(model))["neurons"]
    other = halves(model, clans, "skill")[1]
    every = [(layer, i) for layer in range(3) for i in range(24)]
    own = {"located": (*locate.located(found, 2), 1.0), "every": (found.space, every, 1.0)}
    located, whole = locate.specificity(model, [other], own)
    assert located.verdict == "specific" and abs(located.carried.value) < 0.1 and located.effect.excludes(0)
    assert whole.verdict == "not specific" and whole.carried.value > 0.9
    assert located.what == "skill: w24 / w25" and located.effect.n == len(other)
    assert locate.verdict(None, 1.0) == "not tested"
    assert locate.verdict(locate.Interval(0.4, 0.1, 0.7, 9), 1.0) == "undecided"


def test_the_chain_goes_from_the_name_over_the_head_to_the_end(model, clans):
    choose, report = halves(model, clans)
    found = units.attribute(model, choose, spaces(model))
    parts = {"heads": locate.located(found["heads"], 1), "neurons": locate.located(found["neurons"], 2)}
    links = locate.chain(model, report, units.stream(model), parts)
    at = {(x.what, x.layer, x.place, x.frozen): x.carried.value for x in links}
    assert at["stream", 0, "carrier", None] > 0.9 and at["stream", 0, "decision", None] < 0.1
    assert at["stream", 1, "carrier", None] < 0.1 and at["stream", 1, "decision", None] > 0.9
    assert at["heads", None, "decision", None] > 0.9 and abs(at["heads", None, "carrier", None]) < 0.1
    assert at["neurons", None, "carrier", None] > 0.9
    assert at["neurons", None, "carrier", "heads at decision"] < 0.1  # through the head, and no other way
    assert at["neurons", None, "carrier", "heads at between"] > 0.9
    assert locate.sites_between(model, 2) == [0, 2]


def test_no_module_knows_a_field_or_a_group():
    known = {name for d in (LOAN, HIRING, GERMAN) for name in [*d.fields, *d.groups]}
    for module in ("pairs", "units", "locate", "arms", "outcomes", "locate_figures"):
        tree = ast.parse(Path(importlib.import_module(f"glassbox_utils.decisions.{module}").__file__).read_text())
        strings = {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
        assert not strings & known
