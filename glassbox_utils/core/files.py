"""Files that are whole or not there: written beside their name and renamed, locked, and checked when they are used.

**Written** (``atomic_path``): a kill, a full disk or a second process leaves the old or the new file or folder, each
complete. What a killed process left behind is removed by the next write to the same name.

**Checked** (``record``, ``damage``): a manifest beside a file or folder keeps the sha256 of each of its files, with
size and times. While those are the same, nothing is read; when they differ, the file is hashed again.

**Refused early** (``check_output``): a place that can't be written is found before anything is computed.
"""

import ctypes
import errno
import hashlib
import json
import os
import re
import shutil
import socket
import stat
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import platformdirs
import psutil
from filelock import FileLock

from glassbox_utils.core.errors import GlassboxError

CACHE_VARIABLE = "GLASSBOX_CACHE"

FORGOTTEN = 24 * 3600
"""seconds after which half-written files of another machine count as left behind: nobody can ask for its processes"""

CANNOT = {
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY,
    errno.ENAMETOOLONG, errno.ELOOP, errno.EIO, errno.EINVAL, errno.EXDEV, errno.ENXIO, errno.ENODEV, errno.EBUSY,
}  # fmt: skip
"""reasons why a path can't be used; others (of a network, of another process) are not about the path"""


class AssetError(GlassboxError, RuntimeError):
    """A download, a hash, a member or a path failed; the message names the value and the fix."""


def cache_dir() -> Path:
    """The folder that holds every download: ``$GLASSBOX_CACHE`` or the platform's cache folder."""
    return Path(os.environ.get(CACHE_VARIABLE) or platformdirs.user_cache_dir("glassbox", appauthor=False))


# --- errors -------------------------------------------------------------------------------------------


