"""Does a checker say the right thing? An answer is put in the place of a stub, and its checker is run.

``data/workshop/NN.yaml`` holds, for the exercises of notebook NN that have a checker, a small stand-in for what the
notebook has computed by then (``given``), and answers that people typically give (``wrong``), with the words that the
checker must answer. The tests hold both against each other; the instructor's copy shows them.
"""

import ast
import contextlib
import io
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glassbox_utils.core import schema
from glassbox_utils.core.assets import DATA
from glassbox_utils.core.errors import GlassboxError
from glassbox_utils.lab.roles import Exercise

NOTES = DATA / "workshop"


class WorkshopError(GlassboxError):
    """Notes that don't say what they must, or a folder that is not a workshop's."""


@dataclass(frozen=True)
class Wrong:
    """An answer that people give."""

    code: str
    says: str
    """a part of what the checker answers"""
    why: str
    """what was thought, for the instructor"""


@dataclass(frozen=True)
class Notes:
    """What an instructor should know of one exercise."""

    given: str = ""
    """code that stands in for the notebook above the exercise, in seconds and without a large model"""
    wrong: tuple[Wrong, ...] = ()
    expect: str = ""
    """what a good answer says"""


@dataclass(frozen=True)
class Verdict:
    """What a checker said, and whether it accepted."""

    right: bool
    words: str


def read_notes(notebook: str, folder: Path = NOTES) -> tuple[dict[str, Notes], list[str]]:
    """Notes of a notebook's exercises, by the name of the stub or the label, and questions for discussion.

    Both empty without a file. WorkshopError for a file that does not say what it must.
    """
    path = folder / f"{Path(notebook).name[:2]}.yaml"
    if not path.exists():
        return {}, []
    found = schema.read_mapping(path, WorkshopError, "one of the files beside it")
    try:
        exercises = {
            str(name): Notes(e.get("given", ""), tuple(Wrong(**w) for w in e.get("wrong", [])), e.get("expect", ""))
            for name, e in (found.get("exercises") or {}).items()
        }
        questions = [str(q) for q in found.get("discussion") or []]
    except (TypeError, AttributeError) as error:
        raise WorkshopError(
            f"{path} can't be read: {error}. Allowed: `exercises`, by name, with `given`, `expect` and `wrong` (a list "
            "of `code`, `says`, `why`), and `discussion`, a list of questions."
        ) from error
    return exercises, questions


def try_answer(exercise: Exercise, answer: str = "", given: str = "") -> Verdict:
    """Run the imports, ``given``, the stub, the answer in its place and the checker. Without an answer: the blank.

    Code of the project's own notebooks and notes is executed as it stands. A checker accepts if it ends without an
    exception and says *right*.
    """
    if not exercise.checker:
        raise WorkshopError(
            f"Exercise {exercise.label} has no checker. Allowed: exercises with a stub and code that follows it."
        )
    space: dict[str, Any] = {"__name__": "answers"}
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(exercise.imports, "<imports>", "exec"), space)
        exec(compile(given, "<given>", "exec"), space)
        exec(compile(exercise.stub, "<stub>", "exec"), space)
        exec(compile(answer, "<answer>", "exec"), space)
        try:
            value = _run(exercise.checker, space)
        except Exception as error:  # whatever a wrong answer raises is what the student sees
            return Verdict(False, f"{printed.getvalue()}{type(error).__name__}: {error}".strip())
    words = f"{printed.getvalue()}{'' if value is None else value}".strip()
    return Verdict(bool(re.match(r"['\"]?right\b", words.split("\n")[-1], re.I)), words)


def _run(source: str, space: dict[str, Any]) -> Any:
    """Execute code as a notebook does: the value of a last expression is its answer."""
    tree = ast.parse(source)
    last = tree.body[-1] if tree.body else None
    if not isinstance(last, ast.Expr):
        exec(compile(tree, "<checker>", "exec"), space)
        return None
    tree.body.pop()
    exec(compile(tree, "<checker>", "exec"), space)
    return eval(compile(ast.Expression(last.value), "<checker>", "eval"), space)


# --- a class that is marked by nbgrader -------------------------------------------------------------------

SCHEMA = 3
"""of nbgrader's metadata"""


def points_of(exercise: Exercise) -> int:
    """A point for five minutes of work, at least one."""
    return max(1, round((exercise.minutes or 5) / 5))


def metadata(grade_id: str, solution: bool = False, points: int | None = None) -> dict[str, Any]:
    """nbgrader's mark on a cell: filled in by students (``solution``), or worth points, or both (marked by hand)."""
    graded = {} if points is None else {"points": points}
    marks = {"grade": points is not None, "solution": solution, "locked": not solution, "task": False}
    return {"nbgrader": {**marks, **graded, "grade_id": grade_id, "schema_version": SCHEMA}}


def strict(checker: str) -> str:
    """The checker with a hidden last line that fails where students only read *not done yet*: a blank earns nothing."""
    tree = ast.parse(checker)
    last = tree.body[-1] if tree.body else None
    lines = checker.split("\n")
    hidden = ""
    if isinstance(last, ast.Expr) and isinstance(last.value, ast.Call):
        said: ast.expr = last.value
        while isinstance(said, ast.Call) and ast.unparse(said.func) in ("print", "display") and len(said.args) == 1:
            said = said.args[0]  # what is printed, not what print gives
        call = ast.unparse(said)
        hidden = f'assert str({call}).startswith("right"), "not done yet"'
    else:
        unset = next((n.test for n in tree.body if isinstance(n, ast.If) and " is None" in ast.unparse(n.test)), None)
        if unset is not None:
            hidden = f'assert not ({ast.unparse(unset)}), "not done yet"'
    return "\n".join([*lines, "### BEGIN HIDDEN TESTS", hidden, "### END HIDDEN TESTS"]) if hidden else checker
