"""What the decision position looks at: attention to each field. Rung 1, observed; it is never a reason.

Which tokens hold a field's value is found through the template's placeholders, also inside a chat.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from glassbox_utils.attention.patterns import over_patterns
from glassbox_utils.core.devices import beside
from glassbox_utils.core.models import Model, ModelError
from glassbox_utils.core.text import Batch, tokenize
from glassbox_utils.decisions import scoring
from glassbox_utils.decisions.cases import Case
from glassbox_utils.decisions.decision import PLACEHOLDER, Decision, render


def spans(decision: Decision, case: Case, template: str) -> dict[str, list[tuple[int, int]]]:
    """Field -> (first character, one past the last) of its value, wherever ``render`` writes it."""
    found: dict[str, list[tuple[int, int]]] = {name: [] for name in decision.fields}
    words, at, end = decision.template(template).words, 0, 0
    for match in PLACEHOLDER.finditer(words):
        at += match.start() - end
        end = match.end()
        value = match[0][0] if match[1] is None else str(case.values[match[1]])
        if match[1] is not None:
            found[match[1]].append((at, at + len(value)))
        at += len(value)
    return found


def field_masks(
    model: Model, decision: Decision, cases: Sequence[Case], template: str
) -> tuple[Batch, Bool[Tensor, "n field pos"]]:
    """The prompts as tokens, and which of them hold (a part of) the value of each field.

    ModelError if the model's chat template changes the words of a case, or the tokenizer says no offsets.
    """
    texts = scoring.prompts(model, decision, cases, template)
    batch = tokenize(model, texts)
    mask = torch.zeros(len(cases), len(decision.fields), batch.input_ids.shape[1], dtype=torch.bool)
    for i, (case, text) in enumerate(zip(cases, texts, strict=True)):
        begins = _begin(model, text, render(decision, case, template))
        offsets = _offsets(model, text)
        shift = mask.shape[2] - len(offsets)
        for j, places in enumerate(spans(decision, case, template).values()):
            for start, end in places:
                inside = [
                    k for k, (left, right) in enumerate(offsets) if left < begins + end and right > begins + start
                ]
                mask[i, j, [shift + k for k in inside]] = True
    return batch, mask


def _begin(model: Model, text: str, words: str) -> int:
    """Where the words of a case begin in a prompt; chat templates may cut spaces off their ends."""
    place = text.rfind(words.strip())
    if place < 0:
        raise ModelError(f"The chat template of {model.name} changes the words of a case: its fields can't be found.")
    return place - (len(words) - len(words.lstrip()))


def _offsets(model: Model, text: str) -> list[tuple[int, int]]:
    try:
        return model.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    except NotImplementedError as reason:  # tokenizers that are written in Python
        raise ModelError(f"The tokenizer of {model.name} does not say where its tokens stand in a text.") from reason


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
