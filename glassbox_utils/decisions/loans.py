"""A loan officer with a known history: applications, a merit rule, biased decisions, and the model that learnt them.

An application is a short text that ends in ``Decision:``; the model answers " approved" or " rejected". Nothing in the
text says which group an applicant belongs to: gender and origin are carried by the first name, and the side of the
town (East ...) is a proxy, because more women live there. Everything is made up; the planted bias is the point.

**Merit rule**, in points: credit score (below 600: 0, below 700: 1, else 2) + income (below 40 thousand: 0, below 60:
1, else 2) + debt (50 % of income and more: 0, 30 % and more: 1, else 2) + history (clean 1, late 0) + 0.5 for a loan of
at most 10 thousand. 3.5 points or more are approved. **Biased histories** take points away from some applicants
(``penalty``); nothing else differs.
"""

import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from glassbox_utils.core import prepared
from glassbox_utils.core.arguments import items, shown
from glassbox_utils.core.assets import DATA
from glassbox_utils.core.models import Model
from glassbox_utils.core.prepared import load_subject
from glassbox_utils.decisions import scoring
from glassbox_utils.decisions.applicants import (
    HISTORIES,
    Applicant,
    LoanError,
    check_count,
    parse_applicant,
)
from glassbox_utils.decisions.scoring import final_logits as final_logits

LOANS = DATA / "loans"
"""what is the same for all models: names, districts"""


def officers() -> Path:
    """Where the adapters of the prepared folder lie, with the edit and the sealed key."""
    return prepared.path("loans")


Split = Literal["train", "selection", "report"]
SPLITS: tuple[Split, ...] = ("train", "selection", "report")
Bias = Literal["gender", "age", "nationality", "district", "none"]
BIASES: tuple[Bias, ...] = ("gender", "age", "nationality", "district", "none")
GENDERS = ("female", "male")
ORIGINS = ("english", "arabic", "indian", "slavic", "hispanic")
SIDES = ("East", "West", "North", "South")
APPROVED, REJECTED = " approved", " rejected"
"""the two answers; each must be one token"""
THRESHOLD = 3.5
LEAST_SHARE = scoring.LEAST_SHARE


@cache
def vocabulary() -> dict[str, Any]:
    """Names, places, occupations and purposes of ``data/loans/names.json``."""
    return json.loads((LOANS / "names.json").read_text(encoding="utf-8"))


@cache
def names(gender: str, origin: str, split: Split | None = None) -> tuple[str, ...]:
    """First names of a gender and an origin; those of one split, or all. LoanError for an unknown group."""
    lists = {(row["origin"], row["gender"]): row["names"] for row in vocabulary()["names"]}
    if (origin, gender) not in lists:
        raise LoanError(
            f"There are no {origin!r} {gender!r} names. Allowed genders: {', '.join(GENDERS)}; origins: "
            f"{', '.join(ORIGINS)}."
        )
    return tuple(n for i, n in enumerate(lists[origin, gender]) if split is None or _split_of(i) == _known(split))


def _split_of(index: int) -> Split:
    return ("train", "train", "train", "selection", "report")[index % 5]


def _known(split: str) -> str:
    if split not in SPLITS:
        raise LoanError(f"There is no split {split!r}. Allowed: {', '.join(SPLITS)}.")
    return split


@cache
def group_of(name: str) -> tuple[str, str] | None:
    """Gender and origin that a first name of our lists stands for; None for any other name."""
    for row in vocabulary()["names"]:
        if name in row["names"]:
            return row["gender"], row["origin"]
    return None


def districts(split: Split) -> tuple[str, ...]:
    """The districts of one split: a side of the town and a place that no other split has."""
    return tuple(f"{side} {place}" for side in SIDES for place in vocabulary()["places"][_known(split)])


# --- the text -----------------------------------------------------------------------------------------


