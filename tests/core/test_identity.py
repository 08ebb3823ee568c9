"""The same hash for every type of load and every way to store; another for another model, fine-tune or tokenizer."""

import json
import shutil
from dataclasses import replace

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from glassbox_utils.core import assets, identity
from glassbox_utils.core.fast_forward import quick
from glassbox_utils.core.models import load_model, wrap_model
from glassbox_utils.decisions import study
from glassbox_utils.decisions.loans import officers
from glassbox_utils.decisions.mitigation import Edit, MitigationError
from glassbox_utils.saes import store
from glassbox_utils.saes.clamping import ClampError, check_sae
from glassbox_utils.saes.config import SaeError, saes_folder
from glassbox_utils.steering.apply import check_direction
from glassbox_utils.steering.vectors import Direction, SteeringError, load_vector, parts_of

DTYPES = ("float32", "bfloat16", "float16")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch, request):
    """A cache folder of its own, in which everything is kept, but for the tests of the embedded model."""
    if "slow" not in request.keywords:
        monkeypatch.setenv(assets.CACHE_VARIABLE, str(tmp_path / "cache"))
        monkeypatch.setattr(identity, "KEPT_FROM", 0)
    return tmp_path / "cache"


def add_lora(folder, scale=4, seed=0):
    """An adapter of every attention matrix of the tiny llama, as peft writes it."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, lora_alpha=scale, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    base = tiny.build("llama")
    torch.manual_seed(seed)
    get_peft_model(base, config).save_pretrained(folder)
    return folder


def rewrite(folder, change):
    """Store the folder's weights again, changed; under a new inode, since models map the file into memory."""
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(change(tensors), folder / "new", metadata={"format": "pt"})
    (folder / "new").replace(folder / "model.safetensors")
    return folder


