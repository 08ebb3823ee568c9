"""Text to tokens, tokens to text: tokenize, chat, find a word, generate. Conventions are those of ``models``."""

import math
import re
from collections.abc import Sequence
from functools import cache
from numbers import Integral, Real
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from glassbox_utils.core import chats, devices
from glassbox_utils.core.chats import chat as chat
from glassbox_utils.core.models import Model, ModelError


class Batch(NamedTuple):
    """Left-padded tokens: pass on as ``model.hf(**batch.inputs)``."""

    input_ids: Int[Tensor, "batch pos"]
    attention_mask: Int[Tensor, "batch pos"]

    @property
    def inputs(self) -> dict[str, Tensor]:
        """What a forward pass takes. Positions count from each row's first real token: a model with absolute
        positions (GPT-2) would otherwise see a padded prompt as one that begins late."""
        positions = (self.attention_mask.cumsum(-1) - 1).clamp_min(0)
        return {"input_ids": self.input_ids, "attention_mask": self.attention_mask, "position_ids": positions}


def tokenize(model: Model, text: str | Sequence[str], bos: bool = True, max_tokens: int | None = None) -> Batch:
    """Raw text -> left-padded tokens, one BOS in front (see the module's conventions).

    Text that already begins with the BOS token (a chat prompt) does not get a second one. ``max_tokens`` cuts each text
    after as many tokens, BOS included. What is written like a special token becomes one, since chats are read here too:
    words of somebody else belong into ``chat``, which refuses them. Raises ModelError for an empty prompt, one that is
    longer than the model's context, or a token that the model has no embedding for.
    """
    texts = _texts(text)
    first = first_token(model)
    rows = [list(ids) for ids in model.tokenizer(texts, add_special_tokens=False)["input_ids"]]
    if bos and first is not None:
        rows = [ids if ids[:1] == [first] else [first, *ids] for ids in rows]
    return padded(model, [ids[:max_tokens] for ids in rows])


def _texts(text: str | Sequence[str]) -> list[str]:
    texts = [text] if isinstance(text, str) else list(text)
    if not texts or not all(isinstance(t, str) and t for t in texts):
        raise ModelError("The prompt is empty. Give a text of at least one character.")
    for t in texts:
        try:
            t.encode()
        except UnicodeEncodeError as error:
            raise ModelError(
                f"The prompt holds {t[error.start]!a} at character {error.start}, half of a pair that stands for one "
                "character, which is no text. Remove it, or read the text again as UTF-8."
            ) from error
    return texts


def padded(model: Model, rows: Sequence[Sequence[int]]) -> Batch:
    """Rows of token ids as a left-padded batch; ModelError as in ``tokenize``."""
    longest = max(map(len, rows))
    if not min(map(len, rows)):
        raise ModelError("The prompt has no tokens: the tokenizer makes none of it. Give other text.")
    if longest > model.n_context:
        raise ModelError(
            f"The prompt has {longest} tokens, but the context of {model.name} is {model.n_context}. Shorten it by "
            f"{longest - model.n_context} tokens, or split it."
        )
    known = model.hf.get_input_embeddings().weight.shape[0]
    if (highest := max(map(max, rows))) >= known:
        raise ModelError(
            f"The tokenizer writes the token {highest} ({model.tokenizer.convert_ids_to_tokens(highest)!r}), but "
            f"{model.name} has embeddings for 0 to {known - 1} only. Leave it out, or call "
            "hf.resize_token_embeddings(len(tokenizer)) before the model is wrapped."
        )
    ids = torch.full((len(rows), longest), model.padding, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, longest - len(row) :] = torch.tensor(row)
        mask[i, longest - len(row) :] = 1
    return Batch(devices.beside(ids, model.device), devices.beside(mask, model.device))


def first_token(model: Model) -> int | None:
    """The id that raw text starts with: BOS, else EOS, else None."""
    bos = model.tokenizer.bos_token_id
    return bos if bos is not None else model.tokenizer.eos_token_id


def following(model: Model, text: str) -> list[int]:
    """The tokens of a text as they stand behind other words: ``following(model, " Paris")``.

    Alone, a SentencePiece tokenizer would put a space of its own in front (Llama-2, Mistral, Gemma-1), so that every
    word began with the same token.
    """
    alone = model.tokenizer(text, add_special_tokens=False)["input_ids"]
    if text[:1].isspace():
        lead = model.tokenizer("a", add_special_tokens=False)["input_ids"]
        both = model.tokenizer("a" + text, add_special_tokens=False)["input_ids"]
        if both[: len(lead)] == lead and len(both) > len(lead):
            return both[len(lead) :]
    return alone


def answered(model: Model, prompts: Sequence[str], answers: Sequence[str]) -> tuple[Batch, Bool[Tensor, "batch pos"]]:
    """Prompts with their answers as one batch, and which tokens are the answers'.

    Both are tokenised apart, as a model sees them that has read the prompt and then writes: together, the first
    characters of an answer may merge with the prompt's last token, and would count for neither. An empty answer has no
    tokens. ModelError as in ``tokenize``.
    """
    before = tokenize(model, prompts)
    rows, counts = [], []
    for ids, mask, answer in zip(before.input_ids.tolist(), before.attention_mask.tolist(), answers, strict=True):
        new = following(model, answer) if answer and _texts(answer) else []
        rows.append([i for i, real in zip(ids, mask, strict=True) if real] + new)
        counts.append(len(new))
    batch = padded(model, rows)
    place = torch.arange(batch.input_ids.shape[1], device=model.device)
    return batch, place >= (len(place) - devices.beside(torch.tensor(counts), model.device))[:, None]


