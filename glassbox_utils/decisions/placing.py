"""Where the values of a case stand in what a model reads: characters of the words, of the prompt, and their tokens."""

from collections.abc import Sequence

from glassbox_utils.core.models import Model, ModelError
from glassbox_utils.decisions.cases import Case
from glassbox_utils.decisions.decision import PLACEHOLDER, Decision, render

Span = tuple[str, int, int]
"""a field, the first character of its value, and one past the last"""


def spans(decision: Decision, case: Case, template: str | None = None) -> list[Span]:
    """Every value in the words of ``decision.render``, in order."""
    words, found, at, done = decision.template(template).words, [], 0, 0
    for match in PLACEHOLDER.finditer(words):
        at += match.start() - done
        done = match.end()
        length = len(match[0][0] if match[1] is None else str(case.values[match[1]]))
        if match[1] is not None:
            found.append((match[1], at, at + length))
        at += length
    return found


def in_prompt(model: Model, decision: Decision, case: Case, template: str, prompt: str) -> list[Span]:
    """The same in one of ``scoring.prompts``, behind what a chat puts in front (it may cut spaces off the words' ends).

    ModelError if the model's chat template changes the words.
    """
    words = render(decision, case, template)
    place = prompt.rfind(words.strip())
    if place < 0:
        raise ModelError(
            f"The chat template of {model.name} changes the words of a case: its fields can't be found. Give a "
            "template of raw text."
        )
    start = place - (len(words) - len(words.lstrip()))
    return [(name, start + first, start + past) for name, first, past in spans(decision, case, template)]


def offsets(model: Model, prompts: Sequence[str]) -> list[list[tuple[int, int]]]:
    """Of each prompt's tokens: the first character, and one past the last. ModelError for a tokenizer without them."""
    try:
        return model.tokenizer(list(prompts), add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    except NotImplementedError as reason:  # tokenizers that are written in Python
        raise ModelError(
            f"The tokenizer of {model.name} does not say which characters a token stands for. Load its fast version "
            "(tokenizer.json)."
        ) from reason
