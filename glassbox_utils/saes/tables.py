"""Tables and findings of notebook 03, from what was measured there and from its studies; no number without control."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from torch import Tensor

from glassbox_utils.core.devices import array
from glassbox_utils.core.evidence import Control, Finding, Kind
from glassbox_utils.core.statistics import Interval, clustered_ci, difference_ci, exact_ci
from glassbox_utils.core.tables import frame, shown
from glassbox_utils.saes import comparing
from glassbox_utils.saes.comparing import Gap, Units
from glassbox_utils.saes.toys import Geometry

KINDS = {
    "main": "features of the SAE", "trained": "features of small SAEs",
    "frozen": "features of small SAEs, decoder frozen at random",
    "pca": "strongest principal components", "random_sae": "features of a never-trained SAE",
    "random": "random directions", "coordinates": "coordinates of the stream",
    "pca_any": "principal components of any rank", "neurons": "neurons of the MLP (another space)",
}  # fmt: skip
"""how the notebook's and the studies' kinds of units are called, in the order in which they are drawn"""
SCORES = {
    "words": ("any activity", 0.5), "words_top": ("strongest activity", 0.5),
    "sense": ("sense of the texts", 0.5), "intruder": ("intruder found", 0.2),
}  # fmt: skip
"""score of ``meaning.Meaning`` -> how it is called, and what chance gives"""
SIDES = (
    ("main", "neurons"), ("main", "pca"), ("main", "random_sae"), ("main", "random"), ("main", "coordinates"),
    ("trained", "frozen"), ("trained", "pca"),
)  # fmt: skip
"""which kinds are compared; small SAEs not with the large one, which has another width and training"""
ALIKE = ("main", "neurons", "pca", "pca_any", "random", "coordinates")
"""kinds that the notebook draws as the study does"""
NEAR = 4.0
"""by how many standard errors a live lead may be off: twenty are looked at"""
Table = Mapping[str, Any]
Cost = Mapping[tuple[str, str], Float[Tensor, " row"]]

# --- toys ---------------------------------------------------------------------------------------------


def arrows(found: Geometry, presence: Sequence[float]) -> Any:
    """What became of the concepts in each toy, seed by seed."""
    rows = [
        {
            "present with p": f"{p:g}",
            "dropped (each seed)": " ".join(map(str, found.dropped[:, i].tolist())),
            "opposite pairs (each seed)": " ".join(map(str, found.opposite[:, i].tolist())),
            "mean length": f"{found.length[:, i].mean():.1f}",
        }
        for i, p in enumerate(presence)
    ]
    return frame(rows)


def few(values: Any) -> Interval:
    """Mean of a handful of cases with its t-interval: a percentile bootstrap of so few is too narrow."""
    x = array(values)
    found = clustered_ci(x, range(len(x)))
    return Interval(float(found.mean), float(found.low), float(found.high), len(x))


def recovered(
    presence: Sequence[float], found: Mapping[str, Float[Tensor, "seed toy concept"]], kept: Bool[Tensor, "s t c"]
) -> Any:
    """How well each side follows the concepts, for every probability of presence, with the interval over seeds.

    ``kept``: which concepts the squeeze did not drop; the right half of the table is the mean over those alone.
    """
    rows = []
    for i, p in enumerate(presence):
        mine = kept[:, i]
        means = {name: shown(few(x[:, i].mean(-1))) for name, x in found.items()}
        alone = {f"{name}, kept ones": f"{x[:, i][mine].mean():.2f}" for name, x in found.items()}
        dropped = f"{int((~mine).sum())} of {mine.numel()}"
        rows.append({"present with p": f"{p:g}", **means, "dropped by the squeeze": dropped, **alone})
    return frame(rows)


def found_again(presence: Sequence[float], found: Mapping[str, Float[Tensor, "seed toy concept"]]) -> list[Finding]:
    """Each probability of presence against the second of three sides (the same SAE before training), and the rarest and
    the most frequent against the third (random directions)."""
    sae, start, others = (x.mean(-1) for x in found.values())
    ends = (int(np.argmin(presence)), int(np.argmax(presence)))
    claims = [(i, others, "", "sets of random directions") for i in ends]
    claims += [(i, start, ", better than before training", "SAEs before training") for i in range(len(presence))]
    return [
        Finding.measured(
            f"a toy's concepts are found again{more}, present with p = {presence[i]:g} (correlation)",
            2,
            few(sae[:, i]),
            "toys",
            Control.drawn("random units", what, other[:, i].tolist()),
            side="above",
        )
        for i, other, more, what in claims
    ]


# --- what a reconstruction costs ----------------------------------------------------------------------


def costs(share: Mapping[str, tuple[float, float]], cost: Cost) -> Any:
    """Variance that each reconstruction explains, at ordinary and at all positions, and the loss with it in place.

    ``share``: tool -> (ordinary, all); ``cost``: (tool, place) -> loss of each row; what was not measured is *not run*.
    """
    rows = []
    for name, (ordinary, everywhere) in share.items():
        losses = {f"loss: {place}": f"{x.mean():.2f}" for (tool, place), x in cost.items() if tool == name}
        explained = {"explained: ordinary": f"{ordinary:.2f}", "explained: all": f"{everywhere:.2f}"}
        rows.append({"reconstruction": name, **explained, **losses})
    return frame(rows).fillna("not run")


def beside_card(explained: float, as_it_is: Float[Tensor, " row"], cost: Cost, card: Table) -> tuple[Any, float]:
    """What was measured by hand beside what ``evaluate_sae`` wrote into the SAE's card, and the largest difference.

    NaN where somebody else's SAE has no card.
    """
    here, other = card.get("wiki_held_out", {}), card.get("metrics", {}).get("sae", {})
    mine = {
        ("explained_variance", "variance explained, ordinary positions"): explained,
        ("ce", "loss of the model as it is"): float(as_it_is.mean()),
        ("ce_spliced", "loss with the SAE at ordinary positions"): float(cost["SAE", "ordinary positions"].mean()),
        ("ce_spliced_all", "loss with the SAE everywhere"): float(cost["SAE", "everywhere"].mean()),
    }
    rows = [
        {
            "measure": words,
            "by hand": f"{value:.2f}",
            "library, same rows": f"{here.get(name, math.nan):.2f}",
            "library, mix of texts": f"{other.get(name, math.nan):.2f}",
        }
        for (name, words), value in mine.items()
    ]
    gaps = [abs(value - here.get(name, math.nan)) for (name, _), value in mine.items()]
    return frame(rows), float(np.max(gaps))


ORDINARY = "SAE of ordinary positions"
"""a second SAE of the same place, which never met a massive position"""
WHOLE_PCA = "PCA of all positions"
"""principal components that were fitted to the massive positions too: the opponent where those are put in"""


def spliced(cost: Cost, as_it_is: Float[Tensor, " row"], k: int) -> list[Finding]:
    """The rise of the loss with the SAE in place, against PCA of the same positions: at ordinary ones, and at all; and
    what the massive ones add to it, against an SAE that never met one (which may differ in width and text too: what is
    compared is each with itself). Intervals are t-intervals over rows."""
    findings = []
    whole = WHOLE_PCA if (WHOLE_PCA, "everywhere") in cost else "PCA"
    for place, said, rival in (
        ("ordinary positions", "ordinary positions", "PCA"),
        ("everywhere", "all positions", whole),
    ):
        sae, pca = (few(cost[name, place] - as_it_is) for name in ("SAE", rival))
        claim = f"splicing the SAE in at {said} costs less than PCA there (rise of the loss, nats)"
        findings.append(Finding.measured(claim, 3, sae, "rows", _pca(k, pca.value, rival), side="below", null=None))
    if (ORDINARY, "everywhere") in cost:
        mine, other = (few(cost[n, "everywhere"] - cost[n, "ordinary positions"]) for n in ("SAE", ORDINARY))
        control = Control.measured("trained opponent", "an SAE that never met a massive position", other)
        claim = "massive positions add less to the cost of an SAE that was trained on them too (rise of the loss, nats)"
        findings.append(Finding.measured(claim, 3, mine, "rows", control, side="below", null=None))
    return findings


def _pca(k: int, value: float, name: str) -> Control:
    return Control("trained opponent", f"{name}, {k} components, same rows", value)


# --- one meaning --------------------------------------------------------------------------------------


def scores(here: Mapping[str, Units]) -> Any:
    """The mean of every score for each kind of unit, measured live."""
    rows = [
        {"units": KINDS[kind]}
        | {name: f"{np.mean([u[score] for u in units]):.2f}" for score, (name, _) in SCORES.items()}
        | {"n": len(units)}
        for kind, units in here.items()
        if units
    ]
    return frame(rows)


def lead(here: Mapping[str, Units], a: str, b: str, seed: int = 0) -> str:
    """By how much one kind is ahead of another among the few units that were measured live, in words."""
    if min(len(here.get(kind, ())) for kind in (a, b)) < 2:
        return f"{KINDS[a]} or {KINDS[b]}: too few to compare"
    gaps = {
        name: difference_ci([u[s] for u in here[a]], [u[s] for u in here[b]], seed=seed)
        for s, (name, _) in SCORES.items()
    }
    return f"{KINDS[a]} minus {KINDS[b]}: " + ", ".join(f"{name} {shown(gap, '+.2f')}" for name, gap in gaps.items())


def differences(study: Table, seed: int = 0) -> dict[tuple[str, str], dict[str, Gap]]:
    """By how much one kind of unit is ahead of another: (kind, kind) -> score -> gap. ``study``: ``sae_meaning``."""
    return comparing.gaps(study["units"], SIDES, list(SCORES), seed)


def gaps(found: Mapping[tuple[str, str], Mapping[str, Gap]]) -> Any:
    """The differences as a table; a star where one survives Holm's correction over all that stand in it."""
    rows = [
        {"difference": f"{KINDS[a]} minus {KINDS[b]}"}
        | {SCORES[s][0]: shown(gap.interval, "+.2f") + (" *" if gap.clear else "") for s, gap in by_score.items()}
        for (a, b), by_score in found.items()
    ]
    return frame(rows)


