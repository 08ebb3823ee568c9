"""Tables and findings of notebook 01, from what it measured; every claim with interval and control."""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor

from glassbox_utils.attention.heads_tables import named
from glassbox_utils.attention.looking import (
    KINDS,
    OPPONENTS,
    PREDICTORS,
    BothSides,
    Lookers,
    Looking,
    by_word,
    pooled,
    push,
)
from glassbox_utils.attention.patterns import head_name
from glassbox_utils.core.evidence import Control, Finding
from glassbox_utils.core.interventions import Head
from glassbox_utils.core.statistics import Interval, bootstrap_ci, exact_ci
from glassbox_utils.core.tables import frame, shown

Correlations = Mapping[str, Mapping[str, Interval]]
"""row (a predictor, ``decisive - another``, ...) -> kind of correlation -> its interval: one family of a comparison"""
NOBODY = "no family of prompts can be asked with this tokenizer"
FIRST = (1, 2, 3, 10)
"""of the heads that look most: where to cut is a choice, so several cuts are shown"""
CLAIMS = {
    "decisive": "attention to the decisive word",
    "weighted": "attention to the decisive word, times the length it moves,",
}
METHODS = {"ranks": "Spearman", "values": "Pearson"}
OF = {
    "another": "attention to another token, any,",
    "awake": "being awake",
    "length": "the length of what a head writes",
}


def kinds(rows: Mapping[str, tuple[Interval, Interval, float]]) -> Any:
    """The best head of each kind: its score on sentences in order and shuffled, beside chance."""
    return frame(
        [
            {
                "head": name,
                "in order": shown(first),
                "shuffled": shown(second),
                "chance": f"{chance:.2f}",
                "sentences": first.n,
            }
            for name, (first, second, chance) in rows.items()
        ]
    )


def meaning(
    look: Float[Tensor, "frame what person layer head"],
    heads: Sequence[Head],
    people: Sequence[str],
    whats: Sequence[str],
    seed: int = 0,
) -> Any:
    """For each head: attention from the first word to the first person, to the others, and the lead from both words."""
    who, (first, second) = people[0], whats
    rows = []
    for layer, head in heads:
        to = look[..., layer, head]
        leads = [bootstrap_ci((to[:, i, :1] - to[:, i, 1:]).mean(1), seed=seed) for i in (0, 1)]
        rows.append(
            {
                "head": head_name((layer, head)),
                f"{first} to {who}": f"{to[:, 0, 0].mean():.2f}",
                f"{first} to others": f"{to[:, 0, 1:].mean():.2f}",
                f"lead from {first}": shown(leads[0]),
                f"lead from {second}": shown(leads[1]),
            }
        )
    return frame(rows)


def shares(rows: Mapping[str, Interval]) -> Any:
    """Shares with their intervals, one a line."""
    return frame([{"share": name, "of the first token": shown(x), "sentences": x.n} for name, x in rows.items()])


def both_sides(
    families: Mapping[str, Looking],
    chosen: Mapping[str, Lookers],
    sides: Mapping[str, BothSides],
    seed: int = 0,
    k: int = 3,
) -> Any:
    """What speaks for "who looks, acts" in each family of prompts, and the heads that speak against it."""
    rows = []
    for family, found in families.items():
        side, look, effect, head = sides[family], found.mean("decisive"), found.mean("effect"), chosen[family].heads[0]
        mine = bootstrap_ci(by_word(found.effect, found.words)[:, head[0], head[1]], seed=seed)
        rows.append(
            {
                "family": family.replace("_", " "),
                "looks most": f"{head_name(head)} ({look[head]:.2f})",
                "its effect": f"{shown(mine, '+.2f')}, place {side.place} of {effect.numel()}",
                "act most": "; ".join(
                    f"{head_name(h)} {side.effect[h]:+.2f} (looks {look[h]:.2f})" for h in side.actors[:k]
                ),
                "look, but act less than the typical head": named(side.idle),
                "act, but look less than it": named(side.blind),
            }
        )
    return frame(rows or [{"nothing": NOBODY}])


