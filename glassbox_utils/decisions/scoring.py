"""How a model decides: the difference of its two answers' logits at the position where it would answer.

A positive number is the favourable answer. Prompts are those of ``decision.render``, raw or through the chat template
of the model; words of free text that mark a turn for this model are refused (``core/chats.py``).
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from glassbox_utils.core import chats
from glassbox_utils.core.arguments import items, whole
from glassbox_utils.core.devices import result
from glassbox_utils.core.errors import GlassboxError
from glassbox_utils.core.models import Model
from glassbox_utils.core.text import Batch, tokenize
from glassbox_utils.decisions.cases import Case
from glassbox_utils.decisions.decision import Decision, render
from glassbox_utils.decisions.fields import DecisionError, Text

LEAST_SHARE = 0.2
"""of the probability at the decision position that the two answers together need: below it a model decides nothing
(a trained officer has .998 and more, the base model .0008 and less)"""
ADVICE = (
    "Give a model that was trained to decide (`glassbox train-officer FOLDER` trains one), or answers that this model "
    "gives to these prompts."
)


def prompts(model: Model, decision: Decision, cases: Sequence[Case], template: str | None = None) -> list[str]:
    """What the model reads for each case, up to the position of the answer.

    DecisionError for a template that does not exist or what is no case; ModelError for a chat that the model's template
    refuses, and for free text that holds one of its special tokens or marks of a turn.
    """
    form = decision.template(template)
    people = items("cases", cases, DecisionError, Case, word="Cases")
    free = [name for name, rule in decision.fields.items() if isinstance(rule, Text)]
    for words in sorted({str(case.values[name]) for case in people for name in free}):
        chats.check_words(model, words)
    texts = [render(decision, case, template) for case in people]
    return texts if form.chat is None else [chats.chat(model, text, form.system) + form.opening for text in texts]


def answer_tokens(model: Model, decision: Decision, prompt: str) -> tuple[int, int]:
    """Token ids of the two answers after a prompt. DecisionError if this model can't tell them apart by the first."""
    return first_tokens(model, prompt, decision.answers)


def scores(
    model: Model,
    decision: Decision,
    cases: Sequence[Case],
    template: str | None = None,
    batch_size: int = 32,
    check: bool = True,
) -> Float[Tensor, " n"]:
    """Favourable minus unfavourable answer, in logits, for each case. Active interventions apply.

    DecisionError if the model does not decide there: if in one case the two answers together have less than LEAST_SHARE
    of the probability (``check=False`` leaves that question to the caller).
    """
    texts = prompts(model, decision, cases, template)
    tokens = answer_tokens(model, decision, texts[0])
    ask = lambda logits: check_share(model, logits, tokens, decision.answers)  # noqa: E731
    return differences(model, texts, tokens, batch_size, ask if check else None)


def decided(model: Model, decision: Decision, cases: Sequence[Case], template: str | None = None) -> Bool[Tensor, " n"]:
    """True where the model gives the favourable answer; errors as in ``scores``."""
    return scores(model, decision, cases, template) > 0


# --- from texts to numbers ----------------------------------------------------------------------------


def first_tokens(
    model: Model, asked: str, answers: tuple[str, str], error: type[GlassboxError] = DecisionError
) -> tuple[int, int]:
    """Token ids of two answers after the text ``asked``: the whole word if it is one token, else its first.

    ``error`` if they begin alike, or if an answer's beginning merges with the end of the text into one token, so that
    no token of its own could be read.
    """
    before = model.tokenizer(asked, add_special_tokens=False)["input_ids"]
    found = []
    for answer in answers:
        both = model.tokenizer(asked + answer, add_special_tokens=False)["input_ids"]
        if both[: len(before)] != before or len(both) == len(before):
            raise error(
                f"The answer {answer!r} is empty, or merges with the end of {asked.strip().splitlines()[-1][-40:]!r} "
                "in this model's tokenizer. Choose another spelling, such as one with a space in front."
            )
        found.append(both[len(before)])
    first, second = found
    if first == second:
        raise error(f"{answers[0]!r} and {answers[1]!r} begin with the same token of this model. Choose others.")
    return first, second


def share(logits: Float[Tensor, "n vocab"], tokens: tuple[int, int]) -> Float[Tensor, " n"]:
    """Probability of the two answers together."""
    return result(logits.float().softmax(-1)[:, list(tokens)].sum(-1))


def check_share(
    model: Model,
    logits: Float[Tensor, "n vocab"],
    tokens: tuple[int, int],
    answers: tuple[str, str],
    error: type[GlassboxError] = DecisionError,
    advice: str = ADVICE,
    least: float = LEAST_SHARE,
) -> None:
    """``error`` if at one of the decision positions the two answers together have less than ``least`` of the
    probability: their difference would say nothing."""
    together = share(logits, tokens)
    low = ~(together >= least)  # so that NaN is low
    if low.any():
        raise error(
            f"{model.name} does not decide here: {answers[0]!r} and {answers[1]!r} together have "
            f"{float(together.min()):.2g} of the probability at the decision position ({int(low.sum())} of "
            f"{len(together)} texts are below the bar of {least}). {advice}"
        )


@torch.no_grad()
def differences(
    model: Model,
    texts: Sequence[str],
    tokens: tuple[int, int],
    batch_size: int = 32,
    check: Callable[[Float[Tensor, "n vocab"]], None] | None = None,
    error: type[GlassboxError] = DecisionError,
) -> Float[Tensor, " n"]:
    """The first token's logit minus the second's at the end of each text; ``check`` sees the logits of each batch."""
    whole("batch_size", batch_size, 1, error)
    out = torch.zeros(len(texts))
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # texts of one length share a batch: little padding
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        logits = final_logits(model, tokenize(model, [texts[i] for i in rows]))
        if check is not None:
            check(logits)
        out[rows] = result(logits[:, tokens[0]] - logits[:, tokens[1]])
    return out


def final_logits(model: Model, batch: Batch) -> Float[Tensor, "batch vocab"]:
    """Logits at the decision position."""
    return model.hf(**batch.inputs, logits_to_keep=1, use_cache=False).logits[:, -1]
