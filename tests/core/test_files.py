"""Files that are whole or not there; litter; damage; places that can't be written."""

import ast
import errno
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from glassbox_utils.core import files
from glassbox_utils.core.files import AssetError, atomic_path, check_output, damage, explain_os_errors, record

ROOMS = Path(files.__file__).parents[1]
LONG = "é" * 120 + ".html"
"""245 bytes in 125 letters: a name that is allowed, and that a longer temporary name would not be"""


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def write(path, text):
    with atomic_path(path) as partial:
        if text.startswith("folder"):
            partial.mkdir()
            (partial / "a").write_text(text, encoding="utf-8")
            (partial / "b").write_text(text, encoding="utf-8")
        else:
            partial.write_text(text, encoding="utf-8")


def content(path):
    return {p.read_text(encoding="utf-8") for p in ([path] if path.is_file() else path.iterdir())}


def killed_while_writing(path, then="os._exit(9)"):
    """Another process that dies inside the block, as by SIGKILL: nothing is cleaned up."""
    code = (
        "import os, pathlib, sys\nfrom glassbox_utils.core import files\n"
        f"with files.atomic_path(pathlib.Path(sys.argv[1])) as partial:\n    partial.write_text('half')\n    {then}"
    )
    return subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True)


# --- writing ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["page.html", LONG, "a[b]*?.json", "-dash", " spaces ", "x" * 255])
def test_written_whole_under_any_name(tmp_path, name):
    write(tmp_path / name, "first")
    write(tmp_path / name, "second")
    assert names(tmp_path) == [name] and content(tmp_path / name) == {"second"}


@pytest.mark.parametrize("exchange", [True, False], ids=["in one step", "in two renames"])
def test_a_folder_replaces_a_folder(tmp_path, monkeypatch, exchange):
    if not exchange:
        monkeypatch.setattr(files, "_exchanged", lambda a, b: False)
    write(tmp_path / "sae", "folder one")
    (tmp_path / "sae" / "stray").write_text("folder one")
    write(tmp_path / "sae", "folder two")
    assert names(tmp_path) == ["sae"] and content(tmp_path / "sae") == {"folder two"}
    assert names(tmp_path / "sae") == ["a", "b"]


@pytest.mark.parametrize("exchange", [True, False])
def test_a_failure_while_writing_leaves_the_old_folder(tmp_path, monkeypatch, exchange):
    if not exchange:
        monkeypatch.setattr(files, "_exchanged", lambda a, b: False)
    write(tmp_path / "sae", "folder one")
    with pytest.raises(KeyboardInterrupt), atomic_path(tmp_path / "sae") as partial:
        partial.mkdir()
        raise KeyboardInterrupt
    assert names(tmp_path) == ["sae"] and content(tmp_path / "sae") == {"folder one"}


def test_a_failure_between_the_two_renames_puts_the_old_folder_back(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_exchanged", lambda a, b: False)
    write(tmp_path / "sae", "folder one")
    calls, rename = [], os.rename

    def second_fails(source, target):
        calls.append(source)
        if len(calls) == 2:
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(files.os, "rename", second_fails)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "sae", "folder two")
    assert names(tmp_path) == ["sae"] and content(tmp_path / "sae") == {"folder one"}


def test_a_kill_between_the_two_renames_is_finished_by_the_next_write(tmp_path):
    write(tmp_path / "sae", "folder one")
    code = (
        "import os, pathlib, sys\nfrom glassbox_utils.core import files\n"
        "files._exchanged = lambda a, b: False\nrename, calls = os.rename, []\n"
        "def kill(a, b):\n    calls.append(a)\n    os._exit(9) if len(calls) == 2 else rename(a, b)\n"
        "os.rename = kill\n"
        "with files.atomic_path(pathlib.Path(sys.argv[1])) as partial:\n"
        "    partial.mkdir()\n    (partial / 'a').write_text('folder two')"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path / "sae")]).returncode == 9
    assert not (tmp_path / "sae").exists()
    files.remove_litter(tmp_path / "sae")
    assert names(tmp_path) == ["sae"] and content(tmp_path / "sae") == {"folder two"}


