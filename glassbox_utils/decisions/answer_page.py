"""An answer written down: the page for whoever files it, the same as JSON, and the letter to the person who asked.

HTML files without scripts, without a network and with all figures inside, made to be printed on A4. Their words and
looks are in ``templates``, their measurements come from an ``answer.Answer``; every text from outside is escaped. There
is no date of today in them: the same command on the same files writes the same pages.
"""

import hashlib
import json
import platform
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from glassbox_utils.core import evidence, files, pages, schema
from glassbox_utils.core.models import Model
from glassbox_utils.core.statistics import Interval
from glassbox_utils.decisions import answer, answer_plots, impact, reading
from glassbox_utils.decisions import letter as letters
from glassbox_utils.decisions.answer import Answer, plain, printed
from glassbox_utils.decisions.counterfactual import Change
from glassbox_utils.decisions.decision import FILE, Decision
from glassbox_utils.decisions.drawing import number
from glassbox_utils.decisions.fields import DecisionError, Number, Text
from glassbox_utils.decisions.impact import Impact
from glassbox_utils.decisions.influence import Swap
from glassbox_utils.decisions.letter import with_unit
from glassbox_utils.decisions.outcomes import Outcome
from glassbox_utils.decisions.pairs import Contrast
from glassbox_utils.decisions.reasons import FieldTest

TEMPLATES = Path(__file__).parent / "templates"
ROLES = {"merit": "may count", "protected": "protected", "other": ""}


@dataclass(frozen=True)
class Measure:
    """One line of the mitigation table: something measured before and after, in one unit."""

    name: str
    before: tuple[float, float, float]
    """value, and the ends of its 95 % interval"""
    after: tuple[float, float, float]
    n: int
    rung: int = 4
    note: str = ""

    def __post_init__(self) -> None:
        schema.check(self, DecisionError)
        if self.rung not in evidence.RUNGS:
            raise DecisionError(f"rung is {self.rung}. Allowed: {', '.join(map(str, evidence.RUNGS))}. Correct it.")


@dataclass(frozen=True)
class Mitigation:
    """What was done against a bias, and all that was measured before and after."""

    description: str
    measures: tuple[Any, ...]
    source: str

    def __post_init__(self) -> None:
        schema.check(self, DecisionError)


def mitigation(
    said: str, differs: Contrast, before: Outcome, after: Outcome, source: str, elsewhere: Interval | None = None
) -> Mitigation:
    """What an arm did to a gap, for the page of one person: the gap, who is approved, and other text.

    ``said``: the arm in words; ``elsewhere``: KL of ordinary text to the model as it is, nats a token.
    """
    rates = [f"{percent(one.approved[0])} / {percent(one.approved[1])}" for one in (before, after)]
    note = f"approved, {printed(str(differs.own))} / {printed(str(differs.donor))}: {rates[0]} before, {rates[1]} after"
    rows = [
        Measure(f"{differs}: {name}", _ends(b), _ends(a), b.n, note=more)
        for name, b, a, more in (
            ("gap, logits", before.logits, after.logits, ""),
            ("gap in approvals, points", before.gap, after.gap, note),
        )
        if np.isfinite([*_ends(b), *_ends(a)]).all()
    ]
    if elsewhere is not None:
        what = "ordinary text, moved from the model as it is (KL, nats a token)"
        rows.append(Measure(what, (0.0, 0.0, 0.0), _ends(elsewhere), elsewhere.n, 5))
    return Mitigation(said, tuple(rows), source)


def _ends(x: Interval) -> tuple[float, float, float]:
    return x.value, x.low, x.high


def read_mitigation(path: str | Path) -> Mitigation:
    """A measured mitigation from a YAML or JSON file: ``description``, ``source``, and ``measures`` with ``name``,
    ``before`` and ``after`` (value, low, high), ``n``. DecisionError names what is wrong."""
    example = "a file with description, source and measures, each with name, before, after ([value, low, high]) and n"
    values = schema.read_mapping(Path(path), DecisionError, example)
    found = schema.build(Mitigation, values, str(path), DecisionError)
    rows = [schema.build(Measure, m, f"{path} (measures[{i}])", DecisionError) for i, m in enumerate(found.measures)]
    return Mitigation(found.description, tuple(rows), found.source)


def outputs(path: str | Path) -> tuple[Path, Path, Path]:
    """Where page, JSON and letter go: ``answer.html``, ``answer.json``, ``answer-letter.html``. DecisionError for a
    name without a place for all three."""
    page = Path(path)
    if not page.name or page.suffix == ".json":
        raise DecisionError(f"The page is {str(page)[:100]!r}. Allowed: a file such as answer.html; beside it go the "
                            "letter and a .json file.")  # fmt: skip
    return page, page.with_suffix(".json"), page.with_name(f"{page.stem}-letter.html")


