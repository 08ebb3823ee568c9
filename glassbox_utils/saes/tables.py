"""Tables and findings of notebook 03, from what was measured there and from its studies; no number without control."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from torch import Tensor

from glassbox_utils.core.devices import array
from glassbox_utils.core.evidence import Control, Finding, Kind
from glassbox_utils.core.statistics import Interval, bootstrap_ci, difference_ci, exact_ci
from glassbox_utils.core.tables import frame, shown
from glassbox_utils.saes.toys import Geometry

KINDS = {
    "main": "features of the SAE", "trained": "features of small SAEs",
    "frozen": "small SAEs, decoder frozen at random",
    "pca": "strongest principal components", "random_sae": "SAE that was never trained",
    "random": "random directions", "coordinates": "coordinates of the stream",
    "pca_any": "principal components of any rank", "neurons": "neurons of the MLP (another space)",
}  # fmt: skip
"""how the notebook's and the studies' kinds of units are called, in the order in which they are drawn"""
SCORES = {
    "words": ("any activity", 0.5), "words_top": ("strongest activity", 0.5),
    "sense": ("sense of the texts", 0.5), "intruder": ("intruder found", 0.2),
}  # fmt: skip
"""score of ``meaning.Meaning`` -> how it is called, and what chance gives"""
SIDES = (("main", "pca"), ("main", "random_sae"), ("main", "random"), ("main", "coordinates"), ("trained", "frozen"))
"""which kinds are compared; small SAEs with their twins only, since the large one has another width and training"""
NEAR = 0.12
"""how far the mean of two dozen units may lie from that of a study"""
Table = Mapping[str, Any]
Units = Sequence[Mapping[str, float]]
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


def recovered(presence: Sequence[float], found: Mapping[str, Float[Tensor, "seed toy"]], seed: int = 0) -> Any:
    """How well each side follows the concepts, for every probability of presence, with the interval over seeds."""
    rows = [
        {"present with p": f"{p:g}"}
        | {name: shown(bootstrap_ci(array(values[:, i]), seed=seed)) for name, values in found.items()}
        for i, p in enumerate(presence)
    ]
    return frame(rows)


def found_again(
    presence: Sequence[float], sae: Float[Tensor, "seed toy"], others: Float[Tensor, "seed toy"], seed: int = 0
) -> list[Finding]:
    """The rarest concepts and the most frequent ones, against random directions of every seed."""
    ends = (int(np.argmin(presence)), int(np.argmax(presence)))
    return [
        Finding.measured(
            f"a toy's concepts are found again, present with p = {presence[i]:g} (correlation)",
            2,
            bootstrap_ci(array(sae[:, i]), seed=seed),
            "toys",
            Control.drawn("random units", "sets of random directions", others[:, i].tolist()),
            side="above",
        )
        for i in ends
    ]


# --- what a reconstruction costs ----------------------------------------------------------------------


def costs(share: Mapping[str, tuple[float, float]], cost: Cost) -> Any:
    """Variance that each reconstruction explains, at ordinary and at all positions, and the loss with it in place.

    ``share``: tool -> (ordinary, all); ``cost``: (tool, place) -> loss of each row; what was not measured is empty.
    """
    rows = []
    for name, (ordinary, everywhere) in share.items():
        losses = {f"loss: {place}": f"{x.mean():.2f}" for (tool, place), x in cost.items() if tool == name}
        explained = {"explained: ordinary": f"{ordinary:.2f}", "explained: all": f"{everywhere:.2f}"}
        rows.append({"reconstruction": name, **explained, **losses})
    return frame(rows).fillna("")


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


def spliced(cost: Cost, as_it_is: Float[Tensor, " row"], k: int, seed: int = 0) -> list[Finding]:
    """The rise of the loss with the SAE in place, against PCA of the same positions: at ordinary ones, and at all; and
    what the massive ones add to it, against an SAE that never met one (which may differ in width and text too: what is
    compared is each with itself)."""
    findings = []
    whole = WHOLE_PCA if (WHOLE_PCA, "everywhere") in cost else "PCA"
    for place, said, rival in (
        ("ordinary positions", "ordinary positions", "PCA"),
        ("everywhere", "all positions", whole),
    ):
        sae, pca = (bootstrap_ci(array(cost[name, place] - as_it_is), seed=seed) for name in ("SAE", rival))
        claim = f"splicing the SAE in at {said} costs less than PCA there (rise of the loss, nats)"
        findings.append(Finding.measured(claim, 3, sae, "rows", _pca(k, pca.value, rival), side="below", null=None))
    if (ORDINARY, "everywhere") in cost:
        mine, other = (
            bootstrap_ci(array(cost[n, "everywhere"] - cost[n, "ordinary positions"]), seed=seed)
            for n in ("SAE", ORDINARY)
        )
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


def pooled(study: Table, kind: str, score: str) -> list[float]:
    """Of all seeds; the principal components are the same under every seed, and count once."""
    return [u[score] for part in study["units"][kind][: 1 if kind == "pca" else None] for u in part]


def differences(study: Table, seed: int = 0) -> dict[tuple[str, str], dict[str, Interval]]:
    """By how much one kind of unit is ahead of another: (kind, kind) -> score -> interval.

    ``study``: the table ``sae_meaning``.
    """
    return {
        (a, b): {s: difference_ci(pooled(study, a, s), pooled(study, b, s), seed=seed) for s in SCORES}
        for a, b in SIDES
    }


def gaps(found: Mapping[tuple[str, str], Mapping[str, Interval]]) -> Any:
    """The differences as a table."""
    rows = [
        {"difference": f"{KINDS[a]} minus {KINDS[b]}"}
        | {SCORES[s][0]: shown(gap, "+.2f") for s, gap in by_score.items()}
        for (a, b), by_score in found.items()
    ]
    return frame(rows)


def setup(study: Table) -> str:
    """Of what the study is made: seeds, SAEs, and the variance that each kind explains."""
    small, mean = study["small_saes"], {kind: float(np.mean(x)) for kind, x in study["explained"].items()}
    return (
        f"seeds {study['seeds']}; the SAE {study['sae']} explains {mean['main']:.2f} of the variance\n"
        f"small SAEs ({small['d_sae']} wide, {small['samples']:,} samples of {small['tokens']:,} tokens): trained "
        f"{mean['trained']:.2f}, frozen twins {mean['frozen']:.2f}; never trained, as wide as the SAE above: "
        f"{mean['random_sae']:.2f}"
    )


def near_study(here: Mapping[str, Units], study: Table) -> tuple[int, int]:
    """How many live means lie within NEAR of the study's, and of how many."""
    kinds = [kind for kind in ("main", "pca", "random", "coordinates") if here.get(kind)]
    gaps = [np.mean([u[s] for u in here[kind]]) - np.mean(pooled(study, kind, s)) for kind in kinds for s in SCORES]
    return int((np.abs(gaps) < NEAR).sum()), len(gaps)


