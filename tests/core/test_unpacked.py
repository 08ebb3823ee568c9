"""A GGUF file is de-quantised once into a folder, and is then a model like any other."""

import hashlib
import json
import zipfile

import pytest
import tiny
import torch
from gguf import GGUFWriter

from glassbox_utils.core import assets, packaged, unpacked
from glassbox_utils.core.embedded import _NAMES
from glassbox_utils.core.models import ModelError, load_model

HEADS = {"attn_q": 6, "attn_k": 2}


def written(hf, path):
    """A tiny llama as a GGUF file, as llama.cpp's converter orders it."""
    words, config = tiny.tokenizer(), hf.config
    writer = GGUFWriter(str(path), "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    inner = json.loads(words.backend_tokenizer.to_str())["model"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([w for w, _ in sorted(inner["vocab"].items(), key=lambda item: item[1])])
    writer.add_token_types([3, 3] + [1] * (len(words) - 2))
    writer.add_token_merges([" ".join(pair) for pair in inner["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    names = {f"{their}.weight": mine for mine, their in _NAMES.items()}
    for name, tensor in hf.state_dict().items():
        if name.startswith("model.layers."):
            _, _, layer, rest = name.split(".", 3)
            part = names[rest]
            if part in HEADS:
                tensor = tensor.view(HEADS[part], 2, -1, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
            name = f"blk.{layer}.{part}.weight"
        else:
            kept = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
            name = f"{kept[name.removesuffix('.weight')]}.weight"
        writer.add_tensor(name, tensor.detach().cpu().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_it_is_the_model_of_the_file_and_has_one_hash(tmp_path, monkeypatch):
    monkeypatch.setenv(assets.CACHE_VARIABLE, str(tmp_path / "cache"))
    hf = tiny.build("llama")
    path = written(hf, tmp_path / "small.gguf")
    model = load_model(path)
    ids = torch.tensor([[0, 5, 9, 300, 17]])
    with torch.no_grad():
        mine = model.hf(ids.to(model.device)).logits.cpu()
        assert torch.allclose(mine, hf(ids).logits, atol=1e-3)
    assert model.tokenizer.decode(model.tokenizer("The doctor")["input_ids"]).endswith("The doctor")
    monkeypatch.setattr(unpacked, "write", None)  # made once
    assert load_model(path, dtype="float16").hash == load_model(path, dtype="bfloat16").hash == model.hash


@pytest.fixture
def in_two_packages(tmp_path, monkeypatch):
    """A tiny model whose GGUF lies in two cached wheels, and its name."""
    monkeypatch.setenv(assets.CACHE_VARIABLE, str(tmp_path / "cache"))
    whole = written(tiny.build("llama"), tmp_path / "small.gguf").read_bytes()
    folder = tmp_path / "cache" / "packages"
    folder.mkdir(parents=True)
    for i, piece in enumerate((whole[:5000], whole[5000:])):
        name = f"small-part{i}"
        path = folder / f"small_part{i}-1.0.whl"
        with zipfile.ZipFile(path, "w") as file:
            file.writestr(f"small_part{i}/small.gguf.part0{i}", piece)
        sha = hashlib.sha256(path.read_bytes()).hexdigest()
        pin = assets.Package(name, "1.0", path.name, sha, path.stat().st_size, "terms", "a piece")
        monkeypatch.setitem(assets.PACKAGES, name, pin)
    sha = hashlib.sha256(whole).hexdigest()
    kept = packaged.Packaged("small.gguf", sha, ("small-part0", "small-part1"), "terms")
    monkeypatch.setattr(packaged, "MODELS", {"small": kept})
    return kept


def test_a_model_that_is_cut_into_packages_is_put_together_once(in_two_packages, tmp_path, monkeypatch):
    model = load_model("small")
    assert model.name == "small" and model.hash == load_model(tmp_path / "small.gguf").hash
    monkeypatch.setattr(unpacked, "write", None)
    assert load_model("small").hash == model.hash
    assert not list((tmp_path / "cache" / "models").rglob("*small.gguf"))  # only the folder is kept


def test_pieces_that_are_not_the_pinned_file_give_no_model(in_two_packages, tmp_path, monkeypatch):
    turned = packaged.Packaged(in_two_packages.gguf, in_two_packages.sha256, in_two_packages.parts[::-1], "terms")
    monkeypatch.setattr(packaged, "MODELS", {"small": turned})
    with pytest.raises(assets.AssetError, match=r"small\.gguf, put together from small-part1.*No model was made"):
        load_model("small")
    assert not [p for p in (tmp_path / "cache" / "models").iterdir() if not p.name.endswith(".lock")]


def test_what_is_no_gguf_is_refused_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv(assets.CACHE_VARIABLE, str(tmp_path / "cache"))
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(ModelError, match=r"broken\.gguf can't be read.*save_pretrained") as error:
        load_model(tmp_path / "broken.gguf")
    assert "\n" not in str(error.value)
    assert not [p for p in (tmp_path / "cache" / "models").iterdir() if not p.name.endswith(".lock")]
    with pytest.raises(ModelError, match=r"There is no file .*nowhere\.gguf"):
        load_model(tmp_path / "nowhere.gguf")
