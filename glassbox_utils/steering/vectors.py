"""Steering vectors: a direction in the residual stream, added while the model writes, and gone afterwards.

*Fit* a direction from texts with and without a trait, *steer* with it for some rows of a batch, *sweep* layer and
strength under a side-effect budget, *save* it, and *export* it for llama.cpp. Strength is in units of the layer's
typical residual norm, so that 0.1 means the same push at every layer and in every model: the typical norm is the
median over the tokens of the fitting texts, without each row's first token (an attention sink whose norm is many
times larger) and without tokens above ten times the median.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from glassbox_utils.core import devices
from glassbox_utils.core.assets import DATA
from glassbox_utils.core.devices import result
from glassbox_utils.core.errors import GlassboxError
from glassbox_utils.core.statistics import Interval


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


def random_direction(like: Direction, seed: int) -> Direction:
    """A random unit vector at the same layer and with the same units: the control of every steering claim."""
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
    return ControlVector(
        tuple(random_direction(d, seed if shared else 1000 * (seed + 1) + d.layer) for d in like.parts)
    )


# --- files --------------------------------------------------------------------------------------------


def save_direction(direction: Vector, path: str | Path) -> Path:
    """Write PATH.safetensors (unit vectors, float32) and PATH.json (the card); returns the card's path.

    A ``ControlVector`` becomes one file too: tensors ``direction.LAYER``, and a card for each.
    """
    from safetensors.torch import save_file

    stem = Path(path).with_suffix("")
    stem.parent.mkdir(parents=True, exist_ok=True)
    several = isinstance(direction, ControlVector)
    tensors = {f"direction.{d.layer}" if several else "vector": d.vector for d in parts_of(direction)}
    tensors = {name: result(v).contiguous() for name, v in tensors.items()}
    save_file(tensors, stem.with_suffix(".safetensors"))
    cards = [asdict(replace(d, vector=torch.zeros(0))) for d in parts_of(direction)]
    for one in cards:
        del one["vector"]
    card = {"parts": cards} if several else cards[0]
    card |= {
        "units": "alpha 1 adds a vector of length scale, the layer's typical residual norm",
        "licence": "Apache-2.0",
    }
    stem.with_suffix(".json").write_text(json.dumps(card, indent=1) + "\n")
    return stem.with_suffix(".json")


def load_vector(path: str | Path) -> Vector:
    """Read what ``save_direction`` wrote; a bare name is looked up in data/vectors.

    Raises SteeringError if a file is missing.
    """
    from safetensors.torch import load_file

    stem = Path(path).with_suffix("")
    if not stem.with_suffix(".json").exists() and stem.parent == Path():
        stem = DATA / "vectors" / stem.name
    if not stem.with_suffix(".json").exists() or not stem.with_suffix(".safetensors").exists():
        shipped = sorted(p.stem for p in (DATA / "vectors").glob("*.json"))
        raise SteeringError(
            f"There is no steering vector {str(path)!r}: a card (.json) and a tensor (.safetensors) are needed. "
            f"Shipped vectors: {', '.join(shipped) or 'none'}."
        )
    card, tensors = json.loads(stem.with_suffix(".json").read_text()), load_file(stem.with_suffix(".safetensors"))
    if "parts" in card:
        return ControlVector(tuple(_from_card(one, tensors[f"direction.{one['layer']}"]) for one in card["parts"]))
    return _from_card({key: card[key] for key in card if key not in ("units", "licence")}, tensors["vector"])


def load_direction(path: str | Path) -> Direction:
    """``load_vector`` for a file of one layer. SteeringError for a file of several."""
    found = load_vector(path)
    if isinstance(found, ControlVector):
        raise SteeringError(f"{str(path)!r} steers after the layers {found.layers}: read it with load_vector.")
    return found


def _from_card(card: Mapping[str, Any], vector: Tensor) -> Direction:
    fields = {key: tuple(value) if isinstance(value, list) else value for key, value in card.items()}
    return Direction(vector=vector, **fields | {"stability": card["stability"] and Interval(**card["stability"])})


ARCHITECTURE = "controlvector"


def export_gguf(directions: Vector | Sequence[Direction], path: str | Path, alpha: float = 1.0) -> Path:
    """Write a llama.cpp control vector: use it with ``llama-cli --control-vector-scaled FILE SCALE``.

    Tensor ``direction.N`` (float32 [d_model]) is added to the residual stream after layer N, counted from
    0 as here; llama.cpp refuses N = 0. Each is alpha times the typical norm long, so SCALE multiplies
    alpha. Metadata as repeng writes it (arXiv 2310.01405 made practical by repeng).
    """
    from gguf import GGUFWriter

    several = parts_of(directions) if isinstance(directions, Vector) else tuple(directions)
    layers = [d.layer for d in several]
    if not several or min(layers) < 1 or len(set(layers)) < len(layers):
        raise SteeringError(
            f"A control vector has one direction for each of several layers, from layer 1 on; these are for layers "
            f"{layers}. llama.cpp can't steer after layer 0."
        )
    writer = GGUFWriter(str(path), ARCHITECTURE)
    writer.add_string(f"{ARCHITECTURE}.model_hint", several[0].model_type)
    writer.add_uint32(f"{ARCHITECTURE}.layer_count", len(several))
    for d in several:
        writer.add_tensor(f"direction.{d.layer}", result(alpha * d.scale * d.vector).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Path(path)


def import_gguf(path: str | Path) -> list[Direction]:
    """Directions of a control vector file, one for each layer; alpha = 1 adds what the file holds.

    ``ControlVector(tuple(import_gguf(path)))`` steers with all of them.

    Raises SteeringError if the file is no control vector.
    """
    from gguf import GGUFReader

    if not Path(path).exists():
        raise SteeringError(f"There is no file {path}. Give a control vector (.gguf) that repeng or Glassbox wrote.")
    reader = GGUFReader(str(path))
    field = reader.get_field("general.architecture")
    kind = field.contents() if field else None
    if kind != ARCHITECTURE:
        raise SteeringError(
            f"{path} holds {kind!r}, not a control vector. Give a file of architecture {ARCHITECTURE!r}."
        )
    hint = reader.get_field(f"{ARCHITECTURE}.model_hint")
    model_type = str(hint.contents()) if hint else ""
    found = []
    for tensor in reader.tensors:
        if tensor.name.startswith("direction."):
            vector = torch.from_numpy(np.array(tensor.data, dtype=np.float32))
            length = float(vector.norm())
            layer = int(tensor.name.split(".")[1])
            found.append(Direction(vector / length, layer, length, Path(path).stem, "imported", model_type=model_type))
    return sorted(found, key=lambda d: d.layer)
