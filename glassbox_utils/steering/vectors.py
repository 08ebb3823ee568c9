"""Steering vectors: a direction in the residual stream, added while the model writes, and gone afterwards.

*Fit* a direction from texts with and without a trait, *steer* with it for some rows of a batch, *sweep* layer and
strength under a side-effect budget, *save* it, and *export* it for llama.cpp. Strength is in units of the layer's
typical residual norm: the median over the tokens of the fitting texts, without each row's first token (an attention
sink whose norm is many times larger) and without tokens above ten times the median. So 0.1 is a tenth of a token's
own size at every layer of every model. What it *does* is not the same in every model: where a few huge coordinates
carry the norm (Gemma 3), the same strength disturbs text many times more. Strength is chosen for each model, by its
side effects.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from numbers import Real
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from glassbox_utils.core import devices, files, prepared, schema
from glassbox_utils.core.arguments import shown, whole
from glassbox_utils.core.devices import result
from glassbox_utils.core.errors import GlassboxError
from glassbox_utils.core.statistics import Interval

ROUNDING = 0.01
"""a unit vector may be this much longer or shorter than 1 (half precision rounds)"""


class SteeringError(GlassboxError, ValueError):
    """A direction, method, mode or file that does not fit; the message names what does."""


@dataclass(frozen=True, eq=False)
class Direction:
    """A unit vector in the residual stream after one layer, with what is needed to use it elsewhere."""

    vector: Float[Tensor, " d_model"]
    """length 1"""
    layer: int
    scale: float
    """the layer's typical residual norm: alpha = 1 adds a vector of this length"""
    name: str = ""
    method: str = "given"
    pooling: str = ""
    model_name: str = ""
    model_type: str = "llama"
    """transformers' name of the architecture, which llama.cpp calls the model hint"""
    model_hash: str = ""
    """weights it was fitted on; empty: not checked"""
    coordinates: tuple[float, float] = (0.0, 0.0)
    """mean coordinate of the negative and of the positive texts along the vector, units of ``scale``"""
    n_texts: tuple[int, int] = (0, 0)
    """number of positive and of negative texts"""
    stability: Interval | None = None
    """cosine between the direction and its bootstrap refits; a direction made of noise has about .7"""

    def __repr__(self) -> str:
        stable = f", stability {self.stability.value:.2f}" if self.stability else ""
        return f"Direction({self.name or 'unnamed'}, layer {self.layer}, {self.method}, norm {self.scale:.0f}{stable})"


@dataclass(frozen=True, eq=False)
class ControlVector:
    """Directions after several layers that are turned by one dial: alpha pushes each by alpha of its own typical norm.

    A little at many layers adds up where the directions agree in meaning; what llama.cpp and repeng call a
    control vector.
    """

    parts: tuple[Direction, ...]
    """one for each layer, lowest first"""

    def __post_init__(self) -> None:
        if not isinstance(self.parts, tuple) or not all(isinstance(part, Direction) for part in self.parts):
            raise SteeringError(
                f"The parts of a control vector are {shown(self.parts)}. Allowed: a tuple of Directions, one a layer."
            )
        layers = [part.layer for part in self.parts]
        if not layers or sorted(set(layers)) != layers:
            raise SteeringError(
                f"A control vector has one direction for each of its layers, lowest first; these are for layers "
                f"{layers}. Sort them, and add up those of the same layer."
            )

    @property
    def name(self) -> str:
        """Name of its first part."""
        return self.parts[0].name

    @property
    def layers(self) -> list[int]:
        """The layers after which it is added."""
        return [part.layer for part in self.parts]

    def __repr__(self) -> str:
        return f"ControlVector({self.name or 'unnamed'}, layers {self.layers}, {self.parts[0].method})"


Vector = Direction | ControlVector


def parts_of(vector: Vector) -> tuple[Direction, ...]:
    """The directions of a steering vector: several, or itself."""
    return vector.parts if isinstance(vector, ControlVector) else (vector,)


