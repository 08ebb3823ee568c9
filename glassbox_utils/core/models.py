"""One loaded model: transformers for speed, a TransformerLens bridge for analysis, the same tensors in both.

``load_model()`` gives the embedded SmolLM2-135M-Instruct; any name or folder that transformers loads works
through the same call. Nothing here assumes a number of layers, of heads or one tokenizer.

Three conventions hold everywhere, and are decided here once:

* **Weights are raw** (no layer-norm folding, no centring): what the checkpoint says is what is analysed.
* **Raw text starts with one BOS token** if the tokenizer has one, else with its EOS (GPT-2's
  ``<|endoftext|>``), else with nothing. **Chat prompts** go through the tokenizer's template, which brings
  its own first token.
* **Batches are padded on the left**, with an attention mask, so that the last position is always the newest.
"""

import copy
import json
import os
import socket
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from numbers import Integral
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import nn

from glassbox_utils.core import anatomy, devices, identity, packaged, unpacked
from glassbox_utils.core.anatomy import KINDS as KINDS
from glassbox_utils.core.anatomy import Kind as Kind
from glassbox_utils.core.anatomy import Site as Site
from glassbox_utils.core.anatomy import find_part as find_part
from glassbox_utils.core.anatomy import sites as sites
from glassbox_utils.core.embedded import EMBEDDED, embedded_folder
from glassbox_utils.core.errors import ModelError as ModelError

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, eq=False)
class Model:
    """A language model, its tokenizer, and its bridge. Build it with ``load_model`` or ``wrap_model``."""

    name: str
    hf: Any
    """plain transformers model in eval mode: fast, and what generation uses"""
    tokenizer: Any
    twin: Any
    """a second tree of modules over the same tensors, with eager attention; the bridge takes it over"""
    sites: dict[Site, tuple[nn.Module, nn.Module]]
    """the module of each site, in ``hf`` and in ``twin``; ModelError for one that this architecture has not"""
    origin: identity.Origin | None = None
    """the files that the weights were loaded from, for ``hash``"""

    @cached_property
    def bridge(self) -> Any:
        """The TransformerBridge (booted on first use): hooks, caches, circuitsvis-ready patterns."""
        from transformer_lens.model_bridge import TransformerBridge

        # Without a name and this flag TransformerLens would read the tokenizer from its folder again: one that was made
        # in memory has none, a folder may have moved, and tokens that were added since would be missing.
        words = copy.deepcopy(self.tokenizer)
        words.init_kwargs = {**words.init_kwargs, "name_or_path": self.name, "add_bos_token": True}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                bridge = TransformerBridge.boot_transformers(
                    self.tokenizer.name_or_path or self.name,
                    hf_model=self.twin,
                    tokenizer=words,
                    device=str(self.device),
                    dtype=self.dtype,
                )
        except Exception as error:  # whatever a foreign library raises for an architecture that it does not know
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise ModelError(
                f"TransformerLens can't make a bridge of {self.name} ({type(self.hf).__name__}): {reason}. Use what "
                "needs no bridge (attention, head_scores, capture, edit, ablate_heads, steer), or a model that it "
                "supports."
            ) from error
        bridge.eval()
        return bridge

    @cached_property
    def anatomy(self) -> list[anatomy.Layer]:
        """How each layer writes into the residual stream, measured on first use: see ``anatomy``."""
        return anatomy.measure(self.hf, self.tokenizer.bos_token_id or 0)

    def factor(self, site: Site) -> float:
        """What a sublayer's output is multiplied with on its way into the stream (1 but for Granite's kind)."""
        if site.kind not in ("attn_out", "mlp_out"):
            return 1.0
        layer = self.anatomy[site.layer]
        return (layer.attention if site.kind == "attn_out" else layer.mlp).factor

    @cached_property
    def hash(self) -> str:
        """16 hex digits that identify weights and tokenizer (not the file, the name, or the type that it is loaded in).

        SAEs, vectors and studies record it, and refuse to be used with another model: see ``identity``.
        """
        return identity.of_model(self.hf, self.tokenizer, self.origin)

    @property
    def config(self) -> Any:
        """The text model's transformers configuration."""
        return self.hf.config.get_text_config()

    @property
    def device(self) -> torch.device:
        return next(self.hf.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.hf.parameters()).dtype

    @property
    def padding(self) -> int:
        """The id that fills rows up; masked everywhere, so any will do where the tokenizer has none."""
        pad = self.tokenizer.pad_token_id
        return 0 if pad is None else pad

    @property
    def n_layers(self) -> int:
        return self.config.num_hidden_layers

    @property
    def n_heads(self) -> int:
        return self.config.num_attention_heads

    @property
    def d_model(self) -> int:
        return self.config.hidden_size

    @property
    def d_head(self) -> int:
        return getattr(self.config, "head_dim", None) or self.d_model // self.n_heads

    @property
    def n_context(self) -> int:
        """Tokens that fit; for an architecture that names no limit (ALiBi) as many as there are numbers."""
        named = (getattr(self.config, name, None) for name in ("max_position_embeddings", "max_seq_len", "seq_length"))
        return next((n for n in named if n), sys.maxsize)

    def __repr__(self) -> str:
        place = f"{self.device}, {str(self.dtype).removeprefix('torch.')}"
        chosen = "" if place == "cpu, float32" else f", {place}"
        return f"Model({self.name}: {self.n_layers} layers x {self.n_heads} heads, d_model {self.d_model}{chosen})"


