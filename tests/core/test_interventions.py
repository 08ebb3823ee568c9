"""Interventions do what they say, nest, and leave nothing behind."""

import pytest
import tiny
import torch

from glassbox_utils.attention.ablation import ablate_heads, head_means
from glassbox_utils.core.interventions import capture, edit, patch
from glassbox_utils.core.models import ModelError, Site, load_model
from glassbox_utils.core.text import Batch, generate, tokenize

A, B = "The doctor asked the nurse to help him.", "The doctor asked the nurse to help her."


def logits(model, text=A):
    with torch.no_grad():
        return model.hf(**tokenize(model, text).inputs).logits


def hooks(model):
    modules = [*model.hf.modules(), *model.twin.modules()]
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules)


def z_of(model, head, text=A):
    layer, index = head
    z = capture(model, tokenize(model, text), [Site("z", layer)])[Site("z", layer)]
    return z.unflatten(-1, (model.n_heads, model.d_head))[:, :, index]


@pytest.mark.parametrize("mode", ["zero", "mean", "resample"])
def test_only_the_named_head_is_replaced(tiny_model, mode):
    batch = tokenize(tiny_model, A)
    means = head_means(tiny_model, [tokenize(tiny_model, [B, "The key is in the box."])])
    reference = {"zero": None, "mean": means, "resample": batch}[mode]
    if mode == "resample":
        reference = Batch(batch.input_ids.flip(-1), batch.attention_mask)
    untouched = z_of(tiny_model, (1, 2))
    with ablate_heads(tiny_model, [(1, 3)], mode, reference):
        replaced, kept = z_of(tiny_model, (1, 3)), z_of(tiny_model, (1, 2))
    assert torch.equal(kept, untouched)
    if mode == "zero":
        assert replaced.abs().max() == 0
    if mode == "mean":
        assert torch.allclose(replaced, means.z[1, 3].expand_as(replaced))
    if mode == "resample":
        expected = capture(tiny_model, reference, [Site("z", 1)])[Site("z", 1)]
        assert torch.allclose(replaced, expected.unflatten(-1, (6, -1))[:, :, 3], atol=1e-6)


def test_positions_limit_an_ablation(tiny_model):
    before = z_of(tiny_model, (0, 1))
    with ablate_heads(tiny_model, [(0, 1)], "zero", positions=-1):
        after = z_of(tiny_model, (0, 1))
    assert torch.equal(before[:, :-1], after[:, :-1]) and after[:, -1].abs().max() == 0


def test_each_row_can_have_its_own_position(tiny_llama):
    batch = tokenize(tiny_llama, [A, A])
    with ablate_heads(tiny_llama, [(0, 1)], "zero", positions=torch.tensor([2, 4])):
        z = capture(tiny_llama, batch, [Site("z", 0)])[Site("z", 0)].unflatten(-1, (6, -1))[:, :, 1]
    assert (z.abs().amax(-1) == 0).nonzero().tolist() == [[0, 2], [1, 4]]


def test_the_bridge_sees_an_ablation(tiny_model):
    batch = tokenize(tiny_model, A)
    with torch.no_grad(), ablate_heads(tiny_model, [(1, 0), (2, 5)], "zero"):
        assert (tiny_model.hf(**batch.inputs).logits - tiny_model.bridge(batch.input_ids)).abs().max() < 1e-3


def test_patching_everything_gives_the_other_run(tiny_model):
    target = tokenize(tiny_model, A)
    source = Batch(target.input_ids.flip(-1), target.attention_mask)
    last, head = Site("resid_post", 2), Site("z", 1)
    theirs = capture(tiny_model, source, [last, head])
    with patch(tiny_model, {last: theirs[last]}):
        patched = logits(tiny_model)
    with torch.no_grad():
        assert torch.allclose(patched, tiny_model.hf(**source.inputs).logits, atol=1e-5)
    with patch(tiny_model, {head: theirs[head]}, heads=[(1, 4)]):
        now, kept = z_of(tiny_model, (1, 4)), z_of(tiny_model, (1, 3))
    assert torch.allclose(now, theirs[head].unflatten(-1, (6, -1))[:, :, 4], atol=1e-6)
    assert torch.equal(kept, z_of(tiny_model, (1, 3)))


