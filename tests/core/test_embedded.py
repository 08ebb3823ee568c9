"""The embedded model is made of its GGUF file's own fields, and a folder that another recipe wrote is not used."""

import hashlib
import json

import pytest
import torch

from glassbox_utils.core import assets, embedded
from glassbox_utils.core.text import chat

TEXTS = {  # with the ids of transformers 5.23's own tokenizer of this file
    "Hello world": [19556, 905],
    "  12345\n\n\tdef f(x):": [216, 216, 33, 34, 35, 36, 37, 1116, 197, 1604, 275, 24, 104, 727],
    "<|im_start|>user\nnaïve 中文 🙂<|im_end|>": [1, 4093, 198, 3546, 46494, 216, 28589, 29184, 47526, 2],
}


def test_the_tokenizer_is_that_of_the_file(smol):
    words = smol.tokenizer
    ids = (words.bos_token_id, words.eos_token_id, words.pad_token_id, words.unk_token_id)
    assert ids == (1, 2, 2, 0) and len(words) == 49_152
    assert chat(smol, "Hi", "Be kind.") == (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert words.convert_tokens_to_ids(["<|endoftext|>", "<repo_name>", "<empty_output>"]) == [0, 3, 16]
    for text, expected in TEXTS.items():
        found = words(text)["input_ids"]
        assert found == words(text, add_special_tokens=False)["input_ids"] == expected and words.decode(found) == text


def test_the_files_are_those_of_this_recipe(smol):
    """If this fails because the module was changed on purpose: raise RECIPE, then write the new digest here."""
    folder = embedded.embedded_folder()
    names = ("config.json", "generation_config.json", "tokenizer_config.json", "chat_template.jinja")
    digest = hashlib.sha256(b"".join((folder / name).read_bytes() for name in names)).hexdigest()[:16]
    assert (embedded.RECIPE, digest) == (2, "5cb72a5563ff5015")
    source = json.loads((folder / "source.json").read_text())
    assert source["recipe"] == embedded.RECIPE and source["gguf_sha256"].startswith("b179c952")


def test_a_folder_of_another_recipe_is_replaced(tmp_path, monkeypatch):
    monkeypatch.setenv(assets.CACHE_VARIABLE, str(tmp_path))
    monkeypatch.setattr(assets, "extract", lambda package, member: tmp_path / "file.gguf")
    made = []

    def write(gguf, folder):
        made.append(gguf)
        folder.mkdir()

    monkeypatch.setattr(embedded, "write_folder", write)
    old = embedded.embedded_path(1)
    old.mkdir(parents=True)
    (old / "tokenizer.json").write_text("of whatever transformers there was")
    assert embedded.embedded_folder() == embedded.embedded_path() != old
    assert embedded.embedded_folder().exists() and not old.exists() and made == [tmp_path / "file.gguf"]


def test_rotary_pairs_are_put_half_a_head_apart():
    """The inverse of llama.cpp's ``permute``, for as many heads as there are."""

    def permuted(x, heads):
        return x.reshape(heads, 2, len(x) // heads // 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)

    for heads, size in ((1, 4), (3, 8), (9, 64)):
        x = torch.randn(heads * size, 5)
        assert torch.equal(embedded._unpermuted(permuted(x, heads), heads), x)
    with pytest.raises(KeyError):
        embedded._name("rope_freqs.weight")  # a file with parts that are not known is not half read