@contextmanager
def explain_os_errors(path: Path) -> Iterator[None]:
    """Turn a full disk or a path that can't be used into one readable paragraph (AssetError)."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise AssetError(_full_disk(path)) from error
        if error.errno in CANNOT:
            raise AssetError(_unusable(path, error.strerror or str(error))) from error
        raise


def _in_cache(path: Path) -> bool:
    return path.absolute().is_relative_to(cache_dir().absolute())


def _unusable(path: Path, reason: str) -> str:
    if _in_cache(path):
        return (
            f"{path} can't be read or written ({reason}). Glassbox keeps its downloads and unfinished work in "
            f"{cache_dir()}; set {CACHE_VARIABLE} to a folder that you may write to."
        )
    return (
        f"{path} can't be written ({reason}). Allowed: a path in a folder that you may write to, whose names have at "
        "most 255 bytes. Give another one."
    )


def _full_disk(path: Path) -> str:
    free = shutil.disk_usage(_existing(path)).free / 1e6
    needed = ", about 1,000 MB are needed for the embedded model" if _in_cache(path) else ""
    move = f", or set {CACHE_VARIABLE} to a folder on another disk" if _in_cache(path) else ", or give another path"
    return (
        f"The disk is full: {path} can't be written ({free:.0f} MB free{needed}). Nothing half-written was left. "
        f"Free some space{move}, and run the same command again."
    )


def _existing(path: Path) -> Path:
    """The path itself, or the nearest folder above it that is there."""
    absolute = path.absolute()
    return next(p for p in (absolute, *absolute.parents) if os.path.lexists(p))


def check_output(path: str | Path, what: str, folder: bool = False) -> Path:
    """The path of something that will be written, or AssetError if it can't be: tried, and nothing is left behind.

    ``what``: how the user named it, such as ``--out``. ``folder``: a folder, not a file.
    """
    target = Path(path)
    whole = Path(os.path.abspath(target)) if "\0" not in str(path) else target
    kind, example = ("folder", "build/site") if folder else ("file", "report.html")
    if not str(path).strip() or "\0" in str(path) or (not folder and not target.name):
        raise AssetError(f"{what} is {str(path)!r}. Allowed: the path of a {kind}, such as {example}.")
    try:
        if os.path.lexists(target):
            mode = target.stat().st_mode
            if folder and not stat.S_ISDIR(mode):
                raise AssetError(f"{what} is {target}, which is a file. Allowed: a folder, or a name that is free.")
            if not folder and not stat.S_ISREG(mode):
                there = "a folder" if stat.S_ISDIR(mode) else "no ordinary file"
                raise AssetError(f"{what} is {target}, which is {there}. Allowed: the path of a file to write.")
        above = _existing(whole)
        above = above if folder or above != whole else above.parent
        if not above.is_dir():
            raise AssetError(f"{what} is {target}, but {above} is a file, not a folder. Give another path.")
        with tempfile.TemporaryDirectory(prefix=".glassbox-", dir=above) as tried:
            new = whole.relative_to(above).parts
            Path(tried, *new).mkdir(parents=True, exist_ok=True)  # names that are too long fail here
    except (OSError, ValueError) as error:
        name = str(target) if len(str(target)) <= 100 else f"{str(target)[:97]}..."
        raise AssetError(
            f"{what} is {name}, which can't be written ({getattr(error, 'strerror', None) or error}). Allowed: a "
            f"{kind} in a folder that you may write to, whose names have at most 255 bytes. Give another path."
        ) from error
    return target


# --- writing ------------------------------------------------------------------------------------------


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` that becomes ``path`` if the block succeeds, else vanishes.

    What is written may be a file or a folder; a file replaces a file and a folder a folder. Litter of killed writers
    of the same name is removed first.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_litter(path)
    folder = Path(tempfile.mkdtemp(prefix=f"{_prefix(path)}{_host()}-{os.getpid()}.", dir=path.parent))
    try:
        yield folder / path.name
        _into_place(folder / path.name, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def remove_litter(path: Path) -> None:
    """Remove what killed writers of ``path`` left beside it; a folder that one was about to replace is put back."""
    pattern = re.compile(re.escape(_prefix(path)) + r"(?P<host>[\w-]+)-(?P<pid>\d+)\.[a-z0-9_]{8}")
    for folder in path.parent.glob(f"{_glob_escaped(_prefix(path))}*"):
        found = pattern.fullmatch(folder.name)
        if found is None or _is_at_work(folder, found["host"], int(found["pid"])):
            continue
        old = folder / ".replaced"
        if old.exists() and not path.exists():  # killed between two renames: both are complete, the new one is meant
            with suppress(OSError):
                os.rename(folder / path.name if (folder / path.name).exists() else old, path)
        shutil.rmtree(folder, ignore_errors=True)


def _prefix(path: Path) -> str:
    """What temporary names of a path begin with, short enough to be a name themselves."""
    name = os.fsencode(path.name)
    if len(name) <= 120:
        return f".{path.name}."
    return f".{name[:80].decode('utf-8', 'ignore')}~{hashlib.sha256(name).hexdigest()[:16]}."


def _glob_escaped(text: str) -> str:
    return re.sub(r"([*?[])", r"[\1]", text)


def _host() -> str:
    return re.sub(r"[^\w-]", "-", socket.gethostname())[:40] or "localhost"


def _is_at_work(folder: Path, host: str, pid: int) -> bool:
    """Is the process that made a temporary folder still there?"""
    try:
        made = folder.stat().st_mtime
        if host != _host():
            return time.time() - made < FORGOTTEN
        return psutil.Process(pid).create_time() <= made + 60  # a later process has only taken over the number
    except (psutil.NoSuchProcess, FileNotFoundError):
        return False
    except (psutil.Error, OSError):
        return True


def _into_place(new: Path, path: Path) -> None:
    """Rename, so that at any moment the old or the new is there, complete."""
    if not (new.is_dir() and path.is_dir() and not path.is_symlink()):
        os.replace(new, path)
    elif not _exchanged(new, path):
        aside = new.with_name(".replaced")
        os.rename(path, aside)
        try:
            os.rename(new, path)
        except BaseException:
            if not path.exists():
                os.rename(aside, path)
            raise


def _exchanged(a: Path, b: Path) -> bool:
    """Two folders swapped in one step, where the system can do that (Linux, macOS)."""
    with suppress(AttributeError, OSError):
        library, exchange = ctypes.CDLL(None), ctypes.c_uint(2)
        first, second = os.fsencode(a.absolute()), os.fsencode(b.absolute())
        if sys.platform == "darwin":
            return library.renamex_np(first, second, exchange) == 0
        return library.renameat2(-1, first, -1, second, exchange) == 0  # -1: no folder, both paths are absolute
    return False


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an inter-process lock on ``path``: the second process waits and then finds the work done."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f"{_prefix(path)}lock")):
        yield


# --- checking -----------------------------------------------------------------------------------------

Stamp = tuple[int, int, int]
"""size, time of the last write, time of the last change of any kind (which no program can set back)"""

_hashed: dict[tuple[str, Stamp], str] = {}


def sha256_of(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(path: Path) -> str:
    """``sha256_of``, once in a process as long as the file's size and times are the same."""
    key = str(path.absolute()), _stamp(path)
    if key not in _hashed:
        _hashed[key] = sha256_of(path)
    return _hashed[key]