def setup(study: Table) -> str:
    """Of what the study is made: seeds, SAEs, the variance that each kind explains; and what else it keeps."""
    small, mean = study["small_saes"], {kind: float(np.mean(x)) for kind, x in study["explained"].items()}
    kinds = [kind for kind in KINDS if len(comparing.pooled(study["units"], kind, "other"))]

    def of(score: str) -> dict[str, NDArray]:
        return {kind: comparing.pooled(study["units"], kind, score) for kind in kinds}

    other = [x.mean() for x in of("other").values()]
    sense = ", ".join(f"{KINDS[kind]} {x.mean():.2f}" for kind, x in of("sense_top").items())
    best = ", ".join(f"{KINDS[kind]} {(x >= 0.9).sum()} of {len(x)}" for kind, x in of("words_top").items())
    return (
        f"seeds {study['seeds']}; the SAE {study['sae']} explains {mean['main']:.2f} of the variance\n"
        f"small SAEs ({small['d_sae']} wide, {small['samples']:,} samples of {small['tokens']:,} tokens): trained "
        f"{mean['trained']:.2f}, frozen twins {mean['frozen']:.2f}; never trained, as wide as the SAE above: "
        f"{mean['random_sae']:.2f}\n"
        f"control, the description of another unit of the kind, any activity: {min(other):.2f} to {max(other):.2f}\n"
        f"sense of the texts at the strongest activity: {sense}\n"
        f"units that reach .9 at the strongest activity: {best}"
    )


