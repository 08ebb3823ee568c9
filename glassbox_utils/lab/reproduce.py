"""Compute again what README, cards and results page state, and put it beside what they state.

A *source* is what has to be computed at once: a notebook (its findings are the results page), the card of an SAE, the
card of the loan officers, the facts of the README. What is stated is read from the files, never typed a second time.

A notebook draws its long runs from ``data/studies/`` and computes a random part of them again, which it asserts; a
finding that names a study is therefore compared as *read from* it. ``glassbox study NAME`` computes one in full.
"""

import csv
import json
import math
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import nbformat
import numpy as np

from glassbox_utils.core import files, schema
from glassbox_utils.core.assets import DATA, ROOT
from glassbox_utils.core.errors import GlassboxError
from glassbox_utils.lab import notebooks, subjects

README = ROOT / "README.md"
ROUNDING = 0.011
"""of two printed digits: one unit in the last, as notebooks print them"""
EXACT = ("explained_variance", "recovered_mean", "recovered_zero")
"""what `glassbox evaluate-sae` holds to 0.01; other measures of a card move more, as the baselines' rows are fewer"""
TIMES = 3.0
"""factor by which seconds and GiB of another machine may differ before the row is called outside"""


class ReproduceError(GlassboxError):
    """A source that does not exist."""


@dataclass(frozen=True)
class Number:
    """A number that is stated somewhere."""

    where: str
    what: str
    stated: float
    tolerance: float
    """absolute; for ``machine`` numbers a factor"""
    machine: bool = False
    """seconds or GiB: another machine has others"""
    read_from: str = ""
    """the study whose table the number was drawn from"""


@dataclass(frozen=True)
class Row:
    """A stated number beside the one that was computed now; ``recomputed`` is None if it could not be found again."""

    number: Number
    recomputed: float | None
    seconds: float
    """that its whole source took"""

    @property
    def inside(self) -> bool:
        n = self.number
        if self.recomputed is None or not math.isfinite(self.recomputed):
            return False
        if n.machine:
            return n.stated / n.tolerance <= self.recomputed <= n.stated * n.tolerance
        return abs(self.recomputed - n.stated) <= n.tolerance


@dataclass(frozen=True)
class Source:
    """What is computed at once."""

    name: str
    numbers: tuple[Number, ...]
    compute: Callable[[], Mapping[str, float]]
    """what -> the number now"""


# --- what is stated -------------------------------------------------------------------------------------------


def numbers_of(findings: Iterable[Mapping[str, Any]], where: str) -> list[Number]:
    """Effect, interval and control of each finding that a ladder left in a notebook."""
    found = list[Number]()
    for finding in findings:
        study = re.match(r"study (\S+)", finding.get("source") or "")
        for part, value in _parts(finding):
            what = f"{finding['claim']}: {part}"
            tolerance = max(ROUNDING, 0.02 * abs(value))
            found.append(Number(where, what, value, tolerance, read_from=study[1] if study else ""))
    return found


def _parts(finding: Mapping[str, Any]) -> list[tuple[str, float]]:
    control = finding.get("control") or {}
    parts = [("effect", finding.get("effect")), ("control", control.get("value"))]
    parts += [(end, x) for end, x in zip(("low", "high"), finding.get("ci") or (), strict=False)]
    return [(part, float(x)) for part, x in parts if isinstance(x, int | float) and math.isfinite(x)]


def readme_times(text: str) -> dict[str, tuple[float, float]]:
    """Number of a notebook -> (seconds, GiB), as the README's table states them."""
    rows = re.findall(r"^\|\s*\[(\d\d)\].*\|\s*(\d+)\s*s\s*\|\s*([\d.]+)\s*GiB\s*\|$", text, re.M)
    return {name: (float(seconds), float(gib)) for name, seconds, gib in rows}


FACTS: tuple[tuple[str, str], ...] = (
    (r"each of the (\d+) heads", "heads of the embedded model"),
    (r"(\d+) layers of \d+ heads", "layers of the embedded model"),
    (r"\d+ layers of (\d+) heads", "heads of a layer"),
)


def _facts() -> dict[str, float]:
    from glassbox_utils.core.models import load_model

    model = load_model()
    values = (model.n_layers * model.n_heads, model.n_layers, model.n_heads)
    return {what: float(value) for (_, what), value in zip(FACTS, values, strict=True)}


def _of_readme(text: str) -> Source:
    numbers = [
        Number("README.md", what, float(match[1]), 0.0)
        for pattern, what in FACTS
        if (match := re.search(pattern, text))
    ]
    return Source("readme", tuple(numbers), _facts)


def _of_notebook(path: Path, times: Mapping[str, tuple[float, float]]) -> Source:
    name = path.stem[:2]
    numbers = numbers_of(subjects.findings_of(nbformat.read(path, 4)), path.name)
    if name in times:
        numbers += [
            Number("README.md", f"{what} of notebook {name}", stated, TIMES, machine=True)
            for what, stated in zip(("seconds", "GiB"), times[name], strict=True)
        ]

    def compute() -> dict[str, float]:
        done, seconds, peak = notebooks.execute(path, None)
        now = {n.what: n.stated for n in numbers_of(subjects.findings_of(done), path.name)}
        return now | {f"seconds of notebook {name}": seconds, f"GiB of notebook {name}": peak}

    return Source(f"notebook:{name}", tuple(numbers), compute)


