"""Toys whose concepts are known: how do they lie in few numbers, and how well do units follow them?"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

SHORT, LONG, AGAINST = 0.2, 0.5, -0.9
"""length below which a concept counts as dropped, above which as kept, and the cosine below which two are opposite"""


class Geometry(NamedTuple):
    """How the concepts of each toy lie: their arrows are the columns of the matrix that squeezes them."""

    length: Float[Tensor, "seed toy concept"]
    dropped: Int[Tensor, "seed toy"]
    """concepts with an arrow shorter than SHORT"""
    kept: Int[Tensor, "seed toy"]
    """concepts with an arrow longer than LONG"""
    opposite: Int[Tensor, "seed toy"]
    """pairs of kept concepts that share a line, one at each end"""


def geometry(squeeze: Float[Tensor, "seed toy dimension concept"]) -> Geometry:
    """Lengths of the concepts' arrows, and how many are dropped, kept, and opposite to another one."""
    length, unit = squeeze.norm(dim=2), F.normalize(squeeze, dim=2)
    kept = length > LONG
    pairs = (unit.mT @ unit < AGAINST) & kept[..., None] & kept[..., None, :]
    return Geometry(length, (length < SHORT).sum(-1), kept.sum(-1), pairs.sum((-1, -2)) // 2)


@torch.no_grad()
def matched(
    code: Float[Tensor, "seed toy row unit"], truth: Float[Tensor, "seed toy row concept"]
) -> Float[Tensor, "seed toy concept"]:
    """For each concept the correlation with the unit that follows it best, on rows where something is present.

    The best of many units is chosen on the rows that are reported: compare with units that are chosen in the same way.
    """
    found = torch.zeros(truth.shape[0], truth.shape[1], truth.shape[3])
    for seed, toy in torch.cartesian_prod(*map(torch.arange, found.shape[:2])).tolist():
        some = truth[seed, toy].sum(-1) > 0
        a, b = (x[seed, toy][some] for x in (truth, code))
        a, b = (F.normalize(x - x.mean(0), dim=0) for x in (a, b))
        found[seed, toy] = (a.t() @ b).max(1).values
    return found
