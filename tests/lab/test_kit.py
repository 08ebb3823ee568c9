"""The offline kit: what goes in, who may install it, and that it installs where no network is."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from glassbox_utils.lab import kit, kit_install
from glassbox_utils.lab.kit import KitError

ROOT = Path(__file__).resolve().parents[2]


def a_wheel(folder, name="tiny_thing", version="1.0"):
    """A wheel of one empty module, made by hand."""
    path, info = folder / f"{name}-{version}-py3-none-any.whl", f"{name}-{version}.dist-info"
    record = f"{name}.py,,\n{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(f"{name}.py", "")
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: hand\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", record)
    return path


def test_the_project_goes_in_without_environments_and_builds():
    names = {p.as_posix() for p in kit.tracked()}
    assert {"notebooks/01_attention_heads.ipynb", "requirements.lock", "Makefile", "glassbox_utils/lab/kit.py"} <= names
    assert not any(name.startswith((".venv/", "build/", ".git/")) for name in names)


def test_without_git_the_same_files_are_found(tmp_path):
    for name in ("a/b.py", ".venv/x", "build/y", "a/__pycache__/z", "q.egg-info/r"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    assert kit.tracked(tmp_path) == [Path("a/b.py")]


def test_another_machine_is_refused_in_words():
    mine = ["3.11", "Linux", "x86_64"]
    assert kit_install.refusal(mine, mine) == ""
    words = kit_install.refusal(["3.12", "Linux", "x86_64"], mine)
    assert "Python is 3.11, the kit's is 3.12" in words and "processor" not in words and "`make kit`" in words


def test_wheels_of_an_earlier_lock_stay_out(tmp_path):
    found = [a_wheel(tmp_path, "tiny_thing", v) for v in ("1.0", "0.9")] + [a_wheel(tmp_path, "cuda_thing", "3.0")]
    (tmp_path / "lock").write_text("# words\ntiny-thing==1.0\n")
    assert {p.name.split("-")[0:2][1] for p in kit._wanted(found, [tmp_path / "lock"])} == {"1.0", "3.0"}


def test_a_lock_that_nobody_has_is_said_in_one_paragraph(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    (tmp_path / "lock").write_text("no-such-thing-anywhere==1.0\n")
    with pytest.raises(KitError, match=r"No matching distribution.*finished wheels are kept"):
        kit.wheels(tmp_path / "w", [tmp_path / "lock"])


def small_kit(tmp_path, monkeypatch):
    """The whole way with a lock of one wheel and a project of one file."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    work, root, site = tmp_path / "work", tmp_path / "root", tmp_path / "site"
    for folder in (work, root, site):
        folder.mkdir()
    a_wheel(work)
    (root / "pyproject.toml").write_text("[project]\nname = 'nothing'\nversion = '1'\n")
    (site / "index.html").write_text("a site")
    (root / "requirements.lock").write_text("tiny-thing==1.0\n")
    archive = kit.build(tmp_path / "kit.zip", site, work, root=root, packages=[])
    return archive, work


def test_a_small_kit_holds_what_it_should(tmp_path, monkeypatch):
    archive, _ = small_kit(tmp_path, monkeypatch)
    with zipfile.ZipFile(archive) as packed:
        names = {n.removeprefix(f"{kit.FOLDER}/") for n in packed.namelist()}
        card = json.loads(packed.read(f"{kit.FOLDER}/kit.json"))
    assert names == {"README.txt", "kit.json", "install.py", "glassbox/pyproject.toml", "glassbox/requirements.lock",
                     "wheels/tiny_thing-1.0-py3-none-any.whl", "site/index.html"}  # fmt: skip
    assert card["made_for"] == kit_install.tag() and card["model"] is False


def test_install_says_what_pip_said(tmp_path, monkeypatch):
    """The project of the small kit can't be built without setuptools: the words of pip are shown, and the exit is 1."""
    archive, _ = small_kit(tmp_path, monkeypatch)
    with zipfile.ZipFile(archive) as packed:
        packed.extractall(tmp_path)
    card = tmp_path / kit.FOLDER / "kit.json"
    card.write_text(card.read_text().replace(kit_install.tag()[0], "2.7"))
    run = subprocess.run([sys.executable, "install.py"], cwd=card.parent, capture_output=True, text=True)
    assert run.returncode == 1 and "the kit's is 2.7" in run.stderr


@pytest.mark.skipif(sys.platform != "linux" or not shutil.which("unshare"), reason="needs unshare of util-linux")
def test_a_namespace_has_no_network_but_a_loopback(tmp_path):
    code = (
        "import socket as s; a = s.create_server(('127.0.0.1', 0)); s.create_connection(a.getsockname()); print('ok')"
    )
    done = kit.without_network([sys.executable, "-c", code], tmp_path)
    if "Operation not permitted" in done.stderr:
        pytest.skip("this machine allows no namespaces")
    assert done.stdout.strip() == "ok", done.stderr


@pytest.mark.kit
@pytest.mark.timeout(3600)
def test_the_kit_installs_and_runs_notebook_01_without_a_network(tmp_path):
    archive = Path(os.environ.get("GLASSBOX_KIT", tmp_path / "kit.zip"))
    if not archive.exists():
        kit.build(archive, work=tmp_path / "wheels")
    found = kit.check(archive, tmp_path / "there")
    print(f"\n{archive.stat().st_size / 1e9:.2f} GB, {found}")
    assert found.page_bytes > 100_000
