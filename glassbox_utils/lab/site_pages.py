"""Pages of the site that are made of data: results, gallery, the audit's power, glossary with its back-links, modules.

Every number on them is read from what a notebook or a study wrote; none is typed. Each function returns the text of a
page in MyST Markdown (with HTML where a table needs classes).
"""

import ast
import base64
import html
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from glassbox_utils.core import figures
from glassbox_utils.core.evidence import RUNGS, Verdict
from glassbox_utils.lab.site_notebooks import FIGURE, Lesson, pictures, sections

ROOMS = ("core", "attention", "steering", "saes", "decisions", "lab")


# --- results ------------------------------------------------------------------------------------------


def results(lessons: Sequence[Lesson]) -> str:
    """Every finding of every notebook, with how many ended in which verdict."""
    found = [(lesson, f) for lesson in lessons for f in lesson.findings]
    count = Counter(f["verdict"] for _, f in found)
    total = ", ".join(f"{count[v]} {v}" for v in get_args(Verdict) if count[v])
    lines = [
        "# Results",
        "",
        f"The notebooks state {len(found)} findings: {total}. Each row is read from the notebook that measured it. A "
        "verdict "
        "is computed from the numbers: *held* means that the whole interval lies where the claim puts it, beyond its "
        "control's number and beyond no effect, and the effect outside the brackets of the control (of random units: "
        "lowest and highest draw). *Null* can't be told apart from one of them, *refuted* lies on the other side, *not "
        "testable* had a control that could not have failed. Where *p* stands, it is corrected for what was tested "
        "beside it, and from .05 on the row is null. Evidence, never proof.",
        "",
        "How often the audit finds a planted bias, and how often it accuses the honest, is a "
        "[page of its own](power.md); where three officers' gaps are, and what mends one, is [another](located.md); "
        "which findings keep their verdict with other seeds is [a third](seeds.md).",
        "",
    ]
    lines += ['<p><a href="_static/findings.json">The same as JSON</a>, to count for yourself.</p>', ""]
    for lesson in lessons:
        if rows := lesson.findings:
            link = f"notebooks/{lesson.name}.html#findings"
            source = f"Measured in [{lesson.name}](notebooks/{lesson.name}.ipynb); each claim leads to its ladder."
            lines += [f"## {lesson.title}", "", source, "", _findings(rows, link, lesson.title), ""]
    return "\n".join(lines)


def _findings(rows: Iterable[Mapping[str, Any]], link: str, title: str) -> str:
    columns = ("verdict", "effect", "95 % interval", "claim", "control", "rung", "resampled", "p")
    body = []
    for f in rows:
        cells = [
            f'<span class="verdict {f["verdict"].replace(" ", "-")}">{html.escape(f["verdict"])}</span>',
            f"{f['effect']:.2f}",
            f"{f['ci'][0]:.2f} to {f['ci'][1]:.2f}",
            f'<a href="{link}">{html.escape(f["claim"])}</a>',
            html.escape(_control(f["control"])),
            f"{f['rung']} {RUNGS[f['rung']]}",
            html.escape(f"{f['n']} {f['unit']}"),
            html.escape(f.get("p") or ""),
        ]
        body.append("<tr>" + "".join(f"<td>{c}</td>" for c in cells) + "</tr>")
    return table_html(f"Findings of {title}", columns, body, "findings")


def _control(c: Mapping[str, Any] | None) -> str:
    if c is None:
        return "none"
    spread = f" [{c['ci'][0]:.2f}, {c['ci'][1]:.2f}]" if c["ci"] else ""
    return f"{c['kind']}: {c['what']}: {c['value']:.2f}{spread}"


