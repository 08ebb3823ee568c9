"""Which model is this? 16 hex digits: eight of its weights, eight of its tokenizer.

SAEs, vectors, edits and studies record them and are refused by another model. The halves stand side by side instead of
in one digest, so that a refusal can say which of the two differs; eight digits miss an accidental difference once in
four thousand million.

**Weights** are those that are stored: names, shapes and values of the folder's files, whatever type they are loaded
in. Values count as rounded to bfloat16, so that a folder stored again in bfloat16 is the same model. The rounding hides
what is smaller than 2^-9 of a weight; a fine-tuned matrix differs all the same, since of a million weights that move by
1e-5 of their size some thousands cross a border between two roundings. A LoRA counts as the base model with the
adapter's own tensors and scale, not as their sum: the last digits of a merged matrix depend on the device, the type and
the library that multiplied it. So base and adapter are one model on every machine, a merged folder another.

A model that is only in memory, or was changed there after it was loaded, is hashed as it is. Without an adapter, in
float32 or bfloat16, that gives the same digits as its folder.

**The tokenizer** counts by what it does, not by how it is written down, which varies between versions of transformers:
vocabulary and merges, special tokens, chat template, and the ids of fixed texts and of every word of the vocabulary.
The padding token counts as the end of text where there is none, since every ``Model`` pads with it.
"""

import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from glassbox_utils.core import assets, devices, files

RULE = 1
"""Raise it when the same model would get other digits: what was kept under another rule is not read."""

CHUNK = 1 << 22
"""numbers that one thread rounds and hashes at a time: 8 MB in bfloat16, whatever the size of a tensor"""

KEPT_FROM = 0.2
"""seconds; a digest that took less is not worth a file in the cache folder"""

SCALES = (
    "peft_type", "r", "alpha", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora",
    "fan_in_fan_out", "bias", "layer_replication",
)  # fmt: skip
"""settings of an adapter that the sum depends on, besides its tensors; the others are about training and files"""

PROBES = (
    "The quick brown fox doesn't jump over 1,234,567.89 lazy dogs; it's 42% off at https://example.org/?q=a+b&c=d.",
    "  two  spaces,\ttabs\n\n\nand\r\nlines   ",
    "def f(x: int) -> dict:\n    return {'a': x ** 2, \"b\": [i for i in range(10)]}  # ∑ ≤ →",
    "Ünïcödé naïve façade, Ελληνικά, Русский, العربية, עברית, हिन्दी, ไทย, 中文字符, 日本語テスト, 한국어",
    "🙂🤖👩‍👩‍👧 e\u0301 \u200b \u00a0 \ufeff ﬁ ½ Ⅷ",
    "SHOUTING camelCase snake_case MixedUP 0xDEADBEEF 3.14e-10 <b>bold</b> $x_i^2$",
)


class Origin(NamedTuple):
    """Where a model's weights came from, as long as neither they nor the files are changed."""

    weights: Callable[[], str]
    """their digest, computed when it is asked for"""
    marks: list[Any]
    """what ``marks`` saw right after loading"""
    files: tuple[Path, ...] = ()
    stamps: tuple[Any, ...] = ()
    """path, size and time of the files right after loading"""


def of_model(hf: Any, tokenizer: Any, origin: Origin | None = None) -> str:
    """16 hex digits: eight of the weights, eight of the tokenizer."""
    known = unchanged(hf, origin)
    return (known.weights() if known else of_memory(hf))[:8] + of_tokenizer(tokenizer)[:8]


def difference(made_for: str | None, model_hash: str) -> str:
    """How the model that a tool was made for differs from this one, in words; empty if it does not, or is not known.

    Every room that refuses the tools of another model asks here: ``if why := difference(...): raise ...``.
    """
    if not made_for or made_for == model_hash:
        return ""
    weights, words = made_for[:8] == model_hash[:8], made_for[8:] == model_hash[8:]
    if weights:
        return "the weights are the same, but the tokenizer is another (vocabulary, special tokens or chat template)"
    return "the weights differ (another model, or a fine-tuned one), " + (
        "the tokenizer is the same" if words else "and so does the tokenizer"
    )