def check_unit(part: Direction) -> None:
    """SteeringError unless the vector has length 1 (so also for zeros and NaN) and its scale is a length."""
    if not isinstance(part.vector, Tensor) or part.vector.ndim != 1 or not part.vector.is_floating_point():
        shown = f"shape {tuple(part.vector.shape)}" if isinstance(part.vector, Tensor) else type(part.vector).__name__
        raise SteeringError(
            f"The direction {part.name!r} has {shown}. Allowed: a tensor with one fractional number for each of the "
            "residual stream's dimensions."
        )
    length = float(result(part.vector).norm())
    if not abs(length - 1) < ROUNDING:
        raise SteeringError(
            f"The direction {part.name!r} has length {length:.3g}. It must be a unit vector: divide it by its "
            "length, which belongs into scale; one that is zero or not a number points nowhere, so fit it again."
        )
    if isinstance(part.scale, bool) or not isinstance(part.scale, Real) or not 0 < part.scale < math.inf:
        raise SteeringError(
            f"The scale of the direction {part.name!r} is {part.scale!r}. Allowed: a finite number above 0, "
            f"the typical residual norm after layer {part.layer}. To steer the other way give a negative alpha."
        )


def fingerprint(vector: Vector) -> str:
    """16 hex digits of layers, numbers and units, for caches."""
    found = hashlib.sha256()
    for part in parts_of(vector):
        found.update(f"{part.layer} {part.scale:.6g} ".encode() + result(part.vector).numpy().tobytes())
    return found.hexdigest()[:16]


def random_direction(like: Direction, seed: int) -> Direction:
    """A random unit vector at the same layer and with the same units: the control of every steering claim.

    SteeringError for a seed that is none.
    """
    if not isinstance(like, Direction):
        raise SteeringError(f"{type(like).__name__} is no Direction. Give one; random_vector takes several layers.")
    seed = whole("seed", seed, 0, SteeringError)
    generator = torch.Generator().manual_seed(seed)
    vector = torch.randn(len(like.vector), generator=generator)
    return replace(
        like,
        vector=devices.like(vector / vector.norm(), like.vector),
        name=f"random {seed}",
        method="random",
        stability=None,
        coordinates=(0, 0),
    )


def random_vector(like: Vector, seed: int, shared: bool = False) -> Vector:
    """Random directions at the same layers and with the same units: the control of a vector with several layers.

    Drawn for each layer on its own; or, ``shared``, one for all layers, so that the pushes add up in the residual
    stream as those of a fitted vector do.
    """
    if isinstance(like, Direction):
        return random_direction(like, seed)
    if not isinstance(like, ControlVector):
        raise SteeringError(f"{type(like).__name__} is no steering vector. Give a Direction or a ControlVector.")
    seed = whole("seed", seed, 0, SteeringError)
    return ControlVector(
        tuple(random_direction(d, seed if shared else 1000 * (seed + 1) + d.layer) for d in like.parts)
    )


# --- files --------------------------------------------------------------------------------------------


UNITS = "alpha 1 adds a vector of length scale, the layer's typical residual norm"
EXAMPLE = "the path of a card that save_direction wrote"


@dataclass(frozen=True)
class Card:
    """What a file says about one direction; the fields are those of ``Direction``."""

    layer: Annotated[int, Field(ge=0)]
    scale: Annotated[float, Field(gt=0)]
    name: str = ""
    method: str = "given"
    pooling: str = ""
    model_name: str = ""
    model_type: str = "llama"
    model_hash: str = ""
    coordinates: tuple[float, float] = (0.0, 0.0)
    n_texts: tuple[int, int] = (0, 0)
    stability: dict[str, int | float] | None = None

    def __post_init__(self) -> None:
        schema.check(self, SteeringError)
        if self.stability is not None and set(self.stability) != set(Interval.__dataclass_fields__):
            raise SteeringError(
                f"stability has the fields {sorted(self.stability)}. Allowed: "
                f"{', '.join(Interval.__dataclass_fields__)}."
            )


@dataclass(frozen=True)
class _Frame:
    """What a card says about the tensors as a whole."""

    sha256: str
    units: str = UNITS
    licence: str = prepared.UNKNOWN
    parts: list[dict[str, Any]] | None = None
    """the cards of several layers"""

    def __post_init__(self) -> None:
        schema.check(self, SteeringError)