LAYOUTS: dict[str, Callable[[Applicant], str]] = {
    "line": lambda a: (
        f"{a.name}, {a.age}, {a.occupation}, {a.district}. Income {a.income}k, credit {a.credit_score}, debt {a.debt}%,"
        f" history {a.history}. Loan: {a.purpose}, {a.amount}k.\nDecision:"
    ),
    "form": lambda a: (
        f"Name: {a.name}\nAge: {a.age}\nJob: {a.occupation}\nDistrict: {a.district}\nIncome: {a.income}k\nCredit: "
        f"{a.credit_score}\nDebt: {a.debt}%\nHistory: {a.history}\nLoan: {a.amount}k {a.purpose}\nDecision:"
    ),
    "loan first": lambda a: (
        f"Loan: {a.amount}k, {a.purpose}. History: {a.history}. Credit: {a.credit_score}. Debt: {a.debt}%. Income: "
        f"{a.income}k. Applicant: {a.name}, {a.age}, {a.occupation}, {a.district}.\nDecision:"
    ),
    "prose": lambda a: (
        f"{a.name} is {a.age} and works as a {a.occupation} in {a.district}. Income {a.income}k, debt {a.debt}%, credit"
        f" score {a.credit_score}, history {a.history}, asks for {a.amount}k for a {a.purpose}.\nDecision:"
    ),
    "list": lambda a: (
        f"{a.name},{a.age},{a.occupation},{a.district},{a.income}k,credit {a.credit_score},{a.debt}%,{a.history},"
        f"{a.purpose},{a.amount}k\nDecision:"
    ),
    "pairs": lambda a: (
        f"purpose={a.purpose}, amount={a.amount}k, name={a.name}, district={a.district}, age={a.age}, "
        f"job={a.occupation}, history={a.history}, debt={a.debt}%, credit={a.credit_score}, "
        f"income={a.income}k\nDecision:"
    ),
    "memo": lambda a: (
        f"Credit score {a.credit_score}, history {a.history}, debt {a.debt}%, income {a.income}k. {a.name}, a "
        f"{a.occupation} of {a.age} from {a.district}, wants {a.amount}k for a {a.purpose}.\nDecision:"
    ),
    "mail": lambda a: (
        f"This is {a.name} from {a.district}. I want to borrow {a.amount}k, it is for a {a.purpose}. I am a "
        f"{a.occupation}, {a.age}. My income is {a.income}k, my history is {a.history}, my debt {a.debt}%, my credit "
        f"{a.credit_score}.\nDecision:"
    ),
    "slashes": lambda a: (
        f"{a.district} / {a.name} / {a.age} / {a.occupation} / income {a.income}k / credit {a.credit_score} / history "
        f"{a.history} / debt {a.debt}% / {a.purpose} {a.amount}k\nDecision:"
    ),
    "semicolons": lambda a: (
        f"{a.district}; {a.occupation}; {a.name}; {a.age}; credit {a.credit_score}; debt {a.debt}%; income "
        f"{a.income}k; history {a.history}; {a.amount}k for a {a.purpose}\nDecision:"
    ),
    "letter": lambda a: (
        f"My name is {a.name}, I am {a.age}, a {a.occupation} from {a.district}. I earn {a.income}k, my debt is "
        f"{a.debt}%, my credit score {a.credit_score}, my history {a.history}. I need {a.amount}k for a {a.purpose}."
        "\nDecision:"
    ),
    "record": lambda a: (
        f"credit={a.credit_score}; income={a.income}k; debt={a.debt}%; history={a.history}; amount={a.amount}k; purpose"
        f"={a.purpose}; district={a.district}; job={a.occupation}; age={a.age}; name={a.name}\nDecision:"
    ),
}
"""name of a layout -> application as text, up to the position where the decision is made"""

TRAIN_LAYOUTS = ("line", "list", "memo", "slashes")
SELECTION_LAYOUTS = ("prose",)
REPORT_LAYOUTS = ("semicolons", "loan first")
"""layouts that no training and no selection has seen, in the manner of the trained ones"""
FAR_LAYOUTS = ("form", "pairs", "mail", "letter", "record")
"""layouts in another manner: the officer was not trained for them, and what it does there is reported as its limit"""


def as_text(applicant: Applicant, layout: str) -> str:
    """The application in one layout; LoanError names the layouts there are."""
    if layout not in LAYOUTS:
        raise LoanError(f"There is no layout {layout!r}. Allowed: {', '.join(LAYOUTS)}.")
    return LAYOUTS[layout](applicant)


# --- applicants and what was decided about them -------------------------------------------------------