def _stamp(path: Path) -> Stamp:
    found = path.stat()
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns


def manifest_path(path: Path) -> Path:
    """Where the hashes of a file, or of a folder's files, are kept."""
    return path.with_name(f"{_prefix(path)}manifest.json")


def record(path: Path) -> None:
    """Keep the sha256, size and times of a file that was just made, or of all files of such a folder."""
    _write_manifest(path, {name: digest(file) for name, file in _files(path).items()})


def _write_manifest(path: Path, hashes: dict[str, str]) -> None:
    entries = {name: {"sha256": hashes[name], "stamp": _stamp(file)} for name, file in _files(path).items()}
    with atomic_path(manifest_path(path)) as partial:
        partial.write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")


def is_recorded(path: Path) -> bool:
    """Is it there, with a manifest that can be read?"""
    return path.exists() and _manifest(path) is not None


def recorded(path: Path) -> dict[str, str]:
    """sha256 of each file as it was when it was made, by name; empty without a manifest."""
    return {name: entry["sha256"] for name, entry in (_manifest(path) or {}).items()}


def _manifest(path: Path) -> dict[str, dict[str, Any]] | None:
    with suppress(OSError, ValueError, TypeError, KeyError, AttributeError):
        entries = json.loads(manifest_path(path).read_text(encoding="utf-8"))
        return {name: {"sha256": str(e["sha256"]), "stamp": tuple(map(int, e["stamp"]))} for name, e in entries.items()}
    return None


def _files(path: Path) -> dict[str, Path]:
    if path.is_file():
        return {path.name: path}
    return {str(p.relative_to(path)): p for p in sorted(path.rglob("*")) if p.is_file() and p.name[0] != "."}


def damage(path: Path, full: bool = False) -> list[str]:
    """What is wrong with a recorded file or folder, in words; empty if nothing is. ``full``: hash every file again."""
    known, found = _manifest(path) or {}, _files(path)
    wrong = [f"{name} is missing" for name in known if name not in found]
    wrong += [f"{name} does not belong there" for name in found if name not in known]
    moved = False
    for name in known.keys() & found.keys():
        now, entry = _stamp(found[name]), known[name]
        if now[0] != entry["stamp"][0]:
            wrong.append(f"{name} has {now[0]:,} bytes instead of {entry['stamp'][0]:,}")
        elif full or now != entry["stamp"]:
            moved = moved or now != entry["stamp"]
            if (sha256_of(found[name]) if full else digest(found[name])) != entry["sha256"]:
                wrong.append(f"{name} has another sha256 than when it was made")
    if moved and not wrong:  # copied or touched: the next check need not read it
        with suppress(OSError):
            _write_manifest(path, recorded(path))
    return sorted(wrong)