# --- loading ------------------------------------------------------------------------------------------


def load_model(
    name_or_path: str | Path = EMBEDDED,
    adapter: str | Path | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
) -> Model:
    """Load a model by name or folder, with an optional LoRA folder merged into its weights.

    ``name_or_path``: ``SmolLM2-135M-Instruct`` (the default; needs no hub), a folder written by
    ``save_pretrained``, a GGUF file, or any Hugging Face name. ``device``: ``cpu``, ``cuda``, ``mps`` or None for the
    best one there is. ``dtype``: ``float32``, ``bfloat16`` or ``float16`` (as text or of torch); None is
    GLASSBOX_MODEL_DTYPE, else float32 on every device, so that results do not depend on the machine. Raises ModelError
    for a name, folder, adapter or type that can't be used, devices.DeviceError for the device, and assets.AssetError
    if the embedded model can't be fetched.
    """
    place, kind = devices.choose(device), dtype_of(dtype)
    path = resolve(name_or_path)
    hf, tokenizer = _from_pretrained(path, str(name_or_path), kind)
    if adapter is not None:
        hf = _merge(hf, Path(adapter))
    hf = hf.to(place)
    origin = identity.origin_of(hf, path, None if adapter is None else Path(adapter))
    return wrap_model(hf, tokenizer, Path(name_or_path).name, origin)


def dtype_of(dtype: torch.dtype | str | None) -> torch.dtype:
    """The number type that is meant; None is GLASSBOX_MODEL_DTYPE, else float32. ModelError lists what is allowed."""
    dtype = os.environ.get("GLASSBOX_MODEL_DTYPE") or "float32" if dtype is None else dtype
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise ModelError(
            f"The dtype {dtype!r} can't be used. Allowed: {', '.join(DTYPES)} (as text, or torch.float32 and so on), "
            "or None for float32."
        )
    return getattr(torch, name)


def resolve(name_or_path: str | Path) -> str:
    """What transformers can load: a folder in the cache for the names of models that come in packages and for a GGUF
    file, which is de-quantised into it once; anything else as it is."""
    if str(name_or_path) == EMBEDDED:
        return str(embedded_folder())
    if str(name_or_path) in packaged.MODELS and not Path(name_or_path).exists():
        return str(packaged.folder_of(str(name_or_path)))
    path = Path(name_or_path)
    return str(unpacked.folder_of(path) if path.suffix == ".gguf" and path.is_file() else name_or_path)


def wrap_model(hf: Any, tokenizer: Any, name: str = "model", origin: identity.Origin | None = None) -> Model:
    """Make a ``Model`` of a transformers model that is already in memory (no tensor is copied)."""
    hf.eval()
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is not None:
        tokenizer.pad_token = tokenizer.eos_token
    shared = {id(t): t for t in [*hf.parameters(), *hf.buffers()]}
    twin = copy.deepcopy(hf, shared)
    twin.set_attn_implementation("eager")
    mine, other = sites(hf), sites(twin)
    return Model(
        name, hf, tokenizer, twin, anatomy.Places({s: (mine[s], other[s]) for s in mine}, mine.missing), origin
    )