def helping(sides: Mapping[str, BothSides]) -> str:
    """How many of the first k lookers of each family help, for several k, beside the share of all heads that do."""
    if not sides:
        return NOBODY
    base_rate = sum(side.base_rate for side in sides.values()) / len(sides)
    lines = [f"of all heads {base_rate:.2f} help (without one the right answer's lead falls); of those that look most:"]
    for k in sorted({min(k, max(len(side.lookers) for side in sides.values())) for k in FIRST}):
        x = [one for side in sides.values() for one in side.lookers[:k]]
        n = sum(one.value > 0 for one in x)
        lines.append(
            f"the first {k} in each family: {n} of {len(x)} help ({shown(exact_ci(n, len(x)))}); with the whole "
            f"interval {sum(one.low > 0 for one in x)} help and {sum(one.high < 0 for one in x)} work against it"
        )
    for name, side in sides.items():
        lines.append(
            f"of all heads, with the whole interval: {side.sure[0]:.2f} help and {side.sure[1]:.2f} work against it "
            f"({name.replace('_', ' ')})"
        )
    return "\n".join(lines)


def pushes(families: Mapping[str, Looking], chosen: Mapping[str, Lookers], seed: int = 0) -> Any:
    """What one of the strongest lookers takes away, also without the first and the first two of them, beside draws of
    heads that write as much; and how much both write. A row a family, and their mean."""
    rows = []
    for name in [*families, "mean"]:
        among = list(families) if name == "mean" else [name]
        draws = list(zip(*(chosen[family].alike for family in among), strict=True))  # [draw][family] -> heads

        def mean(of: Sequence[Sequence[Head]], among: Sequence[str] = among) -> Interval:
            return pooled([push(families[f], found) for f, found in zip(among, of, strict=True)], seed=seed)

        def written(of: Sequence[Sequence[Head]], among: Sequence[str] = among) -> float:
            lengths = [families[f].mean("length") for f in among]
            return sum(float(x[h]) for x, found in zip(lengths, of, strict=True) for h in found) / sum(map(len, of))

        others, long = [mean(draw).value for draw in draws], [written(draw) for draw in draws]
        row = {"family": name.replace("_", " "), "they write": f"{written([chosen[f].heads for f in among]):.1f}"}
        row["the others write"] = f"{sum(long) / len(long):.1f} ({min(long):.1f} to {max(long):.1f})"
        for first, what in enumerate(("look most", "without the first", "without the first two")):
            left = [chosen[f].heads[first:] for f in among]
            row[what] = shown(mean(left), "+.2f") if all(left) else "none left"
        said = f"{sum(others) / len(others):+.2f} ({min(others):+.2f} to {max(others):+.2f})"
        different = sum(len({h for draw in chosen[f].alike for h in draw}) for f in among)
        row[f"{len(draws)} draws of others"] = f"{said}, {different} heads"
        rows.append(row)
    return frame(rows if families else [{"nothing": NOBODY}])


def without_one(
    table: Mapping[str, Correlations], rest: Mapping[str, Correlations], strongest: Mapping[str, Head]
) -> Any:
    """Correlations with the size of the effect by values, of all heads and without the head of each family that acts
    most: a row for each."""
    rows = []
    for family in table:
        which = head_name(strongest[family]) if family in strongest else "these"
        for who, by in (("all heads", table), (f"without {which}", rest)):
            row = {"family": f"{family.replace('_', ' ')}, {who}"}
            row |= {PREDICTORS[name]: shown(by[family][name]["size, values"], "+.2f") for name in (*CLAIMS, "length")}
            row["the second minus the third"] = shown(by[family]["weighted - length"]["size, values"], "+.2f")
            rows.append(row)
    return frame(rows or [{"nothing": NOBODY}])


def leads(table: Mapping[str, Correlations], kinds_shown: Sequence[str] = KINDS) -> Any:
    """In how many families attention to the decisive word is ahead of each opponent, and behind it, with the whole
    interval."""
    families = [rows for name, rows in table.items() if name != "mean"]
    rows = []
    for kind in kinds_shown:
        row = {f"of {len(families)} families": kind}
        for name in OPPONENTS:
            gaps = [family[f"decisive - {name}"][kind] for family in families]
            ahead, behind = sum(x.low > 0 for x in gaps), sum(x.high < 0 for x in gaps)
            row[PREDICTORS[name]] = f"ahead in {ahead}, behind in {behind}"
        rows.append(row)
    return frame(rows)


def stored(correlations: Mapping[str, Mapping[str, Mapping[str, Sequence[float]]]]) -> dict[str, Correlations]:
    """The correlations of the table ``heads_looking`` as intervals; it does not keep over how many words, so n is 0."""
    return {
        family: {row: {kind: Interval(x[0], x[1], x[2], 0) for kind, x in by.items()} for row, by in rows.items()}
        for family, rows in correlations.items()
    }