# --- weights --------------------------------------------------------------------------------------------


def origin_of(hf: Any, name_or_path: str, adapter: Path | None = None) -> Origin | None:
    """The files of a model that was just loaded, and an adapter merged into it; None if there are none to be found.

    ``name_or_path``: a folder, or a name in the hub's cache.
    """
    folder = _folder(name_or_path)
    if folder is None or not (files := weight_files(folder)) or getattr(hf, "is_quantized", False):
        return None
    if adapter is not None:
        files = [*files, *weight_files(adapter, "adapter_model", "adapter_model"), adapter / "adapter_config.json"]
    return Origin(partial(of_files, folder, adapter, *_naming(hf)), marks(hf), tuple(files), stamps(files))


def of_files(folder: Path, adapter: Path | None, prefix: str, tied: str | None) -> str:
    """sha256 of the weights stored in a folder, and of an adapter's; kept in the cache by path, size and time."""
    files = weight_files(folder)
    base = _kept([stamps(files), prefix, tied], lambda: _digest(_stored(files), prefix, tied))
    if adapter is None:
        return base
    settings = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    scale = {name: settings[name] for name in SCALES if settings.get(name)}
    added = _digest(_stored(weight_files(adapter, "adapter_model", "adapter_model")), "", None)
    return _sha256(base, added, json.dumps(scale, sort_keys=True))


def stamps(files: Iterable[Path]) -> tuple[Any, ...]:
    """Path, size and time of change of each file; None for one that is gone."""
    return tuple((str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) if f.exists() else None for f in files)


def of_memory(hf: Any) -> str:
    """sha256 of the weights as they are in memory, tied ones once."""
    return _digest(((name, tensor.detach()) for name, tensor in hf.state_dict().items()), *_naming(hf))


def weight_files(folder: Path, safe: str = "model", other: str = "pytorch_model") -> list[Path]:
    """The files that transformers reads weights from, in its order of preference; empty if there are none."""
    for name in (f"{safe}.safetensors", f"{other}.bin"):
        if (folder / name).exists():
            return [folder / name]
        if (index := folder / f"{name}.index.json").exists():
            parts = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            return [folder / f for f in sorted(set(parts.values()))]
    return []


