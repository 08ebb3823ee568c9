"""Toys whose concepts are known: how well do units follow them?"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def matched(
    code: Float[Tensor, "seed toy row unit"], truth: Float[Tensor, "seed toy row concept"]
) -> Float[Tensor, "seed toy"]:
    """Mean over concepts of the correlation with the unit that follows each best, on rows where something is present.

    The best of many units is chosen on the rows that are reported: compare with units that are chosen in the same way.
    """
    found = torch.zeros(truth.shape[:2])
    for seed, toy in torch.cartesian_prod(*map(torch.arange, found.shape)).tolist():
        some = truth[seed, toy].sum(-1) > 0
        a, b = (x[seed, toy][some] for x in (truth, code))
        a, b = (F.normalize(x - x.mean(0), dim=0) for x in (a, b))
        found[seed, toy] = (a.t() @ b).max(1).values.mean()
    return found
