"""What each cell of a notebook is for, so that one source gives student copies, an instructor's copy and slides.

A role is read off the form that every notebook has, so that an author has nothing to mark:

* ``exercise``: the statement, ``**A (10 min).** ...`` or ``**1. Title** (5 minutes). ...`` under a heading
  *Exercises*; a heading of its own, ``### Exercise A ...``, does as well
* ``stub``: code with a function (or a value) that is still ``...``; ``checker``: the code behind it, in the same cell
  or in the next one, which says *right*, *not done yet*, or fails with a sentence
* ``hint``, ``solution``, ``answer``: a fold, ``<details><summary>Hint</summary>``; an *answer* belongs to a
  prediction in the text, not to an exercise
* ``text``, ``code``: all else

Where a form does not say enough, a tag of the cell wins: ``exercise``, ``stub``, ``checker``, ``hint``, ``solution``
(also of a code cell, which then is executed with the notebook), ``answer``. Cells under the heading *Going deeper*,
or with the tag ``deeper``, and all that follows the exercises, are not on the core path; ``core`` puts a cell on it.
"""

import ast
import itertools
import re
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import nbformat

ROLES = ("exercise", "stub", "checker", "hint", "solution", "answer")
FOLDS = {"solution": "solution", "hint": "hint", "answer": "answer"}
FOLD = re.compile(r"<details>\s*<summary>(.*?)</summary>(.*?)</details>", re.S | re.I)
HEADING = re.compile(r"^(#{1,6}) +(.+)$", re.M)
STATEMENT = re.compile(r"^(?:\*\*|#{3,4} +)(?:Exercise +)?([A-Z]|\d{1,2})(?=[.:) ])(?! *\*\*)", re.M)
MINUTES = re.compile(r"\((\d+)(?: to \d+)? min")


@dataclass(frozen=True)
class Piece:
    """A cell, or the part of one that has a single role."""

    role: str
    cell: Any
    section: str
    """the last heading of level 1 or 2 above it"""
    core: bool
    exercise: str = ""
    """label of the exercise that it belongs to"""


@dataclass(frozen=True)
class Exercise:
    """What is asked, what is filled in, what checks it, what solves it."""

    label: str
    statement: str
    minutes: int | None
    name: str = ""
    """the function or value that is filled in; empty for an exercise without a checker"""
    stub: str = ""
    checker: str = ""
    hint: str = ""
    solution: str = ""
    """code that defines ``name``, and what it needs"""
    told: str = ""
    """the whole fold"""
    imports: str = ""
    """import statements of the notebook that bind names used in stub, checker or solution"""


def pieces_of(notebook: Any) -> list[Piece]:
    """The notebook in order, cut so that each piece has one role. Copies: the notebook itself stays as it is."""
    pieces: list[Piece] = []
    section, deeper, inside, label, level = "", False, False, "", 0
    for cell, role in _cut(notebook):
        tags = cell.metadata.get("tags", [])
        if cell.cell_type == "markdown" and (found := HEADING.match(cell.source)):
            depth, title = len(found[1]), found[2].strip()
            if depth <= 2:
                section = title
            if re.search(r"\bExercises?\b", title) and not STATEMENT.match(cell.source):
                inside, level, label = True, depth, ""
            elif inside and depth <= level:
                inside, label = False, ""
                deeper = True  # findings, references
            if re.search(r"\bgoing deeper\b", title, re.I):
                deeper = True
        stated = STATEMENT.match(cell.source) if cell.cell_type == "markdown" else None
        own = stated and (inside or "xercise" in stated[0])
        if "exercise" in tags or (own and role == "text"):
            role, label = "exercise", stated[1] if stated else f"{len({p.exercise for p in pieces if p.exercise}) + 1}"
        elif role in ("text", "answer") and not inside:
            label = ""
        role = next((tag for tag in tags if tag in ROLES), role)
        core = "core" in tags or not (deeper or inside or "deeper" in tags or role in ("hint", "solution"))
        pieces.append(Piece(role, cell, section, core, label))
    return _with_checkers(pieces)


def _cut(notebook: Any) -> Iterator[tuple[Any, str]]:
    for cell in notebook.cells:
        if cell.cell_type == "code":
            stub, rest = split_stub(cell.source)
            if not stub:
                yield cell, "code"
                continue
            yield _like(cell, stub, outputs=not rest), "stub"
            if rest:
                yield _like(cell, rest), "checker"
        elif cell.cell_type == "markdown":
            yield from ((_like(cell, text), role) for text, role in _cut_text(cell.source))
        else:
            yield cell, "text"


def _like(cell: Any, source: str, outputs: bool = True) -> Any:
    new = nbformat.from_dict(cell)
    new.source = source
    if cell.cell_type == "code" and not outputs:
        new.outputs, new.execution_count = [], None
    return new


