"""The rule for devices holds, and what holds it can fail: a planted mix is caught on a machine without a GPU.

``pytest tests --device far`` runs the suite itself on the simulated device; here is what it is made of.
"""

import ast
from pathlib import Path

import pytest
import tiny
import torch
from far import far

from glassbox_utils import cli
from glassbox_utils.core import devices
from glassbox_utils.core.interventions import edit
from glassbox_utils.core.models import Site, wrap_model
from glassbox_utils.core.text import tokenize

ROOMS = Path(__file__).resolve().parents[1] / "glassbox_utils"


@pytest.fixture
def pair(request):
    """The same weights on the CPU and on the simulated device."""
    if request.config.getoption("--device") != "cpu":
        pytest.skip("compares the CPU with the simulated device")
    near = wrap_model(tiny.build("llama"), tiny.tokenizer(), "near")
    with far() as device:
        yield near, wrap_model(tiny.build("llama").to(device), tiny.tokenizer(), "far")


@torch.no_grad()
def logits(model):
    return model.hf(**tokenize(model, ["The key is in the box.", "A nurse"]).inputs, use_cache=False).logits


def test_the_simulated_device_computes_the_same_numbers(pair):
    near, there = pair
    out = logits(there)
    assert out.device.type == "far" and there.device.type == "far"
    assert torch.allclose(devices.result(out), logits(near), atol=1e-4)
    assert torch.equal(devices.result(out), out.cpu()) and devices.exact(out).dtype == torch.float64


PLANTED = {
    "a constant that stayed on the CPU": lambda x: x + torch.ones(x.shape[-1]),
    "a row index from the device into a tensor of the CPU": lambda x: x + torch.ones(x.numel())[x.argmax()[None]].sum(),
    "numpy without a copy to the CPU": lambda x: x * float(x.numpy().sum()),
    "float64, which Apple's GPUs do not have": lambda x: x.double().mean().float() + x,
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_mix_is_caught(pair, name):
    near, there = pair
    site = Site("resid_post", 1)
    with edit(near, site, PLANTED[name]):
        logits(near)  # where nothing is mixed it runs
    with pytest.raises((RuntimeError, TypeError), match=r"same device|numpy|float64"), edit(there, site, PLANTED[name]):
        logits(there)


def test_tools_follow_the_model(pair):
    _, there = pair
    stream = logits(there)
    vector = torch.ones(stream.shape[-1], dtype=torch.bfloat16)
    assert devices.like(vector, stream).device == stream.device and devices.like(vector, stream).dtype == stream.dtype
    assert devices.beside(vector, stream).dtype == torch.bfloat16
    assert devices.like(torch.tensor([3]), stream).dtype == torch.int64, "an index keeps its type"
    tool = torch.nn.Linear(2, 2)
    moved = devices.beside(tool, stream)
    assert devices.beside(tool, stream) is moved and next(tool.parameters()).device.type == "cpu"
    with torch.no_grad():
        tool.weight.fill_(5.0)
    assert float(devices.beside(tool, stream).weight.detach().sum()) == 20, "changed weights are copied again"
    assert devices.beside(tool, torch.zeros(1)) is tool


def test_a_device_that_is_not_there_is_named():
    with pytest.raises(devices.DeviceError, match=r"'tpu' is not on this machine.*cpu"):
        devices.choose("tpu")
    with pytest.raises(devices.DeviceError, match=r"'nonsense'"):
        devices.choose("nonsense")


def test_nobody_moves_tensors_by_hand_outside_core():
    """Results through ``devices.result``, tools through ``devices.like`` and ``devices.beside``."""
    found = []
    for path in sorted(ROOMS.rglob("*.py")):
        if path.parent.name == "core":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            called = node.func if isinstance(node, ast.Call) else None
            if isinstance(called, ast.Attribute) and called.attr in ("to", "cpu", "cuda", "mps"):
                found.append(f"{path.relative_to(ROOMS)}:{node.lineno} .{called.attr}(")
    assert not found, "\n".join(found)


def test_every_command_takes_a_device(capsys):
    for name, command in cli.parser()._subparsers._group_actions[0].choices.items():
        assert "--device" in command.format_help(), name
    assert cli.main(["corpus", "--device", "tpu"]) == 2
    assert "'tpu' is not on this machine" in capsys.readouterr().err
