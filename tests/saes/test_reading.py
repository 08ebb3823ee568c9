"""An SAE is read, and edits, where it says: at every kind of site, shaped, normalised and scaled as it declares."""

import warnings

import pytest
import torch
import worded
from sae_lens import StandardSAE, StandardSAEConfig, TopKSAE, TopKSAEConfig
from sae_lens.saes.transcoder import SkipTranscoder, SkipTranscoderConfig, Transcoder, TranscoderConfig
from worded import PROMPTS

from glassbox_utils.core.corpora import Document, token_rows
from glassbox_utils.core.devices import beside, result
from glassbox_utils.core.interventions import capture, edit
from glassbox_utils.core.models import KINDS, Site
from glassbox_utils.core.text import tokenize
from glassbox_utils.saes import clamping, detection, features, learning, quality, reading
from glassbox_utils.saes.clamping import ClampError
from glassbox_utils.saes.config import SaeError, hook_of, site_of, width_of
from glassbox_utils.saes.store import load_sae

D_SAE = 48
ALSO = {"resid_pre": "hook_in", "resid_post": "hook_out", "z": "attn.o.hook_in", "attn_out": "attn.hook_out"}


@pytest.fixture(scope="module", params=["llama", "gpt2", "gemma3"])
def model(request):
    return worded.build(request.param)


def random_sae(model, site, topk=False, seed=0, hook=None, **declared):
    torch.manual_seed(seed)
    width = width_of(model, site)
    make, config = (TopKSAE, TopKSAEConfig) if topk else (StandardSAE, StandardSAEConfig)
    sae = make(config(d_in=width, d_sae=D_SAE, **({"k": 6} if topk else {}), **declared))
    with torch.no_grad():
        sae.W_dec.copy_(torch.nn.functional.normalize(torch.randn(D_SAE, width), dim=-1))
        sae.W_enc.copy_(sae.W_dec.t())
        sae.b_enc.copy_(0.1 * torch.randn(D_SAE))
        sae.b_dec.copy_(0.1 * torch.randn(width))
    meta = sae.cfg.metadata
    meta.hook_name, meta.model_hash, meta.model_name = hook or hook_of(site), model.hash, model.name
    meta.median_norm = 1e6
    return sae.eval().requires_grad_(False)


def there(model, site, texts=PROMPTS):
    """What stands at a site, by a hook of our own."""
    batch, seen = tokenize(model, list(texts)), []
    with torch.no_grad(), edit(model, site, lambda x: seen.append(result(x)) or x):
        model.hf(**batch.inputs)
    return batch, seen[0]


