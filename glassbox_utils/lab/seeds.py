"""Do the findings survive another seed? Each notebook run with other values of SEED, and what its ladder says then.

SEED draws what a notebook measures live, and the bootstrap. What it reads from a study's table stays as it is: such a
finding can only change its interval. The row of the notebook's own SEED is read from its committed outputs.
"""

import hashlib
import json
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import nbformat

from glassbox_utils.core import files
from glassbox_utils.core.assets import ROOT
from glassbox_utils.core.errors import GlassboxError
from glassbox_utils.lab import notebooks, subjects

SEEDS = (1, 2, 3, 4)
PAGE = ROOT / "docs" / "seeds.md"
TABLE = ROOT / "docs" / "seeds.json"
KEPT = ("claim", "rung", "verdict", "effect", "ci")


class SeedsError(GlassboxError):
    """A notebook that draws nothing, or whose committed outputs hold no finding."""


@dataclass(frozen=True)
class Seeded:
    """What one notebook found with one SEED."""

    notebook: str
    seed: int
    code: str
    """digest of the notebook's code: a row of other code is run again"""
    stopped: str = ""
    """the assertion or error that stopped it"""
    findings: list[dict[str, Any]] = field(default_factory=list)
    date: str = ""


def code_of(notebook: Any) -> str:
    """Digest of the code cells, in order; words and outputs don't count."""
    code = json.dumps([cell.source for cell in notebook.cells if cell.cell_type == "code"])
    return hashlib.sha256(code.encode()).hexdigest()[:16]


def committed(path: Path) -> Seeded:
    """What the committed outputs say, with the notebook's own SEED. SeedsError if there is none, or nothing found."""
    notebook = nbformat.read(path, 4)
    own = re.search(r"^SEED = (\d+)", "\n".join(c.source for c in notebook.cells if c.cell_type == "code"), re.M)
    if not own:
        raise SeedsError(f"{path.name} has no parameter SEED. Give one that draws something: `SEED = 0`.")
    if not (found := subjects.findings_of(notebook)):
        raise SeedsError(f"{path.name} has no finding in its outputs. `glassbox execute {path.stem[:2]}` writes them.")
    return Seeded(path.stem, int(own[1]), code_of(notebook), "", _kept(found), time.strftime("%Y-%m-%d"))


def try_one(path: Path, seed: int) -> Seeded:
    """Run a notebook with another SEED. A failing assertion is a result too."""
    code, stopped = code_of(nbformat.read(path, 4)), ""
    try:
        done, _, _ = notebooks.execute(path, None, {"SEED": seed})
    except notebooks.StoppedError as error:
        done, stopped = error.notebook, str(error)[:300]
    return Seeded(path.stem, seed, code, stopped, _kept(subjects.findings_of(done)), time.strftime("%Y-%m-%d"))


def _kept(found: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: one[key] for key in KEPT} for one in found]


def read(path: Path = TABLE) -> list[Seeded]:
    """What was run before; empty if nothing was."""
    return [Seeded(**row) for row in json.loads(path.read_text(encoding="utf-8"))] if path.exists() else []


def merged(rows: Sequence[Seeded], new: Seeded) -> list[Seeded]:
    """With the new row in the place of an earlier one; rows of the notebook's earlier code are dropped."""
    kept = [r for r in rows if r.notebook != new.notebook or (r.code == new.code and r.seed != new.seed)]
    return sorted([*kept, new], key=lambda r: (r.notebook, r.seed))


def missing(rows: Sequence[Seeded], path: Path, seeds: Sequence[int]) -> list[int]:
    """The seeds that a notebook's present code was not run with."""
    code = code_of(nbformat.read(path, 4))
    done = {r.seed for r in rows if (r.notebook, r.code) == (path.stem, code)}
    return [seed for seed in seeds if seed not in done]


