"""The regulator's page: one decision in plain language, with the rung of evidence under every statement.

One HTML file without scripts, without a network and with all figures inside, made to be printed on A4. Its words
and looks are in ``templates/report.html``, its measurements come from an ``explain.Explanation``; every text that comes
from outside is escaped. There is no date in it: the same command on the same files writes the same page.
"""

import hashlib
import json
import platform
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from glassbox_utils.core import evidence, files, pages, prepared
from glassbox_utils.core.embedded import EMBEDDED, embedded_path
from glassbox_utils.core.models import Model
from glassbox_utils.core.statistics import Interval
from glassbox_utils.decisions import explain, loans, report_plots
from glassbox_utils.decisions.explain import Change, Explanation, FieldEffect, Gap
from glassbox_utils.decisions.loans import Applicant
from glassbox_utils.decisions.report_plots import NAMES, number, with_unit

TEMPLATE = Path(__file__).parent / "templates" / "report.html"


@dataclass(frozen=True)
class Measure:
    """One line of the mitigation table: something measured before and after, in one unit."""

    name: str
    before: Interval
    after: Interval
    rung: int = 4
    note: str = ""


@dataclass(frozen=True)
class Mitigation:
    """What was done against a bias, and all that was measured before and after."""

    description: str
    measures: Sequence[Measure]
    source: str


def write_report(
    model: Model,
    applicant: Applicant,
    path: str | Path,
    *,
    layout: str = "line",
    n: int = 32,
    seed: int = 0,
    adapter: Path | None = None,
    mitigated: Mitigation | None = None,
    applicant_file: str = "applicant.json",
    model_argument: str = "deployed",
) -> Path:
    """Explain one application and write the page; nothing is left behind if anything fails.

    ``n``: applicants of the group comparison. ``adapter``: the LoRA folder that is in the model, for its hash.
    Raises LoanError for an unknown layout. About 20 s on two idle cores.
    """
    found = explain.explain(model, applicant, layout, n, seed)
    where = {"--applicant": applicant_file, "--model": model_argument, "--layout": layout, "--seed": str(seed)}
    where |= {} if str(model.dtype) == "torch.float32" else {"--dtype": str(model.dtype).removeprefix("torch.")}
    command = "glassbox explain " + " ".join(f"{k} {shlex.quote(v)}" for k, v in where.items())
    page = render(found, provenance(model, found, seed, adapter), command, mitigated)
    target = Path(path)
    with files.explain_os_errors(target), files.atomic_path(target) as partial:
        partial.write_text(page, encoding="utf-8")
    return target


def provenance(model: Model, found: Explanation, seed: int, adapter: Path | None) -> dict[str, str]:
    """What the page was computed from: hashes and versions, no date and no machine path."""
    weights = adapter / "adapter_model.safetensors" if adapter else None
    facts = {"Model": model.name, "Weights and tokenizer": f"{model.hash} (8 digits of sha256 of each)"}
    if weights and weights.exists():
        facts["Adapter"] = f"{adapter.name if adapter else ''}, sha256 {files.sha256_of(weights)[:16]}"
    source = embedded_path() / "source.json"
    if source.exists() and _is_of(model, source.parent):
        facts["Base model file"] = (
            f"{EMBEDDED}, GGUF sha256 {json.loads(source.read_text(encoding='utf-8'))['gguf_sha256'][:16]}"
        )
    elif adapter and prepared.path("loans") in adapter.parents:
        facts["Base model"] = f"{prepared.card().model}, {prepared.card().model_hash}"
    facts["Names, places, occupations"] = (
        f"data/loans/names.json, sha256 {files.sha256_of(loans.LOANS / 'names.json')[:16]}"
    )
    canonical = json.dumps(asdict(found.applicant), sort_keys=True)
    facts["This application"] = f"sha256 {hashlib.sha256(canonical.encode()).hexdigest()[:16]} (fields sorted, JSON)"
    packages = ("glassbox-utils", "torch", "transformers", "peft")
    facts["Versions"] = ", ".join(
        [f"Python {platform.python_version()}", *(f"{p} {version(p).split('+')[0]}" for p in packages)]
    )
    facts["Seed and sizes"] = (
        f"seed {seed}; {found.n_applicants} new applicants in the comparison of groups; {explain.N_DONORS} other "
        f"applicants for each field; {found.n_searched} changes searched; layout “{found.layout}”"
    )
    return facts


