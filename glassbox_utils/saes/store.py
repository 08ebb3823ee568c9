"""Save and load sparse autoencoders in sae_lens format, checked against the model that they belong to.

A folder is whole or not there, whenever the writing process was killed; and what is loaded is what was saved: cfg.json
holds the sha256 of the weights, beside sae_lens's own settings (which do not copy it when an SAE is saved anew).
"""

import copy
import json
import math
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
from glassbox_utils.saes.config import SaeError, TrainConfig, saes_folder, site_of, width_of
from glassbox_utils.saes.harvest import OUTLIER, Scaling
from glassbox_utils.saes.reading import check_fits, check_kind, measured_scale, median_norm

WEIGHTS, SETTINGS = "sae_weights.safetensors", "cfg.json"
SCALER = "activation_scaler.json"
"""where a checkpoint of sae_lens keeps the scale of its inputs"""
CENTRING = r"\s*This SAE has non-empty model_from_pretrained_kwargs"
"""sae_lens's advice to load the model with centred weights; ``coding.seen`` does what that would do"""


def save_sae(config: TrainConfig, sae: Any, scaling: Scaling, folder: Path, model: Model) -> None:
    """Write the SAE in sae_lens format, float16, for activations in the model's own units.

    The metadata hold what is needed to use it rightly: the hook, the model's hash, the context and the first token; and
    the hash of the weights. Other files of the folder stay. A kill at any moment leaves the folder as it was or as it
    is meant. SaeError for weights that are no numbers in float16, AssetError for a folder that can't be written.
    """
    final = copy.deepcopy(sae)
    final.fold_activation_norm_scaling_factor(scaling.scale)
    if config.normalize == "constant_norm_rescale":
        final.cfg.normalize_activations = config.normalize  # sae_lens divides by the norm itself, wherever it is opened
    final.W_enc.data = final.W_enc.data.contiguous()  # the file format knows no other layout
    final.cfg.metadata.model_name = Path(config.model).name
    final.cfg.metadata.model_hash = model.hash
    final.cfg.metadata.hook_name = config.hook
    final.cfg.metadata.context_size = config.context
    final.cfg.metadata.prepend_bos = first_token(model) is not None
    final.cfg.metadata.median_norm = scaling.median_norm
    final.cfg.metadata.excluded = excluded(config)
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


def excluded(config: TrainConfig) -> str:
    """The positions that an SAE did not learn from, in words."""
    if config.normalize == "constant_norm_rescale":
        return "nothing: each position is divided by its own norm"
    return f"first token; residual norm above {OUTLIER} times the median"


def shipped() -> list[str]:
    """Names of the SAEs of the prepared folder."""
    return sorted(path.parent.name for path in saes_folder().glob("*/cfg.json"))


def folder_of(name_or_path: str | Path) -> Path:
    """The folder of a prepared SAE, or the folder itself; SaeError lists near matches and all names."""
    path = Path(name_or_path) if os.path.exists(Path(name_or_path) / SETTINGS) else saes_folder() / str(name_or_path)
    if not str(name_or_path) or not os.path.exists(path / SETTINGS):
        near = get_close_matches(str(name_or_path), shipped(), n=2, cutoff=0.3)
        hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
        raise SaeError(
            f"There is no SAE {shown(str(name_or_path))}.{hint} Shipped: {', '.join(shipped()) or 'none'}; or "
            f"give a folder that holds {SETTINGS} and {WEIGHTS}, or a release of sae_lens with its id, such as "
            "'gpt2-small-res-jb/blocks.8.hook_resid_pre'."
        )
    return path


def card_of(name_or_path: str | Path) -> dict[str, Any]:
    """What ``train-sae`` measured of an SAE (``card.json``); empty for one that somebody else made. SaeError for a
    damaged one."""
    path = Path(name_or_path) / "card.json"
    path = path if path.exists() else saes_folder() / str(name_or_path) / "card.json"
    return schema.read_mapping(path, SaeError, "a folder that train-sae has written") if path.exists() else {}


def load_sae(name_or_path: str | Path, model: Model | None = None) -> Any:
    """An SAE of the prepared folder by name, any folder in sae_lens format, or a published one as ``release/sae_id``
    (fetched from the hub), in float32; one of z reads all heads side by side.

    What others do not store is measured if a model is given, and kept with the SAE that is returned: its median norm,
    the scale of its inputs (``expected_average_only_in``), and the hash of the model, with a warning for the last two.
    Raises SaeError for a damaged folder (its weights are not those whose hash it holds), for what is no SAE (a
    transcoder), and with a model given if the SAE was trained on other weights (by hash), at another width or layer.
    """
    published = _release(str(name_or_path))
    sae = _published(*published) if published else _from_folder(folder_of(name_or_path))
    if getattr(sae, "hook_z_reshaping_mode", False):
        sae.turn_off_forward_pass_hook_z_reshaping()
    if model is not None and sae.cfg.normalize_activations == "expected_average_only_in":
        _scale(sae, model, str(name_or_path))
    check_kind(sae)
    if model is not None:
        _complete(sae, model, str(name_or_path))
    return sae


