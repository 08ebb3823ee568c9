"""The same claims on two models: findings of two sets of executed notebooks side by side, and which held on both.

Claims are computed sentences: heads, layers and counts in them are each model's own. Two claims are the same if they
come from the same notebook and read alike once those are taken out.
"""

import ast
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat

from glassbox_utils.core import files, pages
from glassbox_utils.core.errors import GlassboxError
from glassbox_utils.core.evidence import RUNGS
from glassbox_utils.lab import notebooks, subjects

NUMBER = re.compile(
    r"\b(?:one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve)\b|[-+−]?(?:\d+(?:[.,]\d+)*|\.\d+)(?:\s?%)?"
)
SERIES = re.compile(r"#(?:(?:\s*,\s*|\s+and\s+|\s*,\s*and\s+)#)+")


class CompareError(GlassboxError, ValueError):
    """A folder without findings, or with those of several models; the message says how to make one."""


@dataclass(frozen=True)
class Side:
    """What the notebooks of one folder found about one model."""

    model: str
    size: float
    """share of the full number of cases that the model's studies took"""
    findings: Mapping[str, Sequence[Mapping[str, Any]]]
    """notebook -> findings, as ``core.evidence`` writes them"""
    stopped: Sequence[str]
    """notebooks that did not come to their end"""

    @property
    def label(self) -> str:
        return self.model if self.size == 1 else f"{self.model} (studies at {self.size:.0%} of their full size)"


@dataclass(frozen=True)
class Row:
    """One claim, and what each model says about it; None if that model's notebook does not make it."""

    notebook: str
    first: Mapping[str, Any] | None
    second: Mapping[str, Any] | None

    @property
    def outcome(self) -> str:
        """Held on ``both``, the ``first``, the ``second`` or ``neither``; ``unmatched`` if one does not make it."""
        if self.first is None or self.second is None:
            return "unmatched"
        held = (self.first["verdict"] == "held", self.second["verdict"] == "held")
        return {(True, True): "both", (True, False): "first", (False, True): "second"}.get(held, "neither")


def normalised(claim: str) -> str:
    """The claim without what is a model's own: numbers, heads, counts in words, lists of them, signs."""
    plain = NUMBER.sub("#", claim.lower())
    return " ".join(SERIES.sub("#", plain).split())


def read_side(folder: Path) -> Side:
    """Findings of a folder of pages that ``glassbox run`` wrote, or of executed notebooks."""
    if not folder.is_dir():
        raise CompareError(f"There is no folder {folder}. Give the --site of a `glassbox run`, or executed notebooks.")
    side = _of_pages(folder) if (folder / notebooks.RUNS).exists() else _of_notebooks(folder)
    if not any(side.findings.values()):
        raise CompareError(
            f"{folder} holds no findings. Give the folder of pages that `glassbox run --site FOLDER` wrote, or one of "
            "executed notebooks (.ipynb) that end in gb.ladder(...)."
        )
    return side


def _of_pages(folder: Path) -> Side:
    runs = {name: run for name, run in notebooks.runs_of(folder).items() if "model_hash" in run}
    if len({run["model_hash"] for run in runs.values()}) > 1:
        names = ", ".join(sorted({run["model"] for run in runs.values()}))
        raise CompareError(f"{folder} holds pages about several models: {names}. Give each a --site of its own.")
    found = {name: run.get("findings", []) for name, run in runs.items()}
    first = next(iter(runs.values()), {})
    stopped = [name for name, run in runs.items() if "stopped" in run]
    return Side(first.get("model", folder.name), float(first.get("size", 1.0)), found, stopped)


def _of_notebooks(folder: Path) -> Side:
    read = {p.stem: nbformat.read(p, 4) for p in sorted(folder.glob("*.ipynb"))}
    models = {model for notebook in read.values() if (model := _model_of(notebook))}
    if len(models) > 1:
        raise CompareError(f"{folder} holds notebooks about several models: {', '.join(sorted(models))}. Part them.")
    found = {name: subjects.findings_of(notebook) for name, notebook in read.items()}
    return Side(Path(models.pop()).name if models else folder.name, 1.0, found, [])


def _model_of(notebook: Any) -> str | None:
    """What the parameter MODEL was: of the injected cell if there is one, which stands behind the default."""
    tagged = {"parameters", "injected-parameters"}
    source = "\n".join(c.source for c in notebook.cells if tagged & set(c.metadata.get("tags", [])))
    found = [
        node.value.value
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
        if any(isinstance(t, ast.Name) and t.id == "MODEL" for t in node.targets)
    ]
    return str(found[-1]) if found else None


def matched(first: Side, second: Side) -> list[Row]:
    """All claims of both sides, notebook by notebook; those that only one side makes stand alone."""
    rows = []
    for notebook in sorted({*first.findings, *second.findings}):
        mine, rest = list(first.findings.get(notebook, [])), list(second.findings.get(notebook, []))
        partner: dict[int, Mapping[str, Any]] = {}
        for alike in (str, normalised):  # word for word first: what differs in a number only may stand twice
            for i, f in enumerate(mine):
                found = next((j for j, other in enumerate(rest) if alike(other["claim"]) == alike(f["claim"])), None)
                if i not in partner and found is not None:
                    partner[i] = rest.pop(found)
        rows += [Row(notebook, f, partner.get(i)) for i, f in enumerate(mine)]
        rows += [Row(notebook, None, f) for f in rest]
    return rows


def write_page(first: Path, second: Path, out: Path) -> list[Row]:
    """Write the page that compares two folders, as Markdown if it is to end in ``.md``; its rows.

    Raises CompareError for a folder without findings.
    """
    one, two = read_side(Path(first)), read_side(Path(second))
    rows = matched(one, two)
    count = {kind: sum(row.outcome == kind for row in rows) for kind in ("both", "first", "second", "neither")}
    page = pages.render(
        Path(__file__).parent / "templates" / ("compare.md" if Path(out).suffix == ".md" else "compare.html"),
        first=one,
        second=two,
        rungs=RUNGS,
        count=count,
        measured=sum(count.values()),
        pairs=[row for row in rows if row.outcome != "unmatched"],
        alone=[row for row in rows if row.outcome == "unmatched"],
    )
    with files.atomic_path(Path(out)) as partial:
        partial.write_text(page, encoding="utf-8")
    return rows
