"""Files for other places and people: they parse, name what exists, and the table of versions says what was tried."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import yaml

from glassbox_utils import cli
from glassbox_utils.lab import compat
from glassbox_utils.lab.compat import CompatError, Tried

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", ["bug", "wrong-claim", "new-concept"])
def test_issue_templates_are_forms(name):
    form = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / f"{name}.yml").read_text())
    assert form["name"] and form["description"] and form["labels"]
    fields = form["body"]
    assert all(f["type"] in ("input", "textarea", "dropdown") and f["attributes"]["label"] for f in fields)
    assert len({f["id"] for f in fields}) == len(fields) and any(
        f.get("validations", {}).get("required") for f in fields
    )


def test_container_and_binder_use_what_exists():
    container = json.loads((ROOT / ".devcontainer" / "devcontainer.json").read_text())
    target = container["postCreateCommand"].removeprefix("make ")
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M)
    assert "-r ../requirements.lock" in (ROOT / ".binder" / "requirements.txt").read_text()
    assert (ROOT / ".binder" / "runtime.txt").read_text().strip() == "python-3.11"
    post = ROOT / ".binder" / "postBuild"
    assert os.access(post, os.X_OK) and "python -m glassbox_utils assets --fetch" in post.read_text()
    words = (ROOT / "docs" / "elsewhere.md").read_text()
    assert all(re.search(rf"\| {place}.*\*\*not tested", words) for place in ("VS Code", "Binder", "Colab", "conda"))


WAYS = [
    "run", "run NOTEBOOK=01", "run MODEL=gpt2 NOTEBOOK=02", "site", "site WEB=1", "workshop", "workshop NOTEBOOK=03",
    "reproduce", "reproduce QUICK=1", "kit", "kit CHECK=1", "compat", "saes", "assets", "seeds", "seeds NOTEBOOK=06",
]  # fmt: skip


@pytest.mark.skipif(shutil.which("make") is None, reason="without make")
@pytest.mark.parametrize("way", WAYS)
def test_the_commands_call_glassbox_with_arguments_that_it_takes(way, tmp_path):
    """``make run`` once passed ``--model ""``, which is refused: the first command of the README did nothing."""
    dry = ["make", "--dry-run", "--always-make", f"VENV={tmp_path}", *way.split()]
    said = subprocess.run(dry, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    calls = re.findall(r"bin/glassbox ([^;&|>\n]*)", said)
    assert calls, said
    for call in calls:
        assert cli.parser().parse_args(shlex.split(call.replace("$name", "own-8192-l14"))), call


@pytest.mark.lock
def test_the_locks_install_on_the_oldest_python_that_is_promised():
    """Debian 12 has 3.11.2: one locked package once wanted 3.11.5."""
    Specifiers = pytest.importorskip("packaging.specifiers").SpecifierSet
    oldest = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"].removeprefix(">=")
    wrong = []
    for name in re.findall(r"^([\w.-]+)==", "\n".join(p.read_text() for p in ROOT.glob("requirements*.lock")), re.M):
        try:
            wants = metadata.metadata(name).get("Requires-Python")
        except metadata.PackageNotFoundError:
            continue  # of a lock that is not installed here
        if wants and f"{oldest}.0" not in Specifiers(wants):
            wrong.append(f"{name} wants {wants}")
    assert wrong == []


def test_every_link_to_a_file_leads_to_one():
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("**/*.md"), *(ROOT / "data").glob("**/*.md")]
    made = {"docs/site/results.md", "docs/site/workshop.md"}  # of the site itself, or copied there
    wrong = []
    for path in pages:
        prose = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.S)
        for place in re.findall(r"\]\((?!https?:|mailto:|#)([^)#\s]+)", prose):
            target = (path.parent / place).resolve()
            inside = path.is_relative_to(ROOT / "docs" / "site") and place.startswith("notebooks/")  # copied there
            if not target.exists() and not inside and target.relative_to(ROOT).as_posix() not in made:
                wrong.append(f"{path.relative_to(ROOT)}: {place}")
    assert wrong == []


def test_the_citation_is_of_this_version():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == version


def test_the_module_is_the_command():
    run = subprocess.run([sys.executable, "-m", "glassbox_utils", "--help"], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0 and "workshop" in run.stdout and "reproduce" in run.stdout and "kit" in run.stdout


def test_the_table_of_versions_is_what_was_tried(tmp_path):
    first = Tried("3.11.7", "lock", "yes", {"torch": "2.13.0"}, "10 passed", {"01": "100 s"}, 20.0, "2026-11-28")
    again = Tried("3.11.7", "lock", "yes", {"torch": "2.13.0"}, "1 failed, 9 passed", {"01": "it | stopped"}, 20.0, "x")
    newer = Tried("3.13.0", "newest", "ERROR: no wheel")
    rows = compat.merged(compat.merged(compat.merged([], newer), first), again)
    assert [(r.python, r.suite) for r in rows] == [("3.11.7", "1 failed, 9 passed"), ("3.13.0", "not run")]
    compat.write(rows, tmp_path / "c.md", tmp_path / "c.json")
    assert compat.read(tmp_path / "c.json") == rows
    page = (tmp_path / "c.md").read_text()
    assert "| 3.13.0 | newest | ERROR: no wheel |" in page and "it / stopped" in page


def test_a_suite_is_told_by_its_last_line_and_by_what_failed():
    said = "== 2 failed, 5 passed, 1 warning in 3.21s (0:00:03) =="
    failed = "FAILED tests/a.py::test_one[x] - assert 1\nFAILED tests/a.py::test_two - boom\n"
    assert compat.summary(failed + said) == "2 failed, 5 passed, 1 warning (test_one[x], test_two)"
    assert compat.summary("7 passed, 2 skipped in 1.00s") == "7 passed, 2 skipped" and compat.summary("killed") == ""
    many = "".join(f"ERROR tests/a.py::test_{i} - x\n" for i in range(5)) + "5 errors in 1s"
    assert compat.summary(many) == "5 errors (test_0, test_1, test_2 and 2 more)"


def test_the_published_table_is_the_one_of_its_numbers():
    if compat.TABLE.exists():
        assert compat.PAGE.read_text() == compat.as_text(compat.read())


def test_a_python_that_is_not_there_is_said_before_anything_is_installed(capsys, tmp_path):
    assert cli.main(["compat", "--python", str(tmp_path / "python9")]) == 2
    assert "can't be started" in capsys.readouterr().err
    with pytest.raises(CompatError, match="Allowed: lock, newest"):
        compat.try_one(sys.executable, "oldest", [], [])
    assert compat.version_of(sys.executable).startswith(f"{sys.version_info[0]}.{sys.version_info[1]}.")
