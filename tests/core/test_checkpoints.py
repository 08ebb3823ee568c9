"""Checkpoints: what was kept comes back to the bit, and nothing in a file can run."""

import ast
import json
import os
import pickle
from pathlib import Path

import pytest
import tiny
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import save_file
from worded import build, several

from glassbox_utils.core import assets, checkpoints, schema
from glassbox_utils.core.errors import GlassboxError
from glassbox_utils.core.models import wrap_model
from glassbox_utils.decisions import loans, training
from glassbox_utils.steering import training as steering_training

ABOUT = {"seed": 0, "layouts": ("a", "b"), "rate": 1e-3}


def a_run(steps, weights=None, optimiser=None):
    if weights is None:
        torch.manual_seed(0)
        weights = {"a": torch.randn(3, 4).requires_grad_(), "b": torch.randn(5).requires_grad_()}
        optimiser = torch.optim.AdamW(weights.values(), lr=0.1)
    for _ in range(steps):
        sum(w.square().sum() for w in weights.values()).backward()
        optimiser.step()
        optimiser.zero_grad()
    return weights, optimiser


@pytest.fixture
def kept(tmp_path):
    weights, optimiser = a_run(4)
    checkpoints.write(tmp_path / "run.safetensors", ABOUT, weights, optimiser, 4, [0.5, 0.25])
    return tmp_path / "run.safetensors"


def resumed(path, about=ABOUT, run=None):
    weights, optimiser = run or a_run(0)
    return checkpoints.resume(path, about, weights, optimiser, GlassboxError), weights, optimiser


def test_a_resumed_run_ends_with_the_same_bits(kept):
    whole, _ = a_run(9)
    saved, weights, optimiser = resumed(kept)
    assert (saved.step, saved.history) == (4, [0.5, 0.25])
    a_run(5, weights, optimiser)
    assert all(torch.equal(whole[name], weights[name]) for name in whole)
    assert resumed(kept.with_name("none"))[0] is None


class Bomb:
    def __reduce__(self):
        return os.system, (f"touch {os.environ['BOMB']}",)


def rewritten(path, tensors=None, **words):
    with safe_open(path, "pt") as file:
        old, named = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file(named if tensors is None else tensors, path, {k: v for k, v in (old | words).items() if v is not None})


BAD = {
    "a pickle": lambda p: p.write_bytes(pickle.dumps(Bomb())),
    "torch.save": lambda p: torch.save({"step": 1, "x": Bomb()}, p),
    "empty": lambda p: p.write_bytes(b""),
    "cut off": lambda p: p.write_bytes(p.read_bytes()[:-9]),
    "a folder": lambda p: (p.unlink(), p.mkdir()),
    "no words": lambda p: save_file({"a": torch.zeros(3, 4)}, p),
    "words that are no JSON": lambda p: rewritten(p, about="{"),
    "deep words": lambda p: rewritten(p, about="[" * 20_000),
    "step as text": lambda p: rewritten(p, step='"4"'),
    "step negative": lambda p: rewritten(p, step="-1"),
    "step true": lambda p: rewritten(p, step="true"),
    "history of texts": lambda p: rewritten(p, history='["a"]'),
    "no history": lambda p: rewritten(p, history=None),
    "another run": lambda p: rewritten(p, about=json.dumps(ABOUT | {"seed": 1})),
    "an older setting": lambda p: rewritten(p, about=json.dumps(ABOUT | {"more": 1})),
    "no weights": lambda p: rewritten(p, {"x": torch.zeros(1)}),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_checkpoint_is_refused_and_runs_nothing(case, kept, tmp_path, monkeypatch):
    monkeypatch.setenv("BOMB", str(tmp_path / "boom"))
    BAD[case](kept)
    weights, optimiser = run = a_run(0)
    before = {name: w.clone() for name, w in weights.items()}
    with pytest.raises(GlassboxError) as error:
        resumed(kept, run=run)
    assert "\n" not in str(error.value) and len(str(error.value)) < 900 and "Delete it" in str(error.value)
    assert not (tmp_path / "boom").exists()
    assert all(torch.equal(before[name], w) for name, w in weights.items()) and not optimiser.state


def test_weights_of_another_shape_are_refused(kept):
    weights = {"a": torch.zeros(3, 5).requires_grad_(), "b": torch.zeros(5).requires_grad_()}
    with pytest.raises(GlassboxError, match=r"a should have the shape \(3, 5\), it has \(3, 4\)"):
        resumed(kept, run=(weights, torch.optim.AdamW(weights.values())))


def test_the_trainings_refuse_a_prepared_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setenv("BOMB", str(tmp_path / "boom"))
    path, model = tmp_path / "checkpoint.pt", build("llama")
    torch.save({"step": 1, "weights": Bomb()}, path)
    with pytest.raises(GlassboxError, match="can't be read"):
        steering_training.train_vector(
            model, ["w1 w2"], several(model), 0.5, steps=1, valence=torch.ones(32), checkpoint=path
        )
    model = wrap_model(tiny.build("llama"), tiny.tokenizer())
    training.with_lora(model)
    with pytest.raises(loans.LoanError, match="can't be read"):
        training.train_stage(model, "none", 1, 0, False, path)
    assert not (tmp_path / "boom").exists()


def dangers(source):
    """Calls and imports in Python code that can run what a file says."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            yield from (n for n in names if n.split(".")[0] in ("pickle", "dill", "joblib", "shelve", "marshal"))
        if not isinstance(node, ast.Call):
            continue
        name, options = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
        if name in ("torch.save", "yaml.full_load", "yaml.unsafe_load", "eval", "exec"):
            yield name
        if name == "torch.load" and options.get("weights_only") != "True":
            yield name
        if name == "yaml.load" and [ast.unparse(a) for a in node.args[1:]] != ["_strict_yaml()"]:
            yield name
        if options.get("allow_pickle") == "True" or options.get("trust_remote_code") == "True":
            yield name


PACKAGE = Path(assets.__file__).parents[1]
FILES = [*PACKAGE.rglob("*.py"), *(assets.DATA / "examples").glob("*.py")]


def test_no_file_is_read_in_a_way_that_can_run_code():
    found = {path.name: list(dangers(path.read_text(encoding="utf-8"))) for path in FILES}
    assert set(found.pop("marking.py")) == {"exec", "eval"}  # runs exercises, which is what a notebook's code is for
    assert len(found) > 60 and not {name: names for name, names in found.items() if names}
    assert issubclass(schema._strict_yaml(), yaml.SafeLoader)


@pytest.mark.parametrize(
    "line",
    [
        "import pickle", "from joblib import load", "torch.load(path)", "torch.load(path, weights_only=False)",
        "torch.save(x, path)", "yaml.load(text, yaml.Loader)", "np.load(path, allow_pickle=True)", "eval(text)",
    ],
)  # fmt: skip
def test_the_search_for_dangers_finds_one(line):
    assert list(dangers(line))
    assert not list(dangers("torch.load(path, weights_only=True); yaml.safe_load(text); model.eval()"))
