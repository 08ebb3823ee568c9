"""Five kinds of model, each from ``prepare`` through all notebooks: none stops, what can't be done says why.

The whole is an hour on two cores (``pytest tests/lab -m shapes``). The suite takes each notebook once, on a model for
which nothing was prepared (01, 02 and 05 in ``tests/notebooks``); the studies' own tests are each room's
``test_prepared_*``.
"""

import html
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import shapes
from safetensors.torch import load_file

from glassbox_utils import cli
from glassbox_utils.core import files, prepared
from glassbox_utils.lab import notebooks, prepare, subjects

NAMES = [p.stem for p in notebooks.find()]


SMALL = {
    "_first_size": lambda *_: prepare.SMALLEST,
    "_next_size": lambda *_: prepare.SMALLEST,  # the same whatever the steps before took
    "TOKENS": {"main": 20_000, "late": 8_000},
    "LEAST_TOKENS": 4_096,
    "_width": lambda size: 256,
}


def own_cache(folder: Path) -> Path:
    """A cache with the downloads of before and nothing else."""
    folder.mkdir()
    for name in ("packages", "files", "models"):
        (files.cache_dir() / name).mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(files.cache_dir() / name)
    return folder


@pytest.fixture
def apart(tmp_path, monkeypatch):
    """Prepared folders and caches of its own."""
    monkeypatch.setenv(files.CACHE_VARIABLE, str(own_cache(tmp_path / "cache")))
    monkeypatch.setenv(prepared.PLACE, str(tmp_path / "models"))
    for name, value in SMALL.items():
        monkeypatch.setattr(prepare, name, value)
    return tmp_path


def run(apart, folder, names=()):
    """Pages of notebooks; NotebookError names the cell if one stops."""
    notebooks.build_site(apart / "site", names, {"MODEL": str(folder)})
    runs = notebooks.runs_of(apart / "site")
    assert not [name for name, run in runs.items() if "stopped" in run]
    for name, run in runs.items():
        page = html.unescape((apart / "site" / f"{name}.html").read_text(encoding="utf-8"))
        # in words: the way to have it, or the reason why nobody can; then what follows from what was skipped
        causes = [said for said in run["skipped"] if "it uses what was skipped" not in said]
        assert bool(causes) == bool(run["skipped"]) and all(said in page for said in run["skipped"])
        assert all("glassbox prepare" in said or "can't be made for" in said for said in causes)
    return runs


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "name"), [("grouped", "03_sae_training"), ("no-bos", "04_feature_clamping"), ("base", "06_full_cycle")]
)
def test_a_notebook_on_a_model_for_which_nothing_was_prepared(kind, name, apart):
    assert list(run(apart, shapes.save(kind, apart / kind), [name])) == [name]


@pytest.mark.shapes
@pytest.mark.parametrize("kind", shapes.KINDS)
def test_no_notebook_stops(kind, apart):
    folder = shapes.save(kind, apart / kind)
    made = prepare.prepare(folder, cli.studies(), minutes=60.0)
    reasons = json.loads((made / subjects.REFUSED).read_text())
    unforeseen = {name: reason for name, reason in reasons.items() if "not foreseen" in reason}
    assert not unforeseen
    assert sorted(run(apart, folder)) == NAMES


KILLED = """
import sys
sys.path[:0] = {paths!r}
from pathlib import Path
import deaths
from test_shapes import SMALL
from glassbox_utils import cli
from glassbox_utils.lab import prepare
for name, value in SMALL.items():
    setattr(prepare, name, value)
deaths.die_at({moment})
prepare.prepare({model!r}, cli.studies(), 60.0, Path({out!r}))
print("writes", deaths.writes)
"""


@pytest.mark.shapes
def test_killed_again_and_again_prepare_ends_with_the_same_folder(tmp_path):
    """Every real step: a kill -9 at a random write, the same command again, until it is done."""
    model, chance = shapes.save("grouped", tmp_path / "grouped"), random.Random(0)

    def dying(out, moment, cache):
        here = Path(__file__).parent
        code = KILLED.format(paths=[str(here), str(here.parent)], moment=moment, model=str(model), out=str(out))
        environment = os.environ | {files.CACHE_VARIABLE: str(cache), "GLASSBOX_QUIET": "1"}
        return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)

    whole = dying(tmp_path / "whole", 0, own_cache(tmp_path / "cache"))
    assert whole.returncode == 0, whole.stderr[-2000:]
    writes = int(whole.stdout.rsplit(maxsplit=1)[-1])
    cache, deaths, code = own_cache(tmp_path / "other"), 0, -signal.SIGKILL
    while code == -signal.SIGKILL:
        again = dying(tmp_path / "out", chance.randint(2, max(4, writes // 8)), cache)
        code, deaths = again.returncode, deaths + 1
    assert code == 0 and deaths > 5, again.stderr[-2000:]
    assert _content(tmp_path / "out") == _content(tmp_path / "whole")


def _content(folder: Path) -> dict[str, object]:
    """Every table and tensor, without the times and places of its making."""
    found: dict[str, object] = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = str(path.relative_to(folder))
        if path.suffix == ".safetensors":
            found[name] = {key: tensor.float().tolist() for key, tensor in load_file(path).items()}
        elif path.suffix == ".json" and path.name != prepare.LOG:
            content = json.loads(path.read_text(encoding="utf-8"))
            found[name] = {k: v for k, v in content.items() if k not in ("provenance", "hours")}
    return found
