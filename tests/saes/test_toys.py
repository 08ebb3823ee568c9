"""Concepts that are known, followed by units that are known."""

import torch

from glassbox_utils.saes.store import card_of
from glassbox_utils.saes.toys import matched


def test_a_unit_that_is_the_concept_is_found_and_noise_is_not():
    draw = torch.Generator().manual_seed(0)
    truth = torch.rand(2, 3, 2000, 4, generator=draw) * (torch.rand(2, 3, 2000, 4, generator=draw) < 0.2)
    assert torch.allclose(matched(3 * truth.flip(-1), truth), torch.ones(2, 3, 4), atol=1e-3), (
        "another order, another scale"
    )
    noise = matched(torch.rand(2, 3, 2000, 4, generator=draw), truth)
    assert noise.shape == (2, 3, 4) and bool((noise < 0.1).all())
    silent = matched(torch.zeros(2, 3, 2000, 4), truth)
    assert bool((silent == 0).all())


def test_a_card_is_read_by_name_and_is_empty_for_what_somebody_else_made():
    assert card_of("own-8192-l14")["d_sae"] == 8192
    assert card_of("gpt2-small-res-jb/blocks.8.hook_resid_pre") == {}
