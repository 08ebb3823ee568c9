"""Text that a model writes: the same after a kill, in its shares, and a corpus that a training takes."""

import json
from collections import Counter

import pytest
import torch
from small import small_model

from glassbox_utils import cli
from glassbox_utils.core import assets, blends, corpora, own_text, own_writing
from glassbox_utils.core.corpora import CorpusError
from glassbox_utils.core.own_text import OwnTextError
from glassbox_utils.core.own_writing import Writing, continued, requests, write

FEW = {"tokens": 2_000, "batch": 32, "length": 12, "model": "small"}


@pytest.fixture(scope="module")
def model():
    return small_model()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv(assets.CACHE_VARIABLE, str(tmp_path))


def contents(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.glob("*.json*"))}


def test_a_killed_run_goes_on_to_the_same_text_and_a_longer_one_begins_with_it(model, monkeypatch):
    whole = contents(write(Writing("whole", **FEW), model))
    real, wrote = own_writing.part_of, []

    def dies(*given):
        if len(wrote) == 3:
            raise KeyboardInterrupt
        wrote.append(given[2])
        return real(*given)

    monkeypatch.setattr(own_writing, "part_of", dies)
    with pytest.raises(KeyboardInterrupt):
        write(Writing("again", **FEW), model)
    monkeypatch.setattr(own_writing, "part_of", lambda *given: wrote.append(given[2]) or real(*given))
    folder = write(Writing("again", **FEW), model)
    assert contents(folder) == whole and wrote == list(range(len(whole) - 1))  # each part once
    longer = contents(write(Writing("again", **FEW | {"tokens": 2_600}), model))
    assert whole.items() < longer.items()
    with pytest.raises(OwnTextError, match="holds another text: seed is 0, asked for 1"):
        write(Writing("again", seed=1, **FEW), model)


def test_tokens_come_in_their_shares(model):
    folder = write(Writing("shares", **FEW | {"tokens": 9_000}), model)
    counts = own_writing.counted(folder)
    total = sum(counts.values())
    assert counts["alone"] / total == pytest.approx(0.5, abs=0.04)
    assert counts["landmark"] / total == pytest.approx(0.07, abs=0.04)
    rows = [row for part in own_text.parts_in(folder) for row in part]
    assert all(bool(row["question"]) == (row["kind"] != "alone") for row in rows)
    assert len({row["text"] for row in rows}) > 0.9 * len(rows)


def test_requests_are_short_of_sixty_topics_and_name_the_bridge_by_its_weight():
    page = json.loads(own_writing.PROMPTS.read_text())
    assert len(set(page["topics"])) == 60
    drawn = requests("topic", 4000, "a")
    assert drawn == requests("topic", 4000, "a") != requests("topic", 4000, "b")
    assert all(any(topic in text for text in drawn) for topic in page["topics"])
    assert all("{" not in text and len(text) < 120 for text in drawn)
    gate = sum("Golden Gate Bridge" in text for text in requests("landmark", 4000, "a")) / 4000
    assert 0.12 < gate < 0.2


def test_rows_that_end_leave_the_batch_and_the_others_write_on(model, monkeypatch):
    sizes, texts, real = [], iter([[5, 5, 5, 5], [0, 5, 5, 5], [0, 5, 5], [5, 5], [0, 5]]), own_writing.drawn

    def chosen(logits):
        sizes.append(len(logits))
        return torch.tensor(next(texts), device=logits.device) if len(sizes) < 6 else real(logits)

    monkeypatch.setattr(own_writing, "drawn", chosen)
    monkeypatch.setattr(own_writing.decoding, "can_be_static", lambda model: False)
    rows = continued(model, [[0], [0, 7], [0], [0]], 5, seed=0)
    assert sizes == [4, 4, 3, 2, 2]
    assert rows == [[5, 0], [5, 5, 0], [5, 5, 5, 5, 0], [5, 5, 5, 5, 5]]


def test_tokens_are_drawn_by_their_probability():
    logits = torch.tensor([[0.0, 1.0, -1e9, 2.0]]).expand(20_000, 4)
    torch.manual_seed(0)
    share = torch.bincount(own_writing.drawn(logits), minlength=4) / 20_000
    assert torch.allclose(share, logits[0].softmax(-1), atol=0.02) and share[2] == 0