def _of_sae(folder: Path) -> Source:
    card = schema.read_mapping(folder / "card.json", ReproduceError, "a folder that train-sae has written")
    where = f"data/saes/{folder.name}/README.md"
    numbers = [
        Number(where, f"{kind}: {metric}", float(value), 0.01 if metric in EXACT else max(0.02, 0.05 * abs(value)))
        for kind, metrics in card["metrics"].items()
        for metric, value in metrics.items()
    ]

    def compute() -> dict[str, float]:
        from glassbox_utils.saes.quality import evaluate_again

        again = evaluate_again(folder.name)
        return {f"{kind}: {metric}": now for kind, rows in again.items() for metric, (_, now) in rows.items()}

    return Source(f"sae:{folder.name}", tuple(numbers), compute)


def sources(officer: Callable[[], Source] | None = None) -> list[Source]:
    """All of them, in a fixed order. ``officer`` is the card of the loan officers, from the room that knows it."""
    text = README.read_text(encoding="utf-8")
    times = readme_times(text)
    found = [_of_readme(text), *(_of_notebook(path, times) for path in notebooks.find())]
    found += [_of_sae(path.parent) for path in sorted((DATA / "saes").glob("*/card.json"))]
    return [*found, *([officer()] if officer else [])]


def uncovered(text: str, known: Sequence[Source]) -> int:
    """How many numbers of the README's prose no source computes: dates, sizes, defaults, and what is missing here."""
    prose = re.sub(r"```.*?```|`[^`]*`|\]\([^)]*\)", " ", text, flags=re.S)
    mine = sum(n.where == "README.md" for source in known for n in source.numbers)
    return max(0, len(re.findall(r"(?<![\w.])\d+(?:[.,]\d+)*(?![\w])", prose)) - mine)


# --- which, and the table ---------------------------------------------------------------------------------------


def a_tenth(known: Sequence[Source], seed: int) -> list[Source]:
    """Sources in random order until they hold a tenth of all numbers: whole sources, since each is computed at once."""
    wanted, chosen = sum(len(s.numbers) for s in known) / 10, list[Source]()
    for i in np.random.default_rng(seed).permutation(len(known)):
        if sum(len(s.numbers) for s in chosen) >= wanted:
            break
        chosen.append(known[int(i)])
    return [s for s in known if s in chosen]


def named(known: Sequence[Source], names: Sequence[str]) -> list[Source]:
    """Sources by name; ``notebook:`` alone means all of that kind. ReproduceError for a name that fits none."""
    chosen = list[Source]()
    for name in names:
        fits = [s for s in known if s.name == name or (name.endswith(":") and s.name.startswith(name))]
        if not fits:
            raise ReproduceError(f"There is no source {name!r}. Allowed: {', '.join(s.name for s in known)}.")
        chosen += [s for s in fits if s not in chosen]
    return chosen


def compute(source: Source) -> list[Row]:
    """One source, computed now. What is stated and was not found again is a row without a number."""
    start = time.perf_counter()
    now = source.compute()
    seconds = time.perf_counter() - start
    return [Row(number, now.get(number.what), seconds) for number in source.numbers]


def missing(source: Source) -> list[Row]:
    """The rows of a source that could not be computed."""
    return [Row(number, None, 0.0) for number in source.numbers]


def as_text(rows: Sequence[Row]) -> str:
    """The table in Markdown: what is outside first."""
    lines = ["| | where | what | stated | recomputed | tolerance | seconds |", "|---|---|---|---|---|---|---|"]
    for row in sorted(rows, key=lambda r: r.inside):
        n = row.number
        again = "not found" if row.recomputed is None else f"{row.recomputed:.4g}"
        tolerance = f"× {n.tolerance:g}" if n.machine else f"± {n.tolerance:.2g}"
        what = f"{n.what} (read from study {n.read_from})" if n.read_from else n.what
        lines.append(
            f"| {'' if row.inside else 'OUTSIDE'} | {n.where} | {what.replace('|', '/')} | {n.stated:.4g} | {again} "
            f"| {tolerance} | {row.seconds:.0f} |"
        )
    outside = sum(not row.inside for row in rows)
    return "\n".join([*lines, "", f"{len(rows)} numbers, {outside} outside their tolerance."])


def write(rows: Sequence[Row], folder: Path) -> tuple[Path, Path]:
    """``reproduced.md``, ``reproduced.csv`` under ``folder``; both paths."""
    folder.mkdir(parents=True, exist_ok=True)
    page, table = folder / "reproduced.md", folder / "reproduced.csv"
    with files.atomic_path(page) as partial:
        partial.write_text(as_text(rows) + "\n", encoding="utf-8")
    with files.atomic_path(table) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        names = ("where", "what", "stated", "recomputed", "tolerance", "machine", "read_from", "seconds", "inside")
        writer.writerow(names)
        for row in rows:
            n = row.number
            writer.writerow([n.where, n.what, n.stated, row.recomputed, n.tolerance, n.machine, n.read_from,
                             round(row.seconds, 1), row.inside])  # fmt: skip
    return page, table


def kept(path: Path, source: Source) -> list[Row] | None:
    """Rows of a source that an earlier run finished; None if it did not, or if something else is stated now."""
    found = _read(path).get(source.name)
    if not found or [r["number"] for r in found] != [asdict(n) for n in source.numbers]:
        return None
    return [Row(Number(**r["number"]), r["recomputed"], r["seconds"]) for r in found]


def keep(path: Path, source: Source, rows: Sequence[Row]) -> None:
    """Put the rows of a finished source on disk, so that a run that is stopped can go on."""
    known = _read(path) | {source.name: [asdict(row) for row in rows]}
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.atomic_path(path) as partial:
        partial.write_text(json.dumps(known), encoding="utf-8")


def _read(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}