def str_tokens(model: Model, ids: Int[Tensor, " pos"] | Sequence[int]) -> list[str]:
    """Each token as text, for figures: with the space that it begins with, and bytes that are only a part of a
    character as ``\\xf0\\x9f``, so that different tokens look different."""
    return [_shown(model, i) for i in _listed(ids)]


def _shown(model: Model, i: int) -> str:
    shown, piece = model.tokenizer.decode([i]), model.tokenizer.convert_ids_to_tokens(i)
    if piece is None or i in model.tokenizer.all_special_ids:
        return shown
    if "\ufffd" in shown:
        if _BYTE.fullmatch(piece):
            return f"\\x{piece[3:5].lower()}"
        if all(c in _bytes_of_characters() for c in piece):
            return bytes(_bytes_of_characters()[c] for c in piece).decode(errors="backslashreplace")
    return piece.replace("▁", " ") if "▁" in piece else shown


_BYTE = re.compile("<0x[0-9A-Fa-f]{2}>")


@cache
def _bytes_of_characters() -> dict[str, int]:
    """The character that byte-level vocabularies (GPT-2's) write for each byte, the other way round."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    other = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(other)}


def _listed(ids: Int[Tensor, " pos"] | Sequence[int]) -> list[int]:
    """The ids as numbers, with one trip to the device for all of them."""
    return ids.tolist() if isinstance(ids, Tensor) else [int(i) for i in ids]


def find_token(model: Model, ids: Int[Tensor, " pos"], word: str, occurrence: int = 0) -> int:
    """Position of the last token of ``word`` in ``ids`` (occurrence 0 is the first, -1 the last).

    Raises ModelError, with the tokens of the prompt, if the word is not there.
    """
    if not isinstance(word, str) or not word:
        raise ModelError(f"The word to find is {word!r}. Give a text of at least one character.")
    row = _listed(ids)
    forms = [model.tokenizer(form, add_special_tokens=False)["input_ids"] for form in (word, " " + word)]
    needles = [needle for needle in (*forms, following(model, " " + word)) if needle]
    ends = {i + len(n) - 1 for n in needles for i in range(len(row)) if row[i : i + len(n)] == n}
    found = sorted(ends or _ends_in_text(model, row, word))
    if not -len(found) <= occurrence < len(found):
        shown = " ".join(repr(t) for t in str_tokens(model, row))
        raise ModelError(
            f"The token {word!r} (occurrence {occurrence}) is not in the prompt, which has it {len(found)} times. "
            f"Its tokens are: {shown}."
        )
    return found[occurrence]


def _ends_in_text(model: Model, row: list[int], word: str) -> set[int]:
    """The tokens in which a whole word of the text ends: for one that its neighbours have changed the tokens of."""
    text, ends = "", []
    for i in range(len(row)):
        text = model.tokenizer.decode(row[: i + 1])
        ends.append(len(text))
    places = [m.end() for m in re.finditer(rf"(?<!\w){re.escape(word)}(?!\w)", text)]
    return {next(i for i, end in enumerate(ends) if end >= place) for place in places}


# --- running ------------------------------------------------------------------------------------------


def generate(
    model: Model,
    prompts: str | Sequence[str],
    max_new_tokens: int = 40,
    temperature: float = 0.0,
    seed: int | None = None,
) -> list[str]:
    """Continuations of a batch of prompts; temperature 0 is greedy, above 0 the whole distribution is sampled.

    Interventions that are active (``interventions.edit`` and all that is built on it) apply to the prompt
    and to every generated token. ``seed`` makes sampling repeatable without touching the global state. Of the
    checkpoint's generation config only the tokens that end a text count. An answer to a ``chat`` of a model without a
    template ends before the next "User:". On a GPU steps are recorded and replayed: see
    ``decoding`` for what that means for a hook of your own. Raises ModelError for a number of tokens or a temperature
    that is none, or more tokens than the context holds.
    """
    from glassbox_utils.core import decoding  # imports transformers, which is there once a model is

    if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, Integral) or max_new_tokens < 1:
        raise ModelError(f"max_new_tokens is {max_new_tokens!r}. Allowed: a whole number from 1 on; the default is 40.")
    if isinstance(temperature, bool) or not isinstance(temperature, Real) or not 0 <= temperature < math.inf:
        raise ModelError(
            f"The temperature is {temperature!r}. Allowed: 0 (always the likeliest token) or a finite number above it "
            "(1 samples from the model's own distribution)."
        )
    prompts = _texts(prompts)
    batch = tokenize(model, prompts)
    if batch.input_ids.shape[1] + max_new_tokens > model.n_context:
        raise ModelError(
            f"The prompt ({batch.input_ids.shape[1]} tokens) and {max_new_tokens} new tokens exceed the context of "
            f"{model.name} ({model.n_context}). Shorten one of them."
        )
    gpus = range(torch.cuda.device_count())  # manual_seed seeds all of them
    with torch.random.fork_rng(gpus, enabled=seed is not None), torch.inference_mode():
        if seed is not None:
            torch.manual_seed(seed)
        new = decoding.write(model, *batch, int(max_new_tokens), float(temperature))
    ends = decoding.ends(model)
    rows = [row[: next((i + 1 for i, t in enumerate(row) if t in ends), len(row))] for row in new.tolist()]
    answers = model.tokenizer.batch_decode(rows, skip_special_tokens=True)
    return [chats.until_next_turn(model, p, a) for p, a in zip(prompts, answers, strict=True)]
