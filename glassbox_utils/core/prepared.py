"""The prepared folder: what was made for one model, and where it is found.

SAEs, vectors, officers, tables and ``prepared.json`` that says whose they are. ``data/`` is the folder of the embedded
model; ``glassbox prepare MODEL`` makes one for any other, with the same layout. A process works with one folder at a
time: that of GLASSBOX_PREPARED, else ``data/``; ``choose(model)`` takes the one that was made for these very weights.
What is the same for all models (prompts, pairs, people, passages) stays in ``data/`` and is read from there.
"""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypeVar

import platformdirs
from pydantic import Field

from glassbox_utils.core import assets, files, schema
from glassbox_utils.core.errors import GlassboxError
from glassbox_utils.core.models import Model, load_model

_T = TypeVar("_T")

VARIABLE = "GLASSBOX_PREPARED"
PLACE = "GLASSBOX_MODELS"
CARD = "prepared.json"
UNKNOWN = "that of the model it was made from"
"""licence of what is derived from weights whose terms nobody has told us"""
ROLES = ("main", "late")
"""which SAE is meant: the one at half of the depth, and the one at two thirds"""
ORDINARY = "ordinary"
"""role of an SAE beside the main one that never met a massive position: notebook 03 shows what that costs"""


class PreparedError(GlassboxError, ValueError):
    """A prepared folder that is not there, is damaged or belongs to other weights; the message names the command."""


@dataclass(frozen=True)
class Card:
    """Whose folder it is. ``size`` is the share of the full number of cases that its studies took."""

    model: Annotated[str, Field(min_length=1)]
    """what ``load_model`` takes"""
    model_hash: Annotated[str, Field(min_length=1)]
    licence: str = UNKNOWN
    """of what is derived from the weights"""
    saes: dict[str, str] = field(default_factory=dict)
    """role -> folder in ``saes/``, a folder elsewhere, or a release of sae_lens"""
    size: Annotated[float, Field(gt=0, le=1)] = 1.0
    minutes: Annotated[float, Field(gt=0)] | None = None
    """the budget that was given"""

    def __post_init__(self) -> None:
        schema.check(self, PreparedError)
        if unknown := [role for role in self.saes if role not in (*ROLES, ORDINARY)]:
            raise PreparedError(f"saes has the role {unknown[0]!r}. Allowed: {', '.join((*ROLES, ORDINARY))}.")


def models_dir() -> Path:
    """Where prepared folders lie unless told otherwise: GLASSBOX_MODELS, else the user's data folder."""
    return Path(os.environ.get(PLACE) or platformdirs.user_data_path("glassbox") / "models")


def folder() -> Path:
    """The prepared folder that this process works with."""
    return Path(os.environ.get(VARIABLE) or assets.DATA)


def path(*parts: str) -> Path:
    """A place in the prepared folder: ``path("saes", "own-8192-l14")``."""
    return folder().joinpath(*parts)


def card(where: Path | None = None) -> Card:
    """The card of a prepared folder (of the one in use); PreparedError if there is none or it is damaged."""
    file = (where or folder()) / CARD
    if not file.exists():
        raise PreparedError(
            f"{file.parent} is no prepared folder: {CARD} is missing. `glassbox prepare MODEL` makes one; "
            f"{VARIABLE} or --prepared names the one to use."
        )
    values = schema.read_mapping(file, PreparedError, f"the {CARD} that `glassbox prepare` writes")
    return schema.build(Card, values, str(file), PreparedError)


def write_card(content: Card, where: Path) -> Path:
    """Write ``prepared.json``, whole or not at all."""
    where.mkdir(parents=True, exist_ok=True)
    with files.atomic_path(where / CARD) as partial:
        partial.write_text(json.dumps(asdict(content), indent=1) + "\n", encoding="utf-8")
    return where / CARD


def load_subject(device: Any = None, adapter: Path | None = None, dtype: Any = None) -> Model:
    """The model of the prepared folder, in another number type or with an adapter if wanted.

    PreparedError if its weights are others by now.
    """
    mine = card()
    model = load_model(mine.model, device=device, dtype=dtype)
    if model.hash != mine.model_hash:
        raise PreparedError(
            f"{folder()} was made for weights {mine.model_hash}, but {mine.model} holds {model.hash}. Prepare it "
            "again, in another folder, or give the weights that it was made for."
        )
    return model if adapter is None else load_model(mine.model, adapter=adapter, device=device, dtype=dtype)


def found(model_hash: str) -> Path | None:
    """The prepared folder that was made for these very weights: that in use, ``data/``, or one of ``models_dir()``."""
    others = sorted(p.parent for p in models_dir().glob(f"*/{CARD}"))
    for where in dict.fromkeys([folder(), assets.DATA, *others]):
        if (where / CARD).exists() and card(where).model_hash == model_hash:
            return where
    return None


def licence_of(model_hash: str) -> str:
    """Of what is derived from these weights: as their prepared folder says."""
    where = found(model_hash)
    return UNKNOWN if where is None else card(where).licence


def choose(model: Model) -> Path:
    """Work with the folder that was made for this model, in this process and its children; says which one it is.

    If there is none, an empty place is chosen: nothing that was made for another model is read by mistake.
    """
    where = found(model.hash)
    os.environ[VARIABLE] = str(where or models_dir() / model.name)
    if where is None:
        print(
            f"nothing was prepared for {model.name}; `glassbox prepare {model.name}` makes its SAEs, vectors and tables"
        )
    else:
        size = card(where).size
        print(f"prepared for {model.name}" + ("" if size == 1 else f", studies at {size:.0%} of their full size"))
    return folder()


@contextmanager
def using(where: Path) -> Iterator[Path]:
    """Work with this folder inside the block."""
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = str(Path(where).absolute())
    try:
        yield folder()
    finally:
        os.environ.pop(VARIABLE) if before is None else os.environ.update({VARIABLE: before})


def is_for(model: Model) -> bool:
    """Was the folder in use made for these very weights?"""
    return (folder() / CARD).exists() and card().model_hash == model.hash


def sae(role: str = "main") -> str:
    """Name of the SAE that plays a role (``main``: half of the depth, ``late``: two thirds); PreparedError if none."""
    mine = card()
    if role not in mine.saes:
        raise PreparedError(
            f"{folder()} has no {role} SAE. It has: {', '.join(mine.saes) or 'none'}. `glassbox prepare {mine.model}` "
            "trains one."
        )
    return mine.saes[role]


_size: ContextVar[float | None] = ContextVar("size", default=None)


@contextmanager
def at_size(share: float) -> Iterator[None]:
    """Inside the block, studies take this share of the full number of cases, whatever the card says."""
    token = _size.set(share)
    try:
        yield
    finally:
        _size.reset(token)


def size() -> float:
    """Share of the full number of cases that studies take: of ``at_size``, else of the folder's card."""
    return _size.get() or (card().size if (folder() / CARD).exists() else 1.0)


def sized(full: int, least: int = 1) -> int:
    """A number of cases at the size of the folder in use: ``full`` in ``data/``, fewer where the budget was small."""
    share = size()
    return full if share == 1 else min(full, max(least, round(full * share)))


def thinned(grid: Sequence[_T], least: int = 2) -> list[_T]:
    """Fewer settings at the size of the folder in use, spread evenly over the grid, both ends among them."""
    n = max(1, sized(len(grid), least))
    return [grid[round(i * (len(grid) - 1) / max(1, n - 1))] for i in range(n)]


def depth(model: Model, layer: int) -> int:
    """The layer at the relative depth that ``layer`` has in the embedded model's 30 layers."""
    return min(model.n_layers - 1, layer * model.n_layers // 30)
