"""Small models whose heads are known because their weights were set by hand."""

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from glassbox_utils.core import models
from glassbox_utils.core.models import Model

VOCABULARY = 32
POSITIONS = 32
TOKEN, POSITION, BEFORE, OUTPUT = (slice(32 * i, 32 * (i + 1)) for i in range(4))
"""the subspaces of the residual stream, 256 wide"""

PREVIOUS, DUPLICATE, INDUCTION = (0, 1), (0, 2), (1, 3)


def tokenizer() -> PreTrainedTokenizerFast:
    words = {"<s>": 0, **{f"w{i}": i for i in range(1, VOCABULARY)}}
    inner = Tokenizer(WordLevel(words, unk_token="<s>"))
    inner.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="<s>", pad_token="<s>")


def wired_gpt2() -> Model:
    """Two layers x four heads: 0.1 looks one back, 0.2 at earlier copies, 1.3 completes ``A B ... A``; five do nothing.

    The induction circuit is the textbook one: 0.1 writes the token before into its own subspace, 1.3 searches
    there for the current token, and copies what it finds to the output.
    """
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=POSITIONS, n_embd=256, n_layer=2, n_head=4, tie_word_embeddings=False,
        bos_token_id=0, eos_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    hf = GPT2LMHeadModel(config)
    with torch.no_grad():
        for name, parameter in hf.named_parameters():
            parameter.fill_(1.0 if "ln_" in name and name.endswith("weight") else 0.0)
        eye = torch.eye(32)
        hf.transformer.wte.weight[:, TOKEN] = eye
        hf.transformer.wpe.weight[:, POSITION] = eye
        hf.lm_head.weight[:, OUTPUT] = eye
        one_back = torch.diag(torch.ones(31), -1)  # row p (the query's position) -> column p - 1
        _wire(hf, PREVIOUS, q=[(POSITION, one_back)], k=[(POSITION, eye)], v=(TOKEN, eye), out=(BEFORE, eye / 11))
        itself = -eye  # a copy earlier, but not the token itself
        _wire(hf, DUPLICATE, q=[(TOKEN, eye), (POSITION, itself)], k=[(TOKEN, eye), (POSITION, eye)])
        _wire(hf, INDUCTION, q=[(TOKEN, eye)], k=[(BEFORE, eye)], v=(TOKEN, eye), out=(OUTPUT, eye))
    return models.wrap_model(hf, tokenizer(), name="wired-gpt2")


def _wire(hf, head, q, k, v=None, out=None):
    """Read subspaces into the head's query, key and value (32 dimensions each), write its value to another."""
    layer, index = head
    attention, start = hf.transformer.h[layer].attn, 64 * index
    for offset, parts in ((0, q), (256, k)):
        for i, (subspace, matrix) in enumerate(parts):
            column = offset + start + 32 * i
            attention.c_attn.weight[subspace, column : column + 32] = matrix
    if v is not None:
        attention.c_attn.weight[v[0], 512 + start : 512 + start + 32] = v[1]
        attention.c_proj.weight[start : start + 32, out[0]] = out[1]


def copying_llama(copying: int = 2) -> Model:
    """One grouped-query layer, 4 heads on 2 key-value heads; only ``copying`` writes back the token it reads.

    Key-value head 1 carries the token, key-value head 0 carries a shifted token: with the wrong group, or
    without the output weights, another head would win.
    """
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=128, intermediate_size=8, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=64, tie_word_embeddings=False,
    )  # fmt: skip
    hf = LlamaForCausalLM(config)
    eye = torch.eye(32)
    with torch.no_grad():
        for name, parameter in hf.named_parameters():
            parameter.fill_(1.0 if "norm" in name else 0.0)
        hf.model.embed_tokens.weight[:, :32] = eye
        hf.lm_head.weight[:, 64:96] = eye
        attention = hf.model.layers[0].self_attn
        attention.v_proj.weight[:32, :32] = eye.roll(1, 0)
        attention.v_proj.weight[32:, :32] = eye
        group = copying // 2
        other = 2 * (1 - group)
        for head in (copying, other):
            attention.o_proj.weight[64:96, 32 * head : 32 * head + 32] = eye
    return models.wrap_model(hf, tokenizer(), name="copying-llama")
