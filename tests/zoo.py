"""Tiny random models of many architectures over a vocabulary of 40 tokens, with weights that make every part matter."""

from functools import cache

import torch
import transformers as tf
from wired import tokenizer

from glassbox_utils.core import models
from glassbox_utils.core.models import Model

COMMON = {
    "vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": None, "pad_token_id": 0,
}  # fmt: skip
GROUPED = COMMON | {"num_key_value_heads": 2}
WIDE = GROUPED | {"head_dim": 8}
GPT = {
    "vocab_size": 40, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4,
    "bos_token_id": 0, "eos_token_id": None,
}  # fmt: skip
WINDOW = 4

BUILT = {
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**GROUPED, attention_bias=True, mlp_bias=True)),
    "gpt2": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(**GPT)),
    "gpt-neox": lambda: tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**COMMON)),
    "gpt-neox, serial": lambda: tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**COMMON, use_parallel_residual=False)),
    "gemma-2": lambda: tf.Gemma2ForCausalLM(
        tf.Gemma2Config(**WIDE, sliding_window=WINDOW, final_logit_softcapping=3.0, attn_logit_softcapping=3.0)
    ),
    "gemma-3": lambda: tf.Gemma3ForCausalLM(
        tf.Gemma3TextConfig(**WIDE, sliding_window=WINDOW, layer_types=["sliding_attention", "full_attention"])
    ),
    "qwen-3": lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**WIDE)),
    "granite": lambda: tf.GraniteForCausalLM(
        tf.GraniteConfig(
            **GROUPED, logits_scaling=7.0, residual_multiplier=0.22, embedding_multiplier=12.0, attention_multiplier=0.1
        )
    ),
    "cohere": lambda: tf.CohereForCausalLM(tf.CohereConfig(**GROUPED, logit_scale=0.0625)),
    "olmo": lambda: tf.OlmoForCausalLM(tf.OlmoConfig(**GROUPED)),
    "olmo-2": lambda: tf.Olmo2ForCausalLM(tf.Olmo2Config(**GROUPED)),
    "phi": lambda: tf.PhiForCausalLM(tf.PhiConfig(**COMMON)),
    "mistral": lambda: tf.MistralForCausalLM(tf.MistralConfig(**GROUPED, sliding_window=WINDOW)),
    "mixtral": lambda: tf.MixtralForCausalLM(tf.MixtralConfig(**GROUPED, num_local_experts=4)),
    "gpt-j": lambda: tf.GPTJForCausalLM(tf.GPTJConfig(**GPT, rotary_dim=4)),
    "granite-moe": lambda: tf.GraniteMoeForCausalLM(
        tf.GraniteMoeConfig(**GROUPED, num_local_experts=4, residual_multiplier=0.3, logits_scaling=3.0)
    ),
}


def network(kind: str, sharpen: float = 6.0):
    """Sharp matrices, biases that are not zero, norms that are not one."""
    torch.manual_seed(0)
    hf = BUILT[kind]().eval()
    with torch.no_grad():
        for name, parameter in hf.named_parameters():
            if parameter.ndim >= 2:
                parameter.mul_(sharpen)
            elif "bias" in name:
                parameter.normal_(0, 0.3)
            else:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return hf


@cache
def model(kind: str) -> Model:
    return models.wrap_model(network(kind), tokenizer(), kind)