def beside_study(live: Correlations, study: Correlations, asked: Sequence[tuple[str, str]]) -> Any:
    """Live correlations beside those of the full study, for pairs of a predictor and a kind."""
    return frame(
        [
            {
                "predictor": PREDICTORS[row],
                "kind": kind,
                "here": shown(live[row][kind], "+.2f"),
                "study": shown(study[row][kind], "+.2f"),
            }
            for row, kind in asked
        ]
    )


# --- findings -----------------------------------------------------------------------------------------


def findings_of_looking(
    seen: Interval, moved: Interval, shuffled: tuple[Interval, Interval, float], pronoun: Mapping[str, Interval],
    patient: tuple[Interval, Interval],
) -> list[Finding]:  # fmt: skip
    """What was found without touching a head.

    ``seen``, ``moved``: the first token's share of attention, and of what is moved. ``shuffled``: the best
    previous-token head, as in ``kinds``. ``pronoun``: ``recency`` and ``identity``. ``patient``: the chosen head's lead
    from patient, and from parcel.
    """
    measured = Finding.measured
    return [
        measured("share of attention that goes to the first token", 1, seen, "sentences"),
        measured(
            "of what all heads move, less comes from the first token than of their attention goes there (share)",
            2,
            moved,
            "sentences",
            Control.measured("other group", "attention of the same heads to it", seen),
            side="below",
            null=None,
        ),
        measured(
            "the best previous-token head looks one token back in shuffled text too (score)",
            2,
            shuffled[1],
            "sentences",
            Control("base rate", "a head that spreads its attention evenly", shuffled[2]),
            side="above",
        ),
        measured(
            "heads look on average more at the later of two nouns than at the earlier (hundredths of attention, from a "
            "pronoun)",
            2,
            pronoun["recency"],
            "pairs of nouns",
            Control.measured("other group", "more at the man's job than at the woman's", pronoun["identity"]),
            side="above",
        ),
        measured(
            "a head that was chosen for it looks from patient more at doctor than at other people (attention)",
            2,
            patient[0],
            "sentences",
            Control.measured("other group", "the same head from parcel", patient[1]),
            side="above",
        ),
    ]


def findings_of_acting(
    mean: Correlations, rest: Correlations, strongest: Sequence[Head], pushes: Interval, left: Interval,
    draws: Sequence[float],
) -> list[Finding]:  # fmt: skip
    """What was found by taking heads out: the strongest lookers against heads that write as much, and looking against
    its opponents.

    ``mean``: of a ``comparison``; ``rest``: the same without the ``strongest`` head of each family. ``pushes``,
    ``left``, ``draws``: what one of the strongest lookers takes away, one of them without the first two, and one of
    each draw of heads that write as much. A comparison that lies behind draw by draw, with the whole interval, is
    refuted, also where the two intervals overlap.
    """

    def beats(opponent: str, kind: str, claim: str = "decisive", table: Correlations = mean, who: str = "") -> Finding:
        what, method = kind.split(", ")
        goes = {"size": "goes with the size of a head's effect", "sign": "goes with helping the right answer"}[what]
        gap = table.get(f"{claim} - {opponent}")
        return Finding.measured(
            f"{CLAIMS[claim]} {goes} better than {OF[opponent]} does ({METHODS[method]}{who})", 3, table[claim][kind],
            "decisive words", Control.measured("other group", PREDICTORS[opponent], table[opponent][kind]),
            side="above", declared="refuted" if gap and gap[kind].high < 0 else None,
        )  # fmt: skip

    control = Control.drawn("random units", "draws of heads that write as much", draws)
    one = ", ".join(map(head_name, strongest))

    return [
        Finding.measured(
            "heads that look most at the decisive word help the right answer more than others that write as much (fall "
            "of the logit difference)",
            3,
            pushes,
            "decisive words",
            control,
            side="above",
        ),
        Finding.measured(
            "the same without the first two of them in each family", 3, left, "decisive words", control, side="above"
        ),
        beats("another", "size, ranks"),
        beats("awake", "size, ranks"),
        beats("another", "size, values"),
        beats("length", "size, values"),
        beats("another", "sign, values"),
        beats("length", "sign, values"),
        beats("length", "size, ranks"),
        beats("length", "size, ranks", "weighted"),
        beats("length", "size, values", "weighted", who=f", {one} among the heads"),
        beats("length", "size, values", "weighted", rest, f", without {one}"),
    ]