def marks(hf: Any) -> list[Any]:
    """Cheap signs of every tensor: name, shape, version (torch counts writes), and sixteen of its values.

    The version misses what is written through ``.data``, as peft does when it merges; the values see that.
    """
    found, values = [], []
    for name, tensor in hf.state_dict(keep_vars=True).items():
        found.append((name, tuple(tensor.shape), 0 if tensor.is_inference() else tensor._version))
        flat = tensor.detach().reshape(-1)
        values.append(devices.result(flat[:: max(1, len(flat) // 16)][:16]).numpy().tobytes())
    return [found, values]


def unchanged(hf: Any, origin: Origin | None) -> Origin | None:
    """The origin, if the weights are still what was loaded from it, and it is still there."""
    same = origin and origin.marks == marks(hf) and origin.stamps == stamps(origin.files)
    return origin if same else None


def converted(source: Any, origin: Origin | None, copy: Any) -> Origin | None:
    """The origin of a copy in another type: that of its source, or the digits that the source has in memory now."""
    if known := unchanged(source, origin):
        return known._replace(marks=marks(copy))
    if next(copy.parameters()).dtype == torch.bfloat16:
        return None  # hashed as it is, it has the digits of its source
    return Origin(partial(str, of_memory(source)), marks(copy))


def _folder(name_or_path: str) -> Path | None:
    if Path(name_or_path).is_dir():
        return Path(name_or_path)
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name_or_path, "config.json")
    return Path(found).parent if isinstance(found, str) else None


def _naming(hf: Any) -> tuple[str, str | None]:
    """What the names of this model's tensors may begin with, and the name of an output matrix that is the embedding."""
    head, first = hf.get_output_embeddings(), hf.get_input_embeddings()
    if getattr(head, "weight", None) is not first.weight:
        return hf.base_model_prefix, None
    return hf.base_model_prefix, next(name for name, module in hf.named_modules() if module is head) + ".weight"


def _stored(files: Iterable[Path]) -> Iterable[tuple[str, Tensor]]:
    """Names and tensors of files of weights, mapped into memory and read when they are used."""
    from safetensors import safe_open

    for path in files:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                yield from ((name, file.get_tensor(name)) for name in file.keys())  # noqa: SIM118
        else:
            yield from torch.load(path, map_location="cpu", mmap=True, weights_only=True).items()


def _digest(tensors: Iterable[tuple[str, Tensor]], prefix: str, tied: str | None) -> str:
    """One sha256 over the sorted names, shapes and digests of all tensors, which threads hash side by side."""
    work = {}
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for name, tensor in tensors:
            if name != tied and not _is_constant(name, tensor):
                work[name.removeprefix(f"{prefix}.")] = tuple(tensor.shape), pool.submit(_of_tensor, tensor)
    return _sha256(*(f"{name} {shape} {task.result()}" for name, (shape, task) in sorted(work.items())))


def _is_constant(name: str, tensor: Tensor) -> bool:
    """Frequencies and causal masks, which older checkpoints store and newer ones do not."""
    mask = tensor.ndim == 4 and name.endswith(("attn.bias", "attention.bias"))
    return mask or name.endswith(("rotary_emb.inv_freq", ".masked_bias"))


def _of_tensor(tensor: Tensor) -> str:
    """sha256 of the values, rounded to bfloat16 where they have fractions."""
    digest = hashlib.sha256()
    for part in tensor.reshape(-1).split(CHUNK):
        part = part.to(torch.bfloat16) if part.is_floating_point() else part
        digest.update(part.cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def _sha256(*lines: str) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _kept(key: Any, work: Callable[[], str]) -> str:
    """``work()``, from a small file in the cache folder if it was done before (no file if the folder is read-only)."""
    path = assets.cache_dir() / "identity" / f"{_sha256(json.dumps([RULE, key]))[:24]}.json"
    with suppress(OSError, ValueError, TypeError, KeyError):
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept["of"] == json.loads(json.dumps(key)) and re.fullmatch("[0-9a-f]{64}", kept["digest"]):
            return kept["digest"]
    start = time.perf_counter()
    digest = work()
    if time.perf_counter() - start > KEPT_FROM:
        with suppress(OSError), files.atomic_path(path) as unfinished:
            unfinished.write_text(json.dumps({"digest": digest, "of": key}), encoding="utf-8")
    return digest


# --- tokenizer ------------------------------------------------------------------------------------------


def of_tokenizer(tokenizer: Any) -> str:
    """sha256 of what a tokenizer does. How it is written down is only the key under which the digest is kept."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return _behaviour(tokenizer)
    written = [_sha256(backend.to_str()), _special(tokenizer), tokenizer.chat_template]
    return _kept(written, lambda: _behaviour(tokenizer))


def _special(tokenizer: Any) -> list[int | None]:
    pad = tokenizer.pad_token_id
    ids = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id]
    return [*ids, tokenizer.eos_token_id if pad is None else pad]


def _behaviour(tokenizer: Any) -> str:
    words = sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0]))
    special = _special(tokenizer)
    marks = [tokenizer.convert_ids_to_tokens(i) for i in special if i is not None]
    kept = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    every = "\n".join(tokenizer.batch_decode([[i] for _, i in words], **kept))
    texts = [*PROBES, *(f"before{mark}after {mark} {mark}" for mark in marks), every]
    ids = [tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in texts]
    return _sha256(json.dumps([words, special, tokenizer.chat_template, ids, _merges(tokenizer)], sort_keys=True))


def _merges(tokenizer: Any) -> list[list[str]]:
    """The pairs that a BPE joins, in order, which no finite text would show; none for another kind of tokenizer."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    found = json.loads(backend.to_str())["model"].get("merges", []) if backend else []
    return [pair.split(" ") if isinstance(pair, str) else list(pair) for pair in found]
