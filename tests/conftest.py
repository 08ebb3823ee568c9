"""Fixtures, and ``--device``: the whole suite on a GPU (``cuda``, ``mps``), or on the simulated one of ``far.py``."""

import sys

import far
import pytest
import torch

if any(
    a == "--device=far" or (a, b) == ("--device", "far") for a, b in zip(sys.argv, [*sys.argv[1:], ""], strict=True)
):
    torch.inference_mode = torch.no_grad  # torch's Python backends know no inference tensors; before it decorates

import tiny
from worded import build

from glassbox_utils.core import devices, models
from glassbox_utils.core.models import Model, load_model


def pytest_addoption(parser):
    parser.addoption(
        "--device", default="cpu", help="where models live: cpu, cuda, mps, or far (simulated, see far.py)"
    )


def pytest_configure(config):
    """Every model of the tests, also one wrapped by hand, goes to the device that was asked for."""
    device, wrap = config.getoption("--device"), models.wrap_model
    if device == "far":
        context = far.far()
        context.__enter__()
        config.add_cleanup(lambda: context.__exit__(None, None, None))
    if device != "cpu":
        models.wrap_model = lambda hf, *args, **options: wrap(hf.to(device), *args, **options)
    devices.available = lambda: list(dict.fromkeys([device, "cpu"]))


@pytest.fixture(scope="session", params=tiny.KINDS)
def tiny_model(request, tmp_path_factory) -> Model:
    """A small random GPT-2, llama (grouped-query) or gemma-3, loaded from a folder."""
    folder = tmp_path_factory.mktemp(request.param)
    return load_model(tiny.save(request.param, folder))


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory) -> Model:
    return load_model(tiny.save("llama", tmp_path_factory.mktemp("llama-only")))


@pytest.fixture(scope="session")
def smol() -> Model:
    """The embedded model."""
    return load_model()


@pytest.fixture(scope="module", params=["llama", "gpt2", "gemma3"])
def model(request) -> Model:
    """A small random model over 31 words."""
    return build(request.param)


@pytest.fixture(scope="module")
def llama() -> Model:
    return build("llama")
