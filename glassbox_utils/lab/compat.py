"""Which versions work: Python by Python, with the lock and with the newest versions that ``pyproject.toml`` allows.

Each combination gets an environment of its own under ``build/compat``, in which the unit suite and some notebooks run.
The table is written after each, with what was run: a combination that was not tried is not in it, or says so.
"""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from glassbox_utils.core import files
from glassbox_utils.core.assets import ROOT
from glassbox_utils.core.errors import GlassboxError

VERSIONS = ("lock", "newest")
SHOWN = ("torch", "transformers", "transformer-lens", "sae-lens", "numpy")
"""packages whose versions the table names"""
SUITE = "not ranks and not shapes and not long and not kit and not browser"
"""what `make test` runs of the unit suite, but for the browser tests"""
PAGE = ROOT / "docs" / "compatibility.md"
TABLE = ROOT / "docs" / "compatibility.json"


class CompatError(GlassboxError):
    """A combination that does not exist, or a Python that can't be started."""


@dataclass(frozen=True)
class Tried:
    """What one combination did."""

    python: str
    """3.13.0"""
    versions: str
    installed: str
    """yes, or pip's last words"""
    packages: dict[str, str] = field(default_factory=dict)
    suite: str = "not run"
    """pytest's last line, without its time"""
    notebooks: dict[str, str] = field(default_factory=dict)
    """number -> seconds, or why it stopped"""
    minutes: float = 0.0
    date: str = ""


def version_of(python: str) -> str:
    """The full version of an interpreter; CompatError if it can't be started, or is too old."""
    try:
        code = "import sys; print('.'.join(map(str, sys.version_info[:3])))"
        done = subprocess.run([python, "-c", code], capture_output=True, text=True, encoding="utf-8", timeout=60)
        words = (done.stderr.strip().splitlines() or ["it gave no reason"])[0]
    except (OSError, subprocess.TimeoutExpired) as error:
        done, words = None, str(error)
    if done is None or done.returncode:
        raise CompatError(f"{python!r} can't be started: {words}. Give the path of an interpreter with --python.")
    found = done.stdout.strip()
    if tuple(int(x) for x in found.split(".")[:2]) < (3, 11):
        raise CompatError(f"{python!r} is Python {found}. Allowed: 3.11 or newer.")
    return found


def environment(python: str, versions: str, folder: Path) -> tuple[Path, str]:
    """An environment in ``folder`` and how its installation went: "yes", or pip's last words. What is there is kept."""
    venv, mark = folder / "venv", folder / "installed"
    binary = venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if mark.exists():
        return binary, "yes"
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run([python, "-m", "venv", "--clear", str(venv)], check=True, capture_output=True)
    pip = [str(binary), "-m", "pip", "install", "-qq", "--disable-pip-version-check", "--no-compile"]
    if versions == "lock":
        steps = [
            ["-r", str(ROOT / "requirements.lock")],
            ["--no-deps", "--no-build-isolation", "--editable", str(ROOT)],
        ]
    else:
        dev = folder / "dev.txt"
        dev.write_text("\n".join(_dev()), encoding="utf-8")
        steps = [["--upgrade", "pip", "setuptools", "wheel"], ["--upgrade", "--editable", str(ROOT), "-r", str(dev)]]
    for step in steps:
        done = subprocess.run([*pip, *step], capture_output=True, text=True, encoding="utf-8")
        if done.returncode:
            words = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
            return binary, (words[-1].strip() if words else "pip gave no reason")[:300]
    mark.touch()
    return binary, "yes"


def _dev() -> list[str]:
    import tomllib

    return list(tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["dependency-groups"]["dev"])


def _packages(binary: Path) -> dict[str, str]:
    code = (
        f"import json; from importlib.metadata import version; print(json.dumps({{n: version(n) for n in {SHOWN!r}}}))"
    )
    done = subprocess.run([str(binary), "-c", code], capture_output=True, text=True, encoding="utf-8")
    return dict(json.loads(done.stdout)) if done.returncode == 0 else {}


def _suite(binary: Path, where: Sequence[str], versions: str, folder: Path) -> str:
    which = SUITE if versions == "lock" else f"{SUITE} and not lock"
    command = [str(binary), "-m", "pytest", *where, "-q", "-p", "no:cacheprovider", "-m", which]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, encoding="utf-8", env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    (folder / "suite.txt").write_text(done.stdout + done.stderr, encoding="utf-8")  # which tests failed, and why
    return summary(done.stdout) or f"pytest ended with {done.returncode}"


