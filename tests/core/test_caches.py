"""Keys and values by either name: what a hook asks for must be what the installed transformers hands on."""

import pytest
import torch

from glassbox_utils.core import caches
from glassbox_utils.core.text import tokenize


class Renamed:
    def forward(self, input_ids=None, cache=None):
        """As of transformers 5.24."""


class Earlier:
    def forward(self, input_ids=None, past_key_values=None):
        """Before."""


def test_the_name_is_the_one_that_the_model_takes():
    assert caches.handed(Renamed(), 1) == {"cache": 1} and caches.handed(Earlier(), 1) == {"past_key_values": 1}


@pytest.mark.parametrize("name", caches.NAMES)
def test_a_cache_is_found_by_either_name(name):
    assert caches.among({name: 3, "input_ids": 4}) == 3 and caches.among({name: None}) is None
    assert caches.left_by({name: 3}) == 3 and caches.left_by({"logits": 1}) is None


def test_the_second_pass_hands_on_what_the_first_one_left(model):
    batch, seen = tokenize(model, ["w1 w2 w3"]), []
    hook = model.hf.register_forward_pre_hook(lambda m, a, k: seen.append(caches.among(k)), with_kwargs=True)
    with torch.no_grad():
        first = caches.left_by(model.hf(batch.input_ids, use_cache=True))
        model.hf(batch.input_ids[:, -1:], **caches.handed(model.hf, first))
        model.hf.generate(batch.input_ids, max_new_tokens=2, do_sample=False, eos_token_id=None, pad_token_id=0)
    hook.remove()
    assert seen[1] is first and seen[-1].get_seq_length() > batch.input_ids.shape[1]
