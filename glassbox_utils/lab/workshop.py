"""From the notebooks: copies for students, a course folder for the instructor (which nbgrader marks), slides.

Nothing is written by hand twice: ``roles`` says what each cell is for, and a copy is a choice of roles. nbconvert makes
the slides, nbgrader's own format carries the marks. reveal.js comes from a pinned package, so slides need no network.
"""

import re
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell

from glassbox_utils.core import assets, figures, files
from glassbox_utils.lab import notebooks
from glassbox_utils.lab.marking import Notes, metadata, points_of, read_notes, strict
from glassbox_utils.lab.roles import Exercise, Piece, exercises_of, pieces_of

INSTRUCTOR = "instructor"
"""tag of what students never see"""
ASSIGNMENT = "glassbox"
CODE_STUB = "# your work"
CONFIG = f"""# in this folder: nbgrader generate_assignment {ASSIGNMENT}, then autograde, then generate_feedback
c = get_config()
c.CourseDirectory.course_id = "glassbox"
c.ClearSolutions.code_stub = {{"python": "{CODE_STUB}"}}
c.TagRemovePreprocessor.enabled = True
c.TagRemovePreprocessor.remove_cell_tags = ["{INSTRUCTOR}"]
c.GenerateAssignment.preprocessors = ["nbconvert.preprocessors.TagRemovePreprocessor"] + [
    f"nbgrader.preprocessors.{{name}}"
    for name in ("IncludeHeaderFooter", "LockCells", "ClearSolutions", "ClearOutput", "CheckCellMetadata",
                 "ComputeChecksums", "SaveCells", "ClearHiddenTests", "ClearMarkScheme", "ComputeChecksums",
                 "CheckCellMetadata")
]
c.ExecutePreprocessor.timeout = 900
"""
REVEAL = "sphinx_revealjs/_static/revealjs/"
"""the folder of reveal.js in the wheel"""
REVEAL_FILES = (
    "LICENSE", "dist/reset.css", "dist/reveal.css", "dist/reveal.js", "dist/theme/white.css",
    "dist/theme/fonts/source-sans-pro/LICENSE", "dist/theme/fonts/source-sans-pro/source-sans-pro.css",
    "dist/theme/fonts/source-sans-pro/source-sans-pro-regular.woff",
    "dist/theme/fonts/source-sans-pro/source-sans-pro-semibold.woff",
    "dist/theme/fonts/source-sans-pro/source-sans-pro-italic.woff",
    "dist/theme/fonts/source-sans-pro/source-sans-pro-semibolditalic.woff", "plugin/notes/notes.js",
)  # fmt: skip
REQUIRE = """// nbconvert's slides ask require.js for two files, which are plain scripts here: all of it that is needed
window.MathJax = window.MathJax || {Hub: {getAllJax: () => [], Rerender: () => {}}};
function require(options, paths, then) {
  const load = path => new Promise((done, failed) => {
    const script = document.createElement('script');
    Object.assign(script, {src: path, onload: done, onerror: failed});
    document.head.append(script);
  });
  load(paths[0]).then(() => load(paths[1])).then(() => then(window.Reveal, window.RevealNotes));
}
"""
WORDS_A_MINUTE, LINES_A_MINUTE = 150, 8
"""reading speed of the plan: slower than prose is read, since figures are looked at; an estimate"""


@dataclass(frozen=True)
class Part:
    """A row of the instructor's plan."""

    section: str
    minutes: int
    core: bool


# --- copies ----------------------------------------------------------------------------------------------


def student_copy(notebook: Any) -> Any:
    """Solutions out, checkers in, outputs cleared; an exercise without a checker has an empty cell for the answer."""
    return _new(notebook, _students(pieces_of(notebook), exercises_of(notebook)))


