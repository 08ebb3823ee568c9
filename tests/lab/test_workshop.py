"""One source, three readers: nothing is lost, solutions don't reach students, checkers say the right words."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from glassbox_utils.lab import marking, roles, workshop
from glassbox_utils.lab.marking import WorkshopError

ROOT = Path(__file__).resolve().parents[2]
ALL = sorted((ROOT / "notebooks").glob("*.ipynb"))
SOURCES = {path.stem: nbformat.read(path, 4) for path in ALL}
CHECKED = [(stem, e.name) for stem, nb in SOURCES.items() for e in roles.exercises_of(nb) if e.name]


def exercise_of(stem, name):
    return next(e for e in roles.exercises_of(SOURCES[stem]) if e.name == name)


@pytest.mark.parametrize("stem", SOURCES)
def test_nothing_is_lost_when_a_notebook_is_cut_into_roles(stem):
    squeezed = lambda cells: "".join("".join(c.source.split()) for c in cells)  # noqa: E731
    assert squeezed(p.cell for p in roles.pieces_of(SOURCES[stem])) == squeezed(SOURCES[stem].cells)


@pytest.mark.parametrize("stem", SOURCES)
def test_every_notebook_has_an_exercise_that_checks_itself(stem):
    found = roles.exercises_of(SOURCES[stem])
    assert any(e.checker and e.solution for e in found)
    assert len({e.label for e in found}) == len(found)
    assert all(e.minutes for e in found), "an exercise does not say how long it takes"


@pytest.mark.parametrize(("stem", "name"), CHECKED)
def test_a_checker_takes_the_solution_and_rejects_the_blank_and_what_people_typically_answer(stem, name):
    """Checkers that need nothing of the notebook have their wrong answers in tests of their own."""
    exercise, (notes, _) = exercise_of(stem, name), marking.read_notes(stem)
    known = notes.get(name, marking.Notes())
    solved = marking.try_answer(exercise, exercise.solution, known.given)
    assert solved.right, solved.words
    blank = marking.try_answer(exercise, "", known.given)
    assert not blank.right and re.search(r"not (done|solved) yet", blank.words)
    assert len(known.wrong) >= 3 or name not in notes
    for wrong in known.wrong:
        verdict = marking.try_answer(exercise, wrong.code, known.given)
        assert not verdict.right and wrong.says in verdict.words, (wrong.why, verdict)


@pytest.mark.parametrize("stem", SOURCES)
def test_notes_speak_of_exercises_that_exist(stem):
    """An orphan is a note whose exercise was renamed: it reaches no instructor."""
    found = roles.exercises_of(SOURCES[stem])
    orphans = set(marking.read_notes(stem)[0]) - {e.name for e in found} - {e.label for e in found}
    assert not orphans, f"data/workshop/{stem[:2]}.yaml: no exercise is called {', '.join(sorted(orphans))} any more"


@pytest.mark.parametrize("stem", SOURCES)
def test_students_get_blanks_and_checkers_and_nothing_that_solves(stem):
    copy = workshop.student_copy(SOURCES[stem])
    nbformat.validate(copy)
    text = "\n".join(c.source for c in copy.cells)
    assert "<summary>Solution" not in text and not any(c.get("outputs") for c in copy.cells)
    for exercise in roles.exercises_of(SOURCES[stem]):
        assert exercise.statement.split("\n")[0] in text
        assert exercise.stub in text and exercise.checker in text
        assert not exercise.solution or exercise.solution not in text
    ids = [c.metadata["nbgrader"]["grade_id"] for c in copy.cells if "nbgrader" in c.metadata]
    assert len(ids) == len(set(ids)) and all(re.fullmatch(r"[\w-]+", i) for i in ids)


@pytest.mark.parametrize("stem", SOURCES)
def test_the_instructor_has_solutions_a_plan_and_the_outputs(stem):
    copy = workshop.instructor_copy(SOURCES[stem], stem, marking.read_notes(stem))
    nbformat.validate(copy)
    hidden = [c for c in copy.cells if workshop.INSTRUCTOR in c.metadata.get("tags", [])]
    assert "Core path about" in hidden[0].source and "core |" in hidden[0].source
    text = "\n".join(c.source for c in copy.cells)
    for exercise in roles.exercises_of(SOURCES[stem]):
        assert not exercise.solution or f"### BEGIN SOLUTION\n{exercise.solution}\n### END SOLUTION" in text
    outputs = lambda nb: sum(len(c.get("outputs", [])) for c in nb.cells)  # noqa: E731
    assert outputs(copy) == outputs(SOURCES[stem])


@pytest.mark.long
def test_what_nbgrader_makes_of_the_instructors_copy_is_the_students_copy(tmp_path):
    """With the extra `more` only. The blank earns nothing, the solution all points: without kernels, by execution."""
    nbgrader = pytest.importorskip("nbgrader")
    assert nbgrader
    from nbgrader.preprocessors import ClearHiddenTests, ClearSolutions
    from traitlets.config import Config

    for stem, notebook in SOURCES.items():
        copy = workshop.instructor_copy(notebook, stem, marking.read_notes(stem))
        copy.cells = [c for c in copy.cells if workshop.INSTRUCTOR not in c.metadata.get("tags", [])]
        config = Config({"ClearSolutions": {"code_stub": {"python": workshop.CODE_STUB}}})
        cleared, _ = ClearSolutions(config=config).preprocess(copy, {})
        cleared, _ = ClearHiddenTests().preprocess(cleared, {})
        students = workshop.student_copy(notebook)
        assert [c.source for c in cleared.cells] == [c.source for c in students.cells]
        marks = [
            {k: v for k, v in c.metadata.get("nbgrader", {}).items() if k in ("grade", "grade_id", "points")}
            for nb in (cleared, students)
            for c in nb.cells
        ]
        assert marks[: len(students.cells)] == marks[len(students.cells) :]


@pytest.mark.parametrize(("stem", "name"), CHECKED)
def test_a_blank_earns_no_points(stem, name):
    exercise, (notes, _) = exercise_of(stem, name), marking.read_notes(stem)
    hard = roles.replace(exercise, checker=marking.strict(exercise.checker))
    given = notes[name].given if name in notes else ""
    assert hard.checker != exercise.checker
    assert "AssertionError: not done yet" in marking.try_answer(hard, "", given).words
    assert "AssertionError" not in marking.try_answer(hard, exercise.solution, given).words


@pytest.mark.parametrize(
    ("source", "stub", "name"),
    [
        ("import a\ndef f(x):\n    '''doc'''\n    ...\n\nf(1)", "import a\ndef f(x):\n    '''doc'''\n    ...", "f"),
        ("def f(x):\n    raise NotImplementedError", "def f(x):\n    raise NotImplementedError", "f"),
        ("answer = ...\nassert answer", "answer = ...", "answer"),
        ("def f(x):\n    return x", "", ""),
        ("%time 1", "", ""),
    ],
)
def test_a_blank_is_recognised(source, stub, name):
    assert roles.split_stub(source)[0] == stub and roles.name_of(stub) == name


def test_a_checker_may_stand_in_the_next_cell_and_tags_win():
    cells = [
        nbformat.v4.new_markdown_cell("## Exercises\n\n### Exercise 1 (5 min)\n\nDouble it."),
        nbformat.v4.new_code_cell("def double(x):\n    ..."),
        nbformat.v4.new_code_cell("'right' if double(2) == 4 else 'not done yet'"),
        nbformat.v4.new_code_cell("def double(x):\n    return 2 * x", metadata={"tags": ["solution"]}),
        nbformat.v4.new_markdown_cell("## Findings"),
    ]
    (exercise,) = roles.exercises_of(nbformat.v4.new_notebook(cells=cells))
    assert (exercise.label, exercise.minutes, exercise.name) == ("1", 5, "double")
    assert marking.try_answer(exercise, exercise.solution).right and not marking.try_answer(exercise).right


@pytest.mark.parametrize("checker", ["check(f)", "print(check(f))", "g = f\nif g is None:\n    print('not done yet')"])
def test_what_is_hidden_from_students_finds_the_blank(checker):
    before = "check = lambda f: 'not done yet: write it' if f is None else 'right'\nf = {}\n"
    for value, fine in (("None", False), ("abs", True)):
        space = {}
        try:
            exec(before.format(value) + marking.strict(checker), space)
        except AssertionError as error:
            assert not fine and str(error) == "not done yet"
        else:
            assert fine


def test_notes_that_cannot_be_read_say_what_is_allowed(tmp_path):
    (tmp_path / "01.yaml").write_text("exercises:\n  a:\n    wrong:\n      - code: x\n        sez: y\n")
    with pytest.raises(WorkshopError, match="`code`, `says`, `why`"):
        marking.read_notes("01_x", tmp_path)
    assert marking.read_notes("02_x", tmp_path) == ({}, [])
    with pytest.raises(WorkshopError, match="has no checker"):
        marking.try_answer(roles.Exercise("B", "", None))


def test_slides_ask_nobody_for_anything(tmp_path):
    page = workshop.slides_of(SOURCES[ALL[0].stem], ALL[0].stem)
    outside = re.findall(r"""(?:src|href)=["']((?:https?:)?//[^"']+)""", re.sub(r"<a [^>]*>", "", page))
    assert not outside and page.count("<section>") >= 8
    assert "image/png" in page and 'src="require.js"' in page


@pytest.mark.browser
def test_slides_open_from_a_folder_without_a_console_error(tmp_path):
    chromium = shutil.which("chromium")
    if not chromium:
        pytest.skip("needs Debian's chromium")
    from playwright.sync_api import sync_playwright

    workshop.put_reveal(tmp_path)
    page_of = tmp_path / "slides.html"
    page_of.write_text(workshop.slides_of(SOURCES[ALL[0].stem], "slides"))
    said, asked = [], []
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page()
        page.on("console", lambda m: said.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda e: said.append(str(e)))
        page.on("request", lambda r: asked.append(r.url) if not r.url.startswith(("file:", "data:", "blob:")) else None)
        page.goto(page_of.as_uri())
        page.wait_for_function("window.Reveal && Reveal.isReady()")
        for _ in range(4):
            page.keyboard.press("Space")
        assert page.evaluate("Reveal.getProgress()") > 0 and page.locator("section.present").count() >= 1
        browser.close()
    assert not said and not asked


def test_the_command_writes_all_three(tmp_path):
    run = subprocess.run(
        [sys.executable, "-m", "glassbox_utils", "workshop", "01", "--out", str(tmp_path / "w"), "--no-slides"],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    made = {str(p.relative_to(tmp_path / "w")) for p in (tmp_path / "w").rglob("*") if p.is_file()}
    assert {f"students/{ALL[0].name}", f"instructor/source/glassbox/{ALL[0].name}"} <= made
