"""Loading, places, tokens: the same numbers from transformers and from the bridge, on four architectures."""

import pytest
import tiny
import torch

from glassbox_utils.core.devices import DeviceError
from glassbox_utils.core.interventions import edit
from glassbox_utils.core.models import (
    KINDS,
    ModelError,
    Site,
    check_heads,
    check_layer,
    check_site,
    hook_name,
    load_model,
)
from glassbox_utils.core.text import chat, find_token, generate, str_tokens, tokenize

SENTENCE = "The doctor asked the nurse to help him with the patient."


def both_logits(model, text=SENTENCE):
    batch = tokenize(model, text)
    with torch.no_grad():
        return model.hf(**batch.inputs).logits, model.bridge(batch.input_ids)


def test_bridge_and_transformers_agree(tiny_model):
    plain, bridge = both_logits(tiny_model)
    assert plain.std() > 0.1
    assert (plain - bridge).abs().max() < 1e-3


def test_bridge_and_transformers_agree_on_the_embedded_model(smol):
    plain, bridge = both_logits(smol)
    assert (plain - bridge).abs().max() < 1e-3
    assert plain.argmax(-1).tolist() == bridge.argmax(-1).tolist()


def test_the_tensors_are_shared(smol):
    mine = {p.data_ptr() for p in smol.hf.parameters()}
    other = [p.data_ptr() for p in smol.bridge.parameters()]
    assert sum(p in mine for p in other) >= 0.99 * len(other)


def test_the_embedded_model_knows_something(smol):
    assert "Paris" in generate(smol, chat(smol, "What is the capital of France?"), max_new_tokens=10)[0]
    assert (smol.n_layers, smol.n_heads, smol.d_model, smol.d_head) == (30, 9, 576, 64)


@pytest.mark.parametrize("kind", KINDS)
def test_every_site_changes_both_models_alike(tiny_model, kind):
    plain, _ = both_logits(tiny_model)
    with edit(tiny_model, Site(kind, 1), lambda x: x * 1.5 + 0.1):
        changed, bridge = both_logits(tiny_model)
    after, _ = both_logits(tiny_model)
    assert (changed - plain).abs().max() > 1e-3
    assert (changed - bridge).abs().max() < 1e-3
    assert torch.equal(plain, after)


def test_padding_does_not_change_a_prompt(tiny_model):
    alone = tokenize(tiny_model, "The doctor")
    padded = tokenize(tiny_model, ["The doctor", SENTENCE])
    with torch.no_grad():
        a = tiny_model.hf(**alone.inputs).logits[0, -1]
        b = tiny_model.hf(**padded.inputs).logits[0, -1]
    assert (a - b).abs().max() < 1e-3


def test_raw_text_gets_one_bos_and_a_chat_prompt_no_second(smol):
    bos = smol.tokenizer.bos_token_id
    assert tokenize(smol, "Hello").input_ids[0].tolist().count(bos) == 1
    prompt = chat(smol, "Hello")
    ids = tokenize(smol, prompt).input_ids[0].tolist()
    assert ids == smol.tokenizer(prompt, add_special_tokens=False)["input_ids"]


def test_the_type_is_given_as_text_or_of_torch_and_shown_if_it_is_not_the_usual_one(tmp_path, on_cpu):
    folder = tiny.save("llama", tmp_path)
    half = load_model(folder, device="cpu", dtype="bfloat16")
    assert half.dtype == load_model(folder, dtype=torch.bfloat16).dtype == torch.bfloat16
    assert load_model(folder).dtype == load_model(folder, dtype="float32").dtype == torch.float32
    assert repr(half).endswith("d_model 48, cpu, bfloat16)")
    assert repr(load_model(folder, device="cpu")).endswith("heads, d_model 48)")


def test_the_hash_names_the_weights(tiny_llama, tmp_path):
    folder = tiny.save("llama", tmp_path / "another-name")
    assert load_model(folder).hash == tiny_llama.hash
    assert load_model(folder, dtype=torch.bfloat16).hash == tiny_llama.hash
    changed = load_model(folder)
    with torch.no_grad():
        next(changed.hf.parameters())[0, 0] += 1
    assert changed.hash != tiny_llama.hash