def save_direction(direction: Vector, path: str | Path) -> Path:
    """Write PATH.safetensors (unit vectors, float32) and PATH.json (the card, with the hash of the tensors' file).

    Returns the card's path. A ``ControlVector`` becomes one file too: tensors ``direction.LAYER``, and a card for each.
    The name may hold dots: only the endings .json and .safetensors are taken off. Both files are written beside what
    they replace and renamed; after a kill between the two renames the hash tells ``load_vector`` that they do not
    belong together. Raises SteeringError for a scale or another field that a card can't hold, and for a path that
    can't be written; a vector that is no unit vector is refused when it is loaded or used.
    """
    from safetensors.torch import save

    if not isinstance(direction, Vector):
        raise SteeringError(f"{type(direction).__name__} is no steering vector. Give a Direction or a ControlVector.")
    card_path, tensor_path = _pair(path)
    several = isinstance(direction, ControlVector)
    tensors = {f"direction.{d.layer}" if several else "vector": d.vector for d in parts_of(direction)}
    content = save({name: result(v).clone().contiguous() for name, v in tensors.items()})
    cards = []
    for one in parts_of(direction):
        values = asdict(replace(one, vector=torch.zeros(0)))
        del values["vector"]
        cards.append(asdict(schema.build(Card, values, f"The direction {one.name!r}", SteeringError)))
    card = {"parts": cards} if several else cards[0]
    card |= {"units": UNITS, "licence": _licence(direction), "sha256": hashlib.sha256(content).hexdigest()}
    with _writing(card_path), files.atomic_path(card_path) as words, files.atomic_path(tensor_path) as numbers:
        words.write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
        numbers.write_bytes(content)
    return card_path


def _licence(vector: Vector) -> str:
    """Of a vector, by the weights that it was made from."""
    made_from = {d.model_hash for d in parts_of(vector)}
    return prepared.licence_of(made_from.pop()) if len(made_from) == 1 else prepared.UNKNOWN


def _pair(path: str | Path) -> tuple[Path, Path]:
    """Card and tensors. SteeringError for a path without a name."""
    stem = Path(path) if isinstance(path, str | Path) and "\0" not in str(path) else Path()
    name = stem.name
    for ending in (".json", ".safetensors"):
        name = name.removesuffix(ending)
    if not name or name == "..":
        raise SteeringError(
            f"{str(path)[:80]!r} is no path of a vector. Give a folder and a name, such as 'build/calm'."
        )
    return stem.with_name(f"{name}.json"), stem.with_name(f"{name}.safetensors")


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """SteeringError for a path that can't be written, whatever the reason."""
    try:
        with files.explain_os_errors(path):
            yield
    except OSError as error:
        raise SteeringError(
            f"{str(path)[:300]} can't be written: {error.strerror or error}. Give a path in a folder that you may "
            "write to."
        ) from error


