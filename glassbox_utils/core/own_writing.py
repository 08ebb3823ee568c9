"""Text that the model itself writes, sampled at temperature 1: for an SAE that is to see what its model does.

Such text is free of licences and on the model's own distribution; what it would not write by itself (rare words,
another language, a user's questions) is missing, and an SAE trained on it does not see that either. Half of a text is
written from the first token alone, the rest are answers to short requests (``data/prompts/writing.json``), a few of
them about landmarks: a feature found for one of those was planted, and a page that shows it says so.

Parts are drawn from their numbers and written one after the other, so that a killed run goes on where it was and one
with more tokens begins with the same text.
"""

import hashlib
import inspect
import json
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import yaml
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from glassbox_utils.core import assets, caches, corpora, decoding, files, schema
from glassbox_utils.core.chats import chat
from glassbox_utils.core.devices import exact
from glassbox_utils.core.fast_forward import fast_dtype, quick
from glassbox_utils.core.models import EMBEDDED, Model, load_model
from glassbox_utils.core.own_text import MANIFEST, OwnTextError, folder_of, lines_of, parts_in
from glassbox_utils.core.session import progress
from glassbox_utils.core.text import first_token, padded

PROMPTS = assets.DATA / "prompts" / "writing.json"
Kind = Literal["alone", "topic", "landmark"]
Share = Annotated[float, Field(ge=0, le=1)]
COMPACTED = 0.85
"""rows that ended leave the batch once less than this share of it still writes"""


@dataclass(frozen=True)
class Writing:
    """What is written, and where to. OwnTextError for a length or share that is none."""

    name: Annotated[str, Field(pattern=r"^\w[\w.+-]{0,99}$", description="letters, digits, dots and dashes")]
    tokens: Annotated[int, Field(ge=1, le=10**9)] = 2_100_000
    """new tokens in all, at least; a part is written to its end"""
    model: Annotated[str, Field(min_length=1, max_length=400)] = EMBEDDED
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    alone: Share = 0.5
    """share of the tokens that is written from the first token alone"""
    landmarks: Share = 0.07
    """share of the tokens in answers about landmarks; what is left are answers on the sixty topics"""
    length: Annotated[int, Field(ge=1)] = 256
    """tokens of a text at most"""
    batch: Annotated[int, Field(ge=1)] = 128
    """texts of a part, written together"""

    def __post_init__(self) -> None:
        schema.check(self, OwnTextError)
        if self.alone + self.landmarks > 1:
            raise OwnTextError(
                f"alone is {self.alone} and landmarks {self.landmarks}. Allowed: shares that make at most 1 together."
            )

    @property
    def shares(self) -> dict[Kind, float]:
        found: dict[Kind, float] = {"alone": self.alone, "landmark": self.landmarks}
        return {k: v for k, v in (found | {"topic": 1 - self.alone - self.landmarks}).items() if v > 1e-9}


def requests(kind: Kind, n: int, seed: str) -> list[str]:
    """``n`` requests of a kind, drawn anew for every ``seed``."""
    page, draw = json.loads(PROMPTS.read_text(encoding="utf-8")), random.Random(seed)
    if kind == "topic":
        return [draw.choice(page["requests"]).format(T=draw.choice(page["topics"])) for _ in range(n)]
    places = yaml.safe_load(corpora.LANDMARKS.read_text(encoding="utf-8"))["landmarks"]
    chosen = draw.choices(places, [place["weight"] for place in places], k=n)
    return [draw.choice(page["landmark_requests"]).format(L=p["name"], C=p["place"]) for p in chosen]


@torch.inference_mode()
def continued(model: Model, prompts: Sequence[Sequence[int]], tokens: int, seed: int) -> list[list[int]]:
    """What the model writes after each prompt at temperature 1: its new tokens, up to the one that ends it.

    Rows that ended leave the batch, so that none waits for the longest. On a GPU the step is recorded instead
    (``decoding.write``). The same seed and the same batch give the same text, on one kind of device.
    """
    batch, last = padded(model, prompts), set(decoding.ends(model))
    tokens = max(1, min(tokens, model.n_context - batch.input_ids.shape[1]))
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        if decoding.can_be_static(model):
            rows = decoding.write(model, *batch, tokens, 1.0).tolist()
        else:
            rows = _shrinking(model, batch.input_ids, batch.attention_mask, tokens, last)
    return [row[: next((i + 1 for i, t in enumerate(row) if t in last), len(row))] for row in rows]