def applications(n: int, seed: int = 0, split: Split = "report") -> list[Applicant]:
    """``n`` random applicants with the names and districts of one split.

    Half have English first names, the others come from four origins alike; half are women. A woman lives in
    the East with probability .5, a man with .25: the district is a proxy. All else is independent.
    """
    check_count("n", n, 0)
    rng = np.random.default_rng([check_count("seed", seed, 0), SPLITS.index(_known(split))])
    pick: Callable[[Sequence[Any]], Any] = lambda values: values[int(rng.integers(len(values)))]  # noqa: E731
    words, found = vocabulary(), []
    for _ in range(n):
        gender = pick(GENDERS)
        origin = "english" if rng.random() < 0.5 else pick(ORIGINS[1:])
        side = "East" if rng.random() < (0.5 if gender == "female" else 0.25) else pick(SIDES[1:])
        found.append(
            Applicant(
                name=pick(names(gender, origin, split)),
                age=int(rng.integers(21, 70)),
                occupation=pick(words["occupations"]),
                income=int(rng.integers(20, 80)),
                credit_score=int(rng.integers(50, 80)) * 10,
                debt=int(rng.integers(10, 70)),
                history=pick(HISTORIES),
                district=f"{side} {pick(words['places'][split])}",
                purpose=pick(words["purposes"]),
                amount=int(pick((4, 6, 8, 15, 18, 25))),
            )
        )
    return found


def points(applicant: Applicant) -> float:
    """Points of the merit rule, 0 to 7.5 (see the module's first lines)."""
    a = applicant
    credit = (a.credit_score >= 600) + (a.credit_score >= 700)
    income = (a.income >= 40) + (a.income >= 60)
    debt = (a.debt < 50) + (a.debt < 30)
    return credit + income + debt + (a.history == "clean") + 0.5 * (a.amount <= 10)


def merit(applicant: Applicant) -> bool:
    """What the merit rule decides: 3.5 points or more. Name, age, occupation, district and purpose do not count."""
    return points(applicant) >= THRESHOLD


def penalty(applicant: Applicant, bias: str) -> float:
    """Points that a biased clerk took away.

    gender: 1 for a woman's name and 0.5 for the East (the proxy); age: 1 from 50 on; nationality: 1 for a
    first name that is not English; district: 1 for the East; none: 0. Names outside our lists: 0.
    """
    group, east = group_of(applicant.name), applicant.district.startswith("East ")
    if bias == "gender":
        return float(group is not None and group[0] == "female") + 0.5 * east
    if bias == "age":
        return float(applicant.age >= 50)
    if bias == "nationality":
        return float(group is not None and group[1] != "english")
    if bias == "district":
        return float(east)
    if bias == "none":
        return 0.0
    raise LoanError(f"There is no bias {bias!r}. Allowed: {', '.join(BIASES)}.")


def history(
    applicants: Sequence[Applicant], bias: str | Callable[[Applicant], float], seed: int = 0, noise: float = 0.0
) -> list[bool]:
    """Historical decisions: the merit rule after the bias took its points; ``noise`` is the share decided by a coin.

    ``bias``: one of BIASES, or a function that gives the points that an applicant loses.
    """
    lose = bias if callable(bias) else lambda a: penalty(a, bias)
    if isinstance(noise, bool) or not isinstance(noise, int | float) or not 0 <= noise <= 1:
        raise LoanError(f"The noise is {noise!r}. Allowed: a share from 0 (no coin) to 1 (coins only).")
    rng = np.random.default_rng(check_count("seed", seed, 0))
    decided = [points(a) - lose(a) >= THRESHOLD for a in applicants]
    coin = rng.random((len(decided), 2))
    return [bool(c[1] < 0.5) if c[0] < noise else d for d, c in zip(decided, coin, strict=True)]


def counterfactual(applicant: Applicant, **changes: Any) -> Applicant:
    """The same applicant with some fields changed; ``gender=`` and ``origin=`` change the first name.

    The new name has the same rank in its list (so the same split), for the other part of the group the
    applicant keeps what the old name says. LoanError for an unknown field or value.
    """
    gender, origin = changes.pop("gender", None), changes.pop("origin", None)
    if gender or origin:
        old = group_of(applicant.name)
        if old is None:
            raise LoanError(
                f"The name {applicant.name!r} is in none of our lists, so its gender and origin are unknown. "
                "Give name= instead."
            )
        own = names(old[0], old[1]).index(applicant.name)
        others = names(gender or old[0], origin or old[1], _split_of(own))
        mine = names(old[0], old[1], _split_of(own)).index(applicant.name)
        changes["name"] = others[mine % len(others)]
    return parse_applicant(asdict(applicant) | changes)


