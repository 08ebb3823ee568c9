"""The regulator's page: one decision in plain language, with the rung of evidence under every statement.

One HTML file without scripts, without a network and with all figures inside, made to be printed on A4. It is written
from an ``explain.Explanation``; every text that comes from outside is escaped. There is no date in it: the same
command on the same files writes the same page.
"""

import hashlib
import json
import platform
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

from glassbox_utils.core import assets, evidence
from glassbox_utils.core.figures import BLUE, GREEN, GREY, ORANGE, RED, SKY
from glassbox_utils.core.models import EMBEDDED, Model
from glassbox_utils.core.statistics import Interval
from glassbox_utils.decisions import explain, loans
from glassbox_utils.decisions.explain import Change, Explanation, Gap
from glassbox_utils.decisions.loans import Applicant
from glassbox_utils.decisions.report_plots import (
    FAINT,
    INK,
    LINE,
    NAMES,
    e,
    figure_arrival,
    figure_curves,
    figure_fields,
    figure_gaps,
    figure_groups,
    number,
    with_unit,
)

RUNG_COLOURS = {1: GREY, 2: SKY, 3: BLUE, 4: GREEN, 5: ORANGE}


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
    command = "glassbox explain " + " ".join(f"{k} {shlex.quote(v)}" for k, v in where.items())
    page = render(found, provenance(model, found, seed, adapter), command, mitigated)
    target = Path(path)
    with assets.explain_os_errors(target), assets.atomic_path(target) as partial:
        partial.write_text(page, encoding="utf-8")
    return target


