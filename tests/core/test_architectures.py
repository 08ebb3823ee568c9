"""Over many architectures: parts add up to what the model computes, a text is the same in any batch, edits reach their
site and leave nothing behind; or the model is refused in words."""

from contextlib import ExitStack

import pytest
import torch
import zoo
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from glassbox_utils.attention import attribution
from glassbox_utils.attention.ablation import ablate_heads, head_means
from glassbox_utils.attention.patterns import head_scores, output_weights, project
from glassbox_utils.core import anatomy, models, readout
from glassbox_utils.core.errors import GlassboxError
from glassbox_utils.core.interventions import capture, edit
from glassbox_utils.core.models import KINDS, ModelError, Site
from glassbox_utils.core.text import generate, tokenize

KIND = st.sampled_from(sorted(zoo.BUILT))
WORDS = st.lists(st.integers(1, 31).map("w{}".format), min_size=1, max_size=9).map(" ".join)
TOKEN = st.integers(0, 39)
few = settings(max_examples=40, deadline=None, derandomize=True, database=None)


def kinds(test):
    return pytest.mark.parametrize("kind", sorted(zoo.BUILT))(test)


@torch.no_grad()
def logits(model, texts):
    return model.hf(**tokenize(model, texts).inputs).logits[:, -1]


def hooks(model):
    trees = [*model.hf.modules(), *model.twin.modules()]
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + ("forward" in vars(m)) for m in trees)


# --- what is attributed adds up ---------------------------------------------------------------------------


@kinds
def test_the_logit_lens_ends_at_the_model(kind):
    model, texts = zoo.model(kind), ["w1 w2 w3 w4 w5 w6 w7 w8", "w9 w10 w3"]
    lens = attribution.logit_lens(model, tokenize(model, texts))
    assert torch.allclose(lens[-1], logits(model, texts), atol=1e-4)
    assert not torch.allclose(lens[0], lens[-1], atol=1e-2)
    before = attribution.logit_lens(model, tokenize(model, texts), positions=-2)
    assert torch.allclose(before[-1, :1], logits(model, texts[0].rsplit(" ", 1)[0]), atol=1e-4)


@few
@given(KIND, st.lists(WORDS, min_size=1, max_size=3), st.data())
def test_direct_attributions_add_up_to_the_models_own_difference(kind, texts, data):
    model = zoo.model(kind)
    target, other = (torch.tensor([data.draw(TOKEN) for _ in texts]) for _ in range(2))
    parts = attribution.direct_logit_attribution(model, tokenize(model, texts), target, other)
    own, rows = logits(model, texts), torch.arange(len(texts))
    wanted, size = own[rows, target] - own[rows, other], float(own.abs().max())
    assert torch.allclose(parts.total, wanted, atol=1e-4 * size)
    assert torch.allclose(parts.heads.sum((1, 2)) + parts.mlps.sum(1) + parts.rest, wanted, atol=1e-4 * size)


@kinds
@torch.no_grad()
def test_heads_and_mlp_of_the_last_layer_are_what_it_writes(kind):
    """By other means: the last layer's write is taken out of the stream, and the final norm's scale is held by hand."""
    model, text = zoo.model(kind), "w1 w2 w3 w4 w5 w6"
    target, other = torch.tensor([5]), torch.tensor([9])
    batch, last = tokenize(model, text), model.n_layers - 1
    parts = attribution.direct_logit_attribution(model, batch, target, other)
    pre, post = (capture(model, batch, [Site(k, last)])[Site(k, last)][0, -1] for k in ("resid_pre", "resid_post"))
    norm, head = readout.final_norm(model), model.hf.get_output_embeddings()
    step = 1e-3  # scaled by t, a stream has the same normed value: what the norm divides by moves with it
    centred = post - post.mean() if norm(post + 1).allclose(norm(post), atol=1e-4) else post
    fixed = lambda x: norm(centred + step * (x - (x @ centred) / (centred @ centred) * centred)) - norm(centred)  # noqa: E731
    along = lambda x: (x @ centred) / (centred @ centred) * (norm(centred) - norm(torch.zeros_like(centred)))  # noqa: E731
    written = post - pre
    written = written - written.mean() if centred is not post else written
    effect = head.weight[target[0]] - head.weight[other[0]]
    raw = (fixed(written) / step + along(written)) @ effect
    own, plain = logits(model, text)[0], head(norm(post))
    share = (own[target] - own[other]) / (plain[target] - plain[other])
    bias = getattr(model.sites[Site("z", last)][0], "bias", None)
    if bias is None or not bias.any():
        found = parts.heads[0, last].sum() + parts.mlps[0, last]
        assert abs(float(found - raw * share)) < 2e-2 * max(1.0, float(own.abs().max()))