def write(rows: Sequence[Seeded], page: Path = PAGE, table: Path = TABLE) -> None:
    """The table as JSON, and the page of it."""
    with files.atomic_path(table) as partial:
        partial.write_text(json.dumps([asdict(row) for row in rows]) + "\n", encoding="utf-8")
    with files.atomic_path(page) as partial:
        partial.write_text(as_text(rows), encoding="utf-8")


# --- the page -----------------------------------------------------------------------------------------


def present() -> dict[str, str]:
    """Notebook -> digest of the code that it has now, of the repository's notebooks."""
    return {path.stem: code_of(nbformat.read(path, 4)) for path in sorted(notebooks.NOTEBOOKS.glob("[0-9]*.ipynb"))}


def as_text(rows: Sequence[Seeded], now: Mapping[str, str] | None = None) -> str:
    """The page: what stayed, what changed, and every finding seed by seed.

    ``now``: the notebooks' code today (``present``, if it is not given). Rows of earlier code say so.
    """
    now = present() if now is None else now
    books = {name: [r for r in rows if r.notebook == name] for name in dict.fromkeys(r.notebook for r in rows)}
    tables = {name: _table(runs) for name, runs in books.items() if len(runs) > 1}
    every = [row for table in tables.values() for row in table]
    same = sum(len(set(verdicts)) == 1 for _, _, verdicts, _ in every)
    fixed = sum(len(set(effects)) == 1 for *_, effects in every)
    stopped = [f"{r.notebook} with SEED {r.seed}: {r.stopped}" for r in rows if r.stopped]
    lines = [
        "# Other seeds",
        "",
        "`make seeds` writes this page: each notebook is run again with other values of its parameter SEED, which "
        "draws what is measured live, and the bootstrap. What is read from a study's table stays as it is, so that "
        f"such a finding can only change its interval: the effect is the same throughout for {fixed} of {len(every)}.",
        "",
        f"**{same} of {len(every)} findings keep their verdict with every seed.** "
        + (f"Stopped by an assertion or an error: {'; '.join(stopped)}." if stopped else "No assertion failed."),
        "",
        "A cell holds the verdict and the effect, in the unit that the claim names. Bold: another verdict than with "
        "the notebook's own seed, the first column.",
        "",
    ]
    for name, table in tables.items():
        runs = books[name]
        head = ["claim", "rung", *(f"SEED {r.seed}" for r in runs)]
        dates = sorted({r.date for r in runs})
        since = now.get(name, runs[0].code) != runs[0].code
        changed = f" **It has changed since: claims and verdicts may be others now** (`glassbox seeds {name[:2]}`)."
        said = f"Run on {', '.join(dates)}; its code had the digest `{runs[0].code}`.{changed if since else ''}"
        lines += [f"## {name}", "", said, ""]
        lines += ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
        for claim, rung, verdicts, effects in table:
            cells = [claim.replace("|", "\\|"), str(rung)]
            for verdict, effect in zip(verdicts, effects, strict=True):
                words = "none" if effect is None else f"{verdict} {effect:.2f}"
                cells.append(f"**{words}**" if verdict != verdicts[0] else words)
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def _table(runs: Sequence[Seeded]) -> list[tuple[str, int, list[str], list[float | None]]]:
    """(claim, rung, verdicts, effects) for each finding, over the seeds; one that a seed did not state has no effect.

    Claims may name what a seed picked, so findings are matched by their place where the numbers of them agree.
    """
    most = max(len(r.findings) for r in runs)
    found = []
    for i in range(most):
        first = next(r.findings[i] for r in runs if len(r.findings) == most)
        cells = [_at(r.findings, i, first["claim"], most) for r in runs]
        verdicts = [one["verdict"] if one else "none" for one in cells]
        found.append((first["claim"], first["rung"], verdicts, [one["effect"] if one else None for one in cells]))
    return found


def _at(findings: Sequence[dict[str, Any]], i: int, claim: str, most: int) -> dict[str, Any] | None:
    if len(findings) == most:
        return findings[i]
    return next((one for one in findings if one["claim"] == claim), None)
