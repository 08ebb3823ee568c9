"""The project's own files agree with each other."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
LOCK, MORE, WEB = (
    {
        canonicalize_name(line.split("==")[0]): line.split("==")[1]
        for line in (ROOT / name).read_text().splitlines()
        if line and not line.startswith("#")
    }
    for name in ("requirements.lock", "requirements-more.lock", "requirements-web.lock")
)


@pytest.mark.parametrize("wanted", PROJECT["project"]["dependencies"] + PROJECT["dependency-groups"]["dev"])
def test_the_lock_satisfies_pyproject(wanted):
    requirement = Requirement(wanted)
    name = canonicalize_name(requirement.name)
    assert name in LOCK, f"{name} is missing from requirements.lock"
    assert requirement.specifier.contains(LOCK[name], prereleases=True)


@pytest.mark.parametrize(("extra", "lock"), [("more", MORE), ("web", WEB)])
def test_the_other_locks_satisfy_their_extras_and_contradict_nothing(extra, lock):
    for wanted in map(Requirement, PROJECT["project"]["optional-dependencies"][extra]):
        assert wanted.specifier.contains(lock[canonicalize_name(wanted.name)], prereleases=True)
    assert not lock.keys() & LOCK.keys()
    assert not MORE.keys() & WEB.keys()


@pytest.mark.lock
def test_the_lock_is_what_is_installed():
    from importlib.metadata import version

    for name in ("torch", "transformers", "transformer-lens", "sae-lens", "circuitsvis", "nbval"):
        assert version(name).split("+")[0] == LOCK[name]


def test_conda_is_the_route_to_the_same_lock():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    pip = environment["dependencies"][-1]["pip"]
    assert pip == ["-r requirements.lock", "-e ."]
    assert all(re.match(r"(python=3\.\d+|pip)$", d) for d in environment["dependencies"][:-1])
    assert PROJECT["project"]["requires-python"] == ">=3.11" and "python=3.11" in environment["dependencies"]


def lint_imports(folder):
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-logo", "--no-cache"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": ""})


@pytest.mark.parametrize(
    ("file", "line", "broken"),
    [
        (None, None, "3 kept, 0 broken"),
        ("core/models.py", "from glassbox_utils.saes import store", "A room imports only rooms below it BROKEN"),
        ("steering/fit.py", "from glassbox_utils.steering import study", "long runs and figures"),
        ("saes/store.py", "from glassbox_utils.saes import quality", "No circle of imports inside a room BROKEN"),
    ],
)
def test_imports_go_down_only_and_a_planted_one_is_caught(tmp_path, file, line, broken):
    shutil.copytree(ROOT / "glassbox_utils", tmp_path / "glassbox_utils", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    if file:
        path = tmp_path / "glassbox_utils" / file
        path.write_text(path.read_text() + f"\n{line}\n")
    result = lint_imports(tmp_path)
    assert broken in re.sub(r"\s+", " ", result.stdout) and bool(file) == bool(result.returncode), result.stdout


def test_every_study_and_figures_file_is_protected():
    protected = next(c for c in PROJECT["tool"]["importlinter"]["contracts"] if c["id"] == "studies")[
        "protected_modules"
    ]
    files = [p for p in (ROOT / "glassbox_utils").glob("*/*.py") if re.search(r"study$|^figures$", p.stem)]
    named = {f"glassbox_utils.{p.parent.name}.{p.stem}" for p in files} - {"glassbox_utils.core.figures"}
    assert named == set(protected)


def test_no_file_is_too_long_to_be_read():
    for path in (ROOT / "glassbox_utils").rglob("*.py"):
        lines = path.read_text().splitlines()
        assert len(lines) <= 500, f"{path} has {len(lines)} lines: split it"


def test_the_public_face_is_loaded_lazily_and_every_name_is_there():
    code = (
        "import sys, time; start = time.perf_counter(); import glassbox_utils as gb; "
        "spent = time.perf_counter() - start; "
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules; print(spent); "
        "[getattr(gb, name) for name in dir(gb)]; "
        "[getattr(getattr(gb, room), name) for room in ('core', 'attention', 'steering', 'saes', 'decisions', 'lab') "
        "for name in dir(getattr(gb, room))]"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) < 0.2


def test_the_readme_imports_only_the_public_face():
    code = "\n".join(re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S))
    stub = (ROOT / "glassbox_utils" / "__init__.pyi").read_text()
    names = set(re.findall(r"\bgb\.(\w+)", code))
    assert names and "from glassbox_utils" not in code
    assert all(re.search(rf" as {name}$", stub, re.M) for name in names)


def test_architecture_names_files_that_exist():
    text = (ROOT / "ARCHITECTURE.md").read_text()
    paths = re.findall(r"`(glassbox_utils/[\w/]+\.py)`", text)
    assert len(paths) >= 8 and all((ROOT / path).exists() for path in paths)