def test_a_kill_while_swapping_leaves_the_old_or_the_new(tmp_path):
    """A process that swaps two folders for ever is killed; what is there is complete."""
    write(tmp_path / "sae", "folder 0")
    code = (
        "import pathlib, sys\nfrom glassbox_utils.core import files\n"
        "for i in range(10**9):\n    with files.atomic_path(pathlib.Path(sys.argv[1])) as partial:\n"
        "        partial.mkdir()\n        [(partial / n).write_text(f'folder {i}') for n in 'ab']"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "sae")])
    while content(tmp_path / "sae") == {"folder 0"} or len(content(tmp_path / "sae")) != 1:
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert names(tmp_path / "sae") == ["a", "b"] and len(content(tmp_path / "sae")) == 1


# --- litter -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["report.html", LONG])
def test_litter_of_a_killed_process_is_removed_by_the_next_write(tmp_path, name):
    assert killed_while_writing(tmp_path / name).returncode == 9
    assert len(names(tmp_path)) == 1 and not (tmp_path / name).exists()
    write(tmp_path / "other.html", "of another name")
    assert len(names(tmp_path)) == 2, "litter of another name is not this write's business"
    write(tmp_path / name, "whole")
    assert names(tmp_path) == sorted([name, "other.html"])


def test_what_is_being_written_is_left_alone(tmp_path):
    path, me = tmp_path / "report.html", f"{files._host()}-{os.getpid()}"
    mine, theirs = tmp_path / f".report.html.{me}.abcd1234", tmp_path / ".report.html.another-host-7.abcd1234"
    alike, old = tmp_path / ".report.html.notes", tmp_path / ".report.html.long-gone-7.abcd1234"
    for folder in (mine, theirs, alike, old):
        folder.mkdir()
    os.utime(old, (time.time() - 2 * files.FORGOTTEN,) * 2)
    write(path, "whole")
    assert mine.exists() and theirs.exists() and alike.exists() and not old.exists()


def test_a_number_that_a_later_process_took_over_is_no_writer(tmp_path):
    folder = tmp_path / f".report.html.{files._host()}-{os.getpid()}.abcd1234"
    folder.mkdir()
    os.utime(folder, (time.time() - 10**8,) * 2)  # before this process began
    write(tmp_path / "report.html", "whole")
    assert not folder.exists()


# --- damage -------------------------------------------------------------------------------------------


@pytest.fixture()
def made(tmp_path):
    write(tmp_path / "model", "folder of a model")
    record(tmp_path / "model")
    return tmp_path / "model"


def flip(path, keep_times):
    before = path.stat()
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    if keep_times:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_nothing_is_read_while_nothing_has_changed(made, monkeypatch):
    monkeypatch.setattr(files, "sha256_of", lambda path: pytest.fail("read again"))
    assert files.is_recorded(made) and damage(made) == []


@pytest.mark.parametrize("keep_times", [False, True], ids=["written", "written, and its time set back"])
@pytest.mark.parametrize("full", [False, True])
def test_a_flipped_bit_is_found(made, keep_times, full):
    flip(made / "b", keep_times)
    assert damage(made, full) == ["b has another sha256 than when it was made"]


def test_every_kind_of_damage_is_named(made):
    (made / "a").unlink()
    (made / "b").write_text("short", encoding="utf-8")
    (made / "pytorch_model.bin").write_text("put there by somebody", encoding="utf-8")
    assert damage(made) == ["a is missing", "b has 5 bytes instead of 17", "pytorch_model.bin does not belong there"]


def test_a_copy_is_read_once(made, monkeypatch):
    for path in made.iterdir():
        os.utime(path)
    read, real = [], files.sha256_of
    monkeypatch.setattr(files, "sha256_of", lambda path: read.append(path.name) or real(path))
    assert damage(made) == [] and sorted(read) == ["a", "b"]
    assert damage(made) == [] and len(read) == 2
    flip(made / "a", False)
    assert damage(made) == ["a has another sha256 than when it was made"]


