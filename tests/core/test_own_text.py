"""One's own text as a corpus."""

import json

import pytest

from glassbox_utils.core import corpora, own_text
from glassbox_utils.core.own_text import OwnTextError

LONG = "The clerk read the letter twice, put it down and looked out of the window for a long time. "


def test_files_become_documents_of_both_splits(tmp_path):
    (tmp_path / "a.txt").write_text("\n\n".join(f"{i}. {LONG * 30}" for i in range(60)))
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps({"text": f"{i} {LONG}"}) for i in range(60)))
    (tmp_path / "c.py").write_text("not text")
    name = str(tmp_path)
    train, held = (list(corpora.open_corpus(name, split)) for split in ("train", "held"))
    assert train and held and not {d.text for d in train} & {d.text for d in held}
    assert {d.source for d in train} == {"a.txt", "b.jsonl"} and {d.licence for d in train} == {"your own text"}
    assert corpora.load_corpus(name, "train", 5) == train[:5]
    assert max(len(d.text) for d in train) <= own_text.CHARACTERS


def test_only_a_line_feed_ends_a_line_of_json(tmp_path):
    texts = ["one\u2028two", "three\x85four", "five\x0bsix"]
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    (tmp_path / "a.jsonl").write_text("\n".join(lines), encoding="utf-8")
    assert list(own_text.passages(tmp_path / "a.jsonl")) == texts
    (tmp_path / "part-00000.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert [row["text"] for row in own_text.parts_in(tmp_path)[0]] == texts


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", b"{", "line 1 is not valid JSON"), ("a.jsonl", b'{"txt": 1}', "Allowed: an object with"),
        ("a.txt", b"\xff\xfe\x00", "not text in UTF-8"), ("a.pdf", b"x", "of another kind"),
    ],
)  # fmt: skip
def test_what_holds_no_text_is_refused(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(OwnTextError, match=words):
        [t for path in own_text.files_of(tmp_path / name) for t in own_text.passages(path)]


def test_no_file_and_an_empty_folder_are_refused(tmp_path):
    for path in (tmp_path, tmp_path / "nothing.txt"):
        with pytest.raises(OwnTextError, match="Allowed: files that end in"):
            own_text.files_of(path)


def test_a_long_paragraph_is_cut_and_nothing_is_lost(tmp_path):
    (tmp_path / "a.txt").write_text("x" * 9_001 + "\n\nend")
    pieces = list(own_text.passages(tmp_path / "a.txt"))
    assert "".join(pieces).replace("\n\n", "") == "x" * 9_001 + "end" and max(map(len, pieces)) <= own_text.CHARACTERS