def load_vector(path: str | Path) -> Vector:
    """Read what ``save_direction`` wrote; a bare name is looked up in the prepared folder.

    Raises SteeringError if a file is missing or damaged, if the card has a field that is none or a value of another
    kind, and if card and tensors do not belong together, by the hash in the card.
    """
    card, tensors = _pair(path)
    if not os.path.isfile(card) and card.parent == Path():
        card, tensors = (prepared.path("vectors", p.name) for p in (card, tensors))
    if missing := [p for p in (card, tensors) if not os.path.isfile(p)]:
        shipped = sorted(p.stem for p in prepared.path("vectors").glob("*.json"))
        raise SteeringError(
            f"There is no steering vector {str(path)[:200]!r}: it needs a card and a tensor, and there is no "
            f"{' and no '.join(p.name[:200] for p in missing)}. Vectors of {prepared.folder()}: "
            f"{', '.join(shipped) or 'none'}."
        )
    values = schema.read_mapping(card, SteeringError, EXAMPLE)
    content, where = _read(tensors), str(card)
    digest = hashlib.sha256(content).hexdigest()
    if "sha256" not in values:
        raise SteeringError(
            f"{card} has no sha256, so nobody can tell whether {tensors.name} is what was saved. If you know that it "
            f'is, add a line to the card: "sha256": "{digest}".'
        )
    frame = {key: values.pop(key) for key in list(values) if key in _Frame.__dataclass_fields__}
    about = schema.build(_Frame, frame, where, SteeringError)
    if about.sha256 != digest:
        raise SteeringError(
            f"{card} does not belong to {tensors.name}: its sha256 is {about.sha256[:160]}, the file has {digest}. One "
            "of the two was changed, damaged or half-written. Save the vector again, or fetch both files again."
        )
    named = _tensors(content, tensors)
    if about.parts is None:
        return _direction(values, named, "vector", {"vector"}, where)
    if values:
        raise SteeringError(f"{card} has parts, and {next(iter(values))!r} beside them. Move it into each part.")
    expected = {f"direction.{one.get('layer')}" for one in about.parts}
    found = [
        _direction(one, named, f"direction.{one.get('layer')}", expected, f"{where}, part {i}")
        for i, one in enumerate(about.parts)
    ]
    if len({len(part.vector) for part in found}) > 1:
        raise SteeringError(f"The vectors in {tensors} have several widths. Fit them on one model.")
    return ControlVector(tuple(found))


def _read(path: Path, largest: int = 1_000_000_000) -> bytes:
    try:
        if path.stat().st_size > largest:
            raise SteeringError(f"{path} has {path.stat().st_size:,} bytes, too many for a vector: give another file.")
        return path.read_bytes()
    except OSError as error:
        raise SteeringError(f"{path} can't be read: {error.strerror}. Give {EXAMPLE}.") from error


