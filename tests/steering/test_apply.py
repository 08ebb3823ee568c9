"""Steering on tiny random models of three architectures: what is steered, what is not, and what is left afterwards."""

from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from worded import PROMPTS, WIDTH, build, direction, fails_at, logits, record, several, untouched

from glassbox_utils.core.devices import like, result
from glassbox_utils.core.interventions import capture, edit
from glassbox_utils.core.models import ModelError, Site, load_model
from glassbox_utils.core.text import generate, tokenize
from glassbox_utils.steering.apply import functions_of, generate_with_steering, steer
from glassbox_utils.steering.vectors import ControlVector, Direction, SteeringError


class Operations(TorchDispatchMode):
    """The names of the tensor operations inside the block."""

    def __enter__(self):
        super().__enter__()
        self.names = []
        return self.names

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_adds_in_units_of_the_typical_norm_to_prompt_and_generated_tokens(model):
    d = direction(model, scale=2.0)

    def run():
        generate(model, PROMPTS, 3)

    plain = record(model, 1, run)
    with steer(model, d, 0.5):
        steered = record(model, 1, run)
    assert [x.shape[1] for x in steered] == [7, 1, 1]  # the prompt with its BOS, then one token at a time
    for before, after in zip(plain[:1], steered[:1], strict=True):
        torch.testing.assert_close(after - before, (0.5 * 2.0 * d.vector).expand_as(before), atol=1e-5, rtol=1e-4)
    # Later passes see other tokens; a second hook in front of the steering sees what the layer itself wrote.
    inner = []
    with edit(model, Site("resid_post", 1), lambda x: (inner.append(x.clone()), x)[1]), steer(model, d, 0.5):
        outer = record(model, 1, run)
    for before, after in zip(inner, outer, strict=True):
        torch.testing.assert_close(after - before, (d.vector).expand_as(before), atol=1e-5, rtol=1e-4)


def test_logits_are_bit_identical_afterwards(model):
    before = logits(model)
    d = direction(model)
    with steer(model, d, 2.0):
        assert not torch.equal(logits(model), before)
    assert torch.equal(logits(model), before)
    with pytest.raises(KeyboardInterrupt), steer(model, [d, None, d, d], 2.0, scope="generated"):
        generate(model, PROMPTS, 2)
        raise KeyboardInterrupt
    untouched(model, before)


def test_an_exception_in_the_middle_of_generation_leaves_nothing(model):
    before = logits(model)
    steered = steer(model, direction(model), 1.0)
    with pytest.raises(RuntimeError, match="middle"), steered, edit(model, Site("resid_post", 2), fails_at(3)):
        generate(model, PROMPTS, 6)
    assert torch.equal(logits(model), before)


def test_unsteered_rows_of_a_mixed_batch_are_token_identical(model):
    d, other = direction(model, 1), direction(model, 2, seed=5)
    plain = generate(model, PROMPTS, 12)
    with steer(model, [d, None, other, None], [2.0, None, -1.5, 1.0]):
        mixed = generate(model, PROMPTS, 12)
    with steer(model, d, [2.0, 0.0, 0.0, 0.0]):
        first = generate(model, PROMPTS, 12)
    with steer(model, other, -1.5):
        third = generate(model, PROMPTS, 12)
    assert (mixed[1], mixed[3]) == (plain[1], plain[3])
    assert mixed[0] == first[0] != plain[0] and first[1:] == plain[1:]
    assert mixed[2] == third[2] != plain[2]


def test_unsteered_rows_have_bit_identical_logits_in_every_mode(model):
    plain = logits(model)
    for mode in ("add", "project_out", "affine"):
        with steer(model, direction(model), [1.5, None, 0.7, None], mode):
            mixed = logits(model)
        assert torch.equal(mixed[[1, 3]], plain[[1, 3]])
        assert not torch.allclose(mixed[0], plain[0]) and not torch.allclose(mixed[2], plain[2])


def test_a_steered_row_does_not_depend_on_its_batch(model):
    d = direction(model)
    equal = ["w1 w2", "w3 w4", "w5 w6", "w7 w8"]  # GPT-2 counts padding as positions unless it generates
    with steer(model, d, [0.0, 1.0, 0.0, -1.0]):
        together = logits(model, equal)
    with steer(model, d, 1.0):
        alone = logits(model, equal[1:2])
    torch.testing.assert_close(together[1, -1], alone[0, -1], atol=1e-4, rtol=1e-3)


