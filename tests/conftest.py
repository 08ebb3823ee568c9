"""Fixtures, and ``--device``: the whole suite on a GPU (``cuda``, ``mps``), or on the simulated one of ``far.py``."""

import ast
import os
import sys
from pathlib import Path

import chromium
import far
import pytest
import torch

if os.environ.get("GLASSBOX_TESTS_ON") == "far" or any(
    a == "--device=far" or (a, b) == ("--device", "far") for a, b in zip(sys.argv, [*sys.argv[1:], ""], strict=True)
):
    os.environ["GLASSBOX_TESTS_ON"] = "far"  # for the workers of pytest-xdist, whose command line is another
    torch.inference_mode = torch.no_grad  # torch's Python backends know no inference tensors; before it decorates

import tiny
from worded import build

from glassbox_utils.core import devices, models
from glassbox_utils.core.models import Model, load_model

PACKAGE = Path(models.__file__).resolve().parents[1]
TESTS = Path(__file__).resolve().parent


def pytest_addoption(parser):
    parser.addoption(
        "--device", default="cpu", help="where models live: cpu, cuda, mps, or far (simulated, see far.py)"
    )
    parser.addoption("--every-function", action="store_true", help="fail if a function that takes a model was not run")


def compared_on_the_cpu(function):
    """``torch.allclose`` and its like, for tensors of two devices when a test (and nobody else) calls it."""

    def near(x):
        return x.detach().cpu() if isinstance(x, torch.Tensor) else x

    def compare(*args, **options):
        if sys._getframe(1).f_code.co_filename.startswith(str(TESTS)):
            args = [near(x) for x in args]
        return function(*args, **options)

    return compare


def takers_of_a_model():
    """(file, name) -> lines of the body, of every public function with a parameter annotated as ``Model``."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.stem.endswith("study") or (path.stem == "figures" and path.parent.name != "core"):
            continue  # long runs: their parts are functions of the techniques
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                takes = [a for a in [*node.args.args, *node.args.kwonlyargs] if a.annotation]
                if any("Model" in ast.unparse(a.annotation).split(" | ") for a in takes):
                    body = node.body[1:] if ast.get_docstring(node) else node.body
                    found[str(path), node.name] = {
                        n.lineno for stmt in body for n in ast.walk(stmt) if hasattr(n, "lineno")
                    }
    return found


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session):
    measured = getattr(session.config, "glassbox_coverage", None)
    if measured is None:
        return
    measured.stop()
    data = measured.get_data()
    ran = {path: set(data.lines(path) or ()) for path in {path for path, _ in takers_of_a_model()}}
    idle = [f"{Path(path).relative_to(PACKAGE)}: {name}" for (path, name), lines in takers_of_a_model().items()
            if not lines & ran[path]]  # fmt: skip
    print(f"\n{len(takers_of_a_model())} public functions take a model; {len(idle)} of them were not run")
    if idle:
        print("\n".join(idle))
        session.exitstatus = 1


def pytest_configure(config):
    """Every model of the tests, also one wrapped by hand, goes to the device that was asked for."""
    device, wrap = config.getoption("--device"), models.wrap_model
    if config.getoption("--every-function"):
        import coverage

        config.glassbox_coverage = coverage.Coverage(include=[f"{PACKAGE}/*"], data_file=None)
        config.glassbox_coverage.start()
    if device == "far":
        context = far.far()
        context.__enter__()
        config.add_cleanup(lambda: context.__exit__(None, None, None))
    if device != "cpu":
        torch.allclose, torch.equal = compared_on_the_cpu(torch.allclose), compared_on_the_cpu(torch.equal)
        torch.testing.assert_close = compared_on_the_cpu(torch.testing.assert_close)
        models.wrap_model = lambda hf, *args, **options: wrap(hf.to(device), *args, **options)
    devices.available = lambda: list(dict.fromkeys([device, "cpu"]))


@pytest.fixture(autouse=True)
def the_same_prepared_folder():
    """``prepared.choose`` is for the whole process: no test chooses for the next one."""
    before = os.environ.get("GLASSBOX_PREPARED")
    yield
    os.environ.pop("GLASSBOX_PREPARED", None) if before is None else os.environ.update({"GLASSBOX_PREPARED": before})


@pytest.fixture
def on_cpu(request):
    """The test is about the CPU's own answer."""
    if request.config.getoption("--device") != "cpu":
        pytest.skip("about the CPU only")


@pytest.fixture
def has_storage(request):
    """The test looks at memory, or writes the model's own tensors, which the simulated device does not have."""
    if request.config.getoption("--device") == "far":
        pytest.skip("the simulated device has no memory of its own")


@pytest.fixture(scope="session", params=tiny.KINDS)
def tiny_model(request, tmp_path_factory) -> Model:
    """A small random GPT-2, llama (grouped-query) or gemma-3, loaded from a folder."""
    folder = tmp_path_factory.mktemp(request.param)
    return load_model(tiny.save(request.param, folder))


@pytest.fixture(scope="module")
def browser():
    with chromium.launched() as running:
        yield running


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
