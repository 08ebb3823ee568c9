"""Save and load sparse autoencoders in sae_lens format, checked against the model that they belong to."""

import copy
import json
from dataclasses import asdict
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from glassbox_utils.core import assets
from glassbox_utils.core.devices import beside
from glassbox_utils.core.identity import difference
from glassbox_utils.core.models import Model
from glassbox_utils.core.text import first_token
from glassbox_utils.saes.config import SAES, SaeError, TrainConfig
from glassbox_utils.saes.harvest import OUTLIER, Scaling


def save_sae(config: TrainConfig, sae: Any, scaling: Scaling, folder: Path, model: Model) -> None:
    """Write the SAE in sae_lens format, float16, for activations in the model's own units.

    The metadata hold what is needed to use it rightly: the hook, the model's hash, the context and the first token.
    """
    folder = Path(folder)
    final = copy.deepcopy(sae)
    final.fold_activation_norm_scaling_factor(scaling.scale)
    final.W_enc.data = final.W_enc.data.contiguous()  # the file format knows no other layout
    final.cfg.metadata.model_name = config.model
    final.cfg.metadata.model_hash = model.hash
    final.cfg.metadata.hook_name = config.hook
    final.cfg.metadata.context_size = config.context
    final.cfg.metadata.prepend_bos = first_token(model) is not None
    final.cfg.metadata.median_norm = scaling.median_norm
    final.cfg.metadata.excluded = f"first token; residual norm above {OUTLIER} times the median"
    final.cfg.metadata.corpus = config.corpus
    weights, settings = final.save_inference_model(folder)
    with safe_open(weights, "pt") as file:
        tensors = {name: file.get_tensor(name).half().contiguous() for name in file.keys()}  # noqa: SIM118
    values = json.loads(Path(settings).read_text()) | {"dtype": "float16", "device": "cpu"}
    with assets.atomic_path(Path(weights)) as partial:
        save_file(tensors, partial)
    with assets.atomic_path(Path(settings)) as partial:
        partial.write_text(json.dumps(values, indent=1) + "\n")


def shipped() -> list[str]:
    """Names of the SAEs in data/saes."""
    return sorted(path.parent.name for path in SAES.glob("*/cfg.json"))


def load_sae(name_or_path: str | Path, model: Model | None = None) -> Any:
    """A shipped SAE by name, or any folder in sae_lens format, in float32.

    With a model given, raises SaeError if the SAE was trained on other weights (by hash) or another width.
    """
    path = Path(name_or_path) if Path(name_or_path).exists() else SAES / str(name_or_path)
    if not (path / "cfg.json").exists():
        near = get_close_matches(str(name_or_path), shipped(), n=2, cutoff=0.3)
        hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
        raise SaeError(
            f"There is no SAE {str(name_or_path)!r}.{hint} Shipped: {', '.join(shipped()) or 'none'}; or give a folder "
            "that holds cfg.json and sae_weights.safetensors."
        )
    from sae_lens import SAE

    sae = SAE.load_from_disk(path, dtype="float32")
    sae.eval()
    trained_on = sae.cfg.metadata.get("model_hash")
    if model is not None and (why := difference(trained_on, model.hash)):
        raise SaeError(
            f"The SAE {path.name} was trained on {sae.cfg.metadata.model_name} with hash {trained_on}, this model is "
            f"{model.name} with {model.hash}: {why}. Load the model that the card names, or train an SAE for this one."
        )
    if model is not None and sae.cfg.d_in != model.d_model:
        raise SaeError(f"The SAE {path.name} reads {sae.cfg.d_in} dimensions, {model.name} has {model.d_model}.")
    return sae


# --- checkpoints --------------------------------------------------------------------------------------


class Checkpoint(NamedTuple):
    """A training run at one moment: one safetensors file, whose metadata hold what is not a tensor as JSON."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    """``sae.NAME``, ``optimizer.NUMBER.NAME``, ``silent``, ``rng``, ``mean``"""
    state: dict[str, Any]
    """place in the data, history, seconds, the type that products are computed in, scaling"""

    @property
    def scaling(self) -> Scaling:
        return Scaling(self.state["median_norm"], self.state["scale"], self.tensors["mean"])


def checkpoint_path(folder: Path) -> Path:
    return Path(folder) / "checkpoint.safetensors"


def write_checkpoint(
    folder: Path, config: TrainConfig, sae: Any, optimizer: Any, silent: Tensor, state: dict[str, Any], scaling: Scaling
) -> None:
    """Write a checkpoint beside the old one and rename it: after a kill at any moment one of the two is there."""
    tensors = {f"sae.{name}": tensor for name, tensor in sae.state_dict().items()}
    for number, values in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{number}.{name}": tensor for name, tensor in values.items()}
    tensors |= {"silent": silent, "rng": torch.get_rng_state(), "mean": scaling.mean}
    near = {name: beside(tensor.detach(), torch.device("cpu")).contiguous() for name, tensor in tensors.items()}
    words = {"config": asdict(config), "state": state | {"median_norm": scaling.median_norm, "scale": scaling.scale}}
    path = checkpoint_path(folder)
    with assets.explain_os_errors(path), assets.atomic_path(path) as partial:
        save_file(near, partial, {name: json.dumps(value) for name, value in words.items()})


def read_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest checkpoint in a folder, on the CPU; None if there is none."""
    path = checkpoint_path(folder)
    if not path.exists():
        return None
    with safe_open(path, "pt") as file:
        words = {name: json.loads(value) for name, value in file.metadata().items()}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return Checkpoint(words["config"], tensors, words["state"])


def restore(checkpoint: Checkpoint, sae: Any, optimizer: Any) -> None:
    """Put weights and the optimiser's memory back in place, which keeps devices and the encoder's memory layout."""
    with torch.no_grad():
        for name, tensor in sae.state_dict().items():
            tensor.copy_(checkpoint.tensors[f"sae.{name}"])
        for number, parameter in enumerate(p for group in optimizer.param_groups for p in group["params"]):
            for name, tensor in checkpoint.tensors.items():
                if name.startswith(f"optimizer.{number}."):
                    same = tensor.shape == parameter.shape
                    kept = torch.empty_like(parameter).copy_(tensor) if same else beside(tensor, parameter)
                    optimizer.state[parameter][name.rsplit(".", 1)[1]] = kept