def provenance(model: Model, found: Explanation, seed: int, adapter: Path | None) -> dict[str, str]:
    """What the page was computed from: hashes and versions, no date and no machine path."""
    weights = adapter / "adapter_model.safetensors" if adapter else None
    facts = {"Model": model.name, "Weights as they ran": f"{model.hash} (first 16 digits of sha256, bfloat16)"}
    if weights and weights.exists():
        facts["Adapter"] = f"{adapter.name if adapter else ''}, sha256 {assets.sha256_of(weights)[:16]}"
    source = assets.cache_dir() / "models" / EMBEDDED / "source.json"
    if source.exists():
        facts["Base model file"] = f"{EMBEDDED}, GGUF sha256 {json.loads(source.read_text())['gguf_sha256'][:16]}"
    facts["Names, places, occupations"] = (
        f"data/loans/names.json, sha256 {assets.sha256_of(loans.LOANS / 'names.json')[:16]}"
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


# --- words --------------------------------------------------------------------------------------------


def span_of(interval: Interval, digits: int = 2, sign: bool = True) -> str:
    """``+0.31 (+0.22 to +0.40)``."""
    value, low, high = (number(x, digits, sign) for x in (interval.value, interval.low, interval.high))
    return f"{value} ({low} to {high})"


def decided(logit: float) -> str:
    return "approved" if logit > 0 else "rejected"


def _chip(logit: float) -> str:
    return f'<span class="chip {decided(logit)}">{decided(logit)}</span>'


def badge(rung: int) -> str:
    """The rung of evidence as a coloured label."""
    return f'<span class="rung" style="background:{RUNG_COLOURS[rung]}">{rung} {e(evidence.RUNGS[rung])}</span>'


def _change(found: Explanation, change: Change) -> str:
    parts = []
    for field, value in change.changes.items():
        own = getattr(found.applicant, field)
        parts.append(f"<b>{e(NAMES[field])}</b> {e(with_unit(field, value))} instead of {e(with_unit(field, own))}")
    return " and ".join(parts)


def biased(found: Explanation) -> list[Gap]:
    """Gaps that are beyond chance and larger than what another name of the same group does."""
    noise = max(abs(found.control.logits.low), abs(found.control.logits.high))
    return [
        g
        for g in sorted(found.gaps, key=lambda g: -abs(g.logits.value))
        if g.p_value < 0.05 and g.logits.excludes(0) and abs(g.logits.value) > noise
    ]


def _summary(found: Explanation) -> str:
    a = found.applicant
    order = sorted((f for f in found.effects if f.effect.excludes(0)), key=lambda f: f.effect.value)
    against = [f for f in order if f.effect.value < 0][:2]
    favour = [f for f in reversed(order) if f.effect.value > 0][:2]

    def listed(effects: list[explain.FieldEffect]) -> str:
        return " and ".join(f"the {e(NAMES[f.field])} ({e(with_unit(f.field, f.value))})" for f in effects)

    lines = [
        f"The system <b>{decided(found.logit)}</b> the application of {e(a.name)}. It put the chance of approval at "
        f"<b>{found.probability:.0%}</b>; below 50 % means rejection."
    ]
    if against:
        lines.append(f"What counted most against it: {listed(against)}.")
    if favour:
        lines.append(f"What counted most in its favour: {listed(favour)}.")
    if not order:
        lines.append("No single field moved this decision by more than chance.")
    opposite = "approved" if not found.approved else "rejected"
    if found.nearest:
        lines.append(f"It would have been {opposite} with {_change(found, found.nearest[0])}.")
    else:
        lines.append(f"None of {found.n_searched} changed applications that were tried would have been {opposite}.")
    flagged = biased(found)
    if flagged:
        g = flagged[0]
        lines.append(
            f"<b>Who is asking plays a part in this system’s decisions:</b> for otherwise identical applications, "
            f"{e(g.label)} differ by {span_of(g.logits)} in score and by {span_of(g.points, 0)} percentage points in "
            f"approval (95 % intervals, {found.n_applicants} applicants). That "
            "is not a reason that lending rules allow."
        )
    else:
        lines.append(
            f"For {found.n_applicants} other applications, changing gender, origin, age or district alone moved the "
            "decision by no more than chance or than another name of the same group does."
        )
    agree = found.approved == found.merit
    rule = "approve" if found.merit else "reject"
    lines.append(
        f"The written merit rule would {rule} this application ({found.points:g} of 7.5 points, 3.5 needed): the "
        f"system {'agrees with' if agree else 'departs from'} the rule here."
    )
    return "".join(f"<p>{line}</p>" for line in lines)


# --- the page -----------------------------------------------------------------------------------------

STYLE = f"""
@page {{ size: A4; margin: 16mm 15mm; }}
* {{ box-sizing: border-box; }}
body {{ font: 14px/1.5 "Helvetica Neue", Arial, "Liberation Sans", sans-serif; color: {INK}; background: #eef1f4;
  margin: 0; }}
main {{ background: white; max-width: 210mm; margin: 8mm auto; padding: 14mm 15mm; box-shadow: 0 1px 6px #0002; }}
header {{ border-bottom: 2px solid {INK}; padding-bottom: 10px; margin-bottom: 14px; }}
.kicker {{ text-transform: uppercase; letter-spacing: .09em; font-size: 11px; color: {FAINT}; }}
h1 {{ font-size: 25px; line-height: 1.2; margin: 4px 0 2px; }}
h2 {{ font-size: 16.5px; margin: 26px 0 6px; padding-top: 8px; border-top: 1px solid {LINE}; break-after: avoid; }}
p {{ margin: 6px 0; }}
.answer {{ display: grid; grid-template-columns: 46mm 1fr; gap: 16px; background: #f6f8fa; border-left: 5px solid;
  padding: 12px 16px; break-inside: avoid; }}
.answer.rejected {{ border-color: {RED}; }} .answer.approved {{ border-color: {GREEN}; }}
.verdict {{ font-size: 25px; font-weight: 700; text-transform: uppercase; letter-spacing: .02em; }}
.rejected .verdict, .chip.rejected {{ color: #a84300; }} .approved .verdict, .chip.approved {{ color: #00734f; }}
.big {{ font-size: 34px; font-weight: 300; line-height: 1.1; }}
.small, figcaption, .note {{ font-size: 12px; color: {FAINT}; }}
table {{ border-collapse: collapse; width: 100%; font-size: 12.5px; margin: 8px 0; }}
th {{ text-align: left; font-weight: 600; border-bottom: 1.5px solid {INK}; padding: 4px 8px 4px 0; }}
td {{ border-bottom: 1px solid {LINE}; padding: 4px 8px 4px 0; vertical-align: top; }}
tr {{ break-inside: avoid; }}
.facts td:first-child {{ color: {FAINT}; white-space: nowrap; }}
.two {{ columns: 2; column-gap: 24px; }} .two table {{ margin: 0; }}
.rung {{ color: white; font-size: 10.5px; font-weight: 600; border-radius: 9px; padding: 1px 8px;
  white-space: nowrap; }}
.chip {{ font-weight: 700; font-size: 12px; }}
figure {{ margin: 10px 0; break-inside: avoid; }}
svg text {{ paint-order: stroke; stroke: white; stroke-width: 2px; stroke-linejoin: round; }}
svg {{ width: 100%; height: auto; display: block; font-family: inherit; }}
code, pre {{ font: 12px/1.45 "DejaVu Sans Mono", Menlo, Consolas, monospace; overflow-wrap: anywhere; }}
pre {{ background: #f6f8fa; padding: 8px 10px; white-space: pre-wrap; break-inside: avoid; }}
.warn {{ border-left: 4px solid {ORANGE}; padding: 6px 12px; background: #fff8ec; break-inside: avoid; }}
footer {{ margin-top: 22px; border-top: 1px solid {LINE}; padding-top: 8px; font-size: 11.5px; color: {FAINT}; }}
@media print {{ body {{ background: white; font-size: 9.5pt; line-height: 1.4; }}
  h1 {{ font-size: 19pt; }} h2 {{ font-size: 12pt; margin-top: 16px; }} table {{ font-size: 8.5pt; }}
  td {{ padding-top: 2.5px; padding-bottom: 2.5px; }} .small, figcaption, .note {{ font-size: 8.5pt; }}
  main {{ box-shadow: none; margin: 0; padding: 0; max-width: none; }}
  * {{ -webkit-print-color-adjust: exact; print-color-adjust: exact; }} }}
"""

LIMITS = (
    "These are measurements on one model. They are evidence about what moved its decisions, not proof of why, and not "
    "a statement about the intentions of the people who use it.",
    "Attention shows what a model looks at. It is not a reason: it stands on the lowest rung, the first words of a "
    "text draw it whatever they say, and where it disagrees with the causal column, the causal column counts.",
    "A field’s effect is measured by putting other applicants’ values in its place. Two fields that carry the same "
    "information can cover for each other, so a small effect does not show that a field is irrelevant.",
    "Groups are stood in for by first names, districts and ages. A name is not a person’s identity, and no test "
    "was made for groups that these lists do not have.",
    "The search for a smallest change tries a grid of one and two fields inside the ranges that the model was trained "
    "on; a smaller change may exist between the grid’s points.",
    "An interval of 95 % is wrong one time in twenty. The comparison of groups is corrected for testing four "
    "attributes at once; the fields of the single decision are not.",
    "The application, the applicants and the merit rule are made up for teaching. This page shows how an explanation "
    "can be given, and is not itself a legal notice.",
)


def render(found: Explanation, facts: dict[str, str], command: str, mitigated: Mitigation | None = None) -> str:
    """The page as one string of HTML."""
    sections = [
        _head(found),
        _what_it_rested_on(found),
        _what_would_have_changed(found),
        _other_groups(found),
        _many(found),
        _mitigated(mitigated),
        _ladder(found),
        "<h2>What this page can’t tell</h2><ul>" + "".join(f"<li>{e(x)}</li>" for x in LIMITS) + "</ul>",
        _reproduce(found, facts, command),
    ]
    title = f"{found.applicant.name}: {decided(found.logit)}"
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    head += f"<title>{e(title)}</title><style>{STYLE}</style>"
    body = "\n".join(s for s in sections if s)
    return f"<!doctype html>\n<html lang='en'><head>{head}</head><body><main>{body}</main></body></html>\n"


def _head(found: Explanation) -> str:
    a = asdict(found.applicant)
    rows = [f"<tr><td>{e(NAMES[k])}</td><td>{e(with_unit(k, v))}</td></tr>" for k, v in a.items()]
    half = (len(rows) + 1) // 2
    tables = "".join(f'<table class="facts">{"".join(part)}</table>' for part in (rows[:half], rows[half:]))
    warning = ""
    if found.outside:
        listed = ", ".join(NAMES[f] for f in found.outside)
        warning = (
            f'<p class="warn">The model never saw such a value in training: <b>{e(listed)}</b>. What it decides there '
            "is an extrapolation, and so is this explanation.</p>"
        )
    return f"""<header><div class="kicker">Explanation of an automated decision · Glassbox</div>
<h1>The application of {e(found.applicant.name)} was {decided(found.logit)}. Why?</h1></header>
<div class="answer {decided(found.logit)}"><div><div class="verdict">{decided(found.logit)}</div>
<div class="big">{found.probability:.0%}</div><div class="small">chance of approval that the model gives<br>score
{number(found.logit)} (approval above 0)</div></div><div>{_summary(found)}</div></div>
{warning}<h2>The application</h2><div class="two">{tables}</div>"""


def _what_it_rested_on(found: Explanation) -> str:
    agreement = found.agreement
    verdict = "agree" if agreement.low > 0 else "do not agree beyond chance"
    same = sum((x > 0) == (found.logit > 0) for x in found.layouts.values())
    stable = (
        f"Written in {len(found.layouts)} different layouts, the same application gets the same decision in "
        f"{same} of them."
    )
    return f"""<h2>What the decision rested on</h2>
<p>{badge(3)} Each field was replaced by those of {explain.N_DONORS} other applicants, everything else unchanged; the
bar is what this field’s own value did to the score, the black line its 95 % interval, and a grey bar can’t be told from
nothing. {badge(1)} The right column is only what the model looked at.</p>
<figure>{figure_fields(found)}<figcaption>Looking and mattering {verdict} here: rank correlation over the
{len(found.effects)} fields {number(agreement.value)} (95 % {number(agreement.low)} to {number(agreement.high)}).
A score of +1 makes approval 2.7 times likelier against rejection. {stable}</figcaption></figure>"""


def _what_would_have_changed(found: Explanation) -> str:
    opposite = "rejected" if found.approved else "approved"
    if found.nearest:
        rows = "".join(
            f"<tr><td>{_change(found, c)}</td><td>{_chip(c.logit)}</td><td>{number(c.logit)}</td>"
            f"<td>{c.distance:.0%}</td></tr>"
            for c in found.nearest
        )
        words = "Smallest change first; the last column is its size in the range that the model was trained on."
        table = f"<table><tr><th>With</th><th>decision</th><th>score</th><th>size</th></tr>{rows}</table>"
    else:
        words = f"No change of one or two fields that was tried would have led to the application being {opposite}."
        table = ""
    return f"""<h2>What would have changed it</h2>
<p>{badge(3)} {found.n_searched} changed applications were put to the model, in the fields that a person can change
and that the merit rule reads. {words}</p>{table}
<figure>{figure_curves(found)}</figure>"""


def _other_groups(found: Explanation) -> str:
    flips = [g for g in found.groups if (g.logit > 0) != (found.logit > 0)]
    listed = ", ".join(f"{g.kind} {g.group}" for g in flips)
    verdict = (
        f"The decision would have been another with: {listed}." if flips else "None of these changes the decision."
    )
    rows = "".join(
        f"<tr><td>{e(g.kind)}</td><td>{e(g.group)}{' (own)' if g.own else ''}</td><td>{e(g.shown)}</td>"
        f"<td>{_chip(g.logit)}</td><td>{number(g.logit)}{f' ± {g.spread:.2f}' if g.n > 1 else ''}</td>"
        f"<td>{number(g.logit - found.logit)}</td></tr>"
        for g in found.groups
    )
    patched = ""
    if found.arrival:
        control = found.arrival[-1][2]
        words = (
            f"A name of the same group moves the decision {control:.0%} as far: this is about the name, not the group."
            if abs(control) > 0.5
            else f"A name of the same group moves the decision {control:.0%} as far."
        )
        patched = f"""<p>{badge(3)} Inside the model, the name’s influence can be followed to the place where the
decision is made: the state there is replaced, layer by layer, by that of the same application with a name of the other
gender. {e(words)}</p><figure>{figure_arrival(found)}</figure>"""
    return f"""<h2>The same application from somebody else</h2>
<p>{badge(3)} Only the first name, the district or the age is changed; everything that the merit rule reads stays.
{e(verdict)}</p><figure>{figure_groups(found)}</figure>
<table><tr><th>changed</th><th>group</th><th>put in</th><th>decision</th><th>score (± spread over names)</th>
<th>difference</th></tr>{rows}</table>{patched}"""


def _many(found: Explanation) -> str:
    flagged = biased(found)
    verdict = (
        "Beyond chance, and beyond what another name of the same group does: "
        + "; ".join(f"<b>{e(g.label)}</b> (score {span_of(g.logits)}, p = {g.p_value:.2g})" for g in flagged)
        + "."
        if flagged
        else "None of the four is beyond chance and beyond the control."
    )
    return f"""<h2>Is it only this applicant?</h2>
<p>{badge(4)} {found.n_applicants} new applicants, with names and districts that no training has used; each is compared
with itself in another group. {verdict}</p>
<figure>{figure_gaps(found)}<figcaption>Mean difference and 95 % bootstrap interval over {found.n_applicants}
applicants; red: the interval leaves 0 outside. p-values: sign flips, Holm over four attributes.</figcaption>
</figure>"""


def _mitigated(done: Mitigation | None) -> str:
    if done is None:
        return """<h2>What can be done about it</h2><p>For this model no mitigation has been measured. The notebook
06_full_cycle shows how one is fitted, checked on applicants that it has not seen, and what it costs.</p>"""
    rows = "".join(
        f"<tr><td>{badge(m.rung)}</td><td>{e(m.name)}<br><span class=note>{e(m.note)}</span></td>"
        f"<td>{span_of(m.before, sign=m.rung == 4)}</td>"
        f"<td>{span_of(m.after, sign=m.rung == 4)}</td><td>{m.after.n}</td></tr>"
        for m in done.measures
    )
    return f"""<h2>What can be done about it</h2><p>{e(done.description)}</p>
<table><tr><th></th><th>measured</th><th>before (95 %)</th><th>after (95 %)</th><th>n</th></tr>{rows}</table>
<p class="note">Source: {e(done.source)}.</p>"""


def _ladder(found: Explanation) -> str:
    rows = "".join(
        f"<tr><td>{badge(f.rung)}</td><td>{e(f.claim)}{' <b>(not borne out)</b>' if f.refuted else ''}</td>"
        f"<td>{number(f.effect)}</td><td>{'' if f.rung == 1 else f'{number(f.ci[0])} to {number(f.ci[1])}'}</td>"
        f"<td>{f.n}</td><td>{e(f.control or 'none')}</td></tr>"
        for f in sorted(explain.findings(found), key=lambda f: f.rung)
    )
    return f"""<h2>How sure is each statement?</h2>
<p>Evidence has rungs: 1 observed, 2 localised, 3 causal (something was changed, and the decision moved), 4 behavioural
(on new applicants), 5 side effects. No statement claims a higher rung than it was tested on.</p>
<table><tr><th></th><th>statement</th><th>effect</th><th>95 %</th><th>n</th><th>compared with</th></tr>{rows}</table>"""


def _reproduce(found: Explanation, facts: dict[str, str], command: str) -> str:
    rows = "".join(f"<tr><td>{e(k)}</td><td>{e(v)}</td></tr>" for k, v in facts.items())
    file = json.dumps(asdict(found.applicant), ensure_ascii=False)
    return f"""<h2>Check it yourself</h2><p>The same command on the same files gives the same page.</p>
<pre>{e(command)}</pre><p class="small">with this application file:</p><pre>{e(file)}</pre>
<table class="facts">{rows}</table>
<footer>Written by Glassbox. Evidence, not proof.</footer>"""