@pytest.mark.parametrize("kind", KINDS)
def test_everything_reads_the_saes_own_hook(model, kind):
    site = Site(kind, 1)
    sae = random_sae(model, site)
    batch, x = there(model, site)
    code = sae.encode(x)
    torch.testing.assert_close(clamping.last_codes(model, sae, PROMPTS), code[:, -1], atol=1e-4, rtol=1e-4)
    mask = result(batch.attention_mask)
    real = mask.bool() & (mask.cumsum(-1) > 1)
    strongest = (code * real[..., None]).amax(1)
    torch.testing.assert_close(detection.text_scores(model, sae, PROMPTS), strongest, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(clamping.natural_maxima(model, sae, PROMPTS), strongest.amax(0), atol=1e-4, rtol=1e-4)
    rows = token_rows(model, [Document(" ".join(PROMPTS * 6), "s", "l")], context=16)
    scanned = features.scan(model, sae, rows, [Document("", "s", "l")])
    with torch.no_grad():
        packed = [[]]
        with edit(model, site, lambda y: packed[0].append(result(y)) or y):
            model.hf(beside(rows.tokens, model.device))
    want = sae.encode(torch.cat(packed[0]))
    one = int(want[:, 1:].amax((0, 1)).argmax())
    torch.testing.assert_close(features.dense(scanned, one)[:, 1:], want[:, 1:, one], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_clamp_edits_the_saes_own_hook_only(model, kind):
    site = Site(kind, 1)
    sae = random_sae(model, site, hook=f"blocks.1.{ALSO[kind]}" if kind in ALSO else None)
    one, (batch, x) = clamping.feature(model, sae, 5, 2.0), there(model, site)
    with clamping.clamp(model, one, 3.0):
        after = there(model, site)[1]
    want = x + (6.0 - sae.encode(x)[..., 5])[..., None] * sae.W_dec[5]
    torch.testing.assert_close(after, want, atol=1e-4, rtol=1e-4)
    if kind != "resid_pre":
        before = Site("resid_pre", 1)
        with clamping.clamp(model, one, 3.0):
            assert torch.equal(there(model, before)[1], there(model, before)[1])
    assert batch.input_ids.shape == x.shape[:2]


def test_texts_give_the_same_scores_alone_and_in_a_batch(model):
    """Also where positions are absolute: padding on the left must not move a text."""
    sae = random_sae(model, Site("resid_post", 1))
    alone = torch.cat([detection.text_scores(model, sae, [text]) for text in PROMPTS])
    torch.testing.assert_close(detection.text_scores(model, sae, PROMPTS), alone, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("kind", ["z", "mlp_out", "resid_pre"])
def test_learning_reads_and_holds_at_the_saes_own_hook(model, kind, monkeypatch):
    monkeypatch.setattr(learning, "QUIET", 0.7)
    site = Site(kind, 1)
    sae = random_sae(model, site, topk=True)
    given = learning.lessons(model, site, ["w1 w2", "w3"], [" w7 w8 w9"] * 2)
    assert given[0].resid.shape[-1] == width_of(model, site)
    torch.testing.assert_close(given[0].resid, capture(model, given[0].batch, [site])[site])
    group, _, loss = learning.learn_group(model, sae, given, n=4, steps=12, rate=0.2)
    with torch.no_grad(), clamping.clamp(model, group, 1.0):
        held = float(learning.taught_loss(model, given[0]))
    with torch.no_grad():
        assert held < float(learning.taught_loss(model, given[0])) and held == pytest.approx(loss[-1], rel=0.1)
    vector, _ = learning.learn_vector(model, site, given, steps=3)
    assert vector.shape == (width_of(model, site),)
    with pytest.raises(ClampError, match=r"lessons were read at blocks\.1\..*, asked for is blocks\.2"):
        learning.learn_vector(model, 2, given)


@pytest.mark.parametrize("declared", ["layer_norm", "constant_norm_rescale"])
def test_a_normalising_sae_writes_in_the_streams_own_units(model, declared):
    """Setting every feature to its value in the code of other activations is what decoding that code says."""
    site = Site("resid_post", 1)
    sae, (_, x) = random_sae(model, site, normalize_activations=declared), there(model, site)
    one = clamping.feature(model, sae, 7, 1.0)
    code = sae.encode(x)
    moved = code.clone()
    moved[..., 7] = 2.5
    sae.encode(x)  # the norms that decode uses
    base = sae.decode(code)
    sae.encode(x)
    want = x + sae.decode(moved) - base
    with clamping.clamp(model, one, 2.5):
        after = there(model, site)[1]
    some = x.norm(dim=-1) > 0
    torch.testing.assert_close(after[some], want[some], atol=1e-3, rtol=1e-3)
    assert torch.equal(after[~some], x[~some])
    assert detection.text_scores(model, sae, PROMPTS).isfinite().all()


def test_rows_of_any_length_that_the_sae_rescales(model):
    site = Site("resid_post", 1)
    sae, (_, x) = random_sae(model, site, topk=True, rescale_acts_by_decoder_norm=True), there(model, site)
    sae.W_dec *= 0.3 + torch.rand(D_SAE, 1)
    code = sae.encode(x)
    one = int(code.amax((0, 1)).argmax())
    with clamping.clamp(model, clamping.feature(model, sae, one, 1.0), 1.0, "ablate"):
        after = there(model, site)[1]
    without = code.clone()
    without[..., one] = 0
    torch.testing.assert_close(after, x + sae.decode(without) - sae.decode(code), atol=1e-3, rtol=1e-3)


def test_an_sae_that_takes_heads_apart_reads_the_same(model, tmp_path):
    site = Site("z", 1)
    plain, apart = (random_sae(model, site, reshape_activations=r) for r in ("none", "hook_z"))
    for call in (detection.text_scores, clamping.last_codes):
        torch.testing.assert_close(call(model, apart, PROMPTS), call(model, plain, PROMPTS))
    assert apart.hook_z_reshaping_mode, "the caller's own is not changed"
    heads = torch.randn(2, 3, model.n_heads, model.d_head)
    torch.testing.assert_close(apart(heads).flatten(-2), plain(heads.flatten(-2)))
    apart.save_model(tmp_path / "z")
    loaded, (_, x) = load_sae(tmp_path / "z", model), there(model, site)
    torch.testing.assert_close(loaded(x), plain(x))
    report = quality.evaluate_sae(
        model, apart, tokenize(model, ["w1 w2 w3 w4"]).input_ids, site, 1e6, torch.zeros(width_of(model, site)), 1
    )
    assert report.n_tokens == 4
    up = features.logit_effect(model, plain, 3, 2)
    assert len(up.up) == 2


def test_what_is_no_sae_of_one_place_is_refused(model, tmp_path):
    for make, config in ((Transcoder, TranscoderConfig), (SkipTranscoder, SkipTranscoderConfig)):
        tool = make(config(d_in=model.d_model, d_out=model.d_model, d_sae=D_SAE, apply_b_dec_to_input=False))
        tool.cfg.metadata.hook_name = "blocks.1.hook_resid_pre"
        for out in (None, "blocks.1.hook_mlp_out"):
            tool.cfg.metadata.hook_name_out = out
            tool.save_model(tmp_path / "tool")
            with pytest.raises(SaeError, match=r"transcoder that reads.*writes.*Allowed: sparse autoencoders"):
                load_sae(tmp_path / "tool", model)
            for call in (clamping.last_codes, detection.text_scores):
                with pytest.raises((SaeError, ClampError), match="transcoder"):
                    call(model, tool, PROMPTS)
    sae = random_sae(model, Site("resid_post", 1))
    sae.cfg.metadata.hook_name_out = "blocks.2.hook_resid_post"
    with pytest.raises(ClampError, match=r"writes blocks\.2"):
        clamping.feature(model, sae, 1, 1.0)
    sae = random_sae(model, Site("resid_post", 1), normalize_activations="expected_average_only_in")
    with pytest.raises(SaeError, match="scale is not stored"):
        detection.text_scores(model, sae, PROMPTS)


def test_what_others_do_not_store_is_measured_or_asked_for(model, tmp_path, monkeypatch):
    words = [(" ".join(PROMPTS * 3), "", "")] * 40  # all that this tokenizer knows
    monkeypatch.setattr(reading.corpora, "landmark_passages", lambda n: words)
    sae = random_sae(model, Site("mlp_out", 1))
    for name in ("median_norm", "model_hash", "model_name"):
        setattr(sae.cfg.metadata, name, None)
    sae.save_model(tmp_path / "foreign")
    with pytest.warns(UserWarning, match="does not say which weights"):
        loaded = load_sae(tmp_path / "foreign", model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_sae(tmp_path / "foreign")
    median = reading.median_norm(model, loaded)
    assert median == reading.measured_median(model, Site("mlp_out", 1)) > 0
    assert loaded.cfg.metadata.median_norm == median and loaded.cfg.metadata.model_hash == model.hash
    known = detection.text_scores(model, loaded, PROMPTS)
    loaded.cfg.metadata.median_norm = None
    assert torch.equal(detection.text_scores(model, loaded, PROMPTS), known)
    with clamping.clamp(model, clamping.feature(model, loaded, 3, 1.0), 2.0):
        worded.logits(model)
    for wrong in (0, -1.0, float("nan"), "1", True):
        loaded.cfg.metadata.median_norm = wrong
        with pytest.raises(SaeError, match="median_norm is"):
            detection.text_scores(model, loaded, PROMPTS)
    loaded.cfg.metadata.median_norm = loaded.cfg.metadata.hook_name = None
    with pytest.raises(SaeError, match=r"no hook_name\. Set it"):
        detection.text_scores(model, loaded, PROMPTS)


def test_an_sae_is_measured_at_its_own_place_only(model):
    sae, tokens = random_sae(model, Site("resid_pre", 1)), tokenize(model, ["w1 w2 w3 w4"]).input_ids
    with pytest.raises(SaeError, match=r"reads blocks\.1\.hook_resid_pre, .* measured at blocks\.1\.hook_resid_p"):
        quality.evaluate_sae(model, sae, tokens, Site("resid_post", 1), 1e6, torch.zeros(model.d_model))


def test_new_hook_names_are_the_old_places():
    for name in ("hook_in", "hook_out", "attn.o.hook_in", "attn.hook_out", "mlp.hook_out"):
        assert site_of(hook_of(site_of(f"blocks.3.{name}"))) == site_of(f"blocks.3.{name}")
    for wrong in ("blocks.3.hook_outs", "blocks.-1.hook_out", "blocks.x.hook_out", "hook_out", "", None, 3):
        with pytest.raises(SaeError, match="There is no hook"):
            site_of(wrong)
