import pytest
import tiny
from worded import build

from glassbox_utils.core.models import Model, load_model


@pytest.fixture(scope="session", params=tiny.KINDS)
def tiny_model(request, tmp_path_factory) -> Model:
    """A small random GPT-2, llama (grouped-query) or gemma-3, loaded from a folder."""
    folder = tmp_path_factory.mktemp(request.param)
    return load_model(tiny.save(request.param, folder), device="cpu")


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory) -> Model:
    return load_model(tiny.save("llama", tmp_path_factory.mktemp("llama-only")), device="cpu")


@pytest.fixture(scope="session")
def smol() -> Model:
    """The embedded model."""
    return load_model(device="cpu")


@pytest.fixture(scope="module", params=["llama", "gpt2", "gemma3"])
def model(request) -> Model:
    """A small random model over 31 words."""
    return build(request.param)


@pytest.fixture(scope="module")
def llama() -> Model:
    return build("llama")
