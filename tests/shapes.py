"""Folders of five kinds of model that people come with, tiny and random, for whole notebooks."""

from pathlib import Path

import tiny

TEMPLATE = (
    "{% for m in messages %}{{ '<s>' + m['role'] + '\n' + m['content'] + '</s>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}"
)
KINDS = ("gpt2", "grouped", "no-bos", "base", "window")


def save(kind: str, folder: Path) -> Path:
    """gpt2: absolute positions; grouped: two key heads, a chat template; no-bos: no first token, chat template;
    base: no chat template; window: layers that see 16 tokens. Contexts of 512 tokens."""
    words = tiny.tokenizer()
    network = {"gpt2": "gpt2", "window": "gemma3"}.get(kind, "llama")
    tiny.network(network, len(words), layers=4, positions=512).save_pretrained(folder)
    if kind in ("grouped", "no-bos"):
        words.chat_template = TEMPLATE
    if kind == "no-bos":
        words.bos_token = None
    words.save_pretrained(folder)
    return folder