def test_project_out_and_affine(model):
    d = direction(model, scale=2.0)
    batch = tokenize(model, PROMPTS)
    site = Site("resid_post", 1)

    def coordinate():
        return result(capture(model, batch, [site])[site]) @ d.vector

    plain = coordinate()
    with steer(model, d, 1.0, "project_out"):
        torch.testing.assert_close(coordinate(), torch.zeros_like(plain), atol=1e-4, rtol=0)
    with steer(model, d, 0.25, "project_out"):
        torch.testing.assert_close(coordinate(), 0.75 * plain, atol=1e-4, rtol=1e-4)
    with steer(model, d, -0.5, "affine"):
        torch.testing.assert_close(coordinate(), torch.full_like(plain, -1.0), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("scope", ["all", "prompt", "generated"])
def test_scope(model, scope):
    d = direction(model, scale=1.0)
    for prompts in (PROMPTS, "w4"):  # also a prompt as short as a generated token
        inner = []
        look = edit(model, Site("resid_post", 1), lambda x, inner=inner: (inner.append(x.clone()), x)[1])
        with look, steer(model, d, 1.0, scope=scope):
            outer = record(model, 1, lambda prompts=prompts: generate(model, prompts, 4))
        moved = [not torch.equal(a, b) for a, b in zip(inner, outer, strict=True)]
        assert moved == [scope != "generated"] + [scope != "prompt"] * 3


def test_scope_generated_without_a_cache_is_refused(llama):
    batch = tokenize(llama, PROMPTS)
    with pytest.raises(ModelError, match="use_cache=True"), steer(llama, direction(llama), scope="generated"):
        llama.hf(**batch._asdict(), use_cache=False)


def test_a_bridge_sees_the_same_steering(llama, tmp_path, has_storage):
    llama.hf.save_pretrained(tmp_path)
    llama.tokenizer.save_pretrained(tmp_path)
    model = load_model(str(tmp_path))
    batch = tokenize(model, PROMPTS[:1])
    with torch.no_grad(), steer(model, direction(model), 1.0):
        torch.testing.assert_close(
            model.bridge(batch.input_ids), model.hf(**batch._asdict()).logits, atol=1e-3, rtol=1e-3
        )


def test_two_vectors_compose(model):
    a, b = direction(model, 1, 1), direction(model, 1, 2)
    both = Direction((a.vector + b.vector) / (a.vector + b.vector).norm(), 1, 1.0)
    with steer(model, a, 1.0), steer(model, b, 1.0):
        nested = logits(model)
    with steer(model, both, 3.0 * float((a.vector + b.vector).norm())):
        torch.testing.assert_close(logits(model), nested, atol=1e-3, rtol=1e-3)


def test_several_layers_by_one_dial_are_the_sum_of_their_parts(model):
    many = several(model)
    for mode in ("add", "project_out", "affine"):
        with steer(model, many, -0.7, mode):
            together = logits(model)
        with steer(model, many.parts[0], -0.7, mode), steer(model, many.parts[1], -0.7, mode):
            torch.testing.assert_close(logits(model), together)
    assert many.layers == [0, 2] and "layers [0, 2]" in repr(many)


def test_rows_of_one_layer_of_several_and_of_none_share_a_batch(model):
    many, one = several(model), direction(model, 1, seed=7)
    plain = logits(model)
    with steer(model, [many, None, one, many], [1.0, 1.0, -2.0, None]):
        mixed = logits(model)
    assert torch.equal(mixed[[1, 3]], plain[[1, 3]])
    with steer(model, many, 1.0):
        torch.testing.assert_close(logits(model)[0], mixed[0])
    with steer(model, one, -2.0):
        torch.testing.assert_close(logits(model)[2], mixed[2])
    assert torch.equal(logits(model), plain)
    written = generate(model, PROMPTS, 8)
    with steer(model, [many, None, one, many], [2.0, 1.0, -2.0, None]):
        again = generate(model, PROMPTS, 8)
    assert (again[1], again[3]) == (written[1], written[3])
    assert not torch.allclose(mixed[0], plain[0]) and not torch.allclose(mixed[2], plain[2])


def test_zero_strength_changes_nothing(model):
    before = logits(model)
    with steer(model, direction(model), 0.0), steer(model, direction(model), None):
        assert torch.equal(logits(model), before)


def test_generate_with_steering_on_plain_models(model):
    d = direction(model)
    plain = generate(model, PROMPTS, 8)
    asked = [model.tokenizer, "w1 w2 w3"]
    one = generate_with_steering(model.hf, *asked, d, 2.0, max_new_tokens=8)
    bare = generate_with_steering(model.hf, *asked, d.vector * d.scale, 2.0, layer=1, max_new_tokens=8)
    assert one == bare != plain[0]
    many = generate_with_steering(model.hf, model.tokenizer, PROMPTS, d, [2.0, 0, None, 2.0], max_new_tokens=8)
    assert many[0] == one and many[1:3] == plain[1:3] and len(many) == 4
    assert generate_with_steering(model.hf, *asked, d, 0.0, max_new_tokens=8) == plain[0]
    layered = generate_with_steering(model.hf, *asked, several(model), 1.0, max_new_tokens=8)
    with steer(model, several(model), 1.0):
        assert layered == generate(model, PROMPTS[0], 8)[0]


# --- many rows, half precision --------------------------------------------------------------------------------


def test_different_vectors_and_strengths_for_every_row_are_one_addition(llama):
    n = 64
    vectors = [direction(llama, 1, seed) for seed in range(n)]
    alphas = [0.1 * i for i in range(n)]
    functions, rows = functions_of(llama, vectors, alphas, "add")
    x = like(torch.randn(n, 1, WIDTH), next(llama.hf.parameters()))
    (function,) = functions.values()
    with Operations() as seen:
        y = function(x)
    assert seen == ["aten.add.Tensor"] and rows == n
    wanted = torch.stack([a * d.scale * d.vector for a, d in zip(alphas, vectors, strict=True)])
    torch.testing.assert_close(result(y - x)[:, 0], wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_half_precision(dtype):
    model = build("llama")
    model.hf.to(dtype)
    vectors = [direction(model), None, several(model), direction(model, 2, 5)]
    plain, seen = logits(model), []
    for mode in ("add", "project_out", "affine"):
        with steer(model, vectors, [1.5, None, 0.7, None], mode):
            with edit(model, Site("resid_post", 1), lambda x: (seen.append(x.dtype), x)[1]):
                mixed = logits(model)
            assert len(generate(model, PROMPTS, 3)) == 4
        assert mixed.dtype == dtype and torch.equal(mixed[[1, 3]], plain[[1, 3]])
        assert not torch.allclose(mixed[0], plain[0]) and not torch.allclose(mixed[2], plain[2])
    assert set(seen) == {dtype}


# --- mistakes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [float("nan"), float("-inf"), True, "0.5", [1.0, None, "2", 1.0], [[1.0] * 4]])
def test_a_strength_that_is_no_number_is_refused_before_anything_runs(llama, alpha):
    with (
        pytest.raises(SteeringError, match=r"is no finite number\. Allowed: .*None"),
        steer(llama, direction(llama), alpha),
    ):
        raise AssertionError("this must not run")


@pytest.mark.parametrize("mode", ["add", "project_out", "affine"])
def test_a_strength_that_the_model_cannot_hold_is_refused(llama, mode):
    with pytest.raises(SteeringError, match=r"strength 1e\+38 .*float32.*Allowed here: up to"):
        steer(llama, [direction(llama)] * 4, [0.1, 1e38, None, 0.2], mode).__enter__()
    half = build("llama")
    half.hf.to(torch.float16)
    with pytest.raises(SteeringError, match=r"strength 1e\+06 .*float16"):
        steer(half, direction(half), 1e6, mode).__enter__()


@pytest.mark.parametrize(
    "change, words",
    [
        ({"vector": torch.full((WIDTH,), float("nan"))}, "length nan.*unit vector.*fit it again"),
        ({"vector": torch.zeros(WIDTH)}, "length 0.*unit vector"),
        ({"vector": torch.ones(WIDTH)}, "length 5.66.*divide it by its length"),
        ({"vector": torch.ones(1, WIDTH)}, f"1 x {WIDTH} numbers"),
        ({"scale": float("nan")}, r"scale .* nan\. Allowed: a finite number above 0"),
        ({"scale": -2.0}, r"scale .* -2.0\. Allowed.*negative alpha"),
        ({"scale": float("inf")}, "scale .* inf"),
    ],
)
def test_a_direction_that_is_none_is_refused(llama, change, words):
    good, bad = direction(llama), replace(direction(llama), name="bad", **change)
    for vectors in (bad, [good, None, bad, good], ControlVector((direction(llama, 0), bad))):
        with pytest.raises(SteeringError, match=words), steer(llama, vectors, 0.5):
            raise AssertionError("this must not run")


def test_what_is_no_direction_is_refused(llama):
    d = direction(llama)
    for vectors, alpha in (([], 1.0), (d, []), ([], [])):
        with pytest.raises(SteeringError, match="list is empty"):
            steer(llama, vectors, alpha).__enter__()
    for vectors in (d.vector, [d.vector] * 4, ["tone"], "tone", {"tone": d}):
        with pytest.raises(SteeringError, match=r"is no direction\. .*Direction"):
            steer(llama, vectors, 1.0).__enter__()
    for bare in (torch.zeros(WIDTH), torch.full((WIDTH,), float("nan")), torch.ones(WIDTH + 1), torch.ones(2, WIDTH)):
        with pytest.raises(SteeringError, match=rf"Needed: {WIDTH} finite numbers"):
            generate_with_steering(llama.hf, llama.tokenizer, "w1", bare, 1.0, layer=1, max_new_tokens=2)