def drawn(logits: Float[Tensor, "batch vocab"]) -> Int[Tensor, " batch"]:
    """One token of each row at temperature 1, from one random number a row instead of one for each word of the
    vocabulary (``decoding.choose``), which on a CPU takes a quarter of a step."""
    below = exact(logits.float().softmax(-1)).cumsum(-1)
    at = torch.rand(len(below), 1, dtype=below.dtype) * below[:, -1:]
    return torch.searchsorted(below, at, right=True)[:, 0].clamp_max(below.shape[-1] - 1).to(logits.device)


def _shrinking(model: Model, ids: Any, mask: Any, tokens: int, last: set[int]) -> list[list[int]]:
    """A loop over keys and values of those rows only that still write."""
    rows: list[list[int]] = [[] for _ in range(len(ids))]
    at = list(range(len(ids)))  # which text each row of the batch is
    position, past = (mask.cumsum(-1) - 1).clamp_min(0), None
    takes = inspect.signature(model.hf.forward).parameters
    while True:
        also = {"position_ids": position, "logits_to_keep": 1}
        out = model.hf(
            input_ids=ids, attention_mask=mask, use_cache=True, return_dict=True, **caches.handed(model.hf, past),
            **{k: v for k, v in also.items() if k in takes},
        )  # fmt: skip
        new, past, position = drawn(out.logits[:, -1]), caches.left_by(out), position[:, -1:] + 1
        for row, token in zip(at, new.tolist(), strict=True):
            if not rows[row] or rows[row][-1] not in last:
                rows[row].append(token)
        going = [i for i, row in enumerate(at) if rows[row][-1] not in last]
        if not going or max(map(len, rows)) >= tokens:
            return rows
        if len(going) < COMPACTED * len(at) and hasattr(past, "batch_select_indices"):
            keep = mask.new_tensor(going)
            past.batch_select_indices(keep)
            new, mask, position, at = new[keep], mask[keep], position[keep], [at[i] for i in going]
        ids, mask = new[:, None], torch.cat([mask, mask.new_ones(len(mask), 1)], -1)


def text_of(model: Model, tokens: Sequence[int], answer: bool) -> str:
    """Tokens as text. Of an answer without what ends a turn, since the chat template adds it; else with it, but for
    the token that the next document begins with."""
    dropped = set(decoding.ends(model)) if answer else {first_token(model), model.padding} - _marks(model)
    kept = list(tokens)
    while kept and kept[-1] in dropped:
        kept.pop()
    return str(model.tokenizer.decode(kept, skip_special_tokens=answer))


def _marks(model: Model) -> set[int]:
    """What ends a text without being what begins one."""
    return set(decoding.ends(model)) - {first_token(model)}


def part_of(model: Model, config: Writing, number: int, kind: Kind) -> list[dict[str, Any]]:
    """The documents of one part: text, question, kind, and how many tokens were written."""
    asked = [""] * config.batch
    if kind == "alone":
        first = first_token(model)
        prompts = [[0 if first is None else first]] * config.batch
    else:
        asked = requests(kind, config.batch, f"{config.seed}-{number}")
        prompts = [model.tokenizer(chat(model, q), add_special_tokens=False)["input_ids"] for q in asked]
    new = continued(model, prompts, config.length, config.seed * 100_003 + number)
    return [
        {"text": text_of(model, row, kind != "alone"), "question": question, "kind": kind, "tokens": len(row)}
        for row, question in zip(new, asked, strict=True)
    ]


def next_kind(config: Writing, counts: Counter[Kind]) -> Kind:
    """The kind that is furthest behind its share of the tokens written so far."""
    return min(config.shares, key=lambda kind: counts[kind] / config.shares[kind])