def summary(output: str) -> str:
    """Pytest's last line without its time, and the first tests that failed by name; "" if there is no such line."""
    lines = [line for line in output.splitlines() if re.search(r"\d+ (passed|failed|error)", line)]
    if not lines:
        return ""
    said = re.sub(r" in [\d.:]+s.*| in \d+.*", "", lines[-1]).strip(" =")
    failed = re.findall(r"^(?:FAILED|ERROR) \S*::(\S+)", output, re.M)
    more = f" and {len(failed) - 3} more" if len(failed) > 3 else ""
    return said + (f" ({', '.join(failed[:3])}{more})" if failed else "")


def _notebook(binary: Path, number: str, folder: Path) -> str:
    command = [str(binary), "-m", "glassbox_utils", "run", number, "--site", str(folder / "pages")]
    start = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, encoding="utf-8")
    if done.returncode:
        return ((done.stderr or done.stdout).strip().splitlines() or ["it stopped"])[-1][:200]
    return f"{time.perf_counter() - start:.0f} s"


def try_one(
    python: str, versions: str, numbers: Sequence[str], where: Sequence[str], base: Path = ROOT / "build" / "compat"
) -> Tried:
    """Install, run the unit suite (paths ``where``; none: not run) and notebooks, in an environment of its own."""
    if versions not in VERSIONS:
        raise CompatError(f"There is no set of versions {versions!r}. Allowed: {', '.join(VERSIONS)}.")
    full, start = version_of(python), time.perf_counter()
    folder = base / f"{full}-{versions}"
    binary, installed = environment(python, versions, folder)
    if installed != "yes":
        return Tried(full, versions, installed, minutes=_minutes(start), date=time.strftime("%Y-%m-%d"))
    return Tried(
        full,
        versions,
        installed,
        _packages(binary),
        _suite(binary, where, versions, folder) if where else "not run",
        {number: _notebook(binary, number, folder) for number in numbers},
        _minutes(start),
        time.strftime("%Y-%m-%d"),
    )


def _minutes(start: float) -> float:
    return round((time.perf_counter() - start) / 60, 1)


def read(path: Path = TABLE) -> list[Tried]:
    """What was tried before; empty if nothing was."""
    return [Tried(**row) for row in json.loads(path.read_text(encoding="utf-8"))] if path.exists() else []


def write(rows: Sequence[Tried], page: Path = PAGE, table: Path = TABLE) -> None:
    """The table as JSON, and the page of it."""
    with files.atomic_path(table) as partial:
        partial.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n", encoding="utf-8")
    with files.atomic_path(page) as partial:
        partial.write_text(as_text(rows), encoding="utf-8")


def merged(rows: Sequence[Tried], new: Tried) -> list[Tried]:
    """With the new row in the place of an earlier one of the same Python and versions."""
    kept = [r for r in rows if (r.python, r.versions) != (new.python, new.versions)]
    return sorted([*kept, new], key=lambda r: ([int(x) for x in r.python.split(".")], r.versions))


def as_text(rows: Sequence[Tried]) -> str:
    """The page."""
    numbers = sorted({n for r in rows for n in r.notebooks})
    head = [
        "Python",
        "versions",
        "installed",
        *SHOWN,
        "unit suite",
        *(f"notebook {n}" for n in numbers),
        "minutes",
        "on",
    ]
    lines = [
        "# Compatibility",
        "",
        "`make compat` writes this page: each row is an environment of its own, on one machine "
        f"({sys.platform}). *Lock* is `requirements.lock`; *newest* is what pip finds inside the ranges of "
        "`pyproject.toml` on that day, without the two tests that compare what is installed with the lock. A notebook "
        "runs if all that it asserts holds. What is not in the table was not tried: Windows, macOS and GPUs among it.",
        "",
        "| " + " | ".join(head) + " |",
        "|" + "---|" * len(head),
    ]
    for r in rows:
        cells = [r.python, r.versions, r.installed, *(r.packages.get(n, "") for n in SHOWN), r.suite]
        cells += [r.notebooks.get(n, "not run") for n in numbers] + [f"{r.minutes:g}", r.date]
        lines.append("| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |")
    return "\n".join(lines) + "\n"
