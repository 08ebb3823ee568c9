"""Small random models of three architectures with a real tokenizer, built on the spot."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

KINDS = ("gpt2", "llama", "gemma3")
PROMPTS = Path(__file__).parent.parent / "data" / "prompts" / "decisive_tokens.json"


def tokenizer(vocabulary: int = 600) -> PreTrainedTokenizerFast:
    """Byte-level BPE trained on the project's prompts, so that any text has tokens."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator([json.dumps(json.loads(PROMPTS.read_text())) * 3], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")


def network(
    kind: str, words: int, layers: int = 3, width: int = 48, heads: int = 6, positions: int = 128,
    sharpen: float = 6, head_dim: int = 16, window: int = 16, eos: int | None = 1,
):  # fmt: skip
    """A random transformers model with sharp weights: tiny initial ones make every head uniform and tokens alike."""
    torch.manual_seed(0)
    common = {"vocab_size": words, "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
    common |= {"num_key_value_heads": 2, "intermediate_size": 64, "max_position_embeddings": positions}
    common |= {"bos_token_id": 0, "eos_token_id": eos} | ({} if eos is None else {"pad_token_id": eos})
    if kind == "gpt2":
        shape = {"n_positions": positions, "n_embd": width, "n_layer": layers, "n_head": heads}
        hf = GPT2LMHeadModel(GPT2Config(vocab_size=words, **shape, bos_token_id=0, eos_token_id=eos))
    elif kind == "gemma3":
        hf = Gemma3ForCausalLM(Gemma3TextConfig(**common, head_dim=head_dim, sliding_window=window))
    else:
        hf = LlamaForCausalLM(LlamaConfig(**common))
    with torch.no_grad():
        for parameter in hf.parameters():
            if parameter.ndim == 2:
                parameter.mul_(sharpen)
    return hf.eval()


def build(kind: str, layers: int = 3):
    """The network with the byte-level tokenizer's vocabulary."""
    return network(kind, len(tokenizer()), layers)


def save(kind: str, folder: Path) -> Path:
    """The same model as a folder that ``load_model`` takes."""
    build(kind).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def save_gpt2_shaped(folder: Path, positions: int, sharpen: float = 1.0) -> Path:
    """A random GPT-2 of 6 layers with the embedded model's tokenizer: another architecture for whole notebooks.

    ``sharpen`` multiplies the matrices: initial weights are so small that no vector changes an answer.
    """
    from transformers import AutoTokenizer

    from glassbox_utils.core.models import embedded_folder

    torch.manual_seed(0)
    words = AutoTokenizer.from_pretrained(embedded_folder())
    hf = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(words), n_positions=positions, n_embd=64, n_layer=6, n_head=8, bos_token_id=1, eos_token_id=2
        )
    )
    with torch.no_grad():
        for name, parameter in hf.named_parameters():
            if parameter.ndim == 2 and "wte" not in name:
                parameter.mul_(sharpen)
    hf.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder
