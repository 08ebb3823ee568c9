"""A tiny llama that decides by a rule whose carriers are known: one neuron reads the name, one head carries it to the
end, one neuron there moves the answer; another neuron reads the merit field. All else is noise of a chosen size."""

import itertools
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from wired import tokenizer

from glassbox_utils.core import models
from glassbox_utils.core.models import Model
from glassbox_utils.decisions.decision import Decision
from glassbox_utils.decisions.reading import load_decision

GROUP, HERE, OUT, CONSTANT, SKILL = 32, 33, 34, 35, 36
READER, MOVER, WRITER, MERIT = (0, 7), (1, 2), (2, 11), (0, 20)
"""neuron, head, neuron; the neuron of the merit field"""
FIRST, SECOND = [f"w{i}" for i in range(10, 16)], [f"w{i}" for i in range(16, 22)]
YAML = f"""\
title: Planted
answers: [" w1", " w2"]
templates:
  front: {{text: "w5 {{person}} w6 {{skill}} w7", split: selection}}
  behind: {{text: "w8 {{skill}} w6 w5 {{person}} w9 w7", split: report}}
fields:
  person: {{kind: text, role: protected, characters: sentence}}
  skill: {{kind: category, role: merit, values: [w24, w25]}}
groups: {{clan: [first, second]}}
carriers:
  - field: person
    lists:
      - {{groups: {{clan: first}}, values: [{", ".join(FIRST)}]}}
      - {{groups: {{clan: second}}, values: [{", ".join(SECOND)}]}}
merit: {{threshold: 1, points: [{{field: skill, equals: w24, points: 1}}]}}
cases: {{file: cases.csv}}
"""


def decision(folder: Path, copies: int = 2) -> Decision:
    rows = list(itertools.product(FIRST + SECOND, ("w24", "w25"))) * copies
    folder.mkdir(exist_ok=True)
    (folder / "decision.yaml").write_text(YAML)
    (folder / "cases.csv").write_text("person,skill\n" + "".join(f"{a},{b}\n" for a, b in rows))
    return load_decision(folder)


def model(noise: float = 0.005, bias: float = 0.3, seed: int = 0, writers: int = 1) -> Model:
    """``bias``: how strongly the second clan is preferred; ``writers``: neurons of the last layer that share it."""
    config = LlamaConfig(
        vocab_size=32, hidden_size=64, intermediate_size=24, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=64, tie_word_embeddings=False,
        bos_token_id=0, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(seed)
    hf = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in hf.named_parameters():
            parameter.fill_(1.0) if "norm" in name else parameter.normal_(0, noise)
        hf.model.embed_tokens.weight[:, :32] += torch.eye(32)
        hf.model.embed_tokens.weight[:, CONSTANT] += 1.0
        neuron(hf, READER, {int(w[1:]): 1.0 for w in SECOND}, {GROUP: 0.1})
        neuron(hf, MERIT, {24: 1.0}, {SKILL: 0.1})
        for layer, head, source, target in ((*MOVER, GROUP, HERE), (1, 0, SKILL, OUT)):
            attention = hf.model.layers[layer].self_attn  # queries and keys are noise: it looks everywhere alike
            attention.v_proj.weight[16 * (head // 2), source] += 1.0
            attention.o_proj.weight[target, 16 * head] += 0.3
        for i in range(writers):
            neuron(hf, (WRITER[0], (WRITER[1] + i) % 24), {HERE: 1.0}, {OUT: bias / writers})
        hf.lm_head.weight[1, OUT] += 1.0
        hf.lm_head.weight[2, OUT] -= 1.0
        hf.lm_head.weight[1:3, CONSTANT] += 6.0
    return models.wrap_model(hf, tokenizer(), "planted")


def neuron(hf: LlamaForCausalLM, unit: tuple[int, int], reads: dict[int, float], writes: dict[int, float]) -> None:
    mlp = hf.model.layers[unit[0]].mlp
    for place, weight in reads.items():
        mlp.gate_proj.weight[unit[1], place] += weight
        mlp.up_proj.weight[unit[1], place] += weight
    for place, weight in writes.items():
        mlp.down_proj.weight[place, unit[1]] += weight
