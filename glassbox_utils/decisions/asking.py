"""Asking about a case and its edits: in every template, each prompt once, and NaN where there is no answer.

An edit may lead a model to where it does not decide (an income that nobody has). ``scoring.scores`` ends there with an
error, which is right for the case itself; here such a prompt gets NaN, and the others go on.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from torch import Tensor

from glassbox_utils.core.arguments import whole
from glassbox_utils.core.devices import array, result
from glassbox_utils.core.errors import GlassboxError
from glassbox_utils.core.models import Model
from glassbox_utils.core.text import tokenize
from glassbox_utils.decisions import scoring
from glassbox_utils.decisions.cases import Case
from glassbox_utils.decisions.decision import Decision
from glassbox_utils.decisions.fields import DecisionError, Value

Scorer = Callable[[Sequence[Case], str], Float[Tensor, " n"]]
"""cases and the name of a template -> favourable minus unfavourable answer in logits, NaN where there is no answer"""
Ask = Callable[[Sequence[Case], str], Float[NDArray, " n"]]
Memory = dict[tuple[str, tuple[Value, ...]], float]


def scorer(model: Model, decision: Decision, batch_size: int = 32) -> Scorer:
    """The logits of ``scoring.scores``, and NaN for prompts where the two answers together have less than
    ``scoring.LEAST_SHARE`` of the probability. DecisionError as in ``scoring.prompts`` and ``answer_tokens``."""
    whole("batch_size", batch_size, 1, DecisionError)

    @torch.no_grad()
    def score(cases: Sequence[Case], template: str) -> Tensor:
        texts = scoring.prompts(model, decision, cases, template)
        yes, no = scoring.answer_tokens(model, decision, texts[0])
        out = torch.full((len(texts),), torch.nan)
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # as in scoring: little padding
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            logits = scoring.final_logits(model, tokenize(model, [texts[i] for i in rows]))
            heard = scoring.share(logits, (yes, no)) >= scoring.LEAST_SHARE
            out[rows] = torch.where(heard, result(logits[:, yes] - logits[:, no]), torch.nan)
        return out

    return score


def remembered(score: Scorer, memory: Memory | None = None) -> Ask:
    """The same as numpy numbers, with each prompt asked once; ``memory`` fills up with what was asked."""
    known: Memory = {} if memory is None else memory

    def ask(cases: Sequence[Case], template: str) -> NDArray:
        keys = [(template, tuple(case.values.values())) for case in cases]
        new = {key: case for key, case in zip(keys, cases, strict=True) if key not in known}
        if new:
            known.update(zip(new, array(score(list(new.values()), template)).tolist(), strict=True))
        return np.array([known[key] for key in keys], dtype=float)

    return ask


def across(ask: Ask, cases: Sequence[Case], templates: Sequence[str]) -> Float[NDArray, "case template"]:
    """Every case in every template."""
    return np.stack([ask(cases, name) for name in templates], 1)


def answering(ask: Ask, decision: Decision, case: Case) -> tuple[dict[str, float], dict[str, str]]:
    """Template -> score of the case, where it is decided; and template -> why not, where it is not."""
    scores, silent = {}, {}
    for name in decision.templates:
        try:
            score = float(ask([case], name)[0])
        except GlassboxError as reason:  # such as a chat that the model's template refuses
            silent[name] = str(reason)
            continue
        if np.isfinite(score):
            scores[name] = score
        else:
            silent[name] = f"the answers have less than {scoring.LEAST_SHARE:.0%} of the probability there"
    return scores, silent


def chosen_template(decision: Decision, scores: Mapping[str, float], wanted: str | None, reason: str) -> str:
    """The template that the decision is explained in: the one wanted, else the first that answers."""
    if wanted is not None:
        decision.template(wanted)
    name = next(iter(scores), None) if wanted is None else wanted
    if name is None or name not in scores:
        there = f" It decides in: {', '.join(scores)}." if scores else ""
        raise DecisionError(
            f"This model does not decide the case{'' if wanted is None else f' in the template {wanted!r}'}: "
            f"{reason[:300]}.{there} {scoring.ADVICE}"
        )
    return name


def wording_noise(scores: Float[NDArray, "case template"]) -> float | None:
    """How far other words for the same facts move a case against the others: standard deviation in logits.

    What is left of the scores without the mean of each case and of each template (two-way layout). None with fewer
    than two templates or three cases that all of them decide.
    """
    x = scores[np.isfinite(scores).all(1)]
    if x.shape[1] < 2 or len(x) < 3:
        return None
    rest = x - x.mean(0, keepdims=True) - x.mean(1, keepdims=True) + x.mean()
    return float(np.sqrt((rest**2).sum() / ((len(x) - 1) * (x.shape[1] - 1))))


def turned(scores: Float[NDArray, " n"], base: Float[NDArray, " n"]) -> Bool[NDArray, " n"]:
    """Where there are two answers, and they differ."""
    return np.isfinite(scores) & np.isfinite(base) & ((scores > 0) != (base > 0))
