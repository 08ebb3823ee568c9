"""The embedded model is made of its GGUF file's own fields, and a folder that another recipe wrote is not used."""

import hashlib
import json
import shutil
import time

import pytest
import torch

from glassbox_utils import cli
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


@pytest.fixture()
def small(tmp_path, monkeypatch):
    """An embedded model of two small files in a cache of its own; how often it was made."""
    monkeypatch.setenv(assets.CACHE_VARIABLE, str(tmp_path))
    monkeypatch.setattr(assets, "extract", lambda package, member: tmp_path / "file.gguf")
    made = []

    def write(gguf, folder):
        made.append(gguf)
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(bytes(1000))
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(embedded, "write_folder", write)
    return made


DAMAGE = {
    "flipped": (lambda folder: (folder / "model.safetensors").write_bytes(bytes(999) + b"x"), "another sha256"),
    "cut off": (lambda folder: (folder / "model.safetensors").write_bytes(bytes(10)), "10 bytes instead of 1,000"),
    "half deleted": (lambda folder: (folder / "config.json").unlink(), "config.json is missing"),
    "added to": (lambda folder: (folder / "adapter_config.json").write_text("{}"), "does not belong there"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_folder_is_refused_found_and_made_again(small, capsys, kind):
    folder = embedded.embedded_folder()
    harm, words = DAMAGE[kind]
    harm(folder)
    applicant = str(assets.DATA / "examples" / "applicant.json")
    assert cli.main(["explain", "--applicant", applicant, "--out", str(folder.parent / "page.html")]) == 2
    said = capsys.readouterr().err
    assert f"{folder} is damaged" in said and words in said and "assets --fetch" in said and said.count("\n") == 1
    assert cli.main(["assets", "--verify"]) == 1
    out = capsys.readouterr().out
    assert "DAMAGED" in out and words in out and len(small) == 1
    assert cli.main(["assets", "--fetch"]) == 0 and f"made again: {folder}" in capsys.readouterr().out
    assert cli.main(["assets", "--verify"]) == 0 and embedded.embedded_folder() == folder and len(small) == 2


def test_a_folder_without_hashes_or_none_is_made_in_silence(small):
    folder = embedded.embedded_folder()
    embedded.files.manifest_path(folder).unlink()
    (folder / "model.safetensors").write_bytes(b"unknown")
    assert len((embedded.embedded_folder() / "model.safetensors").read_bytes()) == 1000 and len(small) == 2
    shutil.rmtree(folder)
    assert embedded.embedded_folder().exists() and len(small) == 3


def test_no_model_is_made_of_another_file(tmp_path):
    (tmp_path / "file.gguf").write_bytes(b"GGUF" + bytes(1000))
    with pytest.raises(
        assets.AssetError, match=r"file\.gguf is damaged: its sha256 is .* instead of b179c952.*--fetch"
    ):
        embedded.write_folder(tmp_path / "file.gguf", tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_looking_whether_it_is_intact_takes_no_time(smol):
    start = time.perf_counter()
    embedded.embedded_folder()
    assert time.perf_counter() - start < 0.1


def test_rotary_pairs_are_put_half_a_head_apart():
    """The inverse of llama.cpp's ``permute``, for as many heads as there are."""

    def permuted(x, heads):
        return x.reshape(heads, 2, len(x) // heads // 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)

    for heads, size in ((1, 4), (3, 8), (9, 64)):
        x = torch.randn(heads * size, 5)
        assert torch.equal(embedded._unpermuted(permuted(x, heads), heads), x)
    with pytest.raises(KeyError):
        embedded._name("rope_freqs.weight")  # a file with parts that are not known is not half read