def one_meaning(study: Table, seed: int = 0) -> list[Finding]:
    """Every score of features against every opponent of the study's picture but single coordinates.

    *null* too where the interval of the *difference* holds 0: it counts the doubt on both sides.
    """
    against: tuple[tuple[str, str, Kind], ...] = (
        ("main", "random", "random units"),
        ("main", "pca", "trained opponent"),
        ("main", "random_sae", "random units"),
        ("trained", "frozen", "trained opponent"),
    )
    findings = []
    for a, b, typed in against:
        for s in SCORES:
            mine, other = (bootstrap_ci(pooled(study, kind, s), seed=seed) for kind in (a, b))
            claim = f"{KINDS[a]} have one meaning more than {KINDS[b]} have ({SCORES[s][0]})"
            control = Control.measured(typed, KINDS[b], other)
            gap = difference_ci(pooled(study, a, s), pooled(study, b, s), seed=seed)
            even: Any = "null" if gap.low <= 0 <= gap.high else None
            findings.append(
                Finding.measured(claim, 2, mine, "units", control, side="above", null=SCORES[s][1], declared=even)
            )
    return findings


# --- going deeper -------------------------------------------------------------------------------------


def letters(reports: Mapping[str, Sequence[Table]]) -> Any:
    """For each SAE: letters that need exactly one feature, and how good the best one is. ``reports``: of ``saes``."""
    rows = []
    for name, some in reports.items():
        if not some:
            continue
        one = exact_ci(sum(r["n_split"] == 1 for r in some), len(some))
        probe, best, control = np.mean([(r["probe_f1"], r["f1"][0], r["control_f1"]) for r in some], axis=0)
        rows.append(
            {
                "SAE": name,
                "letters": one.n,
                "exactly one feature": shown(one),
                "F1: linear probe": f"{probe:.2f}",
                "F1: best feature": f"{best:.2f}",
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
