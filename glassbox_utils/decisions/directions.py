"""One direction of the stream at the carrier: what of a gap goes along it, and what comes back when it is pushed in.

Fitted on the choose part (the difference of the groups' means), judged on other people.
"""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from glassbox_utils.core.devices import like, result
from glassbox_utils.core.interventions import edits
from glassbox_utils.core.models import Model, Site, check_layer
from glassbox_utils.core.statistics import Interval
from glassbox_utils.decisions import locate, scoring, units
from glassbox_utils.decisions.arms import Arm, levels
from glassbox_utils.decisions.pairs import Pairs, rows


def carried_along(model: Model, choose: Pairs, report: Pairs, layer: int, seed: int = 0) -> Interval:
    """Share of the gap that one direction after a layer brings: the plainest rival of a feature of an SAE there.

    The donor's coordinate along the difference of the means (at the carrier, of ``choose``) is put into the own prompts
    of ``report``, at the carrier and after it; all else stays.
    """
    stream, unit = units.stream(model, [check_layer(model, layer)]), (layer, 0)
    axis = levels(model, choose, stream, [unit], ["carrier"]).axis[0]
    ways = [locate.Condition("own"), locate.Condition("donor"), locate.Condition("own", (
        locate.Put(stream, [unit], axis=axis),))]  # fmt: skip
    own, donor, along = locate.patched(model, report, ways)
    return locate.share(along - own, donor - own, report.clusters, seed)


def pushes(
    model: Model, choose: Pairs, layer: int, seed: int = 0, draws: int = 1
) -> dict[str, Float[Tensor, " d_model"]]:
    """``difference``: the groups' mean difference at the carrier after a layer, donor to own; ``random`` (of several
    draws ``random 0``, ``random 1``, ...): vectors of the same length, the control."""
    means = levels(model, choose, units.stream(model, [check_layer(model, layer)]), [(layer, 0)], ["carrier"])
    push = (means.own - means.donor)[0]
    noise = torch.randn(draws, len(push), generator=torch.Generator().manual_seed(seed))
    noise = noise / noise.norm(dim=-1, keepdim=True) * push.norm()
    names = ["random"] if draws == 1 else [f"random {i}" for i in range(draws)]
    return {"difference": push, **dict(zip(names, noise, strict=True))}


@torch.no_grad()
def reactivated(
    model: Model,
    pairs: Pairs,
    some_arms: Sequence[Arm],
    layer: int,
    push: Mapping[str, Float[Tensor, " d_model"]],
    strengths: Sequence[float] = (0.0, 1.0, 2.0),
    batch_size: int = 12,
) -> dict[tuple[str, str, float], Float[Tensor, " n"]]:
    """Logits of the donor's prompts with a vector added at the carrier after a layer, under each arm.

    (arm, name of the vector, strength) -> [n]. With the groups' mean difference (donor to own) as the vector this asks
    whether a repair took the mechanism out or only what fed it: what share of decisions turns (cf. arXiv 2605.15217).
    A random vector of the same length is the control. Arms that read other cases or words are left out; one of other
    weights gets the same vectors as the model that it was trained from.
    """
    site, found = Site("resid_post", check_layer(model, layer)), {}
    for arm in [a for a in some_arms if a.kind in ("nothing", "units", "direction", "edit", "random", "weights")]:
        used = arm.model or model
        for name, vector in push.items():
            for strength in strengths:
                out = torch.zeros(len(pairs))
                for some in rows(used, pairs, batch_size):
                    where = some.places["carrier"][..., None]
                    add = lambda x, w=where, s=strength, v=vector: torch.where(w, x + s * like(v, x), x)  # noqa: E731
                    with edits(used, {site: add}), arm.on(used, True):
                        logits = scoring.final_logits(used, some.donor)
                    out[some.rows] = result(logits[:, pairs.tokens[0]] - logits[:, pairs.tokens[1]])
                found[arm.name, name, strength] = out
    return found


def turned(before: Float[Tensor, " n"], after: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """1 where the decision is another one, for each pair."""
    return ((before > 0) != (after > 0)).float()