def _students(pieces: Sequence[Piece], exercises: Sequence[Exercise]) -> Iterable[Any]:
    for piece, following in zip(pieces, [*pieces[1:], None], strict=True):
        if piece.role != "solution":
            cell = _cleared(piece.cell)
            if piece.role == "stub":
                cell.source = f"{cell.source}\n\n{CODE_STUB}"
            cell.metadata = nbformat.from_dict({**_tags(cell), **_marks(piece, exercises)})
            yield cell
        if _closes(piece, following, exercises):
            yield from _answer_cells(piece.exercise, exercises)


def instructor_copy(notebook: Any, name: str, notes: tuple[dict[str, Notes], list[str]]) -> Any:
    """The source that nbgrader reads: solutions in the blanks, outputs, a plan, and cells that only instructors see."""
    pieces, exercises, (by_name, questions) = pieces_of(notebook), exercises_of(notebook), notes
    cells: list[Any] = []
    for piece, following in zip(pieces, [*pieces[1:], None], strict=True):
        cell, exercise = nbformat.from_dict(piece.cell), _of(piece.exercise, exercises)
        marks = _marks(piece, exercises)
        if piece.role == "solution":
            cells.append(_for_instructors(cell))
        else:
            if piece.role == "stub" and exercise and exercise.solution:
                region = f"### BEGIN SOLUTION\n{exercise.solution}\n### END SOLUTION"
                cell.source = f"{cell.source}\n\n{region}"
            elif piece.role == "checker" and marks:
                cell.source = strict(cell.source)
            cell.metadata = nbformat.from_dict({**_tags(cell), **marks})
            cells.append(cell)
        if _closes(piece, following, exercises):
            cells += _answer_cells(piece.exercise, exercises)
            known = by_name.get(exercise.name or exercise.label) if exercise else None
            if exercise and known:
                cells.append(_for_instructors(new_markdown_cell(_notes_text(exercise, known))))
    cells.insert(1, _for_instructors(new_markdown_cell(_plan_text(name, plan_of(pieces, exercises), questions))))
    return _new(notebook, cells)


def _of(label: str, exercises: Sequence[Exercise]) -> Exercise | None:
    return next((e for e in exercises if e.label == label), None)


def _closes(piece: Piece, following: Piece | None, exercises: Sequence[Exercise]) -> bool:
    known = _of(piece.exercise, exercises)
    return known is not None and (following is None or following.exercise != piece.exercise)


def _answer_cells(label: str, exercises: Sequence[Exercise]) -> list[Any]:
    """A cell that is marked by hand, for an exercise that no checker marks."""
    exercise = _of(label, exercises)
    if exercise is None or exercise.name:
        return []
    mark = metadata(f"exercise-{label}", solution=True, points=points_of(exercise))
    return [new_code_cell(CODE_STUB, metadata=mark)]


def _marks(piece: Piece, exercises: Sequence[Exercise]) -> dict[str, Any]:
    exercise = _of(piece.exercise, exercises)
    if exercise is None or not exercise.name:
        return {}
    if piece.role == "stub":
        return metadata(exercise.name, solution=True)
    return metadata(f"check-{exercise.name}", points=points_of(exercise)) if piece.role == "checker" else {}


def _tags(cell: Any) -> dict[str, Any]:
    return {"tags": list(cell.metadata["tags"])} if cell.metadata.get("tags") else {}


def _cleared(cell: Any) -> Any:
    new = nbformat.from_dict(cell)
    if new.cell_type == "code":
        new.outputs, new.execution_count = [], None
    return new


def _for_instructors(cell: Any) -> Any:
    cell.metadata = nbformat.from_dict({"tags": [*cell.metadata.get("tags", []), INSTRUCTOR]})
    return cell


def _new(notebook: Any, cells: Iterable[Any]) -> Any:
    numbered = list(cells)
    for index, cell in enumerate(numbered):
        cell.id = f"cell-{index:02d}"
    return nbformat.v4.new_notebook(cells=numbered, metadata=notebook.metadata)


# --- what the instructor reads -----------------------------------------------------------------------------


