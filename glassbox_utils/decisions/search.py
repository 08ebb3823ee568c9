"""An audit that searches: what does a model hold against whom? Any model, any decision, nothing but its answers.

Half of the base cases choose among thousands of questions (``probes``), the other half confirms the few that were
chosen (``screening``), and asks more often about the names and places that were suspected: no case is in both. What is
*found*, *not found* or *not tested* is decided in ``judging``.
"""

import time
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float
from torch import Tensor

from glassbox_utils.core.arguments import whole
from glassbox_utils.core.devices import array
from glassbox_utils.core.errors import GlassboxError
from glassbox_utils.core.models import Model
from glassbox_utils.decisions import judging, scoring
from glassbox_utils.decisions import probes as asking
from glassbox_utils.decisions.cases import Case
from glassbox_utils.decisions.decision import Decision
from glassbox_utils.decisions.fields import DecisionError
from glassbox_utils.decisions.judging import BAR
from glassbox_utils.decisions.probes import Design
from glassbox_utils.decisions.refining import Half
from glassbox_utils.decisions.verdicts import Audit, Verdict

Scorer = Callable[[Sequence[Case], str], Float[Tensor, " n"]]
"""cases and the name of a template -> favourable minus unfavourable answer, in logits"""

N, VERSIONS, WORDINGS = 80, 12, 4
"""base cases, prompts of each in each wording, and wordings: 3,840 prompts"""
LEAST = 16
"""base cases, of which a half confirms: with fewer no question is answered"""
RESAMPLES = 40
TRIED = 4
"""cases by which it is seen whether a scorer decides in a template"""


def audit(
    model: Model,
    decision: Decision,
    n: int = N,
    seed: int = 0,
    templates: Sequence[str] | None = None,
    resamples: int = RESAMPLES,
    batch_size: int = 32,
) -> Audit:
    """What a model holds against whom in a decision; 48 prompts for each of ``n`` base cases (see ``search``).

    A model that does not decide in any template gets *not tested*. DecisionError for arguments that are none.
    """

    def scorer(cases: Sequence[Case], template: str) -> Tensor:
        return scoring.scores(model, decision, cases, template, batch_size)

    return search(scorer, decision, n, seed, templates, resamples)


def search(
    scorer: Scorer,
    decision: Decision,
    n: int = N,
    seed: int = 0,
    templates: Sequence[str] | None = None,
    resamples: int = RESAMPLES,
    limits: bool = True,
) -> Audit:
    """The audit of whatever gives scores.

    ``n`` base cases are drawn (all, if there are fewer) and halved. ``templates``: without, up to four are drawn; one
    in which the scorer refuses to answer (a GlassboxError) is left out. ``resamples``: of base cases and wordings, for
    the confidence (``Verdict.confidence``), without new prompts; 0 leaves it out. ``limits``: say the smallest effects
    that would have been found. Same seed, same audit. DecisionError for arguments that are none, and scores that are
    not finite.
    """
    whole("n", n, 1, DecisionError)
    whole("resamples", resamples, 0, DecisionError)
    begun, rng = time.monotonic(), np.random.default_rng(whole("seed", seed, 0, DecisionError))
    for name in templates or ():
        decision.template(name)
    cases = [decision.cases[i] for i in rng.permutation(len(decision.cases))[:n]]
    if len(cases) < LEAST:
        why = f"too few cases: {len(cases)}, and {LEAST} are needed. Give more cases, or a larger n."
        return untested(decision, why, len(cases), seed)
    names, refusal, calls = answering(scorer, decision, cases[:TRIED], list(templates or ()), rng)
    if not names:
        return untested(decision, f"The model does not answer the question. {refusal}", len(cases), seed)
    first, refusal = asked(scorer, asking.design(decision, cases[::2], names, VERSIONS, rng))
    if first is None:
        return untested(decision, f"The model does not answer the question. {refusal}", len(cases), seed)
    screen = judging.screened(decision, first)
    suspects = judging.suspects(decision, screen)
    names = list(first.design.templates)
    second, refusal = asked(scorer, asking.design(decision, cases[1::2], names, VERSIONS, rng, suspects))
    if second is None or second.design.templates != first.design.templates:
        return untested(decision, f"The model does not answer the question. {refusal}", len(cases), seed)
    verdicts, confirmed = judging.judge(decision, screen, second, resamples, rng, limits)
    return Audit(
        decision.title,
        verdicts,
        len(cases),
        tuple(names),
        calls + len(first.raw) + len(second.raw),
        time.monotonic() - begun,
        BAR,
        judging.moved(second.raw),
        judging.rewording(second),
        float((second.raw > 0).mean()),
        dict(screen.asked.sizes),
        confirmed,
        (tuple(c.id for c in cases[::2]), tuple(c.id for c in cases[1::2])),
        seed,
    )


def answering(
    scorer: Scorer, decision: Decision, cases: Sequence[Case], wanted: list[str], rng: np.random.Generator
) -> tuple[list[str], str, int]:
    """Templates in which the scorer decides, what it said in the last one where it does not, and prompts used."""
    names = list(decision.templates)
    kept, refusal, calls = [], "", 0
    for name in dict.fromkeys(wanted or [names[i] for i in rng.permutation(len(names))]):
        try:
            calls += len(scorer(cases, name))
            kept.append(name)
        except GlassboxError as reason:
            refusal = f"{name}: {reason}"
        if not wanted and len(kept) == WORDINGS:
            break
    return sorted(kept, key=names.index), refusal, calls


def asked(scorer: Scorer, of: Design) -> tuple[Half | None, str]:
    """Questions with their answers, in the templates in which there are any; and why there are none in another."""
    found, refusal = {}, ""
    for name, rows in of.by_template().items():
        try:
            scores = array(scorer([of.asked[i] for i in rows], name))
        except GlassboxError as reason:
            refusal = f"{name}: {reason}"
            continue
        if not np.isfinite(scores).all():
            raise DecisionError(
                f"In the template {name!r} {int((~np.isfinite(scores)).sum())} scores of {len(rows)} are not finite. "
                "Give a model that answers with numbers."
            )
        found[name] = scores.reshape(len(of.cases), of.versions)
    if not found:
        return None, refusal
    design, raw = of.only(tuple(found)), np.stack(list(found.values()), 1).ravel()
    return Half(design, raw, design.without_blocks(raw)), refusal


def untested(decision: Decision, why: str, n: int, seed: int) -> Audit:
    """An audit without an answer."""
    table = asking.subjects(decision)
    verdicts = tuple(Verdict(s, role, "not tested", reason=why) for s, (_, role) in table.items())
    return Audit(decision.title, verdicts, n, (), 0, 0.0, BAR, None, None, None, seed=seed)
