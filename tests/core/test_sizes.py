"""How many cases a notebook takes of a model."""

from types import SimpleNamespace

import pytest
import tiny
import torch
from refusals import refused

from glassbox_utils.core.models import Site, wrap_model
from glassbox_utils.core.sizes import HEAD_WEIGHTS, WEIGHTS, cases


def sized(weights: float, layers: int = 2, heads: int = 4, device: str = "cpu"):
    """What ``cases`` reads of a model: as many numbers, without their memory."""
    block = torch.nn.Linear(1, 1, bias=False)
    block.weight = torch.nn.Parameter(torch.empty(1).expand(int(weights / layers)), requires_grad=False)
    whole = SimpleNamespace(parameters=lambda: [block.weight] * layers)
    return SimpleNamespace(
        hf=whole, n_layers=layers, n_heads=heads, device=torch.device(device),
        sites={Site("resid_pre", layer): (block, "in") for layer in range(layers)},
    )  # fmt: skip


def test_a_small_model_takes_all_and_a_large_one_its_share():
    small = wrap_model(tiny.network("llama", len(tiny.tokenizer()), 4), tiny.tokenizer(), "random")
    assert cases(small, 64, 3.5, stated=3.5) == 64 == cases(small, 64, 3.5, stated=3.5, of="every head")
    large = sized(4 * WEIGHTS)
    assert cases(large, 64, 3, stated=3) == 16 and cases(large, 64, 12, stated=3) == 64
    assert cases(large, 64, 3, stated=3, least=20) == 20 and cases(large, 10, 3, stated=3, least=20) == 10
    assert cases(sized(4 * WEIGHTS, device="cuda"), 64, 3, stated=3) == 64


def test_fewer_minutes_take_fewer_cases():
    model = sized(WEIGHTS)
    assert [cases(model, 60, minutes, stated=2) for minutes in (2, 1, 0.5)] == [60, 30, 15]


def test_of_every_head_counts_heads_and_the_weights_of_the_layers():
    model = sized(HEAD_WEIGHTS / 8, layers=2, heads=8)
    assert cases(model, 60, 2, stated=2, of="every head") == 30


@pytest.mark.parametrize(("full", "minutes"), [(0, 2), (2.5, 2), (10, 0), (10, float("nan")), (10, "2")])
def test_numbers_that_are_none_are_refused(full, minutes):
    assert "Allowed" in refused(lambda: cases(sized(10), full, minutes, stated=2))
