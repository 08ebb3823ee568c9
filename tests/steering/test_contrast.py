"""Pairs, prompts and lexicons: disjoint splits, many and varied."""

import pytest

from glassbox_utils.steering import contrast, style


@pytest.mark.parametrize("name", ["tone", "formality", "honesty", "refusal", "gender"])
def test_pairs_are_many_and_varied(name):
    splits = {split: contrast.pairs(name, split) for split in ("train", "selection", "report")}
    everything = [t for p, n in splits.values() for t in (*p, *n)]
    assert sum(len(p) for p, _ in splits.values()) >= 100
    assert len(set(everything)) == len(everything)  # so no text is in two splits either
    texts = [t if isinstance(t, str) else t[1] for t in everything]
    openings = {" ".join(t.split()[:3]) for t in texts}
    assert len(openings) > 0.5 * len(texts)
    if name == "refusal":
        asked = [{prompt for prompt, _ in p} for p, _ in splits.values()]
        assert not asked[0] & asked[1] and not asked[0] & asked[2] and not asked[1] & asked[2]


def test_selection_and_report_prompts_are_disjoint():
    groups = {split: contrast.prompts(split) for split in ("demo", "train", "selection", "report", "spare", "fresh")}
    assert len(groups["report"]) == 200 and len(groups["selection"]) == 60
    everything = [p for g in groups.values() for p in g]
    assert len(set(everything)) == len(everything)


FRAMES = (
    "a about are describe did how impression is like me of review say something tell the think was were what write you"
)


def test_fresh_prompts_have_topics_of_their_own():
    """Each has a word, its frame's apart, that stands in no prompt of another kind, also not in the plural."""

    def topics(prompt):
        words = {*style.words(prompt)} - {*FRAMES.split(), "you", "your"}
        return {w[:-1] if w.endswith("s") and len(w) > 3 else w for w in words}

    kinds = ("demo", "train", "selection", "report", "spare")
    others = {word for kind in kinds for prompt in contrast.prompts(kind) for word in topics(prompt)}
    fresh = contrast.prompts("fresh")
    known = [prompt for prompt in fresh if not topics(prompt) - others]
    assert known == ["Write a review of the night market."]  # one prompt has a night, another a market
    assert len(set(fresh)) == 136


def test_lexicons():
    assert style.tone(["A wonderful day.", "A horrible day.", "A day."]).tolist() == pytest.approx(
        [0.57, -0.54, 0], abs=0.05
    )
    assert style.gender_words(["She saw her.", "He saw him.", "It rains."]).tolist() == pytest.approx(
        [66.7, -66.7, 0], abs=0.1
    )
    assert style.formality(["Dear Sir, we regret this."])[0] > 0 > style.formality(["Hey dude, it's cool!"])[0]
    assert style.distinct(["a b a b a b", "a b c d"]).tolist() == pytest.approx([0.4, 1.0])
    assert style.length(["one two three", ""]).tolist() == [3, 0]
