"""Attribution against brute force: what is fast must equal what is obvious."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from wired import INDUCTION, PREVIOUS, tokenizer, wired_gpt2

from glassbox_utils.attention import attribution
from glassbox_utils.attention.ablation import ablate_heads, head_means
from glassbox_utils.attention.patterns import induction_targets, output_weights, over_patterns, project, repeated_tokens
from glassbox_utils.core.interventions import capture, edit, patch
from glassbox_utils.core.models import ModelError, Site, wrap_model
from glassbox_utils.core.text import Batch, tokenize


def _gpt2():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=32, n_positions=64, n_embd=32, n_layer=3, n_head=4, bos_token_id=0, eos_token_id=0)
    return wrap_model(GPT2LMHeadModel(config), tokenizer(), "tiny-gpt2")


def _llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.2,
    )  # fmt: skip
    return wrap_model(LlamaForCausalLM(config), tokenizer(), "tiny-llama")


@pytest.fixture(scope="module", params=[_gpt2, _llama], ids=["gpt2", "llama-gqa"])
def model(request):
    return request.param()


@pytest.fixture(scope="module")
def pair(model):
    clean = tokenize(model, ["w1 w2 w3 w4 w5", "w6 w7 w8 w9 w10", "w11 w12 w13 w14 w15"])
    other = tokenize(model, ["w1 w20 w3 w4 w5", "w6 w21 w8 w9 w10", "w11 w22 w13 w14 w15"])
    metric = attribution.logit_difference(torch.tensor([1, 2, 3]), torch.tensor([4, 5, 6]))
    return clean, other, metric


@torch.no_grad()
def test_direct_attribution_adds_up(model, pair):
    clean, _, metric = pair
    parts = attribution.direct_logit_attribution(model, clean, torch.tensor([1, 2, 3]), torch.tensor([4, 5, 6]))
    assert torch.allclose(parts.total, metric(model.hf(**clean._asdict()).logits[:, -1]), atol=1e-4)
    assert parts.heads.shape == (3, 3, 4) and parts.mlps.shape == (3, 3)
    # what is left over is the embedding (and GPT-2's biases, which are zero at initialisation)
    embedded = capture(model, clean, [Site("resid_pre", 0)])[Site("resid_pre", 0)][:, -1]
    final = capture(model, clean, [Site("resid_post", 2)])[Site("resid_post", 2)][:, -1]
    share = attribution._final_norm(model)(final)
    unembed = model.hf.get_output_embeddings().weight
    direction = unembed[[1, 2, 3]] - unembed[[4, 5, 6]]
    if isinstance(attribution._final_norm(model), torch.nn.LayerNorm):
        centred = embedded - embedded.mean(-1, keepdim=True)
        scale = (share / (final - final.mean(-1, keepdim=True))).mean(-1)
    else:
        centred, scale = embedded, (share / final).mean(-1)
    assert torch.allclose(parts.rest, (centred * direction).sum(-1) * scale, atol=1e-3)


@torch.no_grad()
def test_logit_lens_ends_at_the_model(model, pair):
    lens = attribution.logit_lens(model, pair[0])
    assert lens.shape == (3, 3, 32)
    assert torch.allclose(lens[-1], model.hf(**pair[0]._asdict()).logits[:, -1], atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("positions", [None, -1, [2, 3]])
def test_every_patched_head_equals_a_full_pass(model, pair, positions):
    clean, other, metric = pair
    effects = attribution.replace_each_head(model, clean, other, metric, positions=positions)
    for layer in range(3):
        source = capture(model, other, [Site("z", layer)])
        for head in range(4):
            with patch(model, source, heads=[(layer, head)], positions=positions):
                brute = metric(model.hf(**clean._asdict()).logits[:, -1])
            assert torch.allclose(effects.replaced[:, layer, head], brute, atol=1e-4)
    assert effects.effect.abs().max() > 0


@torch.no_grad()
def test_every_ablated_head_equals_a_full_pass(model, pair):
    clean, other, metric = pair
    means = head_means(model, [other])
    effects = attribution.replace_each_head(model, clean, means, metric, layers=[1])
    for head in range(4):
        with ablate_heads(model, [(1, head)], reference=means):
            brute = metric(model.hf(**clean._asdict()).logits[:, -1])
        assert torch.allclose(effects.replaced[:, 1, head], brute, atol=1e-4)
    assert (effects.effect[:, [0, 2]] == 0).all()


def test_attribution_patching_is_the_derivative(model, pair):
    """Towards a donor that is a small step away, the first-order guess becomes exact."""
    clean, other, metric = pair
    guess = attribution.attribution_patching(model, clean, other, metric)
    exact = attribution.replace_each_head(model, clean, other, metric).effect
    assert guess.shape == exact.shape
    means = head_means(model, [clean])
    step = 1e-3
    for layer, head in [(0, 1), (2, 3)]:
        one = attribution.attribution_patching(model, clean, means, metric)[:, layer, head]

        def nudge(z, layer=layer, head=head):
            z = z.unflatten(-1, (4, -1)).clone()
            z[:, :, head] += step * (means.z[layer, head] - z[:, :, head])
            return z.flatten(-2)

        with torch.no_grad():
            base = metric(model.hf(**clean._asdict()).logits[:, -1])
            with edit(model, Site("z", layer), nudge):
                moved = metric(model.hf(**clean._asdict()).logits[:, -1])
        assert torch.allclose((moved - base) / step, one, atol=2e-2 * float(one.abs().max()) + 2e-3)


@torch.no_grad()
def test_resume_is_exact_and_leaves_nothing(model, pair):
    clean = pair[0]
    full = model.hf(**clean._asdict()).logits
    resid = capture(model, clean, [Site("resid_pre", 2)])[Site("resid_pre", 2)]
    with pytest.raises(RuntimeError, match="stop"), attribution.resume(model, 2, resid):
        assert torch.allclose(model.hf(**clean._asdict(), use_cache=False).logits, full, atol=1e-5)
        raise RuntimeError("stop")
    assert torch.equal(model.hf(**clean._asdict()).logits, full)


@torch.no_grad()
def test_key_changes_are_what_the_keys_become(model, pair):
    """Adding the change of the path to the keys equals recomputing keys from the edited residual stream."""
    clean, other, _ = pair
    change = attribution.key_changes(model, clean, other, [(0, 1), (1, 2)], (2, 3))
    assert change.shape == (2, 3, clean.input_ids.shape[1], model.d_head)
    resid = capture(model, clean, [Site("resid_pre", 2)])[Site("resid_pre", 2)]
    z = capture(model, clean, [Site("z", 0)])[Site("z", 0)].unflatten(-1, (4, -1))[:, :, 1]
    z2 = capture(model, other, [Site("z", 0)])[Site("z", 0)].unflatten(-1, (4, -1))[:, :, 1]
    edited = resid + (z2 - z) @ output_weights(model, 0)[1]
    group = 3 * project(model, 2, resid).k.shape[-2] // 4
    expected = (project(model, 2, edited).k - project(model, 2, resid).k)[..., group, :]
    assert torch.allclose(change[0], expected, atol=1e-5)
    with pytest.raises(ModelError, match="senders must be in layers 0 to 1"):
        attribution.key_changes(model, clean, other, [(2, 0)], (2, 3))


@torch.no_grad()
def test_key_patching_changes_only_the_keys_of_one_group(model, pair):
    clean = pair[0]
    patterns = over_patterns(model, clean, lambda p, _: p)
    change = torch.randn(3, clean.input_ids.shape[1], model.d_head)
    n_kv = project(model, 1, torch.zeros(1, model.d_model)).k.shape[-2]
    with attribution.add_to_keys(model, 1, n_kv - 1, change):
        edited = over_patterns(model, clean, lambda p, _: p)
    moved = (edited - patterns).abs().amax((0, 3, 4))[1] > 1e-6
    size = 4 // n_kv
    assert moved.tolist() == [False] * (4 - size) + [True] * size
    assert torch.allclose(over_patterns(model, clean, lambda p, _: p), patterns, atol=1e-6)


def test_path_patching_finds_the_wired_pair():
    """Cutting 0.1 off from the keys of 1.3 stops the induction; cutting any other head off does nothing."""
    model = wired_gpt2()
    clean = repeated_tokens(model, 8, length=12, seed=1)
    donor = repeated_tokens(model, 8, length=12, seed=2)
    targets = induction_targets(clean)

    def score(pattern):
        return (pattern * targets).sum((1, 2)) / targets.any(-1).sum(1)

    senders = [(0, h) for h in range(4)]
    base, patched = attribution.path_patch_keys(model, clean, donor, senders, INDUCTION, score, rows=16)
    lost = (base - patched).mean(1)
    assert base.min() > 0.95
    assert lost[PREVIOUS[1]] > 0.8
    assert torch.cat([lost[: PREVIOUS[1]], lost[PREVIOUS[1] + 1 :]]).abs().max() < 0.01


def test_patches_of_other_shapes_are_refused(model, pair):
    shorter = Batch(*(t[:, :-1] for t in pair[0]))
    with pytest.raises(ModelError, match="Pair prompts of equal length"):
        attribution.replace_each_head(model, pair[0], shorter, pair[2])
