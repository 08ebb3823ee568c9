"""What the README says: its examples run, on the embedded model and on one of another shape, and its keys exist."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import tiny
import yaml

from glassbox_utils import cli
from glassbox_utils.core import assets, prepared
from glassbox_utils.core.models import load_model
from glassbox_utils.core.prepared import Card, write_card
from glassbox_utils.saes import config
from glassbox_utils.saes.training import train_from_config
from glassbox_utils.steering.fit import fit_direction
from glassbox_utils.steering.vectors import save_direction

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.S)


def run(place):
    for example in EXAMPLES:
        exec(compile(example, "README.md", "exec"), place)


@pytest.mark.slow
def test_the_examples_run_on_the_embedded_model(monkeypatch, capsys):
    monkeypatch.setenv(prepared.VARIABLE, str(assets.DATA))
    run({})
    out = capsys.readouterr().out
    assert "prepared for SmolLM2-135M-Instruct" in out and len(out) > 200


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_and_on_a_small_one_for_which_that_much_was_prepared(kind, tmp_path, monkeypatch, capsys):
    folder = tiny.save(kind, tmp_path / "model")
    here, lm = tmp_path / "prepared", load_model(folder)
    monkeypatch.setenv(prepared.VARIABLE, str(here))
    (tmp_path / "cache").mkdir()
    for kept in ("packages", "files"):  # checkpoints of this run go elsewhere
        (tmp_path / "cache" / kept).symlink_to(assets.cache_dir() / kept)
    monkeypatch.setenv(assets.CACHE_VARIABLE, str(tmp_path / "cache"))
    values = yaml.safe_load(re.search(r"```yaml\n(.*?)```", README, re.S)[1])
    values |= {"model": str(folder), "hook": "blocks.1.hook_resid_post", "d_sae": 96, "tokens": 2048, "samples": 2048}
    values |= {
        "options": {"k": 16},
        "context": 64,
        "rows_per_shard": 16,
        "batch": 256,
        "shards": str(tmp_path / "acts"),
    }
    (here / "saes" / "mine").mkdir(parents=True)
    (here / "saes" / "mine" / "config.yaml").write_text(yaml.safe_dump(values))
    train_from_config(here / "saes" / "mine")
    write_card(Card(str(folder), lm.hash, saes={"main": "mine"}), here)
    tone = fit_direction(lm, ["good day", "fine day"], ["bad day", "poor day"], layer=1)
    save_direction(tone, here / "vectors" / "tone")
    embedded = EXAMPLES[0].replace("gb.load_model()", f"gb.load_model({json.dumps(str(folder))})")
    assert embedded != EXAMPLES[0]
    monkeypatch.setitem(globals(), "EXAMPLES", [embedded, *EXAMPLES[1:]])
    run({})
    assert "prepared for model" in capsys.readouterr().out


def test_every_key_of_a_configuration_is_named_with_its_default():
    values = yaml.safe_load(re.search(r"```yaml\n(.*?)```", README, re.S)[1])
    config.TrainConfig(**values)
    told = dict(re.findall(r"`(\w+): ([^`]*)`", README[README.index("### Your own SAE") :]))
    for f in dataclasses.fields(config.TrainConfig):
        assert f.name in values or f.name in told, f.name
        if f.name in told and f.name not in values and f.default is not dataclasses.MISSING:
            default = list(f.default) if isinstance(f.default, tuple) else f.default
            assert yaml.safe_load(told[f.name]) == default or float(told[f.name]) == default, f.name


def test_every_command_that_is_named_takes_what_is_written():
    for line in re.findall(r"^(glassbox (?:prepare|compare)[^#\n]*)", README, re.M):
        args = cli.parser().parse_args(line.split()[1:])
        assert args.function
    options = {o for p in cli.parser()._subparsers._group_actions[0].choices.values() for o in p._option_string_actions}
    for named in re.findall(r"`(--[\w-]+)", README):
        assert named in options or named in ("--fetch",), named