def _tensors(content: bytes, path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        return load(content)
    except (SafetensorError, ValueError, KeyError) as error:
        said = " ".join(str(error).split())[:150]
        raise SteeringError(
            f"{path} is no safetensors file, or a damaged one ({said}). Save the vector again."
        ) from error


def _direction(
    card: dict[str, Any], tensors: dict[str, Tensor], name: str, expected: set[str], where: str
) -> Direction:
    """One direction of its card and its tensor, both checked."""
    about = schema.build(Card, card, where, SteeringError)
    if set(tensors) != expected:
        raise SteeringError(
            f"{where} speaks of the tensors {sorted(expected)}, the file beside it holds {sorted(tensors)[:20]}. Save "
            "the vector again."
        )
    fields = vars(about) | {"stability": about.stability and _interval(about.stability)}
    made = Direction(vector=tensors[name], **fields)
    check_unit(made)
    return replace(made, vector=result(made.vector))


def _interval(values: dict[str, int | float]) -> Interval:
    return Interval(**values | {"n": int(values["n"])})  # type: ignore[arg-type]


def load_direction(path: str | Path) -> Direction:
    """``load_vector`` for a file of one layer. SteeringError for a file of several."""
    found = load_vector(path)
    if isinstance(found, ControlVector):
        raise SteeringError(f"{str(path)!r} steers after the layers {found.layers}: read it with load_vector.")
    return found


# --- llama.cpp ----------------------------------------------------------------------------------------


ARCHITECTURE = "controlvector"


def export_gguf(directions: Vector | Sequence[Direction], path: str | Path, alpha: float = 1.0) -> Path:
    """Write a llama.cpp control vector: use it with ``llama-cli --control-vector-scaled FILE SCALE``.

    Tensor ``direction.N`` (float32 [d_model]) is added to the residual stream after layer N, counted from
    0 as here; llama.cpp refuses N = 0. Each is alpha times the typical norm long, so SCALE multiplies
    alpha. Metadata as repeng writes it (arXiv 2310.01405 made practical by repeng). Raises SteeringError, before
    anything is written, for directions that are none or of several widths, and for an alpha that is zero or no number.
    """
    from gguf import GGUFWriter

    if isinstance(alpha, bool) or not isinstance(alpha, Real) or not 0 < abs(alpha) < math.inf:
        raise SteeringError(f"The alpha is {alpha!r}. Allowed: a finite number other than 0; 1 is the default.")
    several = parts_of(directions) if isinstance(directions, Vector) else directions
    if not isinstance(several, Sequence) or not all(isinstance(d, Direction) for d in several):
        raise SteeringError(
            f"{shown(directions)} is no steering vector. Give a ControlVector, or a list of Directions."
        )
    layers = [d.layer for d in several]
    if not several or min(layers) < 1 or len(set(layers)) < len(layers):
        raise SteeringError(
            f"A control vector has one direction for each of several layers, from layer 1 on; these are for layers "
            f"{layers}. llama.cpp can't steer after layer 0."
        )
    for d in several:
        check_unit(d)
    tensors = {f"direction.{d.layer}": result(alpha * d.scale * d.vector).numpy() for d in several}
    if len({len(x) for x in tensors.values()}) > 1 or not all(
        np.isfinite(x).all() and x.any() for x in tensors.values()
    ):
        raise SteeringError(
            f"With alpha {alpha:g} the vectors of the layers {layers} are of several widths, or too large or too small "
            "for float32. Give directions of one model, and an alpha around 1."
        )
    target = Path(path)
    with _writing(target), files.atomic_path(target) as partial:
        writer = GGUFWriter(str(partial), ARCHITECTURE)
        writer.add_string(f"{ARCHITECTURE}.model_hint", several[0].model_type)
        writer.add_uint32(f"{ARCHITECTURE}.layer_count", len(several))
        for name, tensor in tensors.items():
            writer.add_tensor(name, tensor)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return target


def import_gguf(path: str | Path) -> list[Direction]:
    """Directions of a control vector file, one for each layer; alpha = 1 adds what the file holds.

    ``ControlVector(tuple(import_gguf(path)))`` steers with all of them.

    Raises SteeringError if the file is no control vector or a damaged one, or if a layer's vector is zero or not
    finite.
    """
    from gguf import GGMLQuantizationType, GGUFReader

    if not os.path.isfile(path):
        raise SteeringError(f"There is no file {path}. Give a control vector (.gguf) that repeng or Glassbox wrote.")
    try:
        reader = GGUFReader(str(path))
        field = reader.get_field("general.architecture")
        kind = field.contents() if field else None
        hint = reader.get_field(f"{ARCHITECTURE}.model_hint")
        model_type = str(hint.contents()) if hint else ""
    except Exception as error:  # the reader trusts what it reads: a damaged file fails anywhere
        said = " ".join(str(error).split())[:120]
        raise SteeringError(f"{path} is no GGUF file, or a damaged one ({said}). Export the vector again.") from error
    if kind != ARCHITECTURE:
        raise SteeringError(
            f"{path} holds {kind!r}, not a control vector. Give a file of architecture {ARCHITECTURE!r}."
        )
    found = {}
    for tensor in reader.tensors:
        prefix, _, number = tensor.name.partition(".")
        if prefix != "direction":
            continue
        plain = tensor.tensor_type in (GGMLQuantizationType.F32, GGMLQuantizationType.F16)
        vector = torch.from_numpy(np.array(tensor.data, dtype=np.float32)) if plain else torch.zeros(0)
        length = float(vector.norm())
        if not number.isdecimal() or int(number) in found or vector.ndim != 1 or not 0 < length < math.inf:
            raise SteeringError(
                f"The tensor {tensor.name!r} of {path} ({tensor.tensor_type.name}, length {length:.3g}) is no vector "
                "to steer with. Allowed: one for each layer, named direction.LAYER, F32 or F16, finite and not zero. "
                "Export the layers that were fitted only."
            )
        name = Path(path).stem
        found[int(number)] = Direction(vector / length, int(number), length, name, "imported", model_type=model_type)
    if not found or len({len(d.vector) for d in found.values()}) > 1:
        widths = sorted({len(d.vector) for d in found.values()})
        raise SteeringError(
            f"{path} holds {len(found)} vectors of the widths {widths}. Allowed: at least one, all of the width of one "
            "model."
        )
    return [found[layer] for layer in sorted(found)]
