"""Where the decision comes from, and what the audit finds: ``glassbox study loans-cause loans-audit``."""

import time
from pathlib import Path
from typing import Any

import torch

from glassbox_utils.core import files
from glassbox_utils.core.models import Model
from glassbox_utils.core.studies import SEED, resumed, write_table
from glassbox_utils.decisions import audit, cycle, loans, study
from glassbox_utils.decisions.loans import Applicant, load_loan_model
from glassbox_utils.saes.config import SAES, site_of
from glassbox_utils.saes.store import load_sae

PATCH_LAYERS = (4, 10, 14, 18, 20, 22, 24, 26, 28)
CAUSE_LAYOUT = "semicolons"


def cause_people(n: int) -> list[Applicant]:
    """Applicants of the report split with English names (one token each, mostly, so that texts align)."""
    people = loans.applications(4 * n, SEED + 21, "report")
    return [a for a in people if (loans.group_of(a.name) or ("", ""))[1] == "english"][:n]


def study_cause(n: int = 24) -> Path:
    """Attention, swaps, patches, heads and features of the deployed model."""
    start, model = time.time(), load_loan_model()
    people = cause_people(n)
    key = [model.hash, n, CAUSE_LAYOUT]
    pairs = cycle.aligned_pairs(model, people, CAUSE_LAYOUT)
    donors = loans.applications(n, SEED + 31, "report")

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
        some = cycle.part_of(pairs, slice(0, 12))
        guess = cycle.head_guesses(model, some)
        layers = guess.mean(0).abs().sum(1).topk(4).indices.tolist()
        exact = cycle.head_effects(model, some, sorted(layers))[:, sorted(layers)]
        return {"guess": _rounded(guess), "layers": sorted(layers), "exact": _rounded(exact)}

    out = {
        "attention": resumed("loans_cause", [*key, "attention"], looked),
        "swaps": resumed("loans_cause", [*key, "swaps"], swapped),
        "patches": resumed("loans_cause", [*key, "patches", PATCH_LAYERS], patched),
        "heads": resumed("loans_cause", [*key, "heads"], heads),
    }
    sae = load_sae(study.SAE)
    about = [*key, "features", study.SAE, str(files.sha256_of(SAES / study.SAE / "sae_weights.safetensors"))]
    out["features"] = resumed("loans_cause", about, _features, model, sae, pairs)
    return write_table("loans_cause", model, time.time() - start, **out, layout=CAUSE_LAYOUT, fields=cycle.FIELDS)


def _rounded(x: torch.Tensor) -> Any:
    return x.double().numpy().round(4).tolist()


def _features(model: Model, sae: Any, pairs: cycle.Pairs) -> dict[str, Any]:
    """Features are chosen on the first half of the pairs and ablated on the second."""
    layer = site_of(sae.cfg.metadata.hook_name).layer
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
        "sae": study.SAE,
        "sae_model_hash": sae.cfg.metadata.model_hash,
        "layer": layer,
        "features": chosen.tolist(),
        "difference": difference.tolist(),
        "worse": sae.encode(there_worse)[:, chosen].tolist(),
        "better": sae.encode(there_better)[:, chosen].tolist(),
        "gap": ablated,
    }


# --- the auditing game --------------------------------------------------------------------------------


def study_audit(n: int = 12) -> Path:
    """``audit`` over every shipped loan model, and held-out decisions of each. The key stays closed here."""
    start = time.time()
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
