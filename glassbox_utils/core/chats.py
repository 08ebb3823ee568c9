"""Chats as text: what the model's template makes of messages, with nothing in a message that could end its turn.

A template marks turns with special tokens (``<|im_end|>``, ``<start_of_turn>``) or with plain text (``[/INST]``,
``Assistant:``). Somebody's words that hold such a mark would be read as a turn of somebody else: as a system prompt,
or as the model's own answer. ``chat`` refuses them in words. The marks are found by rendering a conversation of this
tokenizer's template, so no list of known templates is needed. What ``chat`` gives is for ``tokenize`` and ``generate``,
which read marks as such.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

from glassbox_utils.core.models import Model, ModelError

ROLES = ("system", "user", "assistant", "tool", "developer")
_PLACE = "GLASSBOX{}XOBSSALG"
_found: WeakKeyDictionary[Any, tuple[Any, list[re.Pattern[str]]]] = WeakKeyDictionary()
_NEXT_TURN = re.compile(r"\s*\n[ \t]*(User|System|Assistant):")


def chat(model: Model, user: str | Sequence[dict[str, str]], system: str | None = None) -> str:
    """A user's words (or a list of messages) as the text that the model's chat template makes of them.

    ``system``: None leaves the template its own system prompt, if it has one; an empty text means none at all. Models
    without a template (GPT-2) get ``User: ...\\nAssistant:``, and ``generate`` ends their answers before the next
    ``User:``. Raises ModelError for words that hold what marks a turn (``<|im_end|>``, ``[/INST]``), for messages that
    are none, and for what the template refuses or leaves out.
    """
    messages = _messages([{"role": "user", "content": user}] if isinstance(user, str) else user)
    if system is not None:
        messages = [*_messages([{"role": "system", "content": system}]), *messages]
    if not messages:
        raise ModelError("There is no message. Give the user's words, or at least one {'role': ..., 'content': ...}.")
    for message in messages:
        check_words(model, message["content"])
    if system or system is None:
        return _rendered(model, messages)
    try:
        without = _rendered(model, messages[1:])
    except ModelError:
        return _rendered(model, messages)
    try:  # the shorter one: it has no default system prompt (SmolLM2, Qwen2.5), or no empty system turn (Gemma-3)
        return min(without, _rendered(model, messages), key=len)
    except ModelError:
        return without


def _messages(given: Any) -> list[dict[str, str]]:
    """Messages, checked."""
    if isinstance(given, Mapping) or not isinstance(given, Sequence):
        raise ModelError(f"A chat is a text or a list of messages, not {given!r:.80}.")
    for message in given:
        if not isinstance(message, Mapping) or not isinstance(message.get("content"), str):
            raise ModelError(f"{message!r:.80} is no message. Give {{'role': 'user', 'content': 'a text'}}.")
        if message.get("role") not in ROLES:
            raise ModelError(f"There is no role {message.get('role')!r:.80}. Allowed: {', '.join(ROLES)}.")
    return [dict(message) for message in given]


def _rendered(model: Model, messages: list[dict[str, str]]) -> str:
    text = _as_text(model, messages)
    for message in messages:
        if message["role"] == "system" and message["content"].strip() not in text:
            raise ModelError(
                f"The chat template of {model.name} leaves a system prompt out in silence. Put it into the user's "
                'turn, or give system="".'
            )
    return text


def _as_text(model: Model, messages: list[dict[str, str]]) -> str:
    if model.tokenizer.chat_template is None:
        lines = [f"{m['role'].capitalize()}: {m['content']}" for m in messages if m["role"] != "system" or m["content"]]
        return "\n".join([*lines, "Assistant:"])
    from jinja2.exceptions import TemplateError

    try:
        return model.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
        roles = ", ".join(m["role"] for m in messages)
        raise ModelError(
            f"The chat template of {model.name} refuses messages of the roles {roles}: "
            f"{' '.join(str(error).split())[:200]}. If it knows no system prompt, put that into the user's turn; if "
            "roles must alternate, join neighbours."
        ) from error


# --- marks of turns -------------------------------------------------------------------------------------


def check_words(model: Model, text: str) -> None:
    """ModelError for words that hold a special token of this tokenizer, also after its normalisation, or what else
    marks a turn in its chats."""
    tokenizer = model.tokenizer
    if mark := _special(tokenizer, text) or next((m[0] for p in _marks(model) if (m := p.search(text))), None):
        raise ModelError(
            f"The words hold {mark.strip()!r}, which marks a turn or an end for {model.name}: the model would "
            "read what follows as somebody else's. Leave it out, or write it differently (one space inside is enough)."
        )


def _special(tokenizer: Any, text: str) -> str | None:
    """A special token that the text holds as such: one that is gone when special tokens are read as plain text. (An
    unknown word, whose token may be special, is unknown in both.)"""
    special = {i for i, t in tokenizer.added_tokens_decoder.items() if t.special} | set(tokenizer.all_special_ids)
    try:
        given, plain = (
            tokenizer(text, add_special_tokens=False, split_special_tokens=split)["input_ids"]
            for split in (False, True)
        )
    except (UnicodeError, TypeError):
        raise ModelError(f"{text!a:.80} is no text that the tokenizer can read. Read it again as UTF-8.") from None
    if given == plain:
        return None
    more = [i for i in given if i in special and given.count(i) > plain.count(i)] or [i for i in given if i in special]
    marks = [tokenizer.convert_ids_to_tokens(i) for i in more]
    return next((mark for mark in marks if mark in text), (marks or [text])[0])


def _marks(model: Model) -> list[re.Pattern[str]]:
    """Patterns of what marks a turn; found once for a tokenizer and its template."""
    tokenizer = model.tokenizer
    key = tokenizer.chat_template, len(tokenizer)
    if tokenizer not in _found or _found[tokenizer][0] != key:
        _found[tokenizer] = key, list(_patterns(model))
    return _found[tokenizer][1]


def _patterns(model: Model) -> Iterator[re.Pattern[str]]:
    if model.tokenizer.chat_template is None:
        yield re.compile(r"^[ \t]*(User|System|Assistant):", re.MULTILINE)
        return
    added = [t.content for t in model.tokenizer.added_tokens_decoder.values() if t.content.strip()]
    between: set[str] = set()
    for roles in (("user", "assistant", "user"), ("system", "user"), ("user",)):
        messages = [{"role": role, "content": _PLACE.format(i)} for i, role in enumerate(roles)]
        try:
            text = _as_text(model, messages)
        except ModelError:  # a template without this role
            continue
        between |= set(re.split("|".join(m["content"] for m in messages), text))
    for part in between:
        tokens = [t for t in added if t in part]
        yield from (re.compile(re.escape(t)) for t in tokens if len(t) > 1)
        if not tokens and len(part.strip()) > 1:  # nothing but plain text ends the turn
            start = r"^[ \t]*" if part.lstrip(" ").startswith("\n") else ""
            yield re.compile(start + re.escape(part.strip()), re.MULTILINE)


def until_next_turn(model: Model, prompt: str, answer: str) -> str:
    """The answer of a model without a chat template, which has no token that ends its turn, up to the next turn."""
    asked = re.match("(System|User): ", prompt) and "\nAssistant:" in prompt
    if model.tokenizer.chat_template is not None or not asked:
        return answer
    found = _NEXT_TURN.search(answer)
    return answer[: found.start()] if found else answer