def plan_of(pieces: Sequence[Piece], exercises: Sequence[Exercise]) -> list[Part]:
    """Minutes of each section: reading, estimated from words and lines of code, and exercises as they state."""
    rows: dict[str, tuple[float, bool]] = {}
    for piece in pieces:
        words = len(piece.cell.source.split()) if piece.cell.cell_type != "code" else 0
        lines = piece.cell.source.count("\n") + 1 if piece.cell.cell_type == "code" else 0
        spent = 0.0 if piece.exercise or piece.role in ("hint", "solution") else words / WORDS_A_MINUTE
        spent += 0.0 if piece.exercise else lines / LINES_A_MINUTE
        if piece.role == "exercise":
            spent += (_of(piece.exercise, exercises) or Exercise("", "", None)).minutes or 5
        before, core = rows.get(piece.section, (0.0, False))
        rows[piece.section] = before + spent, core or piece.core
    return [Part(section, max(1, round(minutes)), core) for section, (minutes, core) in rows.items() if section]


def _plan_text(name: str, plan: Sequence[Part], questions: Sequence[str]) -> str:
    total = sum(p.minutes for p in plan if p.core)
    lines = [
        f"**For the instructor: {name}.** Core path about {total} minutes, all about {sum(p.minutes for p in plan)}. "
        f"Reading is estimated ({WORDS_A_MINUTE} words or {LINES_A_MINUTE} lines of code a minute), exercises are "
        "as stated; no class has been timed yet. Outputs below are the expected answers. This cell, solutions and "
        "notes are tagged `instructor` and don't reach students.",
        "",
        "| section | minutes | |",
        "|---|---|---|",
        *(f"| {p.section.replace('|', '/')} | {p.minutes} | {'core' if p.core else ''} |" for p in plan),
    ]
    return "\n".join([*lines, *(["", "**To discuss**", ""] if questions else []), *(f"- {q}" for q in questions)])


def _notes_text(exercise: Exercise, notes: Notes) -> str:
    lines = [f"**Notes on exercise {exercise.label}.** {notes.expect}".strip()]
    if notes.wrong:
        lines += ["", "Answers that people typically give, and what the checker says:", ""]
    for wrong in notes.wrong:
        lines += [f"- {wrong.why} The checker: *{wrong.says}*", "", "```python", wrong.code.strip("\n"), "```", ""]
    return "\n".join(lines).strip()


# --- slides ----------------------------------------------------------------------------------------------------

LOOKS = """<style>
.reveal .slides section section { max-height: 700px; overflow-y: auto; }
.reveal h1, .reveal h2, .reveal h3 { text-transform: none; font-size: 1.5em; }
.reveal .jp-OutputArea img { max-height: 560px; max-width: 100%; width: auto; height: auto; object-fit: contain; }
.reveal pre { white-space: pre-wrap; }
</style>"""
"""a slide scrolls where it is too long (nbconvert's own way would need jQuery), and a picture fits on it"""
LONGEST = 90
"""words that a slide shows of one text; the whole text is in its notes (press S)"""


def slides_of(notebook: Any, name: str) -> str:
    """The core path as slides: a section a slide, figures below it, code where it is short; nothing from a network."""
    from nbconvert import SlidesExporter

    shown = notebooks.normalise(_new(notebook, _slides(pieces_of(notebook))))
    exporter = SlidesExporter(
        reveal_url_prefix="reveal.js", require_js_url="require.js", jquery_url="", mathjax_url="", mermaid_js_url="",
        reveal_number="c/t", reveal_theme="white",
    )  # fmt: skip
    exporter.exclude_input_prompt = exporter.exclude_output_prompt = True
    body, _ = exporter.from_notebook_node(shown, {"metadata": {"name": name}})
    body = re.sub(r'<script src=""></script>', "", body)
    body = re.sub(r'<link[^>]*href="https?://[^>]*>', "", body)
    body = re.sub(
        r"<script[^>]*>(?:(?!</script>)[\s\S])*?(?:import mermaid|MathJax\.Hub\.Config)[\s\S]*?</script>", "", body
    )
    return body.replace("</body>", f"{LOOKS}{figures.loader_html()}</body>")


