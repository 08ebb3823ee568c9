"""``glassbox prepare``: the plan, its budget, going on after a kill at any step, and what can't be done."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

from glassbox_utils.core import prepared, studies
from glassbox_utils.core.models import load_model
from glassbox_utils.core.prepared import PreparedError
from glassbox_utils.lab import prepare

STEPS = ("sae-main", "sae-late", "one", "two", "three")
REFERENCE = {"reading": 1.0, "writing": 1.0, "steps": {n: [{"size": 1.0, "seconds": 310.0}] for n in STEPS}}


@pytest.fixture(scope="module")
def there(tmp_path_factory):
    return tiny.save("llama", tmp_path_factory.mktemp("there"))


def table(name, cases=100):
    def study():
        model = prepared.load_subject()
        parts = [studies.resumed(name, ["part", i], lambda i=i: i) for i in range(prepared.sized(cases, 2))]
        return studies.write_table(name, model, 0.0, parts=parts)

    return study


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """No SAE is trained and no officer; the reference says that each step takes a minute."""
    monkeypatch.setenv("GLASSBOX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(prepare.training, "recipes", dict)
    monkeypatch.setattr(prepare, "_sae", lambda role, *_: None)
    monkeypatch.setattr(prepare, "speed_of", lambda model: prepare.Speed(2.0, 2.0))
    monkeypatch.setattr(prepare, "reference", lambda: REFERENCE)


def all_three(**other):
    return {"one": table("one"), "two": table("two"), "three": table("three")} | other


def test_everything_is_made_and_a_second_call_does_nothing(quick, there, tmp_path, capsys):
    out = prepare.prepare(there, all_three(), out=tmp_path / "out")
    card, log = prepared.card(out), json.loads((out / prepare.LOG).read_text())
    assert card.model_hash == load_model(there).hash and card.size == 1 and set(log["steps"]) == set(STEPS)
    assert card.licence != "Apache-2.0"  # that is the embedded model's
    for name in ("one", "two", "three"):
        assert len(json.loads((out / "studies" / f"{name}.json").read_text())["parts"]) == 100
    assert "about 51.7 min" not in capsys.readouterr().out
    before = {p: p.stat().st_mtime_ns for p in (out / "studies").iterdir()}
    prepare.prepare(there, all_three(one=lambda: 1 / 0), out=out)
    assert before == {p: p.stat().st_mtime_ns for p in (out / "studies").iterdir()}
    assert "5 of them done before" in capsys.readouterr().out


def test_the_plan_is_the_reference_times_how_slow_the_model_is(quick, there, tmp_path, capsys):
    prepare.prepare(there, all_three(), minutes=27.0, out=tmp_path / "out")
    said = capsys.readouterr().out  # 5 steps of 300 s, twice as slow: 3,000 s and 20 s each; 27 min leave 1,520
    assert "at 51% of the full sizes: about 27 minutes" in said
    assert prepared.card(tmp_path / "out").size == pytest.approx(1520 / 3000, abs=0.001)
    rows = json.loads((tmp_path / "out" / prepare.LOG).read_text())["steps"]
    assert rows["three"]["size"] > rows["sae-main"]["size"]  # the time that was left over is used


def test_steps_that_take_longer_make_the_later_ones_smaller(quick, there, tmp_path, monkeypatch):
    now = iter(range(0, 10**6, 600))  # every look at the clock is ten minutes later
    monkeypatch.setattr(prepare.time, "perf_counter", lambda: next(now))
    prepare.prepare(there, all_three(), minutes=30.0, out=tmp_path / "out")
    sizes = [row["size"] for row in json.loads((tmp_path / "out" / prepare.LOG).read_text())["steps"].values()]
    assert sizes == sorted(sizes, reverse=True) and sizes[-1] < sizes[0] / 2


def test_what_cannot_be_done_is_recorded_with_its_reason_and_the_rest_goes_on(quick, there, tmp_path):
    def refuses():
        raise studies.StudyError(f"This model has no {tmp_path / 'out' / 'studies' / 'zero.json'}.")

    out = prepare.prepare(there, all_three(one=refuses), out=tmp_path / "out")
    words = {"one": f"This model has no {Path('studies', 'zero.json')}."}  # the folder may be moved
    assert json.loads((out / "refused.json").read_text()) == words
    assert (out / "studies" / "two.json").exists() and not (out / "studies" / "one.json").exists()
    with pytest.raises(PreparedError, match="two ended with an error that was not foreseen"):
        prepare.prepare(there, all_three(two=lambda: 1 / 0), out=tmp_path / "other")
    assert "ZeroDivisionError" in json.loads((tmp_path / "other" / "refused.json").read_text())["two"]
    assert (tmp_path / "other" / "studies" / "three.json").exists()


def few():
    """Whose every write may be the last."""
    return {name: table(name, cases=8) for name in ("one", "two")}


@pytest.mark.parametrize(
    ("change", "words"),
    [({"minutes": 5.0}, "begun with minutes 9.0"), ({"corpus": "wiki"}, r"begun with corpus \['mix'\]")],
)
def test_another_wish_for_the_same_folder_is_refused(quick, there, tmp_path, change, words):
    prepare.prepare(there, all_three(), minutes=9.0, out=tmp_path / "out")
    with pytest.raises(PreparedError, match=words):
        prepare.prepare(there, all_three(), out=tmp_path / "out", **{"minutes": 9.0} | change)


def test_other_weights_a_full_folder_and_data_itself_are_refused(quick, there, tmp_path):
    prepare.prepare(there, all_three(), out=tmp_path / "out")
    with pytest.raises(PreparedError, match="begun with model_hash"):
        prepare.prepare(tiny.save("gpt2", tmp_path / "gpt2"), all_three(), out=tmp_path / "out")
    with pytest.raises(PreparedError, match="is not empty"):
        prepare.prepare(there, all_three(), out=there)
    with pytest.raises(PreparedError, match="ships with the repository"):
        prepare.prepare(there, all_three(), out=prepared.assets.DATA)


@pytest.mark.parametrize("minutes", [0, -3.0, float("nan"), float("inf"), 2.0])
def test_a_budget_that_is_none_or_too_small_is_refused(quick, there, tmp_path, minutes):
    with pytest.raises(PreparedError, match=r"budget is"):
        prepare.prepare(there, all_three(), minutes=minutes, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()  # so that a larger one can be given


KILLED = """
import sys
sys.path[:0] = [{tests!r}, {lab!r}]
from pathlib import Path
import deaths
import test_prepare as t
from glassbox_utils.lab import prepare
prepare.training.recipes, prepare._sae = dict, lambda role, *_: None
prepare.speed_of = lambda model: prepare.Speed(1.0, 1.0)
prepare.reference = lambda: t.REFERENCE
deaths.die_at({moment})
prepare.prepare({model!r}, t.few(), 20.0, Path({out!r}))
print("writes", deaths.writes)
"""


@pytest.mark.slow
def test_killed_at_any_write_it_goes_on_to_the_same_tables(there, tmp_path):
    """Any write of a run is a moment to die; the next call ends with the tables of a run that was not killed."""

    def run(out, moment, cache):
        lab, tests = os.path.dirname(__file__), os.path.dirname(os.path.dirname(__file__))
        code = KILLED.format(tests=tests, lab=lab, moment=moment, model=str(there), out=str(out))
        environment = os.environ | {"GLASSBOX_CACHE": str(cache), "GLASSBOX_QUIET": "1", "OMP_NUM_THREADS": "1"}
        return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)

    def tables(out):
        return {p.name: json.loads(p.read_text())["parts"] for p in (out / "studies").iterdir() if p.suffix == ".json"}

    whole = run(tmp_path / "whole", 0, tmp_path / "cache")
    assert whole.returncode == 0, whole.stderr
    writes = int(whole.stdout.rsplit(maxsplit=1)[-1])
    wanted = tables(tmp_path / "whole")
    for number, moment in enumerate((2, writes // 2, writes - 3)):
        out, cache = tmp_path / f"out{number}", tmp_path / f"cache{number}"
        assert run(out, moment, cache).returncode == -signal.SIGKILL
        again = run(out, 0, cache)
        assert again.returncode == 0, again.stderr
        assert tables(out).keys() == wanted.keys()
        log = json.loads((out / prepare.LOG).read_text())
        assert set(log["steps"]) == {*STEPS} - {"three"} and not (out / "refused.json").read_text().strip("{}\n ")
