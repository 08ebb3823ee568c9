"""A GGUF file of any architecture that transformers reads, de-quantised once into a float32 folder in the cache.

The folder is what everything else works with: it has a hash like any other, and loads without reading the GGUF again.
Weights are the file's own numbers (float32 loses none of them). Tokenizer, special tokens and configuration are what
transformers makes of the file, which differs between its versions; so the folder counts for one version. The embedded
model is read by ``embedded`` instead, which depends on no version.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from glassbox_utils.core import assets, files
from glassbox_utils.core.errors import ModelError


def folder_of(gguf: Path) -> Path:
    """The model of a GGUF file as a folder for transformers, in the cache (4 bytes a weight).

    Raises ModelError for a file that transformers can't read, AssetError if the disk is full.
    """
    status = gguf.stat()
    key = [str(gguf.resolve()), str(status.st_size), str(status.st_mtime_ns), reader()]
    digest = hashlib.sha256("\n".join(key).encode()).hexdigest()[:12]
    folder = assets.cache_dir() / "models" / f"{gguf.stem}-gguf-{digest}"
    return made_once(folder, lambda partial: write(gguf, partial))


def reader() -> str:
    """The version of transformers, which decides what is made of a GGUF."""
    import transformers

    return transformers.__version__


def made_once(folder: Path, write: Callable[[Path], None]) -> Path:
    """A folder of the cache, written whole by ``write`` unless it is there and as it was written."""
    with files.explain_os_errors(folder):
        if not _intact(folder):
            with files.locked(folder):
                if not _intact(folder):
                    with files.atomic_path(folder) as partial:
                        write(partial)
                    files.record(folder)
    return folder


def _intact(folder: Path) -> bool:
    return files.is_recorded(folder) and not files.damage(folder)


def write(gguf: Path, folder: Path) -> None:
    """De-quantise a GGUF into ``folder``; ModelError if transformers can't read it."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        place = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
        where: dict[str, Any] = {**place, "local_files_only": True}
        tokenizer = AutoTokenizer.from_pretrained(**where)
        hf = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    except OSError as error:
        if error.errno is not None:
            raise
        raise ModelError(_unreadable(gguf, error)) from error
    except Exception as error:  # a damaged file raises whatever its reader raises
        raise ModelError(_unreadable(gguf, error)) from error
    if hasattr(hf.config, "quantization_config"):
        del hf.config.quantization_config
    with torch.device("meta"):  # one that was read from a GGUF counts as quantised for good, and refuses to be saved
        plain = AutoModelForCausalLM.from_config(hf.config)
    plain.load_state_dict(hf.state_dict(), assign=True)
    plain.tie_weights()
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _unreadable(gguf: Path, error: Exception) -> str:
    reason = " ".join(str(error).split())[:200].rstrip(".") or type(error).__name__
    return (
        f"The GGUF file {gguf} can't be read: {reason}. Give one of an architecture whose GGUF transformers reads "
        "(llama, qwen2, gemma3, gpt2, ...), in one piece, or the model's own folder as save_pretrained writes it."
    )
