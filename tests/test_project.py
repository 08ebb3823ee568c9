"""The project's own files agree with each other."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
LOCK = {
    canonicalize_name(line.split("==")[0]): line.split("==")[1]
    for line in (ROOT / "requirements.lock").read_text().splitlines()
    if line and not line.startswith("#")
}


@pytest.mark.parametrize("wanted", PROJECT["project"]["dependencies"] + PROJECT["dependency-groups"]["dev"])
def test_the_lock_satisfies_pyproject(wanted):
    requirement = Requirement(wanted)
    name = canonicalize_name(requirement.name)
    assert name in LOCK, f"{name} is missing from requirements.lock"
    assert requirement.specifier.contains(LOCK[name], prereleases=True)


def test_the_lock_is_what_is_installed():
    from importlib.metadata import version

    for name in ("torch", "transformers", "transformer-lens", "sae-lens", "circuitsvis", "nbval"):
        assert version(name).split("+")[0] == LOCK[name]


def test_conda_is_the_route_to_the_same_lock():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    pip = environment["dependencies"][-1]["pip"]
    assert pip == ["-r requirements.lock", "-e ."]
    assert all(re.match(r"(python=3\.\d+|pip)$", d) for d in environment["dependencies"][:-1])
    assert PROJECT["project"]["requires-python"] == ">=3.11" and "python=3.11" in environment["dependencies"]


def test_no_module_imports_a_later_one():
    """Data flows one way (design.md): a module may import only what stands before it."""
    order = ["assets", "models", "corpora", "prompts", "interventions", "attention", "saes", "features", "attribution"]
    order += [
        "steering",
        "clamping",
        "evaluation",
        "loans",
        "loan_training",
        "mitigation",
        "cycle",
        "evidence",
        "audit",
        "reality",
        "safety",
        "figures",
    ]
    order += ["explain", "report_plots", "report", "panels", "notebooks", "cli"]
    known = {p.stem for p in (ROOT / "glassbox_utils").glob("*.py")}
    allowed = {"evaluation": {"attribution", "heads", "steering", "style"}}  # statistics are used by measuring modules
    for name in known & set(order):
        text = (ROOT / "glassbox_utils" / f"{name}.py").read_text()
        top = re.findall(r"^from glassbox_utils(?:\.(\w+) import| import (.+))$", text, re.M)
        imported = {m for module, names in top for m in ([module] if module else re.findall(r"\w+", names))}
        for later in imported & set(order):
            fine = order.index(later) < order.index(name) or name in allowed.get(later, set())
            assert fine, f"{name} imports {later}, which stands after it"