def _cut_text(source: str) -> list[tuple[str, str]]:
    """(text, role): folds that have a role, and texts that begin at a heading of level 1 or 2 or at a statement."""
    parts: list[tuple[str, str]] = []

    def add(text: str) -> None:
        starts = {0, *(m.start() for m in HEADING.finditer(text) if len(m[1]) <= 2 or "xercise" in m[2])}
        starts |= {m.start() for m in STATEMENT.finditer(text) if MINUTES.search(text[m.start() :].split("\n")[0])}
        cuts = [*sorted(starts), len(text)]
        pieces = (text[a:b].strip() for a, b in itertools.pairwise(cuts))
        parts.extend((piece, "text") for piece in pieces if piece)

    plain, end = "", 0
    for fold in FOLD.finditer(source):
        words = re.sub(r"<.*?>|\W+", " ", fold[1]).lower().split()
        role = next((FOLDS[w] for w in words if w in FOLDS), None)
        if role is None:
            continue
        add(plain + source[end : fold.start()])
        parts.append((fold[0], role))
        end = fold.end()
    add(source[end:])
    return parts


def _with_checkers(pieces: Sequence[Piece]) -> list[Piece]:
    """Code that calls the stub, in the next code cell, is its checker if the stub's own cell has none."""
    done, open_name = list[Piece](), ""
    for piece in pieces:
        if piece.role == "stub":
            open_name = name_of(piece.cell.source)
        elif piece.role == "checker":
            open_name = ""
        elif open_name and piece.role == "code":
            if re.search(rf"\b{open_name}\b", piece.cell.source):
                piece = replace(piece, role="checker")
            open_name = ""
        done.append(piece)
    return done


# --- code ----------------------------------------------------------------------------------------------------


def _is_blank(node: ast.AST) -> bool:
    """A function without a body of its own, or a value that is ``...``."""
    if isinstance(node, ast.FunctionDef):
        body = node.body[1:] if ast.get_docstring(node) else node.body
        return len(body) == 1 and _is_nothing(body[0])
    return isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant) and node.value.value is Ellipsis


def _is_nothing(node: ast.stmt) -> bool:
    if isinstance(node, ast.Raise):
        return "NotImplementedError" in ast.unparse(node)
    return isinstance(node, ast.Pass) or (
        isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and node.value.value is Ellipsis
    )


def _body(source: str) -> list[ast.stmt]:
    try:
        return ast.parse(source).body
    except SyntaxError:  # %magic
        return []


def split_stub(source: str) -> tuple[str, str]:
    """(up to the end of the last blank, what follows it); ("", source) for a cell without a blank."""
    blanks = [node for node in _body(source) if _is_blank(node)]
    if not blanks:
        return "", source
    lines = source.split("\n")
    end = blanks[-1].end_lineno or len(lines)
    return "\n".join(lines[:end]).strip("\n"), "\n".join(lines[end:]).strip("\n")


def name_of(stub: str) -> str:
    """What a stub asks for: the name of its last blank."""
    blank = next((node for node in reversed(_body(stub)) if _is_blank(node)), None)
    if isinstance(blank, ast.FunctionDef):
        return blank.name
    return ast.unparse(blank.targets[0]) if isinstance(blank, ast.Assign) else ""


def _binds(node: ast.stmt) -> str:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return node.name
    return ast.unparse(node.targets[0]) if isinstance(node, ast.Assign) else ""


def defining(code: str, name: str) -> str:
    """The part of a solution that defines ``name``: up to the end of its definition; empty if it does not."""
    found = next((node for node in reversed(_body(code)) if _binds(node) == name), None)
    return "\n".join(code.split("\n")[: found.end_lineno]).strip("\n") if found else ""


def exercises_of(notebook: Any) -> list[Exercise]:
    """All exercises of a notebook, in order. One with several blanks has the name of the last."""
    found: dict[str, Exercise] = {}
    for piece in pieces_of(notebook):
        label, source = piece.exercise, piece.cell.source
        if not label:
            continue
        old = found.get(label, Exercise(label, "", None))
        match piece.role:
            case "exercise":
                minutes = MINUTES.search(source)
                old = replace(old, statement=source, minutes=int(minutes[1]) if minutes else None)
            case "text" if not old.name:
                old = replace(old, statement=f"{old.statement}\n\n{source}".strip())
            case "stub":
                old = replace(old, stub=source, name=name_of(source))
            case "checker":
                old = replace(old, checker=source)
            case "hint":
                old = replace(old, hint=source)
            case "solution":
                if piece.cell.cell_type == "code":
                    blocks = [source]
                else:
                    blocks = [textwrap.dedent(b) for b in re.findall(r"```(?:python|py)\n(.*?)```", source, re.S)]
                code = next((d for b in blocks if old.name and (d := defining(b, old.name))), old.solution)
                old = replace(old, told=f"{old.told}\n\n{source}".strip(), solution=code)
        found[label] = old
    sources = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    return [replace(e, imports=_imports_for(e, sources)) for e in found.values() if e.statement]


def _imports_for(exercise: Exercise, sources: Sequence[str]) -> str:
    code = "\n".join((exercise.stub, exercise.checker, exercise.solution))
    used = {node.id for node in ast.walk(ast.Module(_body(code), [])) if isinstance(node, ast.Name)}
    lines = list[str]()
    for node in (node for source in sources for node in _body(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            wanted = [a for a in node.names if (a.asname or a.name.split(".")[0]) in used]
            if wanted:
                node.names = wanted
                lines.append(ast.unparse(node))
    return "\n".join(dict.fromkeys(lines))
