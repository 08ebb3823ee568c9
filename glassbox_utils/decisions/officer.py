"""Teach a model to decide the cases of a folder, and say what it is worth as a scorer: ``glassbox train-officer``.

The LoRA of ``training`` on the decision token, over the decision's own cases: a part of them, drawn by a seed with both
answers in their shares, is held out. Where what really happened is known, the loss is the likelihood of it; where a
merit rule decides, its margin is the target. The held-out cases are then scored in every template, those that were
trained on and those that were not, beside a logistic regression and a gradient boosting of scikit-learn that saw the
same cases as a table. A card says how well each ranks (AUC) and how far its probabilities can be believed.
"""

import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from glassbox_utils.core import assets, checkpoints, files
from glassbox_utils.core.arguments import whole
from glassbox_utils.core.devices import array, beside
from glassbox_utils.core.models import Model
from glassbox_utils.core.prepared import load_subject
from glassbox_utils.core.session import progress
from glassbox_utils.core.statistics import Interval, bootstrap_ci
from glassbox_utils.decisions import scoring
from glassbox_utils.decisions.cases import Case
from glassbox_utils.decisions.decision import Decision, groups, margin, truth
from glassbox_utils.decisions.fields import Category, DecisionError, Number
from glassbox_utils.decisions.training import (
    ALPHA,
    BATCH,
    EVERY,
    RANK,
    RATE,
    SHARPNESS,
    answer_likelihoods,
    save_adapter,
    update,
    with_lora,
)

STEPS = 240
HELD = 0.3
"""share of the cases that training does not see"""
LEAST = 20
"""held-out cases with each answer, for an AUC that says something"""
BINS = 10
CARD = "officer.json"


def divided(decision: Decision, seed: int = 0, held: float = HELD) -> tuple[list[Case], list[Case]]:
    """Cases to train on and cases held out, with the two answers in the same shares.

    DecisionError if too few cases of an answer would be held out, or nothing says what should have been decided.
    """
    rng = np.random.default_rng(whole("seed", seed, 0, DecisionError))
    deserved = [truth(decision, case) for case in decision.cases]
    out: set[int] = set()
    for answer, word in zip((True, False), decision.answers, strict=True):
        rows = [i for i, one in enumerate(deserved) if one == answer]
        n = round(held * len(rows))
        if n < LEAST:
            raise DecisionError(
                f"{decision.title!r} has {len(rows)} cases for which {word!r} is right, so {n} would be held out. "
                f"Allowed: at least {LEAST} for each answer. Add cases."
            )
        out |= set(rng.permutation(rows)[:n].tolist())
    train, rest = ([c for i, c in enumerate(decision.cases) if (i in out) == is_out] for is_out in (False, True))
    return train, rest


def teach(
    model: Model,
    decision: Decision,
    cases: Sequence[Case],
    steps: int = STEPS,
    seed: int = 0,
    checkpoint: Path | None = None,
) -> list[float]:
    """Train the LoRA that is in ``model`` on the cases, in the train templates by turns; the loss of every step.

    The loss also asks that the two answers have all of the probability. ``checkpoint``: a file that is written every
    ten steps and that the same call goes on from. DecisionError as in ``scoring``, or for a file of another run.
    """
    whole("steps", steps, 1, DecisionError)
    names = decision.templates_for("train")
    if not names:
        raise DecisionError(f"{decision.title!r} has no template for training. Give one `split: train`, or none.")
    texts = {name: scoring.prompts(model, decision, cases, name) for name in names}
    tokens = {name: scoring.answer_tokens(model, decision, texts[name][0]) for name in names}
    graded = cases[0].outcome is None
    wanted = [SHARPNESS * margin(decision, c) if graded else float(truth(decision, c)) for c in cases]
    weights = {name: p for name, p in model.hf.named_parameters() if p.requires_grad}
    optimiser = torch.optim.AdamW(weights.values(), lr=RATE, weight_decay=0.0, betas=(0.9, 0.98))
    run = {"decision": decision.name, "cases": digest(decision, cases), "steps": steps, "seed": seed, "batch": BATCH,
           "rate": RATE, "sharpness": SHARPNESS}  # fmt: skip
    history: list[float] = []
    if checkpoint is not None and (saved := checkpoints.resume(checkpoint, run, weights, optimiser, DecisionError)):
        history = saved.history
    for step in progress(range(len(history), steps), "training"):
        for group in optimiser.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / 8, 1.5 * (1 - step / steps))
        rows = _batch(len(cases), step, seed)
        name = names[step % len(names)]
        likely = answer_likelihoods(model, [texts[name][i] for i in rows], tokens[name])
        target = beside(torch.tensor([wanted[i] for i in rows]), model.device)
        history.append(update(optimiser, weights, _loss(likely, target, graded)))
        if checkpoint is not None and (len(history) % EVERY == 0 or len(history) == steps):
            checkpoints.write(checkpoint, run, weights, optimiser, len(history), history)
    return history


