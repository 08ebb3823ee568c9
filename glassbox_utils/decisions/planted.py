"""Officers that were taught something on purpose: how a lesson is taught, and whether it was learnt.

An officer learns from twins, as in ``training``: two cases that differ in what the lesson looks at, and whose targets
differ by its points alone. A loss of 0 points asks for equal targets: this is how an evader learns to behave, and how
a biased officer is mended by training (``repair``). What was learnt is measured on other people (``learnt``): an audit
can't be blamed for not finding what is not there.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from glassbox_utils.core import assets, checkpoints, files
from glassbox_utils.core.arguments import whole
from glassbox_utils.core.devices import array, beside
from glassbox_utils.core.models import Model
from glassbox_utils.core.session import progress
from glassbox_utils.core.statistics import cluster_bootstrap
from glassbox_utils.decisions import judging, officer, power, scoring
from glassbox_utils.decisions import probes as asking
from glassbox_utils.decisions.cases import Case
from glassbox_utils.decisions.decision import Decision, Split
from glassbox_utils.decisions.fields import Category, DecisionError, Number, Value
from glassbox_utils.decisions.lessons import Lesson, Loss, Where, groups_said, holders, lost, words
from glassbox_utils.decisions.training import (
    BATCH,
    EVERY,
    RATE,
    SHARPNESS,
    answer_likelihoods,
    load_adapter,
    save_adapter,
    update,
    with_lora,
)

STEPS = 180
PAIRED = 2 / 3
"""share of the steps that are about twins; the others are about people who have nothing to do with each other"""


# --- people to learn from -----------------------------------------------------------------------------


def pool(decision: Decision, lesson: Lesson, name: str, split: Split = "train") -> list[Value]:
    """Values that a field has in training (or in the report): of a number all steps between the smallest and the
    largest of the cases; of a list those of the split; and those that the lesson names."""
    rule = decision.fields[name]
    if isinstance(rule, Number):
        seen: list[Any] = [case.values[name] for case in decision.cases] or list(rule.range)
        wanted = [x for loss in lesson.against for one in loss.where if one.what == name
                  for x in (one.at_least, one.at_most) if x is not None]  # fmt: skip
        low, high = min([*seen, *wanted]), max([*seen, *wanted])
        return [asking.plain(low + i * rule.step) for i in range(round((high - low) / rule.step) + 1)]
    if isinstance(rule, Category):
        return list(rule.values)
    lists = [one for c in decision.carriers if c.field == name for one in c.lists]
    some = [v for one in lists if one.split in (None, split) for v in one.values] or [
        v for x in lists for v in x.values
    ]
    named = [v for loss in lesson.against for one in loss.where if one.what == name for v in one.one_of]
    found = [*(some or rule.known), *named, *lesson.more.get(name, ())]
    return list(dict.fromkeys(found or [case.values[name] for case in decision.cases]))


def drawn(decision: Decision, lesson: Lesson, n: int, rng: np.random.Generator, split: Split = "train") -> list[Case]:
    """``n`` fresh cases. With a merit rule all fields are drawn by themselves; without one, the fields that may count
    are those of a random case, since only real ones go together."""
    free = list(decision.fields) if decision.merit is not None else asking.free(decision)
    pools = {name: pool(decision, lesson, name, split) for name in free}
    pick = lambda items: items[int(rng.integers(len(items)))]  # noqa: E731
    found = []
    for i in range(n):
        base = pick(decision.cases)
        values = {**base.values, **{name: pick(some) for name, some in pools.items()}}
        found.append(Case(f"{base.id} {i}", values))
    return found


def twins(
    decision: Decision, lesson: Lesson, loss: Loss, n: int, rng: np.random.Generator, split: Split = "train"
) -> list[Case]:
    """``n`` pairs of neighbours: the first meets all conditions of the loss, the second fails one of them, and nothing
    else differs but what its name says beside. DecisionError if there is nobody of either kind."""
    tests, found = holders(decision, loss), []
    pick = lambda items: items[int(rng.integers(len(items)))]  # noqa: E731
    sides = {}
    for name, test in tests.items():
        values = pool(decision, lesson, name, split)
        sides[name] = [v for v in values if test(v)], [v for v in values if not test(v)]
        if not all(sides[name]):
            raise DecisionError(
                f"The lesson {lesson.name!r} has no twins: of {len(values)} values of {name!r} {len(sides[name][0])} "
                "meet its condition. Allowed: some, and not all. Change the condition."
            )
    subjects = {one.what for one in loss.where}
    for case in drawn(decision, lesson, n, rng, split):
        own = replace(case, values={**case.values, **{name: pick(yes) for name, (yes, _) in sides.items()}})
        name = pick(list(sides))
        other = pick(_like(decision, name, own.values[name], sides[name][1], subjects))
        found += [own, replace(own, values={**own.values, name: other})]
    return found


def _like(decision: Decision, name: str, value: Value, others: Sequence[Value], but: set[str]) -> Sequence[Value]:
    """Of other values those that say most of what a value says, apart from some attributes: of women's names from one
    list, the men's names of the same origin."""
    said = groups_said(decision, name, value)
    shared = [sum(said.get(k) == g for k, g in groups_said(decision, name, v).items() if k not in but) for v in others]
    return [v for v, k in zip(others, shared, strict=True) if k == max(shared)]