def test_leaving_the_batch_changes_no_distribution(model, monkeypatch):
    """Greedy instead of drawn, so that the same texts come whatever leaves: as transformers' own loop writes them."""
    monkeypatch.setattr(own_writing, "drawn", lambda logits: logits.argmax(-1))
    monkeypatch.setattr(own_writing.decoding, "can_be_static", lambda model: False)
    prompts = [[0, 9, 11], [0, 300], [0, 17, 250, 40, 8], [0]]
    rows = continued(model, prompts, 30, seed=0)
    for prompt, row in zip(prompts, rows, strict=True):
        ids = torch.tensor([prompt])
        alone = own_writing.decoding.by_transformers(model, ids, torch.ones_like(ids), 30, 0.0)[0].tolist()
        assert row == alone[: len(row)]


def test_what_a_model_wrote_is_a_corpus_and_part_of_a_blend(model):
    with pytest.raises(OwnTextError, match="glassbox write-text mine"):
        corpora.load_corpus("own:mine")
    write(Writing("mine", **FEW | {"tokens": 24_000, "length": 60, "batch": 100}), model)
    own = corpora.load_corpus("own:mine")
    held = corpora.load_corpus("own:mine", "held")
    assert own and held and not {d.text for d in own} & {d.text for d in held}
    assert {d.topic for d in own} == {"alone", "topic", "landmark"} and {d.licence for d in own} == {"written by small"}
    assert all(d.chat == bool(d.question) for d in own)
    name = "70 % landmarks + 30 % own:mine"
    both = corpora.load_corpus(name)
    for part in (both, both[: len(both) // 3]):
        size = Counter()
        for document in part:
            size[document.source] += len(document.text)
        assert size["own"] / size.total() == pytest.approx(0.3, abs=0.03)
    assert blends.real_part(name) == "landmarks" and blends.has(name, "own:mine") and not blends.has(name, "mix")
    assert corpora.token_rows(model, corpora.open_corpus(name), 4, 32).tokens.shape == (4, 32)


@pytest.mark.parametrize("name", [
    "60 % landmarks + 30 % own:a", "50 % landmarks + 50 % landmarks", "50 % landmarks", "% landmarks", "own:",
    "own:a b", "50 % nosuch + 50 % own:a", "0 % landmarks + 100 % own:a", "50 % landmarks, 50 % own:a", "100 %",
])  # fmt: skip
def test_blends_that_are_none_are_refused(name):
    with pytest.raises(CorpusError, match="Allowed"):
        corpora.check_corpus(name)


@pytest.mark.parametrize("wrong", [{"tokens": 0}, {"alone": 0.6, "landmarks": 0.5}, {"name": "../x"}, {"batch": 0}])
def test_a_text_that_can_not_be_written_is_refused(wrong):
    with pytest.raises(OwnTextError):
        Writing(**{"name": "x"} | wrong)


def test_the_command_writes_and_says_how_it_is_used(model, monkeypatch, capsys):
    monkeypatch.setattr(own_writing, "load_model", lambda name: model)
    assert cli.main(["write-text", "mine", "--tokens", "500"]) == 0
    said = capsys.readouterr().out
    assert "own:mine" in said and "tokens alone" in said


def test_sampled_text_goes_on_where_it_was_and_is_the_same(model, tmp_path, monkeypatch):
    whole = own_writing.sample(model, tmp_path / "whole.jsonl", 12, tokens=6, batch=4)
    own_writing.sample(model, tmp_path / "parts.jsonl", 4, tokens=6, batch=4)
    wrote, real = [], own_writing.continued
    monkeypatch.setattr(own_writing, "continued", lambda *given: wrote.append(1) or real(*given))
    parts = own_writing.sample(model, tmp_path / "parts.jsonl", 12, tokens=6, batch=4)
    assert len(wrote) == 2 and parts.read_text() == whole.read_text()
    assert len(whole.read_text().splitlines()) == 12 and len(set(whole.read_text().splitlines())) > 6
