"""The fast forward pass computes what the plain one computes, on every architecture, and leaves the model alone."""

import copy

import pytest
import tiny
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from glassbox_utils.core import caches, fast_forward
from glassbox_utils.core.errors import GlassboxError
from glassbox_utils.core.models import load_model


@pytest.mark.parametrize("length", [1, 63, 64, 65, 200])
@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_block_attention_is_causal_attention(length, kv_heads):
    torch.manual_seed(0)
    query = torch.randn(3, 6, length, 16)
    key, value = torch.randn(2, 3, kv_heads, length, 16)
    expected = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(fast_forward.block_attention(query, key, value, 0.3), expected.transpose(1, 2))


@pytest.mark.parametrize("kv_heads", [1, 2, 6])
@pytest.mark.parametrize("kind", ["none", "boolean", "added"])
def test_the_attention_of_one_new_token_is_attention(kv_heads, kind):
    torch.manual_seed(0)
    query, (key, value) = torch.randn(3, 6, 1, 16), torch.randn(2, 3, kv_heads, 9, 16)
    seen = torch.ones(3, 1, 1, 12).bool()  # a mask may be longer than what there is
    seen[1, ..., :4] = False
    mask = {"none": None, "boolean": seen, "added": torch.zeros(seen.shape).masked_fill(~seen, -1e9)}[kind]
    given = None if mask is None else mask[..., :9]
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=given, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(fast_forward.step_attention(query, key, value, mask, 0.3), expected.transpose(1, 2))


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_text_is_written_by_the_quick_model_as_by_the_plain_one_in_its_type(tmp_path, kind):
    model = load_model(tiny.save(kind, tmp_path))
    fast = fast_forward.quick(model, torch.bfloat16)
    tokens = torch.randint(2, 200, (3, 20), generator=torch.Generator().manual_seed(0)).to(model.device)
    mask = torch.ones_like(tokens)
    mask[1, :5] = 0
    at = (mask.cumsum(-1) - 1).clamp_min(0)
    with torch.no_grad():
        exact = model.hf(tokens, attention_mask=mask, position_ids=at).logits[:, -1]
        first = {"attention_mask": mask[:, :-1], "position_ids": at[:, :-1], "use_cache": True}
        past = caches.left_by(fast.hf(tokens[:, :-1], **first))
        last = {"attention_mask": mask, "position_ids": at[:, -1:], **caches.handed(fast.hf, past)}
        ours = fast.hf(tokens[:, -1:], **last).logits[:, -1].float()
    assert (ours - exact).norm() / exact.norm() < 0.1


@pytest.mark.parametrize("kind", tiny.KINDS)
@pytest.mark.parametrize("padded", [False, True])
def test_the_quick_model_is_as_near_as_bfloat16_is(tmp_path, kind, padded):
    model = load_model(tiny.save(kind, tmp_path))
    before = {name: p.clone() for name, p in model.hf.named_parameters()}
    fast, plain = (
        fast_forward.quick(model, torch.bfloat16),
        AutoModelForCausalLM.from_pretrained(tmp_path).to(model.device),
    )
    tokens = torch.randint(2, 200, (4, 100), generator=torch.Generator().manual_seed(0)).to(model.device)
    mask = torch.ones_like(tokens)
    if padded:
        mask[1, :30] = 0
    with torch.no_grad():
        exact = model.hf(tokens, attention_mask=mask).logits
        ours = fast.hf(tokens, attention_mask=mask).logits.float()
        usual = plain.bfloat16()(tokens, attention_mask=mask).logits.float()
    seen = mask.bool()
    error, allowed = ((x - exact)[seen].norm() / exact[seen].norm() for x in (ours, usual))
    assert error < 1.2 * allowed < 0.1
    assert all(torch.equal(before[name], p) for name, p in model.hf.named_parameters())
    assert model.hf.config._attn_implementation == "sdpa" and fast_forward.quick(model, torch.float32) is model


class Made(TorchDispatchMode):
    """Collects types and sizes of the tensors that are made, not of views of others."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        inputs = {x.untyped_storage().data_ptr() for x in args if isinstance(x, torch.Tensor)}
        if isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() not in inputs:
            self.sizes[out.dtype] = max(out.numel(), self.sizes.get(out.dtype, 0))
        return out


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_no_second_copy_in_the_old_type_is_made(tmp_path, kind, has_storage):
    """The peak is the model and its copy: 8B parameters of float32 need 48 GB, not 80."""
    model, made = load_model(tiny.save(kind, tmp_path)), Made()
    made.sizes = {}
    with made:
        fast = fast_forward.quick(model, torch.float16)
    assert made.sizes[torch.float16] == max(p.numel() for p in model.hf.parameters())
    assert made.sizes.get(torch.float32, 0) <= 16  # the values that the hash looks at
    assert {t.dtype for t in [*fast.hf.parameters(), *fast.hf.buffers()] if t.is_floating_point()} == {torch.float16}
    tied = [m.hf.get_output_embeddings().weight is m.hf.get_input_embeddings().weight for m in (model, fast)]
    assert tied[0] == tied[1] == (kind != "llama")
    usual = copy.deepcopy(model.hf).to(torch.float16).state_dict()
    found = fast.hf.state_dict()
    assert found.keys() == usual.keys() and all(torch.equal(found[name], usual[name]) for name in usual)


def test_only_plain_gated_layers_are_replaced(tmp_path):
    for kind, replaced in {"llama": True, "gemma3": False, "gpt2": False}.items():
        fast = fast_forward.quick(load_model(tiny.save(kind, tmp_path / kind)), torch.bfloat16)
        own = [module for module in fast.hf.modules() if "forward" in vars(module)]
        assert bool(own) == (replaced and fast.device.type == "cpu"), kind


def test_the_type_can_be_set_and_a_wrong_one_is_named(monkeypatch):
    monkeypatch.setenv("GLASSBOX_DTYPE", "float16")
    fast_forward.fast_dtype.cache_clear()
    with pytest.raises(GlassboxError, match=r"GLASSBOX_DTYPE is 'float16'\. Allowed: float32, bfloat16"):
        fast_forward.fast_dtype()
    monkeypatch.setenv("GLASSBOX_DTYPE", "bfloat16")
    assert fast_forward.fast_dtype() == torch.bfloat16
    fast_forward.fast_dtype.cache_clear()


def test_each_device_is_measured_on_itself_and_once(monkeypatch):
    monkeypatch.delenv("GLASSBOX_DTYPE", raising=False)
    measured = []
    monkeypatch.setattr(fast_forward, "_seconds", lambda product, device: measured.append(device) or len(measured))
    fast_forward.fast_dtype.cache_clear()
    for name in ("meta", "meta", "cpu"):
        fast_forward.fast_dtype(torch.device(name))
    assert measured == [torch.device("meta")] * 10 + [torch.device("cpu")] * 10
    fast_forward.fast_dtype.cache_clear()