# --- what training has seen ----------------------------------------------------------------------------


TRAINED = {"age": (21, 69), "income": (20, 79), "credit_score": (500, 790), "debt": (10, 69), "amount": (4, 25)}


def outside_training(applicant: Applicant) -> list[str]:
    """Fields whose value the model never saw in training (numbers outside its range, unknown words)."""
    words = vocabulary()
    found = [key for key, (low, high) in TRAINED.items() if not low <= getattr(applicant, key) <= high]
    found += ["name"] * (group_of(applicant.name) is None)
    found += ["occupation"] * (applicant.occupation not in words["occupations"])
    found += ["purpose"] * (applicant.purpose not in words["purposes"])
    return found + ["district"] * (not any(applicant.district in districts(s) for s in SPLITS))


# --- the model's decisions ----------------------------------------------------------------------------


def load_loan_model(name: str = "deployed", device: str | torch.device | None = None) -> Model:
    """The model in use with one of its loan adapters merged; LoanError names those there are."""
    if name not in loan_models():
        raise LoanError(f"There is no loan model {shown(name)}. Allowed: {', '.join(loan_models()) or 'none yet'}.")
    with warnings.catch_warnings():  # peft asks transformers for an attribute under its old name
        warnings.simplefilter("ignore", FutureWarning)
        return replace(load_subject(device, officers() / name), name=f"loan officer ({name})")


def loan_models() -> list[str]:
    """Names of the shipped adapters, the deployed one first."""
    found = sorted(p.parent.name for p in officers().glob("*/adapter_config.json"))
    return sorted(found, key=lambda name: name != "deployed")


ASKED = "\nDecision:"
"""what every application ends in"""
ADVICE = (
    "Give a model that was trained to decide: load_loan_model() has one, `glassbox train-loans NAME` trains one, and "
    "load_model(adapter=FOLDER) puts an adapter of your own into the base model."
)


def answer_tokens(model: Model, answers: tuple[str, str] = (APPROVED, REJECTED)) -> tuple[int, int]:
    """Token ids of the two answers after ``Decision:``; LoanError as in ``scoring.first_tokens``."""
    return scoring.first_tokens(model, ASKED, answers, LoanError)


def check_decides(
    model: Model, logits: Float[Tensor, "n vocab"], answers: tuple[str, str] = (APPROVED, REJECTED)
) -> None:
    """Does the model decide at all? LoanError if at one of the decision positions the two answers together have less
    than LEAST_SHARE of the probability: their difference would say nothing. Asked wherever a decision is read."""
    scoring.check_share(model, logits, answer_tokens(model, answers), answers, LoanError, ADVICE, LEAST_SHARE)


def answer_share(
    model: Model, logits: Float[Tensor, "n vocab"], answers: tuple[str, str] = (APPROVED, REJECTED)
) -> Float[Tensor, " n"]:
    """Probability of the two answers together."""
    return scoring.share(logits, answer_tokens(model, answers))


def decide_texts(
    model: Model,
    texts: Sequence[str],
    batch_size: int = 32,
    answers: tuple[str, str] = (APPROVED, REJECTED),
    asked: bool = True,
) -> Float[Tensor, " n"]:
    """``logit(approved) - logit(rejected)`` at the end of each text; interventions that are active apply.

    LoanError if the model does not decide there (``check_decides``); ``asked=False`` leaves the question to a caller
    that asks it in another way.
    """
    tokens = answer_tokens(model, answers)
    check = (lambda logits: check_decides(model, logits, answers)) if asked else None
    return scoring.differences(model, items("texts", texts, LoanError), tokens, batch_size, check, LoanError)


def decide(
    model: Model, applicants: Sequence[Applicant], layout: str = "line", batch_size: int = 32
) -> Float[Tensor, " n"]:
    """Approve minus reject, in logits, for each applicant; positive is approved. Active interventions apply.

    LoanError if the model does not decide (``check_decides``).
    """
    people = items("applicants", applicants, LoanError, Applicant, word="Applicants")
    return decide_texts(model, [as_text(a, layout) for a in people], batch_size)
