"""What the decision position looks at: attention to each field. Rung 1, observed; it is never a reason.

Which tokens hold a field's value is found through the template's placeholders (``placing``).
"""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from glassbox_utils.attention.patterns import over_patterns
from glassbox_utils.core.devices import beside
from glassbox_utils.core.models import Model
from glassbox_utils.core.text import Batch, tokenize
from glassbox_utils.decisions import placing, scoring
from glassbox_utils.decisions.cases import Case
from glassbox_utils.decisions.decision import Decision, swapped


def field_masks(
    model: Model, decision: Decision, cases: Sequence[Case], template: str
) -> tuple[Batch, Bool[Tensor, "n field pos"]]:
    """The prompts as tokens, and which of them hold (a part of) the value of each field.

    ModelError if the model's chat template changes the words of a case, or the tokenizer says no offsets.
    """
    texts = scoring.prompts(model, decision, cases, template)
    batch = tokenize(model, texts)
    mask = torch.zeros(len(cases), len(decision.fields), batch.input_ids.shape[1], dtype=torch.bool)
    order = {name: j for j, name in enumerate(decision.fields)}
    for i, (case, text, tokens) in enumerate(zip(cases, texts, placing.offsets(model, texts), strict=True)):
        shift = mask.shape[2] - len(tokens)
        for name, start, end in placing.in_prompt(model, decision, case, template, text):
            inside = [shift + k for k, (left, right) in enumerate(tokens) if left < end and right > start]
            mask[i, order[name], inside] = True
    return batch, mask


def attention_to_fields(
    model: Model, decision: Decision, cases: Sequence[Case], template: str
) -> Float[Tensor, "n field"]:
    """Share of the decision position's attention to the fields that each field's tokens get: mean over layers and
    heads, sum 1 in each row. ModelError for a model whose patterns can't be read."""
    batch, mask = field_masks(model, decision, cases, template)

    def reduce(pattern: Tensor, where: slice) -> Tensor:
        return torch.einsum("bhp,bfp->bf", pattern[:, :, -1].float(), beside(mask[where], pattern).float())

    looked = over_patterns(model, batch, reduce).sum(1)
    return looked / looked.sum(-1, keepdim=True).clamp_min(1e-12)


def moved_by_field(
    model: Model, decision: Decision, cases: Sequence[Case], template: str, seed: int = 0, values: int = 2
) -> Float[Tensor, "case field"]:
    """How far each case's decision moves, up or down, when one field has another value of the decision's cases, logits.

    ``values`` other values are drawn for every case and field, the mean of them counts; a field of which there is one
    value in the table moves nothing.
    """
    rng, now = np.random.default_rng(seed), scoring.scores(model, decision, cases, template, check=False)
    moved = []
    for field in decision.fields:
        known = [[c[field] for c in decision.cases if c[field] != one[field]] or [one[field]] for one in cases]
        steps = []
        for _ in range(values):
            given = [swapped(decision, a, field, b[rng.integers(len(b))]) for a, b in zip(cases, known, strict=True)]
            steps.append((scoring.scores(model, decision, given, template, check=False) - now).abs())
        moved.append(torch.stack(steps).mean(0))
    return torch.stack(moved, 1)