def _from_pretrained(path: str, name: str, dtype: torch.dtype) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not Path(path).exists() and (name.count("/") > 1 or name.endswith(".gguf")):
        kind = "file" if name.endswith(".gguf") else "folder"
        raise ModelError(f"There is no {kind} {name}. Give a folder that holds config.json, or {supported()}.")
    if Path(path).exists() and not (Path(path) / "config.json").is_file():
        raise ModelError(_no_folder(Path(path)))
    local = Path(path).exists() or not hub_answers()
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=local)
        found: Any = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, local_files_only=local, output_loading_info=True
        )
        hf, loaded = found
    except Exception as error:  # damaged files raise whatever their reader raises
        raise ModelError(_why_not(path, name, error, local)) from error
    if absent := sorted(map(str, loaded["missing_keys"])):
        raise ModelError(
            f"The weights of {name!r} are incomplete: {len(absent)} tensors of a {type(hf).__name__} are not "
            f"stored, such as {absent[0]}. They would be random numbers. Use a checkpoint of this very class "
            "(config.json: architectures), or save the model again with model.save_pretrained."
        )
    return hf, tokenizer


def _no_folder(path: Path) -> str:
    """Why a path without config.json is no model, and what it may be instead."""
    if not path.is_dir():
        return f"{path} is a file, and no model folder. Give a folder that holds config.json, or {supported()}."
    held = sorted(p.name for p in path.iterdir())
    if "adapter_config.json" in held:
        try:
            base = json.loads((path / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
        except (OSError, ValueError, LookupError, TypeError):
            base = None
        return (
            f"{path} is an adapter (a LoRA){f' of {base}' if base else ''}, not a model of its own. Load it together "
            f"with its base model: load_model({base or 'BASE'!r}, adapter={str(path)!r}). For a command that takes one "
            "folder, save what that gives: lm.hf.save_pretrained(FOLDER), lm.tokenizer.save_pretrained(FOLDER)."
        )
    if packed := [name for name in held if name.endswith(".gguf")]:
        return f"{path} holds GGUF files. Give the file itself: {path / packed[0]}."
    what = f"it holds {', '.join(held[:5]) or 'nothing'}"
    if any(name.startswith("tokenizer") for name in held) and not identity.weight_files(path):
        what = f"it holds a tokenizer ({', '.join(held[:5])}), but no weights"
    return (
        f"{path} is no model folder: config.json is missing ({what}). Give a folder that model.save_pretrained and "
        f"tokenizer.save_pretrained wrote, or {supported()}."
    )


def _why_not(path: str, name: str, error: Exception, local: bool) -> str:
    """Why a name or folder can't be loaded, and what to do."""
    here = Path(path).exists()
    if here and not identity.weight_files(Path(path)):
        reason = "the folder holds no weights (model.safetensors or pytorch_model.bin)"
    elif not here and local:
        reason = "it is no folder here and not in the hub's cache, and the hub does not answer (no network?)"
    else:
        reason = _first_line(error)
    near = [n for n in get_close_matches(name, [EMBEDDED, *packaged.MODELS], n=1, cutoff=0.5) if n != name]
    return (
        f"The model {name!r} can't be loaded: {reason}."
        + (f" Did you mean {near[0]!r}?" if near and not here else "")
        + f" Allowed: {supported()}. Without a network, use the embedded model, or a folder with config.json, "
        "the weights and the tokenizer (model.save_pretrained and tokenizer.save_pretrained write it)."
    )


def _first_line(error: Exception) -> str:
    words = str(error).strip() or type(error).__name__
    return words.splitlines()[0][:200].rstrip(".")


def hub_answers() -> bool:
    """Is the Hugging Face hub there? Asked once, because its client retries for most of a minute offline."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True  # the proxy knows; a direct connection says nothing
    try:
        address = urlsplit(constants.ENDPOINT)
        socket.create_connection((address.hostname, address.port or 443), timeout=5).close()
    except OSError:
        return False
    return True


def supported() -> str:
    """What ``load_model`` accepts, as words for messages and help texts."""
    return (
        f"{EMBEDDED!r} (embedded, offline), {', '.join(map(repr, packaged.MODELS))} (from packages), a folder written "
        "by save_pretrained, a .gguf file, or a Hugging Face name of a causal language model such as 'gpt2', "
        "'EleutherAI/pythia-70m-deduped'"
    )


def _merge(hf: Any, adapter: Path) -> Any:
    """Merge a LoRA folder (peft format) into the weights; ModelError if a tensor of either has no counterpart."""
    from peft import PeftModel, get_peft_model_state_dict

    if not (adapter / "adapter_config.json").exists():
        raise ModelError(
            f"{adapter} is not an adapter folder: adapter_config.json is missing. Give a folder that peft wrote "
            "(adapter_config.json and adapter_model.safetensors), or leave adapter=None."
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what it warns of is an error here
            merged = PeftModel.from_pretrained(hf, str(adapter))
        stored = {key for file in identity.weight_files(adapter, *["adapter_model"] * 2) for key in _keys(file)}
        expected = set(get_peft_model_state_dict(merged))
    except Exception as error:
        raise ModelError(
            f"The adapter {adapter} does not fit this model: {_first_line(error)}. Use it with the base model that its "
            "card names."
        ) from error
    if odd := sorted(stored ^ expected):
        where = (
            "of the adapter has no place in the model" if odd[0] in stored else "that the model expects is not stored"
        )
        raise ModelError(
            f"The adapter {adapter} does not fit this model: the tensor {odd[0]} {where} "
            f"({len(stored - expected)} stored "
            f"ones have no place, {len(expected - stored)} of {len(expected)} expected ones are missing). Use it "
            "with the base model that its card names."
        )
    return merged.merge_and_unload()


def _keys(file: Path) -> list[str]:
    """Names of the tensors in a file of weights."""
    if file.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(file, "pt") as opened:
            return list(opened.keys())
    return list(torch.load(file, map_location="cpu", mmap=True, weights_only=True))


# --- the places in a model ----------------------------------------------------------------------------


def is_whole(x: Any) -> bool:
    """A whole number, also of numpy; True and False are none."""
    return isinstance(x, Integral) and not isinstance(x, bool)


def check_layer(model: Model, layer: int) -> int:
    """The layer's index (negative ones count from the end); ModelError names the allowed range."""
    if not is_whole(layer) or not -model.n_layers <= layer < model.n_layers:
        raise ModelError(f"{model.name} has no layer {layer!r}. Allowed: 0 to {model.n_layers - 1}.")
    return int(layer) % model.n_layers


def check_heads(model: Model, heads: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """(layer, head) pairs, checked against the model; ModelError names the allowed range."""
    checked = []
    for pair in heads:
        if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2:
            raise ModelError(f"{pair!r} is no head. Give pairs of layer and head, such as [(5, 3), (7, 0)].")
        layer, head = pair
        if not is_whole(head) or not 0 <= head < model.n_heads:
            raise ModelError(f"{model.name} has no head {head!r} in layer {layer}. Allowed: 0 to {model.n_heads - 1}.")
        checked.append((check_layer(model, layer), int(head)))
    return checked


def check_site(model: Model, site: Site) -> Site:
    """The site with a non-negative layer; ModelError names the kinds and the range of layers."""
    if not isinstance(site, tuple) or len(site) != 2:
        raise ModelError(f"{site!r} is no site. Give a kind and a layer, such as Site('resid_post', 14).")
    if site[0] not in KINDS:
        near = get_close_matches(str(site[0]), KINDS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ModelError(f"There is no site {site[0]!r}.{hint} Allowed: {', '.join(KINDS)}.")
    checked = Site(site[0], check_layer(model, site[1]))
    _ = model.sites[checked]  # raises for a part that this architecture has elsewhere
    return checked


def hook_name(model: Model, name: str, layer: int | None = None) -> str:
    """A hook name of the bridge that certainly exists.

    ``hook_name(model, "attn.hook_pattern", 3)`` -> ``blocks.3.attn.hook_pattern``. The bridge itself
    ignores an unknown name in silence; this raises ModelError with near matches.
    """
    full = name if layer is None else f"blocks.{check_layer(model, layer)}.{name}"
    known = model.bridge.hook_dict
    if full not in known:
        near = get_close_matches(full, known, n=4, cutoff=0.5)
        block = ", ".join(k.removeprefix("blocks.0.") for k in known if k.startswith("blocks.0.hook_"))
        raise ModelError(
            f"{model.name} has no hook {full!r}. Near matches: {', '.join(near) or 'none'}. "
            f"Hooks of a block begin with: {block}; all names are in model.bridge.hook_dict."
        )
    return full