def write_answer(
    found: Answer,
    decision: Decision,
    path: str | Path,
    facts: dict[str, str],
    command: str,
    mitigated: Mitigation | None = None,
) -> tuple[Path, Path, Path]:
    """Page, JSON and letter; all are made before the first is written, and each is whole or not there."""
    words = letters.letter(found)
    texts = (
        render(found, decision, facts, command, mitigated),
        json.dumps(as_json(found, facts, command, mitigated), ensure_ascii=False, indent=1, allow_nan=False) + "\n",
        pages.render(TEMPLATES / "letter.html", letter=words),
    )
    targets = outputs(path)
    for target, text in zip(targets, texts, strict=True):
        with files.explain_os_errors(target), files.atomic_path(target) as partial:
            partial.write_text(text, encoding="utf-8")
    return targets


def provenance(model: Model, found: Answer, folder: Path | None = None, adapter: Path | None = None) -> dict[str, str]:
    """What the page was computed from: hashes and versions, no date and no machine path."""
    facts = {"Model": model.name, "Weights and tokenizer": f"{model.hash} (8 digits of sha256 of each)"}
    if str(model.dtype) != "torch.float32":
        facts["Numbers"] = str(model.dtype).removeprefix("torch.")
    weights = adapter / "adapter_model.safetensors" if adapter is not None else None
    if adapter is not None and weights is not None and weights.exists():
        facts["Adapter"] = f"{adapter.resolve().name}, sha256 {files.sha256_of(weights)[:16]}"
    if folder is not None and (folder / FILE).exists():
        facts["Decision"] = f"{found.decision}/{FILE}, sha256 {files.sha256_of(folder / FILE)[:16]}"
    canonical = json.dumps(found.values, sort_keys=True)
    facts["This case"] = f"sha256 {hashlib.sha256(canonical.encode()).hexdigest()[:16]} (fields sorted, JSON)"
    packages = ("glassbox-utils", "torch", "transformers", "peft")
    facts["Versions"] = ", ".join(
        [f"Python {platform.python_version()}", *(f"{p} {version(p).split('+')[0]}" for p in packages)]
    )
    sizes = found.sizes
    facts["Seed and sizes"] = (
        f"seed {sizes.seed}; {sizes.cases} other cases; {sizes.prompts} different prompts; wording "
        f"“{printed(found.template)}”"
    )
    return facts


def as_json(found: Answer, facts: dict[str, str], command: str, mitigated: Mitigation | None = None) -> dict[str, Any]:
    """Everything, as plain values: the audit file for machines."""
    claims = [asdict(f) | {"verdict": f.verdict} for f in answer.findings(found, command)]
    return {
        "command": command,
        "facts": facts,
        "answer": answer.as_json(found),
        "findings": claims,
        "mitigation": None if mitigated is None else asdict(mitigated),
        "letter": asdict(letters.letter(found)),
    }


# --- the page -----------------------------------------------------------------------------------------


def render(
    found: Answer, decision: Decision, facts: dict[str, str], command: str, mitigated: Mitigation | None = None
) -> str:
    """The page as one string of HTML."""
    ranks = {t.field: i for i, t in enumerate(found.reasons, 1)}
    figures = {name: "" for name in ("reasons", "curves", "swaps")} | answer_plots.figures(found)
    good, bad = (printed(word.strip()) for word in found.answers)
    return pages.render(
        TEMPLATES / "answer.html",
        found=found,
        title=printed(found.title),
        case=printed(found.case),
        answer=printed(found.answer),
        opposite=printed(found.opposite),
        favourable=good,
        unfavourable=bad,
        facts_of_case=_facts(found, decision),
        fields=[_field(found, test, ranks) for test in found.fields],
        reasons=[_field(found, test, ranks) for test in found.reasons],
        nearest=[_change(found, one) for one in (found.search.nearest if found.search else ())],
        ranges=_ranges(found, decision),
        tried_how=_tried_how(found),
        swaps=[_swap(s) for s in found.swaps],
        impacts=[_impact(one) for one in found.impacts],
        has_text=any(isinstance(rule, Text) for rule in decision.fields.values()),
        agreement=answer.agreement(found),
        mitigated=mitigated and _mitigation(mitigated),
        letter=letters.letter(found),
        findings=sorted(answer.findings(found), key=lambda f: f.rung),
        figures=figures,
        facts=facts,
        command=command,
        rungs=evidence.RUNGS,
        number=number,
        percent=percent,
        word=lambda score: good if score > 0 else bad,
        names=letters.texts,
        plain=plain,
        printed=printed,
    )


