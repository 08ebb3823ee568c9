"""Are the reasons of the deployed loan officer its reasons? ``glassbox study explain-fidelity``."""

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from glassbox_utils.core import prepared
from glassbox_utils.core.session import progress
from glassbox_utils.core.studies import SEED, resumed, write_table
from glassbox_utils.decisions import asking, fidelity
from glassbox_utils.decisions.cases import Case
from glassbox_utils.decisions.loans import load_loan_model
from glassbox_utils.decisions.reading import load_decision

NAME, DECISION = "explain_fidelity", "loan-officer"
N = (112, 20)
"""rejected applicants, in a full folder and in the smallest"""
CHUNK = 10


def study_fidelity() -> Path:
    """Reasons named in the wordings of the training, judged in others; five methods mend as many fields each."""
    start, model, decision = time.time(), load_loan_model(), load_decision(DECISION)
    ask = asking.remembered(asking.scorer(model, decision))
    made = fidelity.plan(ask, decision, None, prepared.sized(*N), SEED, decision.templates_for("train"))
    key = [model.hash, fidelity.K, made.named_in, made.judged_in, made.typical, made.noise]

    def rows(cases: list[Case]) -> list[dict[str, Any]]:
        looked = fidelity.attention(model, decision, cases, made.named_in[0])
        return [fidelity.row(ask, decision, case, made, look) for case, look in zip(cases, looked, strict=True)]

    found: list[dict[str, Any]] = []
    for i in progress(range(0, len(made.cases), CHUNK), "applicants"):
        part = list(made.cases[i : i + CHUNK])
        found += resumed(NAME, [*key, [case.id for case in part]], rows, part)
    return write_table(
        NAME,
        model,
        time.time() - start,
        decision=DECISION,
        k=fidelity.K,
        typical=made.typical,
        chosen_on=made.chosen_on,
        noise=made.noise,
        summary=asdict(fidelity.summary(found, made)),
        rows=found,
    )


STUDIES_OF_ANSWERS = {"explain-fidelity": study_fidelity}