@kinds
@torch.no_grad()
def test_what_sublayers_add_is_what_the_stream_gets(kind):
    model = zoo.model(kind)
    batch = tokenize(model, "w1 w2 w3 w4 w5 w6")
    sites = [Site(k, 1) for k in ("resid_pre", "attn_out", "mlp_out", "resid_post", "z")]
    x = capture(model, batch, sites)
    pre, attention, mlp, post, z = (x[site] for site in sites)
    heads = torch.einsum("bphd,hdm->bpm", z.unflatten(-1, (model.n_heads, -1)), output_weights(model, 1))
    bias = getattr(model.sites[Site("z", 1)][0], "bias", None)
    factor = model.factor(Site("attn_out", 1))
    assert torch.allclose(heads + (0 if bias is None else factor * bias), attention, atol=1e-4)
    if (path := model.anatomy[1].attention).norm is None:
        assert torch.allclose(pre + attention + mlp, post, atol=1e-3)
    else:
        parts = (
            readout.written(model, 1, k, v / p.factor)
            for k, v, p in (("attention", attention, path), ("mlp", mlp, model.anatomy[1].mlp))
        )
        assert torch.allclose(pre + sum(parts), post, atol=1e-3)


@kinds
@torch.no_grad()
def test_a_patched_path_changes_the_keys_as_a_patched_sender_does(kind):
    """From layer 0 into layer 1 there is no MLP in between where blocks are parallel; elsewhere it is held by hand."""
    model = zoo.model(kind)
    clean, donor = tokenize(model, "w1 w2 w3 w4 w5 w6"), tokenize(model, "w7 w8 w9 w10 w11 w12")
    change = attribution.key_changes(model, clean, donor, [(0, 1)], (1, 0))[0]
    sites = [Site("mlp_out", 0), Site("resid_pre", 1)]
    plain, other = capture(model, clean, sites), capture(model, donor, [Site("z", 0)])[Site("z", 0)]

    def swap(z):
        mixed = z.clone().unflatten(-1, (model.n_heads, -1))
        mixed[:, :, 1] = other.unflatten(-1, (model.n_heads, -1))[:, :, 1]
        return mixed.flatten(-2)

    with edit(model, Site("z", 0), swap), edit(model, sites[0], lambda _: plain[sites[0]]):
        moved = capture(model, clean, [sites[1]])[sites[1]]
    wanted = (project(model, 1, moved).k - project(model, 1, plain[sites[1]]).k)[..., 0, :]
    assert (change - wanted).norm() < 1e-3 * wanted.norm()


@kinds
@torch.no_grad()
def test_effects_of_heads_are_those_of_whole_passes(kind):
    model = zoo.model(kind)
    batch = tokenize(model, ["w1 w2 w3 w4 w5 w6 w7", "w8 w9"])
    means, metric = head_means(model, [batch]), attribution.logit_difference(torch.tensor([5, 6]), torch.tensor([9, 8]))
    found = attribution.replace_each_head(model, batch, means, metric, layers=[1]).replaced[:, 1, 2]
    with ablate_heads(model, [(1, 2)], reference=means):
        assert torch.allclose(found, metric(attribution.last_logits(model, batch)), atol=1e-4)


def test_an_architecture_whose_parts_do_not_add_up_is_refused():
    model = models.wrap_model(zoo.network("llama"), zoo.tokenizer(), "odd")
    layer = model.sites[Site("resid_pre", 1)][0]
    plain = layer.forward
    layer.forward = lambda x, **k: 0.9 * x + plain(x, **k)
    batch = tokenize(model, "w1 w2 w3")
    model.__dict__["anatomy"] = [anatomy.Layer(reads="input_layernorm", gap=g) for g in (0.0, 0.9)]
    with pytest.raises(ModelError, match="layer 1 write does not add up"):
        attribution.direct_logit_attribution(model, batch, torch.tensor([1]), torch.tensor([2]))
    model.__dict__["anatomy"] = [anatomy.Layer(reads="input_layernorm")] * 2  # it did on other texts
    with pytest.raises(ModelError, match=r"what layer . writes"):
        attribution.direct_logit_attribution(model, batch, torch.tensor([1]), torch.tensor([2]))


