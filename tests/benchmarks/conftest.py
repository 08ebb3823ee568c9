"""Writes build/bench.json and a table at the end of ``make bench``."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import turns

OUT = Path(__file__).resolve().parents[2] / "build" / "bench.json"


@pytest.fixture(autouse=True)
def _which(request):
    """What a benchmark notes is marked with its name, and with whether it held."""
    before = len(turns.NOTED)
    yield
    for row in turns.NOTED[before:]:
        row["benchmark"] = request.node.nodeid.split("/")[-1]


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    report = (yield).get_result()
    if report.when == "call":
        item.config.stash.setdefault(HELD, {})[item.nodeid.split("/")[-1]] = report.passed


HELD = pytest.StashKey[dict]()


def pytest_terminal_summary(terminalreporter, config):
    if not turns.NOTED:
        return
    held = config.stash.get(HELD, {})
    rows = [row | {"held": held.get(row["benchmark"])} for row in turns.NOTED]
    limits = turns.limits()
    OUT.parent.mkdir(exist_ok=True)
    OUT.write_text(json.dumps({"machine": limits, "measured": rows}, indent=1) + "\n")
    write = terminalreporter.write_line
    write("\nthis machine: " + ", ".join(f"{k} {v}" for k, v in limits.items()))
    width = max(len(row["name"]) for row in rows)
    for row in rows:
        values = ", ".join(f"{who} {value:,.4g}" for who, value in row["values"].items())
        mark = {True: "held", False: "MISSED"}.get(row["held"], "?")
        write(f"{row['name']:{width}}  {row['ratio']:8.3g}  {mark:6}  {row['promise']:24}  {values} {row['unit']}")
    write(f"written to {OUT}")
