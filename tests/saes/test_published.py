"""SAEs that others published go through features, clamp and quality with sae_lens's own numbers at run time."""

import json
import warnings

import pytest
import torch
import worded
from sae_lens import SAE, JumpReLUSAE, JumpReLUSAEConfig, StandardSAE, StandardSAEConfig
from worded import PROMPTS

from glassbox_utils.core import coding
from glassbox_utils.core.corpora import Document, token_rows
from glassbox_utils.core.devices import result
from glassbox_utils.core.interventions import edit
from glassbox_utils.core.models import Site
from glassbox_utils.core.text import tokenize
from glassbox_utils.saes import clamping, features, quality, reading, store
from glassbox_utils.saes.config import SaeError, hook_of, width_of
from glassbox_utils.saes.store import load_sae

D_SAE, FACTOR = 40, 1.7
KINDS = {
    "jumprelu": ("resid_post", {}),
    "jumprelu, scaled": ("resid_post", {"normalize_activations": "expected_average_only_in"}),
    "standard": ("mlp_out", {}),
    "standard, scaled": ("resid_pre", {"normalize_activations": "expected_average_only_in"}),
    "standard, layer_norm": ("resid_post", {"normalize_activations": "layer_norm"}),
    "standard, constant norm": ("resid_post", {"normalize_activations": "constant_norm_rescale"}),
    "standard, no bias at the input": ("attn_out", {"apply_b_dec_to_input": False}),
    "hook_z": ("z", {"reshape_activations": "hook_z"}),
    "jumprelu of z": ("z", {"reshape_activations": "hook_z"}),
}


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def model(request):
    return worded.build(request.param)


@pytest.fixture(autouse=True)
def known_words(monkeypatch):
    words = [(" ".join(PROMPTS * 3), "", "")] * 40  # all that this tokenizer knows
    monkeypatch.setattr(reading.corpora, "landmark_passages", lambda n: words)


def published(model, kind, folder, site=None, **metadata):
    """A folder as others write it: no hash of a model or of the weights, no median norm."""
    torch.manual_seed(1)
    site = site or Site(KINDS[kind][0], 1)
    width = width_of(model, site)
    jump = kind.startswith("jumprelu")
    make, config = (JumpReLUSAE, JumpReLUSAEConfig) if jump else (StandardSAE, StandardSAEConfig)
    sae = make(config(d_in=width, d_sae=D_SAE, **KINDS[kind][1]))
    with torch.no_grad():
        sae.W_dec.copy_(torch.randn(D_SAE, width) * (0.3 + torch.rand(D_SAE, 1)))
        sae.W_enc.copy_(torch.randn(width, D_SAE) * 0.3)
        sae.b_enc.copy_(0.1 * torch.randn(D_SAE))
        sae.b_dec.copy_(0.1 * torch.randn(width))
        if jump:
            sae.threshold.copy_(0.2 + 0.3 * torch.rand(D_SAE))
    meta = sae.cfg.metadata
    meta.hook_name, meta.model_name = hook_of(site), "somebody's"
    for name, value in metadata.items():
        meta[name] = value
    sae.save_model(folder)
    if sae.cfg.normalize_activations == "expected_average_only_in":
        (folder / store.SCALER).write_text(json.dumps({"scaling_factor": FACTOR, "has_whitening": False}))
    return site


def theirs(folder):
    """sae_lens's own SAE as its users run it: its scale folded in, heads apart."""
    sae = SAE.load_from_disk(folder, dtype="float32").eval().requires_grad_(False)
    if sae.cfg.normalize_activations == "expected_average_only_in":
        sae.fold_activation_norm_scaling_factor(FACTOR)
    return sae


def at(model, site, texts=PROMPTS):
    """What stands at a site, by a hook of our own."""
    batch, seen = tokenize(model, list(texts)), []
    with torch.no_grad(), edit(model, site, lambda x: seen.append(result(x)) or x):
        model.hf(**batch.inputs)
    return seen[0]


def apart(model, site, x):
    """z as TransformerLens has it: [..., head, d_head]."""
    return x.unflatten(-1, (model.n_heads, model.d_head)) if site.kind == "z" else x