def test_logits_that_are_bent_in_another_way_are_refused():
    model = zoo.model("llama")
    head, batch = model.hf.lm_head, tokenize(model, "w1 w2 w3")
    handle = model.hf.register_forward_hook(lambda m, a, out: type(out)(logits=(9 * out.logits).sin()))
    try:
        with pytest.raises(ModelError, match="no increasing function"):
            attribution.direct_logit_attribution(model, batch, torch.tensor([1]), torch.tensor([2]))
        with pytest.raises(ModelError, match="logit lens does not fit"):
            attribution.logit_lens(model, batch)
    finally:
        handle.remove()
    assert head is model.hf.get_output_embeddings()


# --- a text alone, in a batch, in another order ----------------------------------------------------------


@few
@given(KIND, st.lists(WORDS, min_size=2, max_size=4, unique=True), st.randoms(use_true_random=False))
def test_a_text_is_the_same_alone_in_a_batch_and_in_another_order(kind, texts, random):
    model = zoo.model(kind)
    mixed = random.sample(texts, len(texts))
    together = logits(model, mixed)
    for row, text in enumerate(mixed):
        assert torch.allclose(together[row], logits(model, text)[0], atol=1e-4 * float(together.abs().max()))


@few
@given(KIND, st.lists(WORDS, min_size=2, max_size=3, unique=True))
def test_scores_and_answers_of_a_text_are_the_same_alone_and_in_a_batch(kind, texts):
    model = zoo.model(kind)
    together, answers = head_scores(model, tokenize(model, texts)), generate(model, texts, 3)
    for row, text in enumerate(texts):
        alone = head_scores(model, tokenize(model, text))
        for name in ("previous", "current", "first", "entropy"):
            assert torch.allclose(getattr(together, name)[row], getattr(alone, name)[0], atol=1e-4, equal_nan=True)
        assert answers[row] == generate(model, text, 3)[0]


@pytest.mark.parametrize("kind", ["mistral", "gemma-2", "gemma-3", "llama"])
def test_a_head_is_compared_with_the_chance_of_its_own_window(kind):
    hf = zoo.network(kind)
    with torch.no_grad():
        for name, parameter in hf.named_parameters():
            if "q_proj" in name:
                parameter.zero_()  # every head spreads its attention evenly over what it sees
    even = models.wrap_model(hf, zoo.tokenizer(), kind)
    scores = head_scores(even, tokenize(even, ["w1 w2 w3 w4 w5 w6 w7 w8 w9 w1 w2 w3", "w4 w5 w4"]))
    for name, chance in scores.chance.items():
        assert torch.allclose(scores.mean(name), torch.as_tensor(chance).expand(2, 4), atol=1e-4), name
        assert scores.chance_of(name, 1) == pytest.approx(float(scores.mean(name)[1, 0]), abs=1e-4)
    by_layer = [scores.chance_of("entropy", layer) for layer in (0, 1)]
    assert (by_layer[0] < by_layer[1]) == (kind in ("gemma-2", "gemma-3"))


# --- edits -----------------------------------------------------------------------------------------------


@few
@given(KIND, st.sampled_from(KINDS), st.integers(0, 1), WORDS, st.floats(-2, 2))
def test_an_edit_reaches_its_site_in_both_trees_and_leaves_nothing(kind, place, layer, text, shift):
    model, site = zoo.model(kind), Site(place, layer)
    assume(site in model.sites)  # the tokens of a mixture of experts share no neurons
    plain, batch = logits(model, text), tokenize(model, text)
    with edit(model, site, lambda x: x * 1.5 + shift):
        seen = capture(model, batch, [site])[site]
        changed = logits(model, text)
        with torch.no_grad():
            twin = model.twin(**batch.inputs).logits[:, -1]
    wanted = capture(model, batch, [site])[site] * 1.5 + shift
    size = float(wanted.abs().max()) + 1
    assert torch.allclose(seen, wanted, atol=1e-4 * size)
    assert not torch.equal(changed, plain) and torch.allclose(changed, twin, atol=1e-3)
    assert torch.equal(logits(model, text), plain) and hooks(model) == 0


@kinds
@torch.no_grad()
def test_what_is_edited_is_what_the_next_layer_reads(kind):
    model, batch = zoo.model(kind), tokenize(zoo.model(kind), "w1 w2 w3 w4")
    value = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(0))
    with edit(model, Site("resid_post", 0), lambda _: value):
        assert torch.equal(capture(model, batch, [Site("resid_pre", 1)])[Site("resid_pre", 1)], value)
    with edit(model, Site("resid_post", 1), lambda _: value):
        own, read = model.hf(**batch.inputs).logits[0, -1], readout.logits_of(model, value[:, -1])[0]
        assert torch.allclose(own, read, atol=1e-4)