def _complete(sae: Any, model: Model, name: str) -> None:
    """Check an SAE against the model, and add to its metadata what can be measured."""
    check_fits(model, sae)
    meta = sae.cfg.metadata
    meta.median_norm = median_norm(model, sae)
    if meta.get("model_hash") is None:
        warnings.warn(
            f"The SAE {name} does not say which weights it was trained on (no model_hash in its metadata; its model is "
            f"called {meta.get('model_name') or 'nothing'}). Whether it belongs to {model.name} is for you to know: an "
            "SAE of another model gives numbers, too.",
            stacklevel=3,
        )
        meta.model_hash = model.hash


def _scale(sae: Any, model: Model, name: str) -> None:
    """Fold a measured scale into the weights: the SAE's own, by its training text, was not stored."""
    if sae.cfg.d_in != (width := width_of(model, site_of(sae.cfg.metadata.hook_name))):
        raise SaeError(f"The SAE {name} reads {sae.cfg.d_in} dimensions, its place in {model.name} has {width}.")
    factor = measured_scale(model, sae)
    sae.fold_activation_norm_scaling_factor(factor)
    warnings.warn(
        f"The SAE {name} expects inputs scaled by its training text, and the factor is not stored with it. On our "
        f"passages it is {factor:.4g}, which is used.",
        stacklevel=3,
    )


def _from_folder(path: Path) -> Any:
    """An SAE from disk, its declared scale folded into the weights; SaeError for a damaged folder."""
    settings = schema.read_mapping(path / SETTINGS, SaeError, "the cfg.json of a folder in sae_lens format")
    known = settings.get("weights_sha256")
    again = "Restore the folder (git checkout, if it is a shipped one), or train it again: `glassbox train-sae CONFIG`."
    if not (path / WEIGHTS).is_file():
        raise SaeError(f"{path} has no {WEIGHTS}: it is no SAE, or incomplete. {again}")
    if known is not None and files.sha256_of(path / WEIGHTS) != known:
        raise SaeError(f"{path / WEIGHTS} is damaged: its sha256 is not the one that {SETTINGS} holds. {again}")
    sae = _loaded(path, again)
    if sae.cfg.normalize_activations == "expected_average_only_in" and (path / SCALER).is_file():
        declared = schema.read_mapping(path / SCALER, SaeError, "the scale that sae_lens writes beside a checkpoint")
        factor = declared.get("scaling_factor")
        if factor is not None:
            if isinstance(factor, bool) or not isinstance(factor, int | float) or not 0 < factor < math.inf:
                raise SaeError(f"scaling_factor is {shown(factor)} in {path / SCALER}. Allowed: a number above 0.")
            sae.fold_activation_norm_scaling_factor(factor)
    return sae


def _loaded(path: Path, again: str) -> Any:
    """sae_lens's own reading of a folder, with its errors in words."""
    from sae_lens import SAE

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=CENTRING)
            sae = SAE.load_from_disk(path, dtype="float32")
    except (SafetensorError, RuntimeError, ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise SaeError(f"{path} can't be read as an SAE in sae_lens format ({reason}). {again}") from error
    return _finite(sae, f"{path}", again)


def _finite(sae: Any, name: str, again: str) -> Any:
    if wrong := [name for name, tensor in sae.state_dict().items() if not tensor.isfinite().all()]:
        raise SaeError(f"{', '.join(wrong)} of {name} hold values that are no finite numbers. {again}")
    return sae.eval()


def identity_of(name: str) -> str:
    """What changes when an SAE is trained again: the hash of its weights; the name of one that is fetched."""
    try:
        return str(files.sha256_of(folder_of(name) / WEIGHTS))
    except (SaeError, OSError):
        return name


# --- published ----------------------------------------------------------------------------------------


def _release(name: str) -> tuple[str, str] | None:
    """(release, sae_id) of ``release/sae_id`` or ``owner/repository/folder``; None for a name or a folder."""
    if "/" not in name or name[0] in "/.~" or os.path.exists(name) or os.path.exists(saes_folder() / name):
        return None
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    parts = name.split("/")
    if parts[0] in get_pretrained_saes_directory():
        return parts[0], "/".join(parts[1:])
    return ("/".join(parts[:2]), "/".join(parts[2:])) if len(parts) > 2 else None


def _published(release: str, sae_id: str) -> Any:
    """A published SAE as ``SAE.from_pretrained`` gives it, with its errors in words."""
    from sae_lens import SAE

    name = f"{release}/{sae_id}"
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=CENTRING)
            warnings.filterwarnings("ignore", message="norm_scaling_factor not found")  # it is measured
            sae = SAE.from_pretrained(release, sae_id, device="cpu", dtype="float32")
    except Exception as error:  # the hub's and sae_lens's: no network, no such id, a gated or damaged repository
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise SaeError(
            f"The SAE {sae_id} of the release {release} can't be fetched ({reason}). Without a network, fetch the "
            "folder elsewhere and give its path; the ids of a release are listed in sae_lens's pretrained_saes.yaml."
        ) from error
    return _finite(sae, name, "Take another one.")


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
