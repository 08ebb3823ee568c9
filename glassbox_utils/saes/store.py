"""Save and load sparse autoencoders in sae_lens format, checked against the model that they belong to.

A folder is whole or not there, whenever the writing process was killed; and what is loaded is what was saved: cfg.json
holds the sha256 of the weights, beside sae_lens's own settings (which do not copy it when an SAE is saved anew).
"""

import copy
import json
import os
import shutil
import warnings
from dataclasses import asdict
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from glassbox_utils.core import checkpoints, files, schema
from glassbox_utils.core.arguments import shown
from glassbox_utils.core.devices import beside
from glassbox_utils.core.models import Model
from glassbox_utils.core.text import first_token
from glassbox_utils.saes.config import SAES, SaeError, TrainConfig
from glassbox_utils.saes.harvest import OUTLIER, Scaling
from glassbox_utils.saes.reading import check_fits, check_kind

WEIGHTS, SETTINGS = "sae_weights.safetensors", "cfg.json"


def save_sae(config: TrainConfig, sae: Any, scaling: Scaling, folder: Path, model: Model) -> None:
    """Write the SAE in sae_lens format, float16, for activations in the model's own units.

    The metadata hold what is needed to use it rightly: the hook, the model's hash, the context and the first token; and
    the hash of the weights. Other files of the folder stay. A kill at any moment leaves the folder as it was or as it
    is meant. SaeError for weights that are no numbers in float16, AssetError for a folder that can't be written.
    """
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
    folder, here = Path(folder).resolve(), Path.cwd()
    with files.explain_os_errors(folder), files.atomic_path(folder) as new:
        new.mkdir()
        for path in folder.glob("*") if folder.is_dir() else ():
            if path.name not in (WEIGHTS, SETTINGS):
                shutil.copytree(path, new / path.name) if path.is_dir() else shutil.copy2(path, new / path.name)
        weights, settings = map(Path, final.save_inference_model(new))
        tensors = {name: tensor.half().contiguous() for name, tensor in load_file(weights).items()}
        if wrong := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
            raise SaeError(
                f"{', '.join(wrong)} of the SAE {config.name!r} hold values that float16 has not. Nothing was written. "
                "The training diverged: lower lr, or raise warmup."
            )
        save_file(tensors, weights)
        values = json.loads(settings.read_text(encoding="utf-8")) | {"dtype": "float16", "device": "cpu"}
        values["weights_sha256"] = files.sha256_of(weights)
        settings.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    if here.is_relative_to(folder):  # a process in the folder would be left in the old one
        os.chdir(here)


def shipped() -> list[str]:
    """Names of the SAEs in data/saes."""
    return sorted(path.parent.name for path in SAES.glob("*/cfg.json"))


def folder_of(name_or_path: str | Path) -> Path:
    """The folder of a shipped SAE, or the folder itself; SaeError lists near matches and all names."""
    path = Path(name_or_path) if os.path.exists(Path(name_or_path) / SETTINGS) else SAES / str(name_or_path)
    if not str(name_or_path) or not os.path.exists(path / SETTINGS):
        near = get_close_matches(str(name_or_path), shipped(), n=2, cutoff=0.3)
        hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
        raise SaeError(
            f"There is no SAE {shown(str(name_or_path))}.{hint} Shipped: {', '.join(shipped()) or 'none'}; or "
            f"give a folder that holds {SETTINGS} and {WEIGHTS}."
        )
    return path


def load_sae(name_or_path: str | Path, model: Model | None = None) -> Any:
    """A shipped SAE by name, or any folder in sae_lens format, in float32; one of z reads all heads side by side.

    Raises SaeError for a damaged folder (its weights are not those whose hash it holds), for what is no SAE (a
    transcoder), and with a model given if the SAE was trained on other weights (by hash), at another width or layer.
    An SAE that does not say which weights it was trained on is loaded with a warning.
    """
    path = folder_of(name_or_path)
    settings = schema.read_mapping(path / SETTINGS, SaeError, "the cfg.json of a folder in sae_lens format")
    known = settings.get("weights_sha256")
    again = "Restore the folder (git checkout, if it is a shipped one), or train it again: `glassbox train-sae CONFIG`."
    if not (path / WEIGHTS).is_file():
        raise SaeError(f"{path} has no {WEIGHTS}: it is no SAE, or incomplete. {again}")
    if known is not None and files.sha256_of(path / WEIGHTS) != known:
        raise SaeError(f"{path / WEIGHTS} is damaged: its sha256 is not the one that {SETTINGS} holds. {again}")
    sae = _loaded(path, again)
    if getattr(sae, "hook_z_reshaping_mode", False):
        sae.turn_off_forward_pass_hook_z_reshaping()
    check_kind(sae)
    if model is not None:
        check_fits(model, sae)
        if sae.cfg.metadata.get("model_hash") is None:
            warnings.warn(
                f"The SAE {path.name} does not say which weights it was trained on (no model_hash in its metadata). "
                f"Whether it belongs to {model.name} is for you to know: an SAE of another model gives numbers, too.",
                stacklevel=2,
            )
    return sae


def _loaded(path: Path, again: str) -> Any:
    """sae_lens's own reading of a folder, with its errors in words."""
    from sae_lens import SAE

    try:
        sae = SAE.load_from_disk(path, dtype="float32")
    except (SafetensorError, RuntimeError, ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise SaeError(f"{path} can't be read as an SAE in sae_lens format ({reason}). {again}") from error
    if wrong := [name for name, tensor in sae.state_dict().items() if not tensor.isfinite().all()]:
        raise SaeError(f"{', '.join(wrong)} of {path} hold values that are no finite numbers. {again}")
    return sae.eval()


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
    tensors = {f"sae.{name}": tensor for name, tensor in sae.state_dict().items()} | checkpoints.memory(optimizer)
    tensors |= {"silent": silent, "rng": torch.get_rng_state(), "mean": scaling.mean}
    words = {"config": asdict(config), "state": state | {"median_norm": scaling.median_norm, "scale": scaling.scale}}
    checkpoints.keep(checkpoint_path(folder), tensors, words)


def read_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest checkpoint in a folder, on the CPU; None if there is none, SaeError if it is damaged."""
    path = checkpoint_path(folder)
    if not path.exists():
        return None
    words, tensors = checkpoints.read(path, SaeError)
    missing = {"config", "state"} - set(words) or {"mean", "rng", "silent"} - set(tensors)
    if missing:
        raise SaeError(f"{path} is no checkpoint of ours: it has no {', '.join(sorted(missing))}. Delete it.")
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
