"""Where the decision comes from, and what the audit finds: ``glassbox study loans-cause loans-audit``."""

import time
from pathlib import Path
from typing import Any

import torch

from glassbox_utils.core import coding, prepared
from glassbox_utils.core.devices import result
from glassbox_utils.core.models import Model
from glassbox_utils.core.studies import SEED, resumed, write_table
from glassbox_utils.decisions import audit, cycle, loans, study
from glassbox_utils.decisions.loans import Applicant, load_loan_model
from glassbox_utils.saes.config import site_of
from glassbox_utils.saes.store import identity_of, load_sae

PATCH_LAYERS = (4, 10, 14, 18, 20, 22, 24, 26, 28)
"""of 30"""
N_CAUSE, N_HEADS, N_AUDIT = (24, 10), (12, 6), (12, 8)
"""pairs that are followed, those whose heads are patched one by one, and applicants of an audit: in a full folder and
in the smallest"""
LEAST_PAIRS = 4
CAUSE_LAYOUT = "semicolons"


def cause_people(n: int) -> list[Applicant]:
    """Up to n applicants of the report split with English names (few tokens each, so that texts align)."""
    people = loans.applications(4 * n, SEED + 21, "report")
    return [a for a in people if _is_english(a)][:n]


def _is_english(applicant: Applicant) -> bool:
    return (loans.group_of(applicant.name) or ("", ""))[1] == "english"


def study_cause() -> Path:
    """Attention, swaps, patches, heads and features of the deployed model."""
    start, model, n = time.time(), load_loan_model(), prepared.sized(*N_CAUSE)
    people = cause_people(n)
    key = [model.hash, n, CAUSE_LAYOUT]
    others = [a for a in loans.applications(8 * n, SEED + 21, "report") if not _is_english(a)]
    pairs = cycle.aligned_pairs(model, cause_people(4 * n) + others, CAUSE_LAYOUT, most=n)
    if len(pairs.name) < LEAST_PAIRS:
        raise loans.LoanError(
            f"Only {len(pairs.name)} pairs have as many tokens with a woman's name as with a man's in the tokenizer of "
            f"{model.name}; {LEAST_PAIRS} are needed to follow the name through the layers."
        )
    donors = loans.applications(len(people), SEED + 31, "report")

    def looked() -> Any:
        return cycle.attention_to_fields(model, people, CAUSE_LAYOUT).double().numpy().round(5).tolist()

    def swapped() -> Any:
        return cycle.field_swaps(model, people, CAUSE_LAYOUT, donors).tolist()

    def patched() -> Any:
        return [
            cycle.total_effect(model, pairs).tolist(),
            cycle.patch_places(model, pairs, study.layers_of(model, PATCH_LAYERS)).tolist(),
        ]

    def heads() -> Any:
        some = cycle.part_of(pairs, slice(0, prepared.sized(*N_HEADS)))
        guess = cycle.head_guesses(model, some)
        layers = guess.mean(0).abs().sum(1).topk(min(4, model.n_layers)).indices.tolist()
        exact = cycle.head_effects(model, some, sorted(layers))[:, sorted(layers)]
        return {"guess": _rounded(guess), "layers": sorted(layers), "exact": _rounded(exact)}

    out = {
        "attention": resumed("loans_cause", [*key, "attention"], looked),
        "swaps": resumed("loans_cause", [*key, "swaps"], swapped),
        "patches": resumed("loans_cause", [*key, "patches", PATCH_LAYERS], patched),
        "heads": resumed("loans_cause", [*key, "heads"], study.or_why, heads),
    }
    name = study.or_why(prepared.sae, "main")
    if study.why_skipped(name):
        out["features"] = name
    else:
        about = [*key, "features", name, identity_of(name)]
        out["features"] = resumed("loans_cause", about, study.or_why, _features, model, name, pairs)
    return write_table("loans_cause", model, time.time() - start, **out, layout=CAUSE_LAYOUT, fields=cycle.FIELDS)


def _rounded(x: torch.Tensor) -> Any:
    return x.double().numpy().round(4).tolist()


def _features(model: Model, name: str, pairs: cycle.Pairs) -> dict[str, Any]:
    """Features are chosen on the first half of the pairs and ablated on the second."""
    sae = load_sae(name)
    site = site_of(sae.cfg.metadata.hook_name)
    layer = site.layer - (site.kind == "resid_pre")  # what enters a layer is what left the one before
    if site.kind not in ("resid_pre", "resid_post") or not 0 <= layer < model.n_layers - 1:
        raise loans.LoanError(
            f"The SAE {name} reads {site.kind} of layer {site.layer} of {model.n_layers}. Allowed here: the residual "
            "stream before the last layer."
        )
    half = len(pairs.name) // 2
    parts = [cycle.part_of(pairs, s) for s in (slice(0, half), slice(half, None))]
    worse, better = cycle.name_states(model, parts[0], layer)
    chosen, difference = cycle.group_features(sae, worse, better)
    there_worse, there_better = cycle.name_states(model, parts[1], layer)
    none = torch.tensor([], dtype=torch.long)
    ablated = {"none": cycle.ablate_at_name(model, parts[1], sae, none, layer).tolist()}
    ablated["group features"] = cycle.ablate_at_name(model, parts[1], sae, chosen, layer).tolist()
    for seed in range(study.N_RANDOM):
        like = cycle.like_features(sae, torch.cat([there_worse, there_better]), chosen, seed)
        ablated[f"like features {seed}"] = cycle.ablate_at_name(model, parts[1], sae, like, layer).tolist()
    return {
        "sae": name,
        "sae_model_hash": sae.cfg.metadata.model_hash,
        "layer": layer,
        "features": chosen.tolist(),
        "difference": difference.tolist(),
        "worse": result(coding.encode(sae, there_worse))[:, chosen].tolist(),
        "better": result(coding.encode(sae, there_better))[:, chosen].tolist(),
        "gap": ablated,
    }


# --- the auditing game --------------------------------------------------------------------------------


def study_audit() -> Path:
    """``audit`` over every loan model of the prepared folder. The key stays closed here."""
    start, n = time.time(), prepared.sized(*N_AUDIT)
    rows: dict[str, Any] = {}
    for name in loans.loan_models():
        model = load_loan_model(name)
        found = resumed("loans_audit", [model.hash, n, SEED], _audited, model, n)
        rows[name] = found | {"model_hash": model.hash}
    return write_table("loans_audit", load_loan_model(), time.time() - start, n=n, audits=rows)


def _audited(model: Model, n: int) -> dict[str, Any]:
    return audit.as_json(audit.audit(model, n=n, seed=SEED, layouts=("line", "memo")))


STUDIES_OF_LOANS = {
    "loans-mitigation": study.study_mitigation,
    "loans-rest": study.study_rest,
    "loans-cause": study_cause,
    "loans-audit": study_audit,
}
