"""What is in a corpus: documents, words, licences by source, as the command ``glassbox corpus`` prints it."""

import itertools
from collections import Counter

from glassbox_utils.core.corpora import SOURCES, SPLITS, corpus_hash, load_corpus, packed
from glassbox_utils.core.models import Model
from glassbox_utils.core.session import progress


def print_corpus(name: str = "mix", model: Model | None = None) -> None:
    """What is in a corpus: documents, words, licence by source; tokens too if a model is given."""
    print(f"{'source':12s} {'train':>7s} {'held':>6s} {'gg':>4s} {'words':>10s} {'chat':>5s}  licence; what")
    total: Counter[str] = Counter()
    parts = (
        {split: load_corpus(name, split) for split in SPLITS}
        if "/" not in name
        else {"train": load_corpus(name, "train", 1000)}
    )
    for source in dict.fromkeys(d.source for d in itertools.chain(*parts.values())):
        rows = {split: [d for d in documents if d.source == source] for split, documents in parts.items()}
        train = rows["train"]
        words = sum(len(d.text.split()) for d in train)
        chat = sum(d.chat for d in train) / max(len(train), 1)
        held, gate = len(rows.get("held", [])), len(rows.get("golden_gate", []))
        registered = SOURCES.get(source)
        what = f"{registered.licence}; {registered.note}" if registered else (train[0].licence if train else "")
        print(f"{source:12s} {len(train):7,d} {held:6,d} {gate:4d} {words:10,d} {chat:5.0%}  {what}")
        total.update(train=len(train), held=held, gg=gate, words=words)
    print(f"{'total':12s} {total['train']:7,d} {total['held']:6,d} {total['gg']:4d} {total['words']:10,d}")
    print(f"hash of the training documents: {corpus_hash(parts['train'])}")
    if model is not None:
        n = sum(r.tokens.numel() for r in progress(packed(model, parts["train"]), "tokenise"))
        print(f"{n:,d} tokens of {model.name} in rows of 256")