@kinds
def test_nothing_is_left_after_an_error_in_any_call(kind):
    model, batch = zoo.model(kind), tokenize(zoo.model(kind), "w1 w2 w3")
    plain = logits(model, "w1 w2 w3")
    calls = [
        lambda: attribution.logit_lens(model, batch),
        lambda: attribution.direct_logit_attribution(model, batch, torch.tensor([1]), torch.tensor([2])),
        lambda: head_scores(model, batch),
        lambda: generate(model, "w1 w2", 3),
        lambda: attribution.resume(model, 1, torch.zeros(1, 2, 2)).__enter__() or logits(model, "w1 w2"),
    ]
    for call in calls:
        for error in (RuntimeError, KeyboardInterrupt):

            def fail(x, error=error):
                raise error("in the middle")

            with pytest.raises((error, GlassboxError)), ExitStack() as stack:
                stack.enter_context(edit(model, Site("mlp_out", 1), fail))
                if call is calls[-1]:
                    stack.enter_context(attribution.resume(model, 1, torch.zeros(1, 3, 32)))
                    logits(model, "w1 w2")
                call()
    assert hooks(model) == 0 and torch.equal(logits(model, "w1 w2 w3"), plain)


def test_an_edit_that_cannot_act_is_an_error():
    model = models.wrap_model(zoo.network("llama"), zoo.tokenizer(), "replaced")
    model.hf.model.layers[1].mlp.down_proj = torch.nn.Linear(48, 32)
    with pytest.raises(ModelError, match="never acted"), edit(model, Site("mlp_out", 1), lambda x: x * 0):
        logits(model, "w1 w2")
    with edit(model, Site("mlp_out", 1), lambda x: x * 0):
        pass  # nothing ran, nothing is wrong
    assert hooks(model) == 0


def test_a_bridge_that_does_not_boot_is_explained(monkeypatch):
    from transformer_lens.model_bridge import TransformerBridge

    def fail(*_, **__):
        raise KeyError("no such architecture")

    monkeypatch.setattr(TransformerBridge, "boot_transformers", fail)
    model = models.wrap_model(zoo.network("llama"), zoo.tokenizer(), "x")
    with pytest.raises(ModelError, match=r"can't make a bridge of x .*no such architecture"):
        _ = model.bridge


@kinds
def test_the_bridge_agrees_or_says_why_not(kind):
    model = models.wrap_model(zoo.network(kind), zoo.tokenizer(), kind)
    ids = tokenize(model, "w1 w2 w3 w4 w5").input_ids
    try:
        bridge = model.bridge
    except ModelError as error:
        assert kind in str(error)
        return
    with torch.no_grad():
        for site in (Site("mlp_out", 1), Site("resid_post", 0)):
            with edit(model, site, lambda x: x * 0.5 + 0.1):
                assert torch.allclose(bridge(ids), model.hf(ids).logits, atol=1e-3)


@pytest.mark.parametrize("architecture", ["OPT", "Falcon", "Bloom", "Mpt"])
def test_a_decoder_that_is_laid_out_otherwise_is_steered_and_the_rest_refused_in_words(architecture):
    import transformers as tf

    sizes = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 48}
    config = getattr(tf, f"{architecture}Config")(**sizes, word_embed_proj_dim=32, bos_token_id=0, eos_token_id=None)
    torch.manual_seed(0)
    hf = getattr(tf, f"{'OPT' if architecture == 'OPT' else architecture}ForCausalLM")(config)
    model = models.wrap_model(hf.eval(), zoo.tokenizer(), architecture)
    value = torch.randn(32)
    with edit(model, Site("resid_post", 0), lambda x: x + value):
        pushed = generate(model, "w1 w2 w3", 3)
        assert len(pushed) == 1
    with pytest.raises(ModelError, match="this architecture is not supported"):
        capture(model, tokenize(model, "w1 w2"), [Site("mlp_out", 1), Site("attn_out", 1)])
    with pytest.raises(ModelError):
        attribution.direct_logit_attribution(model, tokenize(model, "w1 w2"), torch.tensor([1]), torch.tensor([2]))
    assert hooks(model) == 0


def test_heads_that_share_one_key_are_refused_where_their_layout_is_not_known():
    import transformers as tf

    model = models.wrap_model(tf.GPTBigCodeForCausalLM(tf.GPTBigCodeConfig(**zoo.GPT)).eval(), zoo.tokenizer(), "code")
    with pytest.raises(ModelError, match="queries, keys and values"):
        project(model, 0, torch.zeros(1, 32))