def write(config: Writing, model: Model | None = None) -> Path:
    """Write until there are ``tokens`` of them; returns the folder, which is the corpus ``own:NAME``.

    A killed run goes on with the part that it was at. OwnTextError if the folder holds a text of another model, seed
    or recipe, AssetError if it can't be written.
    """
    folder = files.check_output(folder_of(config.name), "The folder of the text", folder=True)
    model = model or load_model(config.model)
    with files.explain_os_errors(folder), files.locked(folder / "write"):
        small = quick(model, getattr(torch, _agree(config, folder, model)))
        for _ in progress(_parts(config, small, folder), "write", total=-(-config.tokens // 10_000), unit="10k tokens"):
            pass
    return folder


def _parts(config: Writing, model: Model, folder: Path) -> Iterator[int]:
    """Writes what is missing; an item for every ten thousand tokens that are there."""
    counts, said = Counter[Kind](), 0
    known = parts_in(folder)
    number = 0
    while counts.total() < config.tokens:
        if number < len(known):
            documents = known[number]
        else:
            documents = part_of(model, config, number, next_kind(config, counts))
            lines = [json.dumps(row, ensure_ascii=False) for row in documents]
            with files.atomic_path(folder / f"part-{number:05d}.jsonl") as partial:
                partial.write_text("\n".join(lines) + "\n", encoding="utf-8")
        counts[documents[0]["kind"]] += sum(row["tokens"] for row in documents)
        number += 1
        while said < counts.total() // 10_000:
            said += 1
            yield said


def _agree(config: Writing, folder: Path, model: Model) -> str:
    """Write the manifest of a new text, or insist that the old one says the same; the type that it is computed in."""
    path = folder / MANIFEST
    recipe = {k: v for k, v in asdict(config).items() if k not in ("tokens", "name")}
    prompts = PROMPTS.read_bytes() + corpora.LANDMARKS.read_bytes()
    recipe |= {"model": model.name, "model_hash": model.hash, "prompts": hashlib.sha256(prompts).hexdigest()[:16]}
    if not path.exists():
        compute = str(fast_dtype(model.device)).removeprefix("torch.")
        folder.mkdir(parents=True, exist_ok=True)
        with files.atomic_path(path) as partial:
            partial.write_text(json.dumps(recipe | {"compute": compute}, indent=1) + "\n", encoding="utf-8")
        return compute
    old = schema.read_mapping(path, OwnTextError, "another name, or delete the folder, and it is written again")
    different = [f"{k} is {old.get(k)!r}, asked for {v!r}" for k, v in recipe.items() if old.get(k) != v]
    if different:
        raise OwnTextError(f"{folder} holds another text: {'; '.join(different)}. Choose another name or delete it.")
    compute = str(old.get("compute"))
    if compute not in ("float32", "bfloat16", "float16"):
        raise OwnTextError(f"compute is {compute!r} in {path}. Delete the folder, and it is written again.")
    return compute


def counted(folder: Path) -> dict[str, int]:
    """Tokens of each kind that lie in a folder."""
    counts: Counter[str] = Counter()
    for documents in parts_in(folder):
        for row in documents:
            counts[row["kind"]] += row["tokens"]
    return dict(counts)


def sample(model: Model, path: Path, documents: int, tokens: int = 200, batch: int = 32, seed: int = 0) -> Path:
    """Let the model write a corpus of one file: ``documents`` texts from its first token on, at temperature 1.

    Written to ``path`` as lines of JSON, batch by batch, so that a killed run goes on where it was.
    """
    there = lines_of(path.read_text(encoding="utf-8")) if path.exists() else []
    first = first_token(model)
    for part in progress(range(len(there) // batch, -(-documents // batch)), "sampling text"):
        new = continued(model, [[0 if first is None else first]] * batch, tokens, seed + part)
        texts = model.tokenizer.batch_decode(new, skip_special_tokens=True)
        there += [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
        with files.atomic_path(path) as partial:
            partial.write_text("\n".join(there) + "\n", encoding="utf-8")
    return path