def test_a_read_only_copy_is_read_once_in_a_process(made, monkeypatch):
    for path in made.iterdir():
        os.utime(path)

    def refuse(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(files.tempfile, "mkdtemp", refuse)
    assert damage(made) == []
    monkeypatch.setattr(files, "sha256_of", lambda path: pytest.fail("read again"))
    assert damage(made) == []


@pytest.mark.parametrize("text", ["", "{", "[]", '{"a": 1}', '{"a": {"sha256": "x"}}', "\x00"])
def test_a_broken_manifest_is_none(made, text):
    files.manifest_path(made).write_text(text, encoding="utf-8")
    assert not files.is_recorded(made)


# --- places -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "place",
    ["", "   ", "a\0b", "x" * 300, f"{'x' * 300}/page.html", "there.txt/page.html", "there.txt/deep/er/page.html", ".",
     "/proc/page.html", "/proc/1/page.html", "/dev/null", "/", "loop/page.html", "dangling", "fifo", "d/" * 2500],
)  # fmt: skip
@pytest.mark.parametrize("folder", [False, True])
def test_a_place_that_cannot_be_written_is_refused_at_once(tmp_path, monkeypatch, place, folder):
    if folder and place in ("/", "."):
        pytest.skip("a folder that is there may be written into")
    (tmp_path / "there.txt").write_text("kept", encoding="utf-8")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "fifo")
    monkeypatch.chdir(tmp_path)
    before = names(tmp_path)
    with pytest.raises(AssetError, match=r"^--out is ") as error:
        check_output(place, "--out", folder)
    assert names(tmp_path) == before and "\n" not in str(error.value) and len(str(error.value)) < 1000
    assert "cache" not in str(error.value), "the cache has nothing to do with it"


@pytest.mark.parametrize("place", ["page.html", "new/folder/page.html", LONG, "x" * 255, "new/../page.html", "é/ü ?*"])
@pytest.mark.parametrize("folder", [False, True])
def test_a_place_that_can_be_written_is_left_as_it_was(tmp_path, monkeypatch, place, folder):
    monkeypatch.chdir(tmp_path)
    assert check_output(place, "--out", folder) == Path(place) and names(tmp_path) == []
    write(check_output(place, "--out", folder), "folder" if folder else "whole")
    check_output(place, "--out", folder)


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.ENOTDIR, errno.ENAMETOOLONG, errno.EIO])
def test_a_message_is_about_the_path_and_not_always_the_cache(tmp_path, monkeypatch, number):
    monkeypatch.setenv(files.CACHE_VARIABLE, str(tmp_path / "cache"))
    for path, of_the_cache in ((tmp_path / "page.html", False), (tmp_path / "cache" / "models" / "m", True)):
        with pytest.raises(AssetError) as error, explain_os_errors(path):
            raise OSError(number, os.strerror(number))
        assert str(path) in str(error.value) and os.strerror(number) in str(error.value)
        assert (files.CACHE_VARIABLE in str(error.value)) == of_the_cache
        with pytest.raises(AssetError, match="disk is full") as error, explain_os_errors(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        assert (files.CACHE_VARIABLE in str(error.value)) == of_the_cache


def test_what_is_not_about_a_path_passes():
    for error in (ConnectionResetError(errno.ECONNRESET, "reset"), OSError("a library's own"), BrokenPipeError()):
        with pytest.raises(type(error)), explain_os_errors(Path("x")):
            raise error


# --- encodings ----------------------------------------------------------------------------------------


def test_no_text_is_opened_in_the_encoding_of_the_locale():
    found = []
    for path in sorted(ROOMS.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            given = {k.arg for k in node.keywords}
            place = 1 if called == "write_text" else 0
            text = called in ("read_text", "write_text") and len(node.args) <= place
            if called == "open" and isinstance(node.func, ast.Name):
                mode = ast.unparse(node.args[1]) if len(node.args) > 1 else "'r'"
                text = "b" not in mode
            if called in ("run", "Popen", "check_output") and "text" in given:
                text = True
            if text and "encoding" not in given:
                found.append(f"{path.relative_to(ROOMS)}:{node.lineno}")
    assert not found, found
