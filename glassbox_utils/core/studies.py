"""Long runs whose tables the notebooks draw: resumable, and written with their provenance.

What takes longer than a notebook may is computed by ``glassbox study NAME``; finished parts are kept in the cache
folder, so that a killed run goes on where it was.
"""

import hashlib
import json
import os
import platform
import time
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from glassbox_utils.core import assets, files, prepared
from glassbox_utils.core.errors import GlassboxError
from glassbox_utils.core.models import Model

SEED = 0


class StudyError(GlassboxError, LookupError):
    """A table that was not made for this model; the message names the command that makes it."""


def table_path(name: str) -> Path:
    """Where a study's table lies in the prepared folder: ``studies/NAME.json``."""
    return prepared.path("studies", f"{name}.json")


def _subject() -> str:
    """What tells the kept parts of one model's studies from another's, and of another size."""
    if prepared.folder() == assets.DATA:
        return ""
    mine = prepared.card()
    return f"{mine.model_hash} {prepared.size()}"


def _chunks(name: str, key: str) -> Path:
    folder = assets.cache_dir() / "studies" / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.json"


def resumed(name: str, key: Any, work: Callable[..., Any], *args: Any) -> Any:
    """``work(*args)``, from the cache folder if this study has done it with these settings before."""
    dtype = os.environ.get("GLASSBOX_MODEL_DTYPE", "").replace("float32", "")
    path = _chunks(name, json.dumps(key, sort_keys=True, default=str) + dtype + _subject())
    with suppress(FileNotFoundError, ValueError):  # not there, or damaged: computed again
        return json.loads(path.read_text(encoding="utf-8"))
    result = json.dumps(work(*args))
    with files.atomic_path(path) as partial:
        partial.write_text(result, encoding="utf-8")
    return json.loads(result)


def write_table(name: str, model: Model | None, seconds: float, **content: Any) -> Path:
    """``studies/NAME.json`` in the prepared folder: provenance first, then the content. ``model``: None if none was
    asked anything."""
    packages = ("torch", "transformers", "peft", "vaderSentiment")
    provenance = {
        "command": f"glassbox study {name.replace('_', '-')}",
        "seed": SEED,
        **({} if model is None else {"model": model.name, "model_hash": model.hash}),
        **({} if model is None or prepared.size() == 1 else {"size": prepared.size()}),
        **(
            {}
            if model is None or str(model.dtype) == "torch.float32"
            else {"dtype": str(model.dtype).removeprefix("torch.")}
        ),
        "versions": {"python": platform.python_version(), **{p: version(p).split("+")[0] for p in packages}},
        "seconds_of_last_run": round(seconds),
        "finished": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    }
    path = table_path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = json.dumps({"provenance": provenance, **content}, ensure_ascii=False, indent=None)
    with files.atomic_path(path) as partial:
        partial.write_text(lines.replace("}, {", "},\n{") + "\n", encoding="utf-8")
    return path


def has_table(name: str, model: Model | None = None) -> bool:
    """Is there a table of this study, and (if a model is given) was it made with these very weights?"""
    path = table_path(name)
    return path.exists() and (model is None or read_table(name)["provenance"]["model_hash"] == model.hash)


def read_table(name: str) -> dict[str, Any]:
    """A study's table as ``write_table`` wrote it; StudyError if it was not made for the model in use."""
    path = table_path(name)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        command = f"glassbox study {name.replace('_', '-')}"
        raise StudyError(
            f"There is no table {path}. `{command}` makes it, for another model than the embedded one with --prepared "
            "FOLDER; `glassbox prepare MODEL` makes all."
        ) from None
    except ValueError as reason:
        raise StudyError(f"{path} is damaged ({reason}). Delete it, and run `glassbox study` again.") from reason
