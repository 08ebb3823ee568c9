"""Save and load sparse autoencoders in sae_lens format, checked against the model that they belong to."""

import copy
import json
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file

from glassbox_utils.core import assets
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
    if model is not None and trained_on is not None and trained_on != model.hash:
        raise SaeError(
            f"The SAE {path.name} was trained on {sae.cfg.metadata.model_name} with hash {trained_on}, this model is "
            f"{model.name} with {model.hash}. Load the model that the card names, or train an SAE for this one."
        )
    if model is not None and sae.cfg.d_in != model.d_model:
        raise SaeError(f"The SAE {path.name} reads {sae.cfg.d_in} dimensions, {model.name} has {model.d_model}.")
    return sae