def page(model: Model, found: Answer, decision: Decision, command: str, mitigated: Mitigation | None = None) -> str:
    """``render`` with the provenance of a model without an adapter of its own, and of the decision's folder."""
    return render(found, decision, provenance(model, found, reading.folder_of(decision.name)), command, mitigated)


def percent(share: float) -> str:
    """``42%``."""
    return f"{number(100 * share, 0, False)}%"


def span_of(x: Interval | None, digits: int = 2, sign: bool = True) -> str:
    """``+0.31 (+0.22 to +0.40)``; the number alone where nothing was resampled."""
    if x is None:
        return "–"
    value, low, high = (number(v, digits, sign) for v in (x.value, x.low, x.high))
    return value if x.n < 2 else f"{value} ({low} to {high})"


def _facts(found: Answer, decision: Decision) -> list[dict[str, str]]:
    rows = []
    for name, value in found.values.items():
        group = found.groups.get(name) if isinstance(decision.fields[name], Number) else None
        role = ROLES[decision.fields[name].role] + (f", {group}" if group else "")
        rows.append({"name": plain(name), "value": with_unit(found, name, value), "role": role})
    carried = {name: group for name, group in found.groups.items() if name not in found.values}
    return rows + [
        {"name": plain(name), "value": printed(group or "not known"), "role": "protected, carried"}
        for name, group in carried.items()
    ]


def _field(found: Answer, test: FieldTest, ranks: dict[str, int]) -> dict[str, Any]:
    return {
        "rank": ranks.get(test.field),
        "name": plain(test.field),
        "value": with_unit(found, test.field, test.value),
        "typical": with_unit(found, test.field, test.typical),
        "effect": span_of(test.effect),
        "agree": test.agree,
        "of": len(test.effects),
    }


def _change(found: Answer, one: Change) -> dict[str, Any]:
    parts = [
        {"name": plain(n), "value": with_unit(found, n, v), "own": with_unit(found, n, found.values[n])}
        for n, v in one.changes.items()
    ]
    return {"parts": parts, "score": one.score, "distance": one.distance, "turned": one.turned, "of": one.templates,
            "exact": one.exact}  # fmt: skip


def _ranges(found: Answer, decision: Decision) -> str:
    """``income 18 to 95; history 2 values``."""
    if found.search is None:
        return ""
    said = []
    for name, values in found.search.ranges.items():
        stride = found.search.strides[name]
        every = "" if stride == 1 else f", every {stride} steps"
        number_like = isinstance(decision.fields[name], Number)
        said.append(f"{plain(name)} {values[0]} to {values[1]}{every}" if number_like else f"{plain(name)}: all values")
    return "; ".join(said)


def _tried_how(found: Answer) -> str:
    """How densely fields were tried: a long grid is tried in strides, and finely where the answer turns."""
    strided = found.search and any(stride > 1 for stride in found.search.strides.values())
    if not strided:
        return "Every value of a field’s grid was tried"
    return "Values were tried at the steps that are named, and all between two of them where the answer first turned"


def _swap(s: Swap) -> dict[str, Any]:
    same = "–"
    if s.same is not None and s.same.ci is not None:
        same = f"{number(s.same.ci[0])} to {number(s.same.ci[1])}"
    return {
        "attribute": plain(s.attribute), "group": printed(s.group), "own": printed(s.own or "not known"),
        "put_in": ", ".join(s.put_in), "effect": span_of(s.effect), "same": same, "turns_this": s.turns_this,
        "turned": s.turned, "asked": s.asked,
    }  # fmt: skip


def _impact(one: Impact) -> dict[str, Any]:
    rows = [
        {
            "group": printed(r.group), "n": r.n, "rate": percent(r.rate), "ratio": span_of(r.ratio, sign=False),
            "below": r.ratio is not None and r.ratio.high < impact.FOUR_FIFTHS, "logits": span_of(r.logits),
            "points": span_of(r.points, 0),
        }
        for r in one.rows
    ]  # fmt: skip
    chance = "" if one.chance is None else (
        f"By chance alone (groups shuffled) the lowest ratio falls below {number(one.chance, 2, False)} one time in "
        "twenty."
    )  # fmt: skip
    return {"attribute": plain(one.attribute), "reference": printed(one.reference), "rows": rows, "chance": chance,
            "unit": one.unit, "paired": one.paired}  # fmt: skip


def _mitigation(given: Mitigation) -> dict[str, Any]:
    def said(values: tuple[float, float, float]) -> str:
        return span_of(Interval(*values, n=2))

    rows = [asdict(m) | {"before": said(m.before), "after": said(m.after)} for m in given.measures]
    return {"description": given.description, "measures": rows, "source": given.source}