def table_html(name: str, columns: Sequence[str], rows: Sequence[str], kind: str = "") -> str:
    head = "".join(f'<th scope="col">{html.escape(c)}</th>' for c in columns)
    label = html.escape(name, quote=True)
    return (
        f'<div class="scrolls" tabindex="0" role="group" aria-label="{label}"><table class="table {kind}">'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


# --- gallery ------------------------------------------------------------------------------------------


def gallery(lessons: Sequence[Lesson], folder: Path) -> str:
    """Every static figure beside a link to where it is explained; the pictures are written into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        "# Gallery",
        "",
        "Every figure of the notebooks. What it shows, and what would falsify it, stands at its place.",
    ]
    for lesson in lessons:
        drawn = pictures(lesson)
        if not drawn:
            continue
        live = sum(FIGURE in "".join(o.get("data", {}).get("text/html", "")) for o in _outputs(lesson))
        more = f" {live} more {'is' if live == 1 else 'are'} interactive, on the page itself." if live else ""
        lines += [
            "",
            f"## {lesson.title}",
            "",
            f"[{lesson.name}](notebooks/{lesson.name}.ipynb): {len(drawn)} figures.{more}",
            "",
        ]
        lines += ['<div class="gallery">', ""]
        for k, picture in enumerate(drawn):
            name = f"{lesson.name}-{k + 1:02d}.png"
            (folder / name).write_bytes(base64.b64decode(picture.png))
            words, place = html.escape(picture.alt, quote=True), html.escape(picture.section or lesson.title)
            image = f'<img src="_static/{folder.name}/{name}" alt="{words}" loading="lazy">'
            link = f"notebooks/{lesson.name}.html#{_identifier(picture.section)}"
            lines.append(f'<figure>{image}<figcaption><a href="{link}">{place}</a></figcaption></figure>')
        lines += ["</div>"]
    return "\n".join(lines) + "\n"


def _identifier(heading: str) -> str:
    """The id that Sphinx gives a heading."""
    from docutils.nodes import make_id

    return make_id(re.sub(r"[`*]", "", heading))


def _outputs(lesson: Lesson) -> Iterable[Any]:
    return (o for c in lesson.notebook.cells for o in c.get("outputs", []))


# --- the audit's power --------------------------------------------------------------------------------


def power(table: Mapping[str, Any], picture: Path) -> str:
    """What ``glassbox study audit-power`` found, as a curve and its numbers; the curve is drawn into ``picture``."""
    rates = {(r["part"], r["of"], r["size"], r["what"]): r for r in table["rates"]}
    sizes = table["settings"]["sizes"]
    alt = _draw_power(rates, sizes, picture)
    made = table["provenance"]
    point, alarm = rates["curve", "all", 1.0, "found"], rates["honest", "all", None, "alarm"]
    said = (
        f"Of {point['n']} planted biases of one point {point['value'] * point['n']:.0f} were found "
        f"({point['value']:.2f} [{point['low']:.2f}, {point['high']:.2f}]). A false alarm: of {alarm['n']} honest "
        f"officers {alarm['value'] * alarm['n']:.0f} were accused "
        f"({alarm['value']:.2f} [{alarm['low']:.2f}, {alarm['high']:.2f}])."
    )
    found = [rates["curve", "all", size, "found"] for size in sizes]
    missed = [
        f"<tr><td>{size:g}</td><td>{r['value'] * r['n']:.0f} of {r['n']}</td><td>{1 - r['value']:.0%}</td>"
        f"<td>{1 - r['high']:.0%} to {1 - r['low']:.0%}</td></tr>"
        for size, r in zip(sizes, found, strict=True)
    ]
    columns = ("what", "of which", "size, points of the merit rule", "share", "95 % interval", "n")
    words = {"found": "found", "right": "found and named right", "alarm": "false alarm", "again": "said again"}
    rows = []
    for r in table["rates"]:
        cells = (
            f"{r['part']}: {words[r['what']]}", r["of"], "" if r["size"] is None else f"{r['size']:g}",
            f"{r['value']:.2f}", f"{r['low']:.2f} to {r['high']:.2f}", str(r["n"]),
        )  # fmt: skip
        rows.append("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in cells) + "</tr>")
    return "\n".join(
        [
            "# How often the audit is right",
            "",
            "A bias of known size was planted in officers, which the audit then asked without knowing it; officers "
            "that hold nothing against anybody were audited beside them. **These officers are no language models:** "
            "each is a rule plus a penalty that is read from the text of the application. *A point* is one point of "
            "that rule.",
            "",
            said,
            "",
            "## How small a bias would have been missed?",
            "",
            table_html("Missed, by size", ("size of the bias, points", "found", "missed", "95 % interval"), missed),
            "",
            "Notebook 07 says the same of one audit of one model, in logits: the smallest effect that it would have "
            "found with 90 % power.",
            "",
            "Intervals are Wilson's, over officers. *Named right*: the group that was planted is the one that is "
            "named.",
            "",
            f"```{{figure}} {picture.name}",
            f":alt: {alt}",
            "```",
            "",
            f"Made by `{made['command']}` with seed {made['seed']}, finished {made['finished']}. *Curve*: planted "
            "biases in "
            "each size. *Honest*: officers without any. *Promised*: biases of the size that an audit had said it "
            "would find, "
            "and a quarter more. *Unseen*: biases of a form that no question of the audit has. *Again*: the same "
            "officer "
            "audited with another seed.",
            "",
            table_html("All rates", columns, rows),
            "",
        ]
    )


def _draw_power(rates: Mapping[Any, Mapping[str, Any]], sizes: Sequence[float], path: Path) -> str:
    import matplotlib.pyplot as plt

    figures.style()
    figure, axis = plt.subplots(figsize=(6.5, 3.4))
    said = []
    for what, words, colour in (("found", "found", figures.BLUE), ("right", "found and named right", figures.GREEN)):
        line = [rates["curve", "all", size, what] for size in sizes]
        value = [r["value"] for r in line]
        ends = [[r["value"] - r["low"] for r in line], [r["high"] - r["value"] for r in line]]
        axis.errorbar(sizes, value, ends, color=colour, marker="o", capsize=3, label=words)
        said.append(f"{words}: " + ", ".join(f"{v:.0%} at {s:g}" for s, v in zip(sizes, value, strict=True)))
    alarm = rates["honest", "all", None, "alarm"]
    axis.set(
        xlabel="size of the planted bias, points of the merit rule", ylabel="share of officers", ylim=(-0.03, 1.03)
    )
    axis.set_xscale("log", base=2)
    axis.set_xticks(sizes, [f"{s:g}" for s in sizes])
    first, second = (rates["curve", "all", size, "found"]["value"] for size in sizes[:2])
    figures.titled(
        figure,
        f"Found: {first:.0%} of biases of {sizes[0]:g} points, {second:.0%} of {sizes[1]:g}; "
        f"{alarm['value'] * alarm['n']:.0f} of {alarm['n']} honest officers accused",
    )
    axis.legend(loc="lower right")
    figure.savefig(path, metadata={"Software": None})
    plt.close(figure)
    return "Share of officers whose planted bias is " + "; ".join(said) + " points."


# --- glossary -----------------------------------------------------------------------------------------


def glossary(text: str, lessons: Sequence[Lesson]) -> str:
    """The glossary, under each term the sections that link to it or, where none does, those that use the word."""
    lines, used = [], _mentions(lessons)
    heads = [(n, m) for n, line in enumerate(text.splitlines()) if (m := re.match(r"(#{2,4}) +(.+?) *#*$", line))]
    ends = {(heads[k + 1][0] if k + 1 < len(heads) else len(text.splitlines())): m[2] for k, (_, m) in enumerate(heads)}
    for n, line in enumerate([*text.splitlines(), ""]):
        if n in ends and (back := _back_links(ends[n], used)):
            lines += ["", back, ""]
        lines.append(line)
    return "\n".join(lines) + "\n"


def _mentions(lessons: Sequence[Lesson]) -> list[tuple[Lesson, str, str]]:
    """(lesson, section, its prose) for each Markdown cell."""
    found = []
    for lesson in lessons:
        for cell, section in zip(lesson.notebook.cells, sections(lesson.notebook), strict=True):
            if cell.cell_type == "markdown":
                found.append((lesson, section, cell.source))
    return found


def _back_links(term: str, used: Sequence[tuple[Lesson, str, str]]) -> str:
    plain = re.sub(r"[`*_]", "", term)
    names = [n for n in (x.strip() for x in re.split(r"[/()]", plain)) if len(n) > 1]
    anchor = slug(plain)
    linked = [(lesson, section) for lesson, section, source in used if f"glossary.md#{anchor})" in source]
    if not linked and names:
        word = re.compile(r"\b(?:" + "|".join(map(re.escape, names)) + r")s?\b", re.I)
        linked = [(lesson, section) for lesson, section, source in used if word.search(source)]
    places: dict[str, tuple[Lesson, str]] = {}
    for lesson, section in linked:
        places.setdefault(lesson.name, (lesson, section))  # the first place in each notebook
    links = [_place(lesson, section) for lesson, section in places.values()]
    return f"*Used in:* {' · '.join(links)}" if links else ""


def _place(lesson: Lesson, section: str) -> str:
    number = lesson.name.split("_")[0]
    words = f"{number}, {section}" if section and section != lesson.title else lesson.title
    return (
        f"[{words}](notebooks/{lesson.name}.ipynb#{slug(section)})"
        if section
        else f"[{words}](notebooks/{lesson.name}.ipynb)"
    )


def slug(heading: str) -> str:
    """A heading's anchor, as GitHub and MyST make it."""
    return re.sub(r"[^\w\- ]", "", heading.lower().strip()).replace(" ", "-")


# --- modules ------------------------------------------------------------------------------------------


def modules(package: Path) -> dict[str, str]:
    """module (``core.text``) -> first line of its docstring, in the order of the rooms."""
    found = {}
    for room in ROOMS:
        for path in sorted((package / room).glob("*.py")):
            if path.stem.startswith("_"):
                continue
            words = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
            found[f"{room}.{path.stem}"] = words.split("\n\n")[0].replace("\n", " ")
    return found


def module_page(name: str) -> str:
    """One module's functions and classes, from their docstrings."""
    full = f"glassbox_utils.{name}"
    return f"# {name}\n\n```{{eval-rst}}\n.. automodule:: {full}\n   :members:\n   :member-order: bysource\n```\n"


def module_indexes(found: Mapping[str, str]) -> dict[str, str]:
    """File -> text: an index of the rooms, and one of each room's modules with what each is about."""
    rooms = [room for room in ROOMS if any(name.startswith(f"{room}.") for name in found)]
    words = (
        "One page for each module, from the docstrings: shapes and units in the signature, errors, source. A room "
        "imports "
        "only rooms above it in this list. `import glassbox_utils as gb` hands on the names that one needs."
    )
    pages = {"index.md": "\n".join(["# API", "", words, "", "```{toctree}", *rooms, "```", ""])}
    for room in rooms:
        mine = {name: about for name, about in found.items() if name.startswith(f"{room}.")}
        lines = [f"- [{name}]({name.replace('.', '/')}.md): {about.replace('``', '`')}" for name, about in mine.items()]
        hidden = [name.replace(".", "/") for name in mine]
        pages[f"{room}.md"] = "\n".join(
            [f"# {room}", "", *lines, "", "```{toctree}", ":hidden:", "", *hidden, "```", ""]
        )
    return pages


def load_table(path: Path) -> dict[str, Any]:
    """A study's table as plain values."""
    return json.loads(path.read_text(encoding="utf-8"))