def together(site, x):
    return x.flatten(-2) if site.kind == "z" else x


@pytest.mark.parametrize("kind", KINDS)
def test_features_clamp_and_quality_are_sae_lenss(model, kind, tmp_path):
    site = published(model, kind, tmp_path)
    with pytest.warns(UserWarning, match="does not say which weights"):
        ours = load_sae(tmp_path, model)
    assert ours.cfg.metadata.model_hash == model.hash
    assert ours.cfg.metadata.median_norm == reading.measured_median(model, site)
    reference, x = theirs(tmp_path), at(model, site)
    code = reference.encode(apart(model, site, x)).nan_to_num()
    assert 0 < (code > 0).float().mean() < 1
    torch.testing.assert_close(coding.encode(ours, x), code, atol=1e-4, rtol=1e-4)

    # features: every activation of a scan
    ours.cfg.metadata.median_norm = 1e6
    rows = token_rows(model, [Document(" ".join(PROMPTS * 6), "s", "l")], context=16)
    scanned, seen = features.scan(model, ours, rows, [Document("", "s", "l")]), []
    with torch.no_grad(), edit(model, site, lambda y: seen.append(result(y)) or y):
        model.hf(rows.tokens)
    y = torch.cat(seen)
    want, raw = reference.encode(apart(model, site, y)), reference(apart(model, site, y))
    for one in range(0, D_SAE, 7):
        got = features.dense(scanned, one)[:, 1:]
        torch.testing.assert_close(got, want[:, 1:, one], atol=1e-4, rtol=1e-4)

    # clamp: what decoding the changed code says, in the stream's own units
    one, target = int(code.amax((0, 1)).argmax()), 2.5
    moved = code.clone()
    moved[..., one] = target
    decoded = []
    for c in (code, moved):
        reference.encode(apart(model, site, x))  # the norms that decode uses
        decoded.append(together(site, reference.decode(c)))
    with clamping.clamp(model, clamping.feature(model, ours, one, 1.0), target):
        after = at(model, site)
    some = x.norm(dim=-1) > 0
    torch.testing.assert_close(after[some], (x + decoded[1] - decoded[0])[some], atol=1e-3, rtol=1e-3)

    # quality: what it rebuilds
    mean = y[:, 1:].flatten(0, 1).mean(0)
    report = quality.evaluate_sae(model, ours, rows.tokens, site, 1e6, mean, ce_rows=1)
    error = (together(site, raw) - y)[:, 1:].square().sum() / (y - mean)[:, 1:].square().sum()
    assert report.explained_variance == pytest.approx(1 - float(error), abs=1e-4)
    assert report.l0 == pytest.approx(float((want[:, 1:] > 0).float().sum(-1).mean()), rel=1e-5)


def test_a_scale_that_is_not_stored_is_measured(model, tmp_path):
    site = published(model, "standard, scaled", tmp_path, context_size=16)
    (tmp_path / store.SCALER).unlink()
    with pytest.raises(SaeError, match=r"scale is not stored.*gb\.load_sae\(NAME, MODEL\) measures"):
        load_sae(tmp_path)
    with pytest.warns(UserWarning, match="expects inputs scaled by its training text"):
        ours = load_sae(tmp_path, model)
    factor = width_of(model, site) ** 0.5 / float(reading.norms_at(model, site, 16).mean())
    reference, x = SAE.load_from_disk(tmp_path, dtype="float32"), at(model, site)
    torch.testing.assert_close(coding.encode(ours, x), reference.encode(x * factor), atol=1e-4, rtol=1e-4)
    for wrong in (0, -1, "2", float("inf"), True):
        (tmp_path / store.SCALER).write_text(json.dumps({"scaling_factor": wrong}))
        with pytest.raises(SaeError, match="scaling_factor is"):
            load_sae(tmp_path, model)


