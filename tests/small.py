"""A tiny llama with a subword tokenizer, built on the spot."""

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from glassbox_utils.core import models
from glassbox_utils.core.corpora import landmark_passages
from glassbox_utils.core.models import Model


def small_model(layers: int = 3, width: int = 32, seed: int = 0) -> Model:
    inner = Tokenizer(BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=500, special_tokens=["<s>"], initial_alphabet=alphabet, show_progress=False)
    inner.train_from_iterator((text for text, _, _ in landmark_passages(200)), trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="<s>", pad_token="<s>")
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=width, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=64, max_position_embeddings=256, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    hf = LlamaForCausalLM(config)
    with torch.no_grad():  # initial weights are so small that every token looks alike
        for parameter in hf.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4)
    return models.wrap_model(hf, tokenizer, name="small")