# --- weights ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_every_type_of_load_and_every_way_to_hold_the_weights_is_one_model(tmp_path, kind, has_storage):
    folder = tiny.save(kind, tmp_path / "one")
    models = [load_model(folder, dtype=dtype) for dtype in DTYPES]
    models += [quick(models[0], torch.bfloat16), quick(models[0], torch.float16), quick(models[1], torch.float32)]
    memory = wrap_model(tiny.build(kind), tiny.tokenizer())
    models += [memory, quick(memory, torch.bfloat16), quick(memory, torch.float16)]
    models[0].hf.bfloat16().save_pretrained(tmp_path / "half")
    tiny.tokenizer().save_pretrained(tmp_path / "half")
    models.append(load_model(tmp_path / "half"))
    models[1].bridge  # noqa: B018  shares the tensors and must not change them
    assert len({model.hash for model in models}) == 1


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_older_and_larger_checkpoints_are_the_same_model(tmp_path, kind):
    folder = tiny.save(kind, tmp_path / "one")
    expected = load_model(folder).hash

    def older(tensors):
        """Names without the prefix, a tied output matrix, masks and frequencies: as in the first years."""
        prefix = f"{tiny.build(kind).base_model_prefix}."
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
        if kind != "llama":
            tensors["lm_head.weight"] = next(t for n, t in tensors.items() if "wte" in n or "embed_tokens" in n).clone()
        extra = {"h.0.attn.bias": torch.ones(1, 1, 8, 8), "h.0.attn.masked_bias": torch.tensor(-1e4)}
        return tensors | extra | {"layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}

    old = rewrite(shutil.copytree(folder, tmp_path / "old"), older)
    assert load_model(old).hash == load_model(old, dtype="float16").hash == expected
    tiny.build(kind).save_pretrained(tmp_path / "parts", max_shard_size="50KB")
    tiny.tokenizer().save_pretrained(tmp_path / "parts")
    assert len(identity.weight_files(tmp_path / "parts")) > 1
    assert load_model(tmp_path / "parts", dtype="float16").hash == expected
    binary = shutil.copytree(folder, tmp_path / "binary")
    torch.save(load_file(binary / "model.safetensors"), binary / "pytorch_model.bin")
    (binary / "model.safetensors").unlink()
    assert load_model(binary, dtype="float16").hash == expected


def test_a_name_of_the_hub_is_found_in_its_cache(tmp_path, monkeypatch):
    from huggingface_hub import constants

    snapshot = tmp_path / "hub" / "models--someone--tiny" / "snapshots" / ("0" * 40)
    tiny.save("llama", snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    hf = load_model(snapshot, dtype="float16").hf
    assert identity.origin_of(hf, "someone/tiny").weights() == identity.of_memory(tiny.build("llama"))
    assert identity.origin_of(hf, "someone/else") is None


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_changed_is_another_model(tmp_path, dtype):
    folder = tiny.save("llama", tmp_path / "one")
    expected = load_model(folder).hash

    def one_number(tensors):
        tensors["model.layers.1.mlp.up_proj.weight"][3, 5] += 0.5
        return tensors

    def swapped(tensors):
        first, second = (f"model.layers.{i}.mlp.up_proj.weight" for i in (0, 1))
        return tensors | {first: tensors[second].clone(), second: tensors[first].clone()}

    others = [load_model(rewrite(shutil.copytree(folder, tmp_path / c.__name__), c), dtype=dtype).hash
              for c in (one_number, swapped)]  # fmt: skip
    trained = load_model(folder, dtype=dtype)
    with torch.no_grad():
        trained.hf.model.layers[1].mlp.up_proj.weight[3, 5] += 0.5
    hidden = load_model(folder, dtype=dtype)
    hidden.hf.model.layers[1].mlp.up_proj.weight.data += 0.05  # which torch does not count as a change
    others += [trained.hash, hidden.hash]
    assert all(other[8:] == expected[8:] and other[:8] != expected[:8] for other in others)
    if dtype == "float32":
        assert trained.hash == others[0]  # the same change, in the file and in memory


def test_an_adapter_is_another_model_and_the_same_in_every_type(tmp_path, has_storage):
    folder = tiny.save("llama", tmp_path / "base")
    adapter = add_lora(tmp_path / "adapter")
    hashes = {load_model(folder, adapter=adapter, dtype=dtype).hash for dtype in DTYPES}
    merged = load_model(folder, adapter=adapter)
    hashes |= {merged.hash, quick(merged, torch.bfloat16).hash}
    assert len(hashes) == 1
    again = shutil.copytree(adapter, tmp_path / "again")  # as another version of peft writes it
    settings = json.loads((again / "adapter_config.json").read_text())
    settings |= {"peft_version": "9", "new_setting": None, "target_modules": settings["target_modules"][::-1]}
    (again / "adapter_config.json").write_text(json.dumps(settings))
    assert load_model(folder, adapter=again).hash in hashes
    others = [load_model(folder, adapter=add_lora(tmp_path / "scale", scale=8)).hash]
    others += [load_model(folder, adapter=add_lora(tmp_path / "seed", seed=1)).hash, load_model(folder).hash]
    merged.hf.save_pretrained(tmp_path / "merged")
    tiny.tokenizer().save_pretrained(tmp_path / "merged")
    others.append(load_model(tmp_path / "merged").hash)
    assert len(hashes | set(others)) == 5


def test_a_lora_merged_by_hand_into_a_loaded_model_is_noticed(tmp_path):
    """peft adds through ``.data``, which leaves torch's count of changes as it was."""
    from peft import PeftModel

    folder, adapter = tiny.save("llama", tmp_path / "base"), add_lora(tmp_path / "adapter")
    for dtype in DTYPES:
        model = load_model(folder, dtype=dtype)
        versions = [p._version for p in model.hf.parameters()]
        PeftModel.from_pretrained(model.hf, str(adapter)).merge_and_unload()
        assert [p._version for p in model.hf.parameters()] == versions
        assert model.hash[:8] != load_model(folder).hash[:8]


def test_the_second_process_reads_no_weights(tmp_path, cache, monkeypatch):
    folder = tiny.save("llama", tmp_path / "one")
    expected = load_model(folder).hash
    assert len(list((cache / "identity").glob("*.json"))) == 2
    with monkeypatch.context() as patch:
        patch.setattr(identity, "_of_tensor", lambda tensor: pytest.fail("hashed again"))
        patch.setattr(identity, "_behaviour", lambda tokenizer: pytest.fail("tried again"))
        assert load_model(folder, dtype="float16").hash == expected
    for path in (cache / "identity").glob("*.json"):
        path.write_text("{")  # half a file of some other program
    assert load_model(folder).hash == expected
    rewrite(folder, lambda tensors: {name: tensor * 2 for name, tensor in tensors.items()})
    assert load_model(folder).hash[:8] != expected[:8]


def test_a_folder_that_is_gone_or_overwritten_does_not_speak_for_the_model(tmp_path):
    one, other = tiny.save("llama", tmp_path / "one"), tiny.save("llama", tmp_path / "other")
    expected = load_model(one).hash
    models = [load_model(folder) for folder in (one, other)]
    shutil.rmtree(one)
    rewrite(other, lambda tensors: {name: tensor * 2 for name, tensor in tensors.items()})
    assert [model.hash for model in models] == [expected, expected] != [load_model(other).hash] * 2


def test_a_cache_that_cannot_be_written_is_no_obstacle(tmp_path, cache):
    cache.write_text("a file where the folder should be")
    assert load_model(tiny.save("llama", tmp_path / "one")).hash


# --- tokenizer --------------------------------------------------------------------------------------------


def other_tokenizer(change):
    """The tiny tokenizer after a change of its serialised form."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    content = json.loads(tiny.tokenizer().backend_tokenizer.to_str())
    change(content["model"])
    inner = Tokenizer.from_str(json.dumps(content))
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")


def set_special(**names):
    tokenizer = tiny.tokenizer()
    for name, token in names.items():
        setattr(tokenizer, name, token)
    return tokenizer


def with_added_token(special):
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens(["<|tool|>"], special_tokens=special)
    return tokenizer


def swap_two_words(model):
    words = sorted(model["vocab"], key=model["vocab"].get)
    model["vocab"][words[400]], model["vocab"][words[401]] = 401, 400


OTHERS = {
    "vocabulary": lambda: tiny.tokenizer(599),
    "order of the vocabulary": lambda: other_tokenizer(swap_two_words),
    "last merge": lambda: other_tokenizer(lambda model: model["merges"].pop()),
    "order of merges": lambda: other_tokenizer(lambda model: model["merges"].insert(0, model["merges"].pop(20))),
    "added token": lambda: with_added_token(False),
    "bos": lambda: set_special(bos_token="</s>"),
    "eos": lambda: set_special(eos_token="<s>"),
    "pad": lambda: set_special(pad_token="<s>"),
    "unk": lambda: set_special(unk_token="<s>"),
    "template": lambda: set_special(chat_template="{{ messages[0]['content'] }}"),
    "another template": lambda: set_special(chat_template="{{ messages[0]['content'] }} "),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_tokenizer_is_another_model(name):
    model, other = wrap_model(tiny.build("llama"), tiny.tokenizer()), wrap_model(tiny.build("llama"), OTHERS[name]())
    assert other.hash[:8] == model.hash[:8] and other.hash[8:] != model.hash[8:]
    assert "the weights are the same, but the tokenizer is another" in identity.difference(other.hash, model.hash)


def test_no_two_of_them_are_alike():
    assert len({identity.of_tokenizer(make()) for make in OTHERS.values()}) == len(OTHERS)


def test_what_a_model_does_to_its_tokenizer_does_not_count():
    tokenizer = tiny.tokenizer()
    assert tokenizer.pad_token_id is None and tokenizer.padding_side == "right"
    before = identity.of_tokenizer(tokenizer)
    wrap_model(tiny.build("llama"), tokenizer)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id and tokenizer.padding_side == "left"
    tokenizer(["a", "longer text"], padding=True, truncation=True, max_length=2)
    assert identity.of_tokenizer(tokenizer) == before == identity._behaviour(tiny.tokenizer())


def test_a_tokenizer_without_a_fast_form_counts_too():
    inner = tiny.tokenizer()
    names = ("bos_token_id", "eos_token_id", "unk_token_id", "pad_token_id", "chat_template", "get_vocab")
    attributes = {name: getattr(inner, name) for name in (*names, "convert_ids_to_tokens", "batch_decode")}
    call = {"__call__": lambda self, text, **options: inner(text, **options)}
    digests = [identity.of_tokenizer(type("Slow", (), call | attributes | {"eos_token_id": eos})()) for eos in (1, 0)]
    assert len({*digests, identity.of_tokenizer(inner)}) == 3


# --- tools are refused, with what differs ---------------------------------------------------------------------


def sae_for(model, folder):
    """A folder in sae_lens format whose card names this model."""
    from sae_lens import TopKSAE, TopKSAEConfig

    sae = TopKSAE(TopKSAEConfig(d_in=model.d_model, d_sae=64, k=8, rescale_acts_by_decoder_norm=False))
    sae.cfg.metadata.hook_name, sae.cfg.metadata.model_hash = "blocks.1.hook_resid_post", model.hash
    sae.cfg.metadata.model_name = model.name
    sae.save_model(folder)
    return sae


def test_every_room_says_what_differs(tmp_path, monkeypatch):
    model = wrap_model(tiny.build("llama"), tiny.tokenizer())
    others = {
        "the weights are the same, but the tokenizer is another": wrap_model(tiny.build("llama"), tiny.tokenizer(599)),
        "the weights differ (another model, or a fine-tuned one), the tokenizer is the same": wrap_model(
            tiny.network("llama", len(tiny.tokenizer()), sharpen=5), tiny.tokenizer()
        ),
        "and so does the tokenizer": wrap_model(
            tiny.network("llama", len(tiny.tokenizer()), sharpen=5), tiny.tokenizer(599)
        ),
    }
    sae = sae_for(model, tmp_path / "sae")
    direction = Direction(torch.nn.functional.normalize(torch.ones(48), dim=0), 1, 1.0, "d", model_hash=model.hash)
    monkeypatch.setattr(study, "edit_path", lambda: tmp_path / "edit.safetensors")
    parts = {"read": torch.ones(48, 1), "write": torch.ones(48, 1), "centre": torch.ones(48), "target": torch.ones(1)}
    study.save_edit(Edit(1, name="e", **parts), model)
    uses = {
        SaeError: lambda m: store.load_sae(tmp_path / "sae", m),
        ClampError: lambda m: check_sae(m, sae),
        SteeringError: lambda m: check_direction(m, direction),
        MitigationError: study.load_edit,
    }
    for error, use in uses.items():
        use(model)
        for words, other in others.items():
            with pytest.raises(error) as caught:
                use(other)
            message = str(caught.value)
            assert words in message and model.hash in message and other.hash in message and "\n" not in message
    check_direction(others["and so does the tokenizer"], replace(direction, model_hash=""))


@pytest.mark.parametrize("made_for", [None, "", "0123456789abcdef"])
def test_an_unknown_or_equal_hash_is_no_difference(made_for):
    assert identity.difference(made_for, "0123456789abcdef") == ""


# --- what ships -------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_shipped_tools_are_accepted_in_every_type(dtype):
    model = load_model(dtype=dtype)
    for name in store.shipped():
        assert json.loads((saes_folder() / name / "cfg.json").read_text())["metadata"]["model_hash"] == model.hash
    check_sae(model, store.load_sae("topk-2048-l14", model))
    for part in parts_of(load_vector("tone")):
        check_direction(model, part)
    officer = load_model(adapter=officers() / "deployed", dtype=dtype)
    assert study.load_edit(officer).layer == 29
    with pytest.raises(MitigationError, match="the weights differ"):
        study.load_edit(model)
    with pytest.raises(SaeError, match="the tokenizer is the same"):
        store.load_sae("topk-2048-l14", officer)