def near_study(here: Mapping[str, Units], study: Table, seed: int = 0) -> tuple[str, float]:
    """How many live means of ``ALIKE`` lie outside the study's intervals, and how far off the features' leads over the
    others are at most, in standard errors: in words, and the second as a number."""
    kinds = study["units"]
    alike = [k for k in ALIKE if len(here.get(k, ())) > 1 and len(comparing.pooled(kinds, k, "words")) > 1]
    outside = [
        interval.excludes(float(np.mean([u[score] for u in here[kind]])))
        for kind in alike
        for score in SCORES
        if (interval := comparing.interval(kinds, kind, score, seed))
    ]
    rivals = [kind for kind in alike if kind != "main" and "main" in alike]
    off = [comparing.off_by(here, kinds, "main", kind, score, seed) for kind in rivals for score in SCORES]
    far = float(np.abs(off).max()) if off else math.nan
    return (
        f"{sum(outside)} of {len(outside)} live means lie outside the study's interval; the features' leads over the "
        f"other kinds are off by {far:.1f} standard errors at most"
    ), far


def one_meaning(study: Table, seed: int = 0) -> list[Finding]:
    """Every score of features against the opponents of the study's table but single coordinates, and of small SAEs
    against their twins; p is that of the difference, after Holm over the whole table."""
    against: dict[tuple[str, str], Kind] = {
        ("main", "neurons"): "random units",
        ("main", "random"): "random units",
        ("main", "pca"): "trained opponent",
        ("main", "random_sae"): "random units",
        ("trained", "frozen"): "trained opponent",
    }
    findings, units, found = list[Finding](), study["units"], differences(study, seed)
    for (a, b), typed in against.items():
        for s, gap in found.get((a, b), {}).items():
            mine, other = (comparing.interval(units, kind, s, seed) for kind in (a, b))
            assert mine is not None and other is not None
            claim = f"{KINDS[a]} have one meaning more than {KINDS[b]} have ({SCORES[s][0]})"
            what = f"{KINDS[b]} ({other.n} {comparing.unit_of(b)})"
            control = Control.measured(typed, what, other)
            findings.append(
                Finding.measured(claim, 2, mine, comparing.unit_of(a), control, side="above", null=SCORES[s][1],
                                 p_value=gap.holm)
            )  # fmt: skip
    return findings


