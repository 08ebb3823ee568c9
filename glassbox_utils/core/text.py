"""Text to tokens, tokens to text: tokenize, chat, find a word, generate. Conventions are those of ``models``."""

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from glassbox_utils.core import devices
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


def tokenize(model: Model, text: str | Sequence[str], bos: bool = True) -> Batch:
    """Raw text -> left-padded tokens, one BOS in front (see the module's conventions).

    Text that already begins with the BOS token (a chat prompt) does not get a second one. Raises
    ModelError for an empty prompt or one that is longer than the model's context.
    """
    texts = [text] if isinstance(text, str) else list(text)
    if not texts or not all(isinstance(t, str) and t for t in texts):
        raise ModelError("The prompt is empty. Give a text of at least one character.")
    first = first_token(model)
    rows = [ids for ids in model.tokenizer(texts, add_special_tokens=False)["input_ids"]]
    if bos and first is not None:
        rows = [ids if ids[:1] == [first] else [first, *ids] for ids in rows]
    longest = max(map(len, rows))
    if longest > model.n_context:
        raise ModelError(
            f"The prompt has {longest} tokens, but the context of {model.name} is {model.n_context}. Shorten it by "
            f"{longest - model.n_context} tokens, or split it."
        )
    ids = torch.full((len(rows), longest), model.tokenizer.pad_token_id, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, longest - len(row) :] = torch.tensor(row)
        mask[i, longest - len(row) :] = 1
    return Batch(devices.beside(ids, model.device), devices.beside(mask, model.device))


def first_token(model: Model) -> int | None:
    """The id that raw text starts with: BOS, else EOS, else None."""
    bos = model.tokenizer.bos_token_id
    return bos if bos is not None else model.tokenizer.eos_token_id


def chat(model: Model, user: str | Sequence[dict[str, str]], system: str | None = None) -> str:
    """A user's words (or a list of messages) as the text that the model's chat template makes of them.

    Models without a template (GPT-2) get ``User: ...\\nAssistant:``.
    """
    messages = [{"role": "user", "content": user}] if isinstance(user, str) else list(user)
    if system is not None:
        messages = [{"role": "system", "content": system}, *messages]
    if model.tokenizer.chat_template is None:
        return "\n".join(f"{m['role'].capitalize()}: {m['content']}" for m in messages) + "\nAssistant:"
    return model.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def str_tokens(model: Model, ids: Int[Tensor, " pos"] | Sequence[int]) -> list[str]:
    """Each token as text, for figures."""
    return [model.tokenizer.decode([i]) for i in _listed(ids)]


def _listed(ids: Int[Tensor, " pos"] | Sequence[int]) -> list[int]:
    """The ids as numbers, with one trip to the device for all of them."""
    return ids.tolist() if isinstance(ids, Tensor) else [int(i) for i in ids]


def find_token(model: Model, ids: Int[Tensor, " pos"], word: str, occurrence: int = 0) -> int:
    """Position of the last token of ``word`` in ``ids`` (occurrence 0 is the first, -1 the last).

    Raises ModelError, with the tokens of the prompt, if the word is not there.
    """
    row = _listed(ids)
    ends = set()
    for form in (word, " " + word):
        needle = model.tokenizer(form, add_special_tokens=False)["input_ids"]
        ends |= {i + len(needle) - 1 for i in range(len(row)) if row[i : i + len(needle)] == needle}
    found = sorted(ends)
    if not -len(found) <= occurrence < len(found):
        shown = " ".join(repr(t) for t in str_tokens(model, row))
        raise ModelError(
            f"The token {word!r} (occurrence {occurrence}) is not in the prompt, which has it {len(found)} times. "
            f"Its tokens are: {shown}."
        )
    return found[occurrence]


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
    checkpoint's generation config only the tokens that end a text count. On a GPU steps are recorded and replayed: see
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
    return model.tokenizer.batch_decode(new, skip_special_tokens=True)