def _loss(likely: Float[Tensor, "n 2"], target: Float[Tensor, " n"], graded: bool) -> Tensor:
    difference = likely[:, 0] - likely[:, 1]
    near = torch.nn.functional
    wrong = near.smooth_l1_loss if graded else near.binary_cross_entropy_with_logits
    return wrong(difference, target) - likely.logsumexp(-1).mean()


def _batch(n: int, step: int, seed: int) -> list[int]:
    """The cases of one step: every case once in each round, in another order."""
    at = range(step * BATCH, (step + 1) * BATCH)
    orders = {k // n: np.random.default_rng([seed, k // n]).permutation(n) for k in at}
    return [int(orders[k // n][k % n]) for k in at]


def digest(decision: Decision, cases: Sequence[Case]) -> str:
    """Tells these cases, and what is right for them, from others."""
    rows = [[c.id, dict(c.values), truth(decision, c)] for c in cases]
    return hashlib.sha256(json.dumps([decision.answers, rows], sort_keys=True).encode()).hexdigest()[:16]


# --- what a scorer is worth -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Quality:
    """How well probabilities fit what was right; intervals over held-out cases."""

    auc: Interval
    """chance that a case with the favourable answer scores above one without; .5 is a coin"""
    brier: Interval
    """mean squared distance of probability and outcome; ``constant`` is what the base rate alone gets"""
    constant: float
    calibration: Interval
    """mean distance of probability and share in bins of equally many cases; resampling adds to it"""
    floor: float
    """the calibration error that these very probabilities would show on average if they were exactly right"""
    accuracy: Interval


def quality(p: NDArray, right: NDArray, seed: int = 0) -> Quality:
    """Of probabilities [n] of the favourable answer, and whether it was right [n]. Unit: cases."""
    y, n = right.astype(float), len(p)
    drawn = np.random.default_rng(seed).random((500, n)) < p
    return Quality(
        bootstrap_ci((p, y), auc, seed=seed),
        bootstrap_ci((p - y) ** 2, seed=seed),
        float(y.mean() * (1 - y.mean())),
        bootstrap_ci((p, y), calibration_error, seed=seed),
        float(calibration_error(np.broadcast_to(p, drawn.shape), drawn).mean()),
        bootstrap_ci(((p > 0.5) == right).astype(float), seed=seed),
    )


def auc(p: NDArray, y: NDArray, axis: int = -1) -> NDArray:
    """Area under the ROC curve by ranks, ties in half (Mann-Whitney); .5 where one answer is missing."""
    positive = y.sum(axis)
    pairs = positive * (y.shape[axis] - positive)
    above = (stats.rankdata(p, axis=axis) * y).sum(axis) - positive * (positive + 1) / 2
    return np.where(pairs > 0, above / np.maximum(pairs, 1), 0.5)


def calibration_error(p: NDArray, y: NDArray, axis: int = -1) -> NDArray:
    """Expected calibration error in BINS bins of equally many cases (arXiv 1706.04599, with equal counts)."""
    order = np.argsort(p, axis=axis, kind="stable")
    off = np.take_along_axis(p, order, axis) - np.take_along_axis(y, order, axis)
    parts = np.array_split(off, min(BINS, max(1, p.shape[axis] // 5)), axis=axis)
    return sum(np.abs(part.sum(axis)) for part in parts) / p.shape[axis]


def as_table(decision: Decision, cases: Sequence[Case]) -> NDArray:
    """The cases as numbers [n, columns]: numbers as they are, categories and carried groups as 0 and 1.

    Free text itself is not in it: of a first name, a table's methods see the groups that it carries.
    """
    stated = [groups(decision, case) for case in cases]
    columns = []
    for name, rule in decision.fields.items():
        if isinstance(rule, Number):
            columns.append([float(case.values[name]) for case in cases])
        elif isinstance(rule, Category):
            columns += [[float(case.values[name] == value) for case in cases] for value in rule.values]
    for name, values in decision.groups.items():
        columns += [[float(mine[name] == value) for mine in stated] for value in values]
    return np.array(columns).T


def opponents(decision: Decision, train: Sequence[Case], held: Sequence[Case], seed: int = 0) -> dict[str, NDArray]:
    """Probabilities [n] of the favourable answer for the held-out cases, by methods for tables (scikit-learn)."""
    from sklearn.ensemble import HistGradientBoostingClassifier
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    x, y = as_table(decision, train), [truth(decision, case) for case in train]
    methods = {
        "logistic regression": make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000)),
        "gradient boosting": HistGradientBoostingClassifier(random_state=seed),
    }
    return {name: method.fit(x, y).predict_proba(as_table(decision, held))[:, 1] for name, method in methods.items()}


def train_officer(
    decision: Decision, folder: str | Path, base: Model | None = None, seed: int = 0, steps: int = STEPS
) -> dict[str, Any]:
    """Train an officer on a decision's cases, write its adapter and its card, and give the card.

    Some half an hour on one core for the embedded model, reckoned from six steps, not measured. A killed run goes on
    where it was. Raises DecisionError before anything is computed if there are too few cases or the model can't tell
    the answers apart.
    """
    train, held = divided(decision, seed)
    whole("steps", steps, 1, DecisionError)
    model = base or load_subject()
    for name in decision.templates:
        scoring.answer_tokens(model, decision, scoring.prompts(model, decision, held[:1], name)[0])
    weights = model.hash  # of the base model: before the LoRA is put in
    about = [decision.name, digest(decision, train), weights, str(model.dtype), steps, seed, RANK, ALPHA]
    work = assets.cache_dir() / "officers" / hashlib.sha256(json.dumps(about).encode()).hexdigest()[:12]
    work.mkdir(parents=True, exist_ok=True)
    peft = with_lora(model, seed)
    history = teach(model, decision, train, steps, seed, work / "officer.safetensors")
    place = save_adapter(peft, Path(folder))
    right = np.array([truth(decision, case) for case in held])
    rows = []
    for name, template in decision.templates.items():
        p, least = _answers(model, decision, held, name)
        about_it = {"template": name, "split": template.split, "trained on": name in decision.templates_for("train")}
        rows.append({"scorer": "officer"} | about_it | {"least share": least} | asdict(quality(p, right, seed)))
    for name, p in opponents(decision, train, held, seed).items():
        rows.append({"scorer": name} | asdict(quality(p, right, seed)))
    packages = ("torch", "transformers", "peft", "scikit-learn")
    card = {
        "decision": decision.name,
        "title": decision.title,
        "taught by": "what really happened" if train[0].outcome is not None else "the merit rule",
        "model": model.name,
        "model_hash": weights,
        "licence of the cases": decision.licence,
        "seed": seed,
        "steps": steps,
        "versions": {"python": platform.python_version(), **{p: version(p).split("+")[0] for p in packages}},
        "cases": {"trained on": len(train), "held out": len(held), "favourable": float(right.mean()),
                  "digest": digest(decision, decision.cases)},
        "last losses": [round(x, 4) for x in history[-10:]],
        "unit": "held-out cases; one seed",
        "quality": rows,
    }  # fmt: skip
    with files.atomic_path(place / CARD) as partial:
        partial.write_text(json.dumps(card, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return card


def _answers(model: Model, decision: Decision, cases: Sequence[Case], template: str) -> tuple[NDArray, float]:
    """Probability [n] of the favourable answer among the two, and the least that both have together."""
    texts = scoring.prompts(model, decision, cases, template)
    tokens = scoring.answer_tokens(model, decision, texts[0])
    together: list[Float[Tensor, " n"]] = []
    scored = scoring.differences(model, texts, tokens, check=lambda x: together.append(scoring.share(x, tokens)))
    return 1 / (1 + np.exp(-array(scored))), float(torch.cat(together).min())


def as_lines(card: Mapping[str, Any]) -> list[str]:
    """The card's table as text, for a terminal."""

    def said(x: Mapping[str, Any]) -> str:
        return f"{x['value']:.3f} [{x['low']:.3f}, {x['high']:.3f}]"

    found = [f"{'scorer':34} {'AUC':23} {'Brier score':23} {'calibration error':23} if exact"]
    for row in card["quality"]:
        where = f" ({row['template']}{', trained on' if row['trained on'] else ''})" if "template" in row else ""
        cells = " ".join(f"{said(row[key]):23}" for key in ("auc", "brier", "calibration"))
        found.append(f"{row['scorer'] + where:34} {cells} {row['floor']:.3f}")
    return found