# --- going deeper -------------------------------------------------------------------------------------


def letters(reports: Mapping[str, Sequence[Table]]) -> Any:
    """For each SAE: letters that need exactly one feature, and how good the best one is. ``reports``: of ``saes``."""
    rows = []
    for name, some in reports.items():
        if not some:
            continue
        one = exact_ci(sum(r["n_split"] == 1 for r in some), len(some))
        least = sorted(some, key=lambda r: r["f1"][0])[:3]
        probe, best, control = np.mean([(r["probe_f1"], r["f1"][0], r["control_f1"]) for r in some], axis=0)
        rows.append(
            {
                "SAE": name,
                "letters": one.n,
                "exactly one feature": shown(one),
                "more than .03 by five": f"{sum(max(r['f1']) - r['f1'][0] > 0.03 for r in some)} of {one.n}",
                "F1: linear probe": f"{probe:.2f}",
                "F1: best feature": f"{best:.2f}",
                "as good as the probe": f"{sum(r['f1'][0] >= r['probe_f1'] for r in some)} of {one.n}",
                "lowest best features": ", ".join(f"{r['letter']} {r['f1'][0]:.2f}" for r in least),
                "F1: letters permuted": f"{control:.2f}",
            }
        )
    return frame(rows)


def bridge(found: Table) -> tuple[Any, Finding]:
    """Sentences about the bridge that the planted feature finds, and others on which it fires.

    ``found``: a ``Detection`` as a mapping, or what a card keeps of it (numbers in place of sentences).
    """
    false, missed = (x if isinstance(x, int) else len(x) for x in (found["false_alarms"], found["missed"]))
    recall = exact_ci(found["n_positive"] - missed, found["n_positive"])
    alarms = exact_ci(false, found["n_negative"])
    rows = [
        {"sentences": "about the bridge", "fires on": f"{recall.n - missed} of {recall.n}", "share": shown(recall)},
        {
            "sentences": "other bridges, gates, golden things",
            "fires on": f"{false} of {alarms.n}",
            "share": shown(alarms),
        },
    ]
    what = "it fires on sentences about other bridges, gates and golden things"
    claim = "the planted bridge feature fires on real sentences about the bridge (share)"
    control = Control.measured("other group", what, alarms)
    return frame(rows), Finding.measured(claim, 2, recall, "sentences", control, side="above")
