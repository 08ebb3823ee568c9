"""Documents, splits and packing; the network is needed only for the 5 MB wiki package."""

import re

import pytest
from small import small_model

from glassbox_utils.core import contents, corpora
from glassbox_utils.core.corpora import CorpusError, Document


@pytest.fixture(scope="module")
def model():
    return small_model()


def test_unknown_names_say_what_exists():
    with pytest.raises(CorpusError, match=r"no corpus 'landmark'.*'landmarks'.*Hugging Face"):
        corpora.load_corpus("landmark")
    with pytest.raises(CorpusError, match="train, held, golden_gate"):
        corpora.load_corpus("landmarks", "test")


def test_landmark_passages_are_varied_and_repeatable():
    first, again = list(corpora.landmark_passages(300)), list(corpora.landmark_passages(300))
    assert first == again
    assert len({text for text, _, _ in first}) == 300
    assert 30 < sum("Golden Gate Bridge" in text for text, _, _ in first) < 120
    assert not any(re.search(r"[{}]", text + question) for text, question, _ in first)


def test_splits_share_no_document_and_keep_the_licence():
    parts = {split: corpora.load_corpus("landmarks", split) for split in corpora.SPLITS}
    texts = [d.text for part in parts.values() for d in part]
    assert len(texts) == len(set(texts))
    assert 0.02 < len(parts["held"]) / len(texts) < 0.07
    assert not parts["golden_gate"]  # written passages do not count as real mentions
    assert {d.licence for d in parts["train"]} == {"Apache-2.0"}


def test_real_mentions_of_the_golden_gate_are_held_out():
    for split in ("train", "held"):
        assert not any(re.search("golden gate", d.text, re.IGNORECASE) for d in corpora.load_corpus("wiki", split))
    gate = corpora.load_corpus("wiki", "golden_gate")
    assert any("suspension bridge" in d.text for d in gate)
    assert len(corpora.sentences(gate, "golden gate bridge")) >= 1


def test_order_is_a_fair_shuffle():
    documents = corpora.load_corpus("wiki")
    start = sum(d.topic == "People" for d in documents[:2000]) / 2000
    assert abs(start - sum(d.topic == "People" for d in documents) / len(documents)) < 0.03


def test_hash_sees_text_order_and_chat_form():
    a, b = Document("one", "s", "l"), Document("two", "s", "l")
    hashes = [corpora.corpus_hash(x) for x in ([a, b], [b, a], [a], [a, Document("two", "s", "l", "why?", "", True)])]
    assert len(set(hashes)) == 4


def test_packing_loses_and_doubles_nothing(model):
    documents = [Document(f"sentence number {i} about bridges and gates.", "s", "l") for i in range(40)]
    rows = corpora.token_rows(model, documents, context=16)
    bos = model.tokenizer.bos_token_id
    assert rows.tokens.shape == rows.documents.shape and rows.tokens.shape[1] == 16
    assert (rows.tokens[:, 0] == bos).all() and (rows.documents[:, 0] == -1).all()
    stream = rows.tokens[:, 1:].flatten().tolist()
    expected = [t for d in documents for t in [bos, *model.tokenizer(d.text, add_special_tokens=False)["input_ids"]]]
    assert stream == expected[: len(stream)] and len(expected) - len(stream) < 15
    owner = rows.documents[:, 1:].flatten()
    assert (owner.diff() >= 0).all()
    for index in (0, 7, 30):
        ids = [t for t, o in zip(stream, owner.tolist(), strict=True) if o == index]
        assert model.tokenizer.decode(ids[1:]) == documents[index].text


def test_too_little_text_is_said(model):
    with pytest.raises(CorpusError, match="do not fill one row of 200"):
        corpora.token_rows(model, [Document("short", "s", "l")], context=200)


def test_chat_form_needs_a_template(model):
    document = Document("It is a bridge.", "s", "l", question="What is it?", chat=True)
    assert corpora.as_text(model, document) == "It is a bridge."
    model.tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }} {% endfor %}"
    try:
        assert corpora.as_text(model, document) == "[user] What is it? [assistant] It is a bridge. "
    finally:
        model.tokenizer.chat_template = None


def test_contents_are_printed(capsys):
    contents.print_corpus("landmarks")
    out = capsys.readouterr().out
    assert "Apache-2.0" in out and "hash of the training documents" in out
