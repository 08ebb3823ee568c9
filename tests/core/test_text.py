"""Words are found and told apart in every kind of tokenizer; what can't be read is refused in words."""

import json

import pytest
import tiny
import torch
import zoo
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, trainers
from tokenizers import models as kinds
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from glassbox_utils.attention.ablation import ablate_heads, head_means
from glassbox_utils.attention.heads import first_id, output_norms
from glassbox_utils.attention.induction import circuit_scores
from glassbox_utils.attention.patterns import attention, head_scores, repeated_tokens
from glassbox_utils.core import models
from glassbox_utils.core.devices import result
from glassbox_utils.core.interventions import capture, edit, patch
from glassbox_utils.core.losses import answer_losses, perplexity, text_losses
from glassbox_utils.core.models import ModelError, Site, check_heads, check_layer, load_model
from glassbox_utils.core.text import answered, find_token, following, generate, str_tokens, tokenize

few = settings(max_examples=50, deadline=None, derandomize=True, database=None)


def llama(words, rows=None):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    config = LlamaConfig(vocab_size=rows or len(words), **sizes, max_position_embeddings=128, bos_token_id=0)
    return models.wrap_model(LlamaForCausalLM(config).eval(), words, "llama")


def sentencepiece():
    """As in tokenizer.json of Llama-2: a normaliser puts a space before every text; unknown characters are bytes."""
    inner = Tokenizer(kinds.BPE(unk_token="<unk>", byte_fallback=True))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    special = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    texts = [json.dumps(json.loads(tiny.PROMPTS.read_text())) * 2, "the doctor asked the nurse about Paris " * 50]
    inner.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=1000, special_tokens=special, show_progress=False))
    learned = json.loads(inner.to_str())["model"]
    pairs = [tuple(pair) for pair in learned["merges"]]
    again = Tokenizer(
        kinds.BPE(vocab=learned["vocab"], merges=pairs, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    again.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    again.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=again, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.fixture(scope="module", params=[tiny.tokenizer, sentencepiece], ids=["bytes", "sentencepiece"])
def model(request):
    return llama(request.param())


def test_words_inside_a_text_have_their_own_first_token(model):
    first = [first_id(model, word) for word in ("doctor", "nurse", "Paris", "is", "are")]
    if "▁" in model.tokenizer.get_vocab():  # the tiny byte vocabulary has only spaces of their own
        assert model.tokenizer.convert_tokens_to_ids("▁") not in first and len(set(first)) >= 4
    ids = tokenize(model, "the doctor asked the nurse about Paris").input_ids[0].tolist()
    wanted = following(model, " Paris")
    assert ids[-len(wanted) :] == wanted
    assert "".join(str_tokens(model, ids)[1:]).strip() == "the doctor asked the nurse about Paris"


TEXT = st.text(st.characters(exclude_categories=("Cs", "Cc"), exclude_characters="▁"), min_size=1, max_size=12)
BYTES = llama(tiny.tokenizer())


@few
@given(TEXT)
def test_tokens_show_their_text_and_different_ones_look_different(text):
    ids = tokenize(BYTES, text).input_ids[0].tolist()[1:]
    shown = str_tokens(BYTES, ids)
    assert ("�" in "".join(shown)) == ("�" in text)
    assert len(set(shown)) == len(set(ids))
    joined = "".join(shown)
    if "\\x" not in joined:
        assert joined == text


def test_a_piece_of_a_character_is_shown_as_bytes(model):
    shown = str_tokens(model, tokenize(model, "Hi 🙂").input_ids[0])
    assert "�" not in "".join(shown) and any(t.strip().startswith("\\xf0") for t in shown)


@pytest.mark.parametrize("text, word", [("Hi 東京 now", "東京"), ("(doctor)", "doctor"), ("it's a nurse.", "nurse")])
def test_a_word_is_found_whatever_its_neighbours_made_of_its_tokens(model, text, word):
    ids = tokenize(model, text).input_ids[0]
    place = find_token(model, ids, word)
    assert word in model.tokenizer.decode(ids[: place + 1])
    assert word not in model.tokenizer.decode(ids[:place])


@few
@given(st.lists(TEXT, min_size=1, max_size=3), TEXT)
def test_an_answer_keeps_all_of_its_tokens_whatever_the_prompt_ends_with(prompts, answer):
    batch, mask = answered(BYTES, prompts, [answer] * len(prompts))
    alone = BYTES.tokenizer(answer, add_special_tokens=False)["input_ids"]
    for ids, counted, prompt in zip(batch.input_ids, mask, prompts, strict=True):
        assert len(ids[counted]) >= 1
        if not answer[0].isspace():
            assert ids[counted].tolist() == alone
        before = tokenize(BYTES, prompt).input_ids[0].tolist()
        assert ids[~counted].tolist()[-len(before) :] == before


@pytest.mark.parametrize("special", [{}, {"bos_token": "<s>"}, {"unk_token": "<s>"}])
def test_a_tokenizer_without_special_tokens_is_enough(special):
    words = PreTrainedTokenizerFast(tokenizer_object=tiny.tokenizer()._tokenizer, **special)
    sizes = {"n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": None, "eos_token_id": None}
    hf = GPT2LMHeadModel(GPT2Config(vocab_size=len(words), **sizes)).eval()
    model = models.wrap_model(hf, words, "bare")
    texts = ["The key", "The key is in the box."]
    assert generate(model, texts, 3) == [generate(model, text, 3)[0] for text in texts]
    assert head_scores(model, tokenize(model, texts)).current.isfinite().all()


def test_tokens_that_end_a_text_are_not_followed_by_padding():
    model = llama(PreTrainedTokenizerFast(tokenizer_object=tiny.tokenizer()._tokenizer))
    model.hf.generation_config.eos_token_id = list(range(2, 300))  # most tokens end a text, none of them is special
    texts = ["The key", "The key is in the box."]
    assert generate(model, texts, 6) == [generate(model, text, 6)[0] for text in texts]


def test_long_texts_are_cut_before_they_are_too_long():
    long, short = "The key is in the box. " * 200, "The key is in the box. " * 8
    losses, counts = text_losses(BYTES, [long, short], 30)
    alone, _ = text_losses(BYTES, [short], 30)
    assert counts.tolist() == [29, 29] and losses == pytest.approx([alone[0]] * 2, abs=1e-3)
    assert perplexity(BYTES, [long], 30).value > 1


def test_rows_without_a_token_and_tokens_without_a_row():
    words = tiny.tokenizer()
    assert int(repeated_tokens(llama(words, len(words) + 300), 4, 20).input_ids.max()) < len(words)
    words.add_tokens(["<extra>"])
    narrow = llama(words, len(words) - 1)
    assert int(repeated_tokens(narrow, 8, 40).input_ids.max()) < len(words) - 1
    for call in (tokenize, attention, lambda m, t: generate(m, t, 3)):
        with pytest.raises(ModelError, match=r"<extra>.*embeddings for 0 to"):
            call(narrow, "The <extra> key")


def test_padding_counts_nowhere():
    batch = tokenize(BYTES, ["The key", "The doctor asked the nurse about the key."])
    alone = tokenize(BYTES, "The key")
    both = torch.stack([output_norms(BYTES, tokenize(BYTES, t)) for t in ("The key", "The key")]).mean(0)
    assert torch.allclose(output_norms(BYTES, alone), both)
    n = result(batch.attention_mask.sum(-1) - 1).float()
    parts = [output_norms(BYTES, tokenize(BYTES, t)) for t in ("The key", "The doctor asked the nurse about the key.")]
    assert torch.allclose(output_norms(BYTES, batch), (parts[0] * n[0] + parts[1] * n[1]) / n.sum(), atol=1e-5)
    with pytest.raises(ModelError, match="without padding"):
        circuit_scores(BYTES, batch)


@pytest.mark.parametrize(
    "mistake, words",
    [
        (lambda m: check_layer(m, True), "no layer True"),
        (lambda m: check_layer(m, 1.0), "no layer 1.0"),
        (lambda m: check_heads(m, [(0, False)]), "no head False"),
        (lambda m: check_heads(m, [3]), "is no head"),
        (lambda m: check_heads(m, ["ab"]), "is no head"),
        (lambda m: ablate_heads(m, [], "zero").__enter__(), "list is empty"),
        (lambda m: ablate_heads(m, [(True, 0)], "zero").__enter__(), "no layer True"),
        (lambda m: edit(m, ("resid_post", True), lambda x: x).__enter__(), "no layer True"),
        (lambda m: edit(m, "resid_post", lambda x: x).__enter__(), "is no site"),
        (lambda m: patch(m, {}).__enter__(), "nothing to patch"),
        (lambda m: patch(m, {Site("z", 0): torch.zeros(1)}, heads=[]).__enter__(), "nothing to patch"),
        (lambda m: patch(m, {Site("z", 0): torch.zeros(1)}, heads=[(1, 0)]).__enter__(), "no Site"),
        (lambda m: capture(m, tokenize(m, "a"), []), "no site"),
        (lambda m: head_means(m, []), "no token to average"),
        (lambda m: head_means(m, [tokenize(m, "a", bos=False)]), "no token to average"),
        (lambda m: find_token(m, [1, 2], ""), "word to find is ''"),
        (lambda m: find_token(m, [1, 2], None), "word to find is None"),
        (lambda m: tokenize(m, "a\ud83d"), "UTF-8"),
        (lambda m: generate(m, ["a", 3]), "empty"),
        (lambda m: text_losses(m, ["a"], 1), "max_tokens is 1"),
        (lambda m: text_losses(m, ["a"], batch_size=0), "batch_size is 0"),
        (lambda m: answer_losses(m, [], []), "0 questions"),
        (lambda m: answer_losses(m, ["a"], ["b", "c"]), "1 questions and 2 answers"),
        (lambda m: repeated_tokens(m, 0, 5), "0 rows"),
        (lambda m: repeated_tokens(m, True, 5), "True rows"),
    ],
)
def test_a_mistake_is_explained(mistake, words):
    with pytest.raises(ModelError, match=words) as error:
        mistake(BYTES)
    assert "\n" not in str(error.value)


# --- folders that are not what they should be ------------------------------------------------------------


def test_an_adapter_without_a_counterpart_in_the_model_is_refused(tmp_path):
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import load_file, save_file

    base = tiny.save("llama", tmp_path / "base")
    lora = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(tiny.build("llama", layers=5), lora).save_pretrained(tmp_path / "deeper")
    get_peft_model(tiny.build("llama"), lora).save_pretrained(tmp_path / "renamed")
    file = tmp_path / "renamed" / "adapter_model.safetensors"
    tensors = load_file(file)
    assert load_model(base, tmp_path / "renamed").hash != load_model(base).hash
    save_file({name.replace("layers", "h"): t for name, t in tensors.items()}, file)
    for name in ("deeper", "renamed"):
        with pytest.raises(ModelError, match=r"adapter .* does not fit this model: the tensor .* has no place"):
            load_model(base, tmp_path / name)
    save_file(dict(list(tensors.items())[2:]), file)
    with pytest.raises(ModelError, match="2 of 6 expected ones are missing"):
        load_model(base, tmp_path / "renamed")
    file.write_bytes(b"version https://git-lfs")
    with pytest.raises(ModelError, match="does not fit this model"):
        load_model(base, tmp_path / "renamed")


def test_a_folder_without_all_of_a_model_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    empty = tmp_path / "SmolLM2-135M-Instruct"
    empty.mkdir()
    with pytest.raises(ModelError, match=r"config.json is missing \(it holds nothing\)") as error:
        load_model(empty)
    assert "Did you mean" not in str(error.value)
    folder = tiny.save("llama", tmp_path / "half")
    file = folder / "model.safetensors"
    tensors = load_file(file)
    lost = sorted(tensors)[3]
    save_file({name: t for name, t in tensors.items() if name != lost}, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=f"1 tensors .* not stored, such as {lost}"):
        load_model(folder)
    for content in (b"", b"version https://git-lfs", file.read_bytes()[:5000]):
        file.write_bytes(content)
        with pytest.raises(ModelError, match="can't be loaded"):
            load_model(folder)


def test_the_bridge_knows_a_tokenizer_of_memory_and_later_tokens():
    words = zoo.tokenizer()
    words.add_tokens(["<extra>"])
    model = models.wrap_model(zoo.network("llama"), words, "memory")
    assert "<extra>" in model.bridge.tokenizer.get_vocab()