def test_nested_blocks_apply_in_order_and_come_off_one_by_one(tiny_llama):
    plain = logits(tiny_llama)
    with edit(tiny_llama, Site("resid_post", 0), lambda x: x + 1):
        one = logits(tiny_llama)
        with edit(tiny_llama, Site("resid_post", 0), lambda x: x * 0):
            two = logits(tiny_llama)
        assert torch.equal(logits(tiny_llama), one)
    assert torch.equal(logits(tiny_llama), plain)
    assert not torch.equal(one, two) and not torch.equal(one, plain)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_nothing_is_left_after_an_error(tiny_model, error):
    before, plain = hooks(tiny_model), logits(tiny_model)

    def fail(x):
        raise error("in the middle")

    for attempt in (
        lambda: ablate_heads(tiny_model, [(0, 0), (2, 1)], "zero"),
        lambda: edit(tiny_model, Site("mlp_out", 1), lambda x: x * 2),
    ):
        with pytest.raises(error), attempt():
            raise error("in the block")
    with pytest.raises(error), edit(tiny_model, Site("resid_post", 1), fail):
        generate(tiny_model, A, 5)
    assert hooks(tiny_model) == before
    assert torch.equal(logits(tiny_model), plain)


def test_generated_tokens_are_changed_too(tiny_llama):
    seen = []

    def look(x):
        seen.append(x.shape[1])
        return x

    with edit(tiny_llama, Site("resid_post", 1), look):
        generate(tiny_llama, A, 4)
    assert seen[0] > 1 and seen[1:] == [1] * (len(seen) - 1) and len(seen) > 1


@pytest.mark.parametrize(
    "mistake, words",
    [
        (lambda m: ablate_heads(m, [(0, 9)], "zero"), ["9", "0 to 5"]),
        (lambda m: ablate_heads(m, [(7, 0)], "zero"), ["7", "0 to 2"]),
        (lambda m: ablate_heads(m, [(0, 0)]), ["head_means"]),
        (lambda m: ablate_heads(m, [(0, 0)], "nil"), ["nil", "resample"]),
        (lambda m: edit(m, Site("resid_post", 5), lambda x: x), ["5", "0 to 2"]),
        (lambda m: ablate_heads(m, [(0, 0)], "zero", positions=99), ["99"]),
        (lambda m: patch(m, {Site("z", 0): torch.zeros(1, 2, 48)}), ["shape"]),
    ],
)
def test_a_mistake_is_explained(tiny_llama, mistake, words):
    with pytest.raises(ModelError) as error, mistake(tiny_llama):
        logits(tiny_llama)
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize(
    "function, words",
    [
        (lambda x: None, ["returned None"]),
        (lambda x: x[0], ["shape (10, 48)"]),
        (lambda x: x[:, -1:], ["shape (1, 1, 48)"]),
        (lambda x: x.mean(), ["shape ()"]),
        (lambda x: 2.0, ["returned 2.0"]),
    ],
)
def test_an_edit_that_returns_another_shape_is_explained(tiny_llama, function, words):
    plain = logits(tiny_llama)
    for kind in ("resid_post", "z"):
        with pytest.raises(ModelError) as error, edit(tiny_llama, Site(kind, 1), function):
            logits(tiny_llama)
        wanted = [f"{kind} of layer 1", f"(1, {tokenize(tiny_llama, A).input_ids.shape[1]}, 48)", "must return"]
        assert all(word in str(error.value) for word in [*wanted, *(w for w in words if "10" not in w)])
    assert torch.equal(logits(tiny_llama), plain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_edit_cannot_change_the_type_of_the_stream(dtype, tmp_path):
    model = load_model(tiny.save("llama", tmp_path), dtype=dtype)
    types = []

    def look(x):
        types.append(x.dtype)
        return x

    for kind in ("resid_pre", "z", "mlp_out", "resid_post"):
        with edit(model, Site(kind, 1), lambda x: x.float() * 1.5), edit(model, Site("resid_pre", 2), look):
            assert logits(model).dtype == dtype
    assert types == [dtype] * 4