def test_centred_writing_weights_are_minded(tmp_path):
    """What GPT-2's releases declare: TransformerLens took the mean over the width out of the stream."""
    model = worded.build("gpt2")
    declared = {"model_from_pretrained_kwargs": {"center_writing_weights": True}}
    site = published(model, "standard", tmp_path, Site("resid_post", 1), model_hash=model.hash, **declared)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = load_sae(tmp_path, model)
    x = at(model, site)
    centred = x - x.mean(-1, keepdim=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reference = theirs(tmp_path)
    want = reference.encode(centred)
    torch.testing.assert_close(coding.encode(ours, x), want, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(coding.encode(ours, x), reference.encode(x), atol=1e-3)
    one = int(want.amax((0, 1)).argmax())
    with clamping.clamp(model, clamping.feature(model, ours, one, 1.0), 2.0):
        after = at(model, site)
    torch.testing.assert_close(after, x + (2.0 - want[..., one, None]) * reference.W_dec[one], atol=1e-3, rtol=1e-3)
    # the same model with and without the mean: LayerNorm takes no notice
    plain = worded.logits(model)
    with edit(model, site, lambda h: h - h.mean(-1, keepdim=True)):
        torch.testing.assert_close(worded.logits(model), plain, atol=1e-3, rtol=1e-3)
    rows = tokenize(model, ["w1 w2 w3 w4"]).input_ids
    y, mean = at(model, site, ["w1 w2 w3 w4"])[:, 1:], torch.zeros(model.d_model)
    y = y - y.mean(-1, keepdim=True)
    report = quality.evaluate_sae(model, ours, rows, site, 1e6, mean, 1)
    error = (reference(y) - y).square().sum() / y.square().sum()
    assert report.explained_variance == pytest.approx(1 - float(error), abs=1e-4)


@pytest.mark.parametrize("scaled", [False, True])
def test_a_release_is_fetched_by_its_id(tmp_path, monkeypatch, scaled):
    """``release/sae_id`` as ``SAE.from_pretrained`` takes it; the hub is a folder here."""
    from huggingface_hub.utils import EntryNotFoundError
    from sae_lens.loading import pretrained_sae_loaders, pretrained_saes_directory

    model = worded.build("gpt2")
    kind = "jumprelu, scaled" if scaled else "standard"
    known = pretrained_saes_directory.PretrainedSAELookup(
        release="a-release", repo_id="somebody/saes", model="tiny", conversion_func=None, saes_map={"l1/res": "one"},
        expected_var_explained={}, expected_l0={}, neuronpedia_id={}, config_overrides=None,
        norm_scaling_factor={"l1/res": FACTOR} if scaled else {},
    )  # fmt: skip
    site = published(model, kind, tmp_path / "one")
    reference = theirs(tmp_path / "one")
    (tmp_path / "one" / store.SCALER).unlink(missing_ok=True)  # the list of releases has the factor

    def download(repo_id, filename, **_):
        if not (tmp_path / filename).exists():
            raise EntryNotFoundError(filename)
        return str(tmp_path / filename)

    monkeypatch.setitem(pretrained_saes_directory.get_pretrained_saes_directory(), "a-release", known)
    monkeypatch.setattr(pretrained_sae_loaders, "hf_hub_download", download)
    with pytest.warns(UserWarning, match="a-release/l1/res does not say which weights"):
        ours = load_sae("a-release/l1/res", model)
    x = at(model, site)
    torch.testing.assert_close(coding.encode(ours, x), reference.encode(x), atol=1e-4, rtol=1e-4)
    with pytest.raises(SaeError, match=r"SAE l9/res of the release a-release can't be fetched.*ids of a release"):
        load_sae("a-release/l9/res", model)
    if not scaled:  # a bare repository names no factor
        assert torch.equal(load_sae("somebody/saes/one").W_dec, ours.W_dec)


def test_without_a_network_the_message_says_what_to_do():
    with pytest.raises(SaeError, match=r"There is no SAE 'no-release/here'.*release of sae_lens"):
        load_sae("no-release/here")
    with pytest.raises(SaeError, match=r"can't be fetched.*fetch the folder elsewhere"):
        load_sae("gpt2-small-res-jb/blocks.99.hook_resid_pre")
