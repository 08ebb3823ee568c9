"""Tiny random models of three architectures over a vocabulary of 31 words, and what tests do with them."""

import tiny
import torch
from wired import VOCABULARY, tokenizer

from glassbox_utils.core import models
from glassbox_utils.core.interventions import edit
from glassbox_utils.core.models import Site
from glassbox_utils.core.text import tokenize
from glassbox_utils.steering.vectors import ControlVector, Direction, random_direction

WIDTH, LAYERS = 32, 3
PROMPTS = ["w1 w2 w3", "w4", "w5 w6 w7 w8 w9 w10", "w11 w12"]


def build(kind):
    hf = tiny.network(kind, VOCABULARY, LAYERS, WIDTH, 4, 64, sharpen=4, head_dim=8, window=8, eos=None)
    hf.generation_config.eos_token_id = None  # tiny random models would stop anywhere
    return models.wrap_model(hf, tokenizer(), name=kind)


def direction(model, layer=1, seed=0, scale=3.0):
    blank = Direction(torch.ones(WIDTH), layer, scale, model_hash=model.hash, model_name=model.name)
    return random_direction(blank, seed)


def several(model, seed=0):
    """A control vector after the layers 0 and 2."""
    return ControlVector((direction(model, 0, seed), direction(model, 2, seed + 1, scale=2.0)))


def logits(model, texts=PROMPTS):
    with torch.no_grad():
        return model.hf(**tokenize(model, texts)._asdict()).logits


def untouched(model, before):
    """The model is what it was, to the bit, and no hook is left."""
    assert torch.equal(logits(model), before)
    for tree in (model.hf, model.twin):
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in tree.modules())


def fails_at(n):
    """A function for ``edit`` that raises in its n-th pass."""
    passes = 0

    def fail(x):
        nonlocal passes
        passes += 1
        if passes == n:
            raise RuntimeError("in the middle")
        return x

    return fail


def record(model, layer, run):
    """Residual stream after ``layer`` in every forward pass of ``run``, as the later layers see it."""
    seen = []

    def look(x):
        seen.append(x.clone())
        return x

    with edit(model, Site("resid_post", layer), look):
        run()
    return seen