def test_an_adapter_is_merged(tiny_llama, tmp_path):
    from peft import LoraConfig, get_peft_model

    folder = tiny.save("llama", tmp_path / "base")
    lora = get_peft_model(tiny.build("llama"), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    lora.save_pretrained(tmp_path / "adapter")
    merged = load_model(folder, adapter=tmp_path / "adapter")
    batch = tokenize(merged, SENTENCE)
    with torch.no_grad():
        expected = lora.eval().to(merged.device)(**batch.inputs).logits
        assert (merged.hf(**batch.inputs).logits - expected).abs().max() < 1e-3
        assert (merged.bridge(batch.input_ids) - expected).abs().max() < 1e-3
    assert merged.hash != tiny_llama.hash


def test_sampling_is_repeatable_and_leaves_the_global_state(tiny_llama):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    texts = [generate(tiny_llama, "The doctor", 8, temperature=1.0, seed=s)[0] for s in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert torch.equal(torch.rand(1), expected)


def test_batched_generation_equals_single(tiny_model):
    prompts = ["The doctor", SENTENCE]
    assert generate(tiny_model, prompts, 6) == [generate(tiny_model, p, 6)[0] for p in prompts]


def test_words_are_found(smol):
    ids = tokenize(smol, SENTENCE).input_ids[0]
    tokens = str_tokens(smol, ids)
    assert tokens[find_token(smol, ids, "doctor")] == " doctor"
    assert find_token(smol, ids, "the", 0) < find_token(smol, ids, "the", -1)


# --- bad input: each message names the value, what is allowed, and the fix ------------------------------


@pytest.mark.parametrize(
    "mistake, words",
    [
        (lambda m: load_model("smollm-135m-instruct"), ["smollm-135m-instruct", "SmolLM2-135M-Instruct"]),
        (lambda m: load_model("/nowhere/at/all"), ["/nowhere/at/all", "config.json"]),
        (lambda m: load_model(device="tpu"), ["tpu", "cpu"]),
        (lambda m: load_model(adapter="/nowhere"), ["/nowhere", "adapter_config.json"]),
        (lambda m: load_model(dtype="float64"), ["float64", "float32, bfloat16, float16"]),
        (lambda m: load_model(dtype=torch.int8), ["torch.int8", "float32, bfloat16, float16"]),
        (lambda m: check_layer(m, 3), ["3", "0 to 2"]),
        (lambda m: check_heads(m, [(1, 6)]), ["6", "0 to 5"]),
        (lambda m: check_site(m, Site("resid_past", 0)), ["resid_past", "resid_post"]),
        (lambda m: hook_name(m, "attn.hook_patern", 1), ["attn.hook_patern", "attn.hook_pattern"]),
        (lambda m: hook_name(m, "blocks.99.attn.hook_pattern"), ["blocks.99", "blocks."]),
        (lambda m: tokenize(m, ""), ["empty"]),
        (lambda m: tokenize(m, ["a", ""]), ["empty"]),
        (lambda m: tokenize(m, "word " * 500), ["128", "context"]),
        (lambda m: generate(m, "The doctor", 500), ["500", "128"]),
        (lambda m: find_token(m, tokenize(m, "The doctor").input_ids[0], "nurse"), ["nurse", "doctor"]),
    ],
)
def test_a_mistake_is_explained(tiny_llama, mistake, words):
    with pytest.raises((ModelError, DeviceError)) as error:
        mistake(tiny_llama)
    for word in words:
        assert word in str(error.value)
    assert "\n" not in str(error.value)


# --- folders that are something else: the message says what they are and how to use that -------------------------


def refusal(path, **options):
    with pytest.raises(ModelError) as error:
        load_model(path, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_an_adapter_as_a_model_names_its_base(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "some/base"}')
    said = refusal(tmp_path)
    assert "is an adapter (a LoRA) of some/base" in said and f"load_model('some/base', adapter='{tmp_path}')" in said
    (tmp_path / "adapter_config.json").write_text("[]")
    assert "load_model('BASE', adapter=" in refusal(tmp_path)


def test_a_folder_without_weights_or_configuration_says_which(tmp_path):
    tiny.tokenizer().save_pretrained(tmp_path)
    assert "config.json is missing (it holds a tokenizer" in refusal(tmp_path) and "no weights" in refusal(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    assert "can't be loaded: the folder holds no weights" in refusal(tmp_path)
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed" / "x.gguf").touch()
    assert f"Give the file itself: {tmp_path}/packed/x.gguf." in refusal(tmp_path / "packed")
    (tmp_path / "page.txt").touch()
    assert "page.txt is a file, and no model folder" in refusal(tmp_path / "page.txt")


def test_a_name_of_the_hub_without_a_network_is_not_guessed_again(monkeypatch):
    monkeypatch.setattr("glassbox_utils.core.models.hub_answers", lambda: False)
    said = refusal("gpt2")
    assert "Did you mean" not in said and "not in the hub's cache, and the hub does not answer" in said
    assert "Did you mean 'SmolLM2-135M-Instruct'?" in refusal("SmolLM2-135M-Instuct")