def _is_of(model: Model, folder: Path) -> bool:
    """Were the model's weights read from this folder?"""
    return model.origin is not None and folder.resolve() in {p.resolve() for f in model.origin.files for p in f.parents}


# --- the page -----------------------------------------------------------------------------------------


def render(found: Explanation, facts: dict[str, str], command: str, mitigated: Mitigation | None = None) -> str:
    """The page as one string of HTML."""
    return pages.render(
        TEMPLATE,
        found=found,
        facts=facts,
        command=command,
        mitigated=mitigated,
        application=_fields(asdict(found.applicant)),
        file=json.dumps(asdict(found.applicant), ensure_ascii=False),
        outside=[NAMES[f] for f in found.outside],
        reasons=_reasons(found.effects),
        nearest=[_change(found, change) for change in found.nearest],
        flips=[g for g in found.groups if (g.logit > 0) != found.approved],
        silent_layouts=len(loans.LAYOUTS) - len(found.layouts),
        same_layouts=sum((x > 0) == found.approved for x in found.layouts.values()),
        biased=biased(found),
        findings=sorted(explain.findings(found), key=lambda f: f.rung),
        figures=_figures(found),
        rungs=evidence.RUNGS,
        donors=explain.N_DONORS,
        number=number,
        percent=percent,
        span_of=span_of,
        decided=decided,
    )


def percent(share: float) -> str:
    """``−7%``."""
    return f"{number(100 * share, 0, False)}%"


def span_of(interval: Interval, digits: int = 2, sign: bool = True) -> str:
    """``+0.31 (+0.22 to +0.40)``."""
    value, low, high = (number(x, digits, sign) for x in (interval.value, interval.low, interval.high))
    return f"{value} ({low} to {high})"


def decided(logit: float) -> str:
    """The decision as a word, which is also the class of its colour."""
    return "approved" if logit > 0 else "rejected"


def biased(found: Explanation) -> list[Gap]:
    """Gaps that are beyond chance and larger than what another name of the same group does."""
    noise = max(abs(found.control.logits.low), abs(found.control.logits.high))
    return [
        g
        for g in sorted(found.gaps, key=lambda g: -abs(g.logits.value))
        if g.p_value < 0.05 and g.logits.excludes(0) and abs(g.logits.value) > noise
    ]


def _fields(values: dict[str, Any]) -> list[dict[str, str]]:
    return [{"name": NAMES[field], "value": with_unit(field, value)} for field, value in values.items()]


def _reasons(effects: Sequence[FieldEffect]) -> dict[str, list[dict[str, str]]]:
    """The two fields that counted most on each side, of those that moved the decision beyond chance."""
    order = sorted((f for f in effects if f.effect.excludes(0)), key=lambda f: f.effect.value)
    against = [f for f in order if f.effect.value < 0][:2]
    favour = [f for f in reversed(order) if f.effect.value > 0][:2]
    return {k: _fields({f.field: f.value for f in side}) for k, side in (("against", against), ("favour", favour))}


def _change(found: Explanation, change: Change) -> dict[str, Any]:
    own = {field: getattr(found.applicant, field) for field in change.changes}
    parts = [new | {"own": old["value"]} for new, old in zip(_fields(change.changes), _fields(own), strict=True)]
    return {"parts": parts, "logit": change.logit, "distance": change.distance}


def _figures(found: Explanation) -> dict[str, str]:
    """SVG by its name in the template; the way of the name through the layers only where there is one."""
    drawn = {
        "fields": report_plots.figure_fields(found),
        "curves": report_plots.figure_curves(found),
        "groups": report_plots.figure_groups(found),
        "gaps": report_plots.figure_gaps(found),
    }
    return drawn | ({"arrival": report_plots.figure_arrival(found)} if found.arrival else {})