def _slides(pieces: Sequence[Piece]) -> Iterable[Any]:
    section = ""
    for piece in pieces:
        if not piece.core or piece.role in ("hint", "solution", "stub", "checker", "exercise"):
            continue
        cell = nbformat.from_dict(piece.cell)
        if piece.role == "answer":
            yield new_markdown_cell(cell.source, metadata={"slideshow": {"slide_type": "notes"}})
            continue
        if cell.cell_type == "code":
            picture = any("image/png" in o.get("data", {}) for o in cell.outputs)
            lines, preparing = cell.source.count("\n") + 1, "gb.setup(" in cell.source
            if preparing or "parameters" in cell.metadata.get("tags", []) or (not picture and lines > 10):
                continue
            kind = "subslide" if picture else "-"
            if picture and lines > 4:  # the picture is what is shown
                cell.source = ""
                cell.outputs = [o for o in cell.outputs if "image/png" in o.get("data", {})][:1]
            cell.metadata = nbformat.from_dict({"slideshow": {"slide_type": kind}})
            yield cell
            continue
        first = piece.section != section
        section = piece.section
        told, whole = _shortened(cell.source), cell.source
        yield new_markdown_cell(told, metadata={"slideshow": {"slide_type": "slide" if first else "subslide"}})
        if told != whole:
            yield new_markdown_cell(whole, metadata={"slideshow": {"slide_type": "notes"}})


def _shortened(text: str) -> str:
    """Whole paragraphs up to about LONGEST words, and at least the first."""
    kept, words = list[str](), 0
    for paragraph in text.split("\n\n"):
        words += len(paragraph.split())
        if kept and words > LONGEST and not (len(kept) == 1 and kept[0].startswith("#")):
            break
        kept.append(paragraph)
    return "\n\n".join(kept)


def put_reveal(folder: Path) -> None:
    """reveal.js, its licence and fonts, and the few lines that stand for require.js, beside the slides."""
    for name in REVEAL_FILES:
        path = folder / "reveal.js" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with files.atomic_path(path) as partial:
            partial.write_bytes(assets.read("sphinx-revealjs", REVEAL + name))
    (folder / "require.js").write_text(REQUIRE, encoding="utf-8")


# --- all of it -------------------------------------------------------------------------------------------------


def build(target: Path, names: Sequence[str] = (), slides: bool = True) -> list[Path]:
    """``students/``, ``instructor/`` (an nbgrader course), ``slides/`` under ``target``; the files that were written.

    Raises NotebookError for a name that fits no notebook, WorkshopError for notes that can't be read, AssetError if
    reveal.js can't be fetched.
    """
    written, chosen = list[Path](), notebooks.find(names)
    course = target / "instructor"
    if slides:
        put_reveal(target / "slides")
    for path in chosen:
        notebook = nbformat.read(path, 4)
        copies = {
            target / "students" / path.name: student_copy(notebook),
            course / "source" / ASSIGNMENT / path.name: instructor_copy(notebook, path.stem, read_notes(path.stem)),
        }
        for place, copy in copies.items():
            place.parent.mkdir(parents=True, exist_ok=True)
            with files.atomic_path(place) as partial:
                nbformat.write(copy, partial)
            written.append(place)
        if slides:
            page = target / "slides" / f"{path.stem}.html"
            with files.atomic_path(page) as partial:
                partial.write_text(slides_of(notebook, path.stem), encoding="utf-8")
            written.append(page)
    (course / "nbgrader_config.py").write_text(CONFIG, encoding="utf-8")
    routes = assets.ROOT / "docs" / "workshop.md"
    if routes.exists():
        shutil.copy(routes, course / "README.md")
    return [*written, course / "nbgrader_config.py"]