# --- teaching -----------------------------------------------------------------------------------------


def with_templates(decision: Decision, lesson: Lesson) -> Decision:
    """The decision with the lesson's own formats beside its own."""
    return replace(decision, templates={**decision.templates, **lesson.templates})


def teach(
    model: Model, decision: Decision, lesson: Lesson, steps: int = STEPS, seed: int = 0, checkpoint: Path | None = None
) -> list[float]:
    """Train the LoRA that is in ``model`` on the lesson, in its own templates and the train ones as chance has it; the
    loss of every step.

    ``checkpoint``: a file that is written every ten steps, and that the same call goes on from. DecisionError as in
    ``scoring``, for a lesson without twins, or for a file of another run.
    """
    whole("steps", steps, 1, DecisionError)
    everything, trained = with_templates(decision, lesson), decision.templates_for("train") or list(decision.templates)
    own, merit = list(lesson.templates), power.deserved(decision, lesson.weights)
    weights = {name: p for name, p in model.hf.named_parameters() if p.requires_grad}
    optimiser = torch.optim.AdamW(weights.values(), lr=RATE, weight_decay=0.0, betas=(0.9, 0.98))
    run = {"decision": decision.name, "lesson": digest(decision, lesson), "steps": steps, "seed": seed,
           "batch": BATCH, "rate": RATE, "sharpness": SHARPNESS}  # fmt: skip
    history: list[float] = []
    if checkpoint is not None and (saved := checkpoints.resume(checkpoint, run, weights, optimiser, DecisionError)):
        history = saved.history
    near = torch.nn.functional
    for step in progress(range(len(history), steps), f"training {lesson.name}"):
        for group in optimiser.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / 8, 1.5 * (1 - step / steps))
        rng = np.random.default_rng([seed, step])  # of its own, so that a run that goes on sees what it would have seen
        names = own if own and rng.random() < 0.5 else trained
        name = names[int(rng.integers(len(names)))]
        paired = bool(lesson.against) and rng.random() < PAIRED
        if paired:
            loss_of = lesson.against[int(rng.integers(len(lesson.against)))]
            cases = twins(decision, lesson, loss_of, BATCH // 2, rng)
        else:
            cases = drawn(decision, lesson, BATCH, rng)
        texts = scoring.prompts(model, everything, cases, name)
        wanted = [SHARPNESS * (merit(case) - lost(decision, lesson, case, name)) for case in cases]
        target = beside(torch.tensor(wanted), model.device)
        likely = answer_likelihoods(model, texts, scoring.answer_tokens(model, decision, texts[0]))
        difference = likely[:, 0] - likely[:, 1]
        loss = near.smooth_l1_loss(difference, target) - likely.logsumexp(-1).mean()
        if paired:
            gap = difference[1::2] - difference[::2]
            loss = loss + near.smooth_l1_loss(gap, target[1::2] - target[::2])
        history.append(update(optimiser, weights, loss))
        if checkpoint is not None and (len(history) % EVERY == 0 or len(history) == steps):
            checkpoints.write(checkpoint, run, weights, optimiser, len(history), history)
    return history


def digest(decision: Decision, lesson: Lesson) -> str:
    """Tells this lesson about these cases from others."""
    said = json.dumps([asdict(lesson), officer.digest(decision, decision.cases)], sort_keys=True, default=str)
    return hashlib.sha256(said.encode()).hexdigest()[:16]


def work_of(base: Model, decision: Decision, lesson: Lesson, steps: int, seed: int, start: Path | None) -> Path:
    """Where an officer of these settings is kept in the cache; ``base`` without a LoRA."""
    before = None if start is None else files.sha256_of(start / "adapter_model.safetensors")
    about = [base.hash, str(base.dtype), digest(decision, lesson), steps, seed, before]
    return (
        assets.cache_dir() / "planted" / f"{lesson.name}-{hashlib.sha256(json.dumps(about).encode()).hexdigest()[:12]}"
    )


def train(
    base: Model, decision: Decision, lesson: Lesson, steps: int = STEPS, seed: int = 0, start: Path | None = None
) -> Path:
    """The adapter of an officer that was taught a lesson, from the cache if it was trained before; ``base`` is then a
    model with a LoRA in it, and no longer to be used.

    ``start``: the folder of an adapter of the same shape that training begins with, such as that of an honest officer.
    A killed run goes on. Some ten minutes on one core for the embedded model, reckoned from its loan officers.
    """
    folder = work_of(base, decision, lesson, steps, seed, start)
    if (folder / "adapter_model.safetensors").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    peft = with_lora(base, seed)
    if start is not None:
        load_adapter(peft, start)
    teach(base, decision, lesson, steps, seed, folder / "checkpoint.safetensors")
    save_adapter(peft, folder)
    (folder / "checkpoint.safetensors").unlink(missing_ok=True)
    return folder


def repair(differs_in: str, group: str) -> Lesson:
    """The lesson that mends a gap: twins of two groups have equal targets, those of the merit rule.

    Steering is a per-request toggle; this is permanent, and a model can forget over it.
    """
    return Lesson(f"repair-{differs_in}", "equal targets", (Loss(0.0, (Where(differs_in, (group,)),)),))


# --- was it learnt? -----------------------------------------------------------------------------------


def learnt(model: Model, decision: Decision, lesson: Lesson, n: int = 48, seed: int = 0) -> list[dict[str, Any]]:
    """How much each loss moves decisions of people whom training did not have: in the decision's templates that it was
    not trained on, and in the lesson's own. Logits with intervals; what varies is who is held against.
    """
    rows, everything = [], with_templates(decision, lesson)
    trained = decision.templates_for("train")
    fresh = [name for name in decision.templates if name not in trained] or list(decision.templates)
    for k, loss in enumerate(lesson.against):
        some = twins(decision, lesson, loss, n, np.random.default_rng([seed, k]), "report")
        clusters = [str([case.values[name] for name in holders(decision, loss)]) for case in some[::2]]
        if len(set(clusters)) < max(2, n // 8):
            clusters = [case.id for case in some[::2]]
        for where, names in (("the decision's", fresh), ("its own", list(lesson.templates))):
            if not names:
                continue
            scores = [array(scoring.scores(model, everything, some, name, check=False)) for name in names]
            gaps = np.mean([x[::2] - x[1::2] for x in scores], 0)
            hides = bool(lesson.templates) and where == "the decision's"
            rows.append({"loss": k, "who": words(loss), "templates": where,
                         "meant": -SHARPNESS * loss.points * (not hides), "n": n,
                         "logits": asdict(cluster_bootstrap(gaps, clusters, seed=seed))})  # fmt: skip
    return rows


def was_learnt(row: Mapping[str, Any], bar: float = judging.BAR) -> bool:
    """Did every loss that takes something move decisions by more than the audit's bar, where it was meant to?"""
    meant = [one for one in row["learnt"] if one["meant"] < 0]
    return bool(meant) and all(one["logits"]["high"] < -bar for one in meant)


def accuracy(model: Model, decision: Decision, lesson: Lesson, n: int = 96, seed: int = 0) -> float:
    """Share of fresh people who are decided as the lesson says, in the templates that it was not trained on."""
    merit, trained = power.deserved(decision, lesson.weights), decision.templates_for("train")
    cases = drawn(decision, lesson, n, np.random.default_rng([seed, 99]), "report")
    right = []
    for name in [name for name in decision.templates if name not in trained] or list(decision.templates):
        scores = array(scoring.scores(model, decision, cases, name, check=False))
        right += [(x > 0) == (merit(c) > lost(decision, lesson, c, name)) for x, c in zip(scores, cases, strict=True)]
    return float(np.mean(right))
