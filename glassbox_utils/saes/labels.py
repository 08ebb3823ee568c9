"""Labels of features and their tests: enrichment on one half of the text, detection on the other."""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from glassbox_utils.core.models import Model
from glassbox_utils.saes.features import Scan, firing


@dataclass(frozen=True)
class Label:
    """An automatic description: a word or a topic that is over-represented where the feature fires."""

    feature: int
    kind: str
    """token or topic"""
    text: str
    share: float
    """of the activations in the first half of the rows"""
    base_rate: float
    p_value: float
    """binomial tail, Bonferroni-corrected over the labels that were tried"""
    detection: float
    """balanced accuracy of the label as a predictor of firing, in the second half; 0.5 is chance"""


def label(model: Model, scanned: Scan, feature: int) -> Label | None:
    """The most enriched token or topic of a feature, or None if nothing passes p < 0.01.

    Fitted on the first half of the rows, scored on the second. No outside model is asked.
    """
    from scipy.stats import binom

    cut = len(scanned.rows.tokens) // 2 * scanned.rows.tokens.shape[1]
    usual = scanned.usual.flatten()
    positions, _ = firing(scanned, feature)
    fit, test = positions[positions < cut], positions[positions >= cut]
    if len(fit) < 5:
        return None
    best: Label | None = None
    for kind, names in (("token", token_names(model, scanned)), ("topic", topic_names(scanned))):
        base = Counter(names[:cut][usual[:cut].numpy()].tolist())
        here = Counter(names[fit.numpy()].tolist())
        here.pop("", None)
        total = sum(base.values())
        for name, count in here.most_common(5):
            rate = base[name] / total
            p = float(binom.sf(count - 1, len(fit), rate)) * len(base)
            share = count / len(fit)
            if p < 0.01 and share > 2 * rate and (best is None or share - rate > best.share - best.base_rate):
                detection = _detection(names, name, cut, usual, test)
                best = Label(feature, kind, name, share, rate, min(1.0, p), detection)
    return best


def _detection(names: NDArray, name: str, cut: int, usual: Tensor, fired: Tensor) -> float:
    """Balanced accuracy of "the label applies" as a prediction of "the feature fires"."""
    predicted = torch.from_numpy(names == name)
    active = torch.zeros(len(predicted), dtype=torch.bool)
    active[fired] = True
    test = usual.clone()
    test[:cut] = False
    yes, no = predicted[test & active], predicted[test & ~active]
    if not len(yes) or not len(no):
        return math.nan
    return float((yes.float().mean() + (~no).float().mean()) / 2)


def token_names(model: Model, scanned: Scan) -> NDArray:
    """Lower-cased text of every token of the scan, flat."""
    flat = scanned.rows.tokens.flatten().tolist()
    names = {i: model.tokenizer.decode([i]).strip().lower() for i in set(flat)}
    return np.array([names[i] for i in flat], dtype=object)


def topic_names(scanned: Scan) -> NDArray:
    """Topic of the document of every token of the scan, flat; empty where the source has none."""
    owners = scanned.rows.documents.flatten().tolist()
    return np.array([scanned.documents[i].topic if i >= 0 else "" for i in owners], dtype=object)


def find_label(labels: Sequence[Label], word: str) -> list[Label]:
    """Labels that contain a word, the best detection first."""
    found = [x for x in labels if word.lower() in x.text.lower()]
    return sorted(found, key=lambda x: -x.detection if not math.isnan(x.detection) else 0.0)


# --- monosemanticity ----------------------------------------------------------------------------------


def concentration(scanned: Scan, names: NDArray, top: int = 50, minimum: int = 20) -> Iterator[tuple[int, float]]:
    """For each feature with enough activations: the share of its ``top`` strongest that has one and the same name.

    With ``token_names`` this says how far one word explains a feature. It needs a control, as any score that picks
    the commonest name does: the same with the names permuted (``rng.permutation(names)``).
    """
    for feature in range(scanned.d_sae):
        positions, values = firing(scanned, feature)
        if len(positions) >= minimum:
            strongest = positions[values.topk(min(top, len(values))).indices]
            yield feature, Counter(names[strongest.numpy()].tolist()).most_common(1)[0][1] / len(strongest)


class Group(NamedTuple):
    """Some of a unit's strongest activations that one feature shares."""

    feature: int
    positions: list[int]


def unmix(
    units: Scan, scanned: Scan, top: int = 24, smallest: int = 4, rare: float = 0.02
) -> Iterator[tuple[int, list[Group]]]:
    """For each unit of ``units`` (neurons, say): which features share its ``top`` strongest activations.

    Greedy: the feature (firing on less than ``rare`` of all tokens) that is active at most of the positions, then at
    most of the rest, as long as it has ``smallest`` of them. Both scans are of the same rows.
    """
    order = scanned.positions.argsort(stable=True)
    features = scanned.features[order]
    starts = torch.zeros(scanned.rows.tokens.numel() + 1, dtype=torch.long)
    starts[1:] = torch.bincount(scanned.positions, minlength=len(starts) - 1).cumsum(0)
    common = set((scanned.density >= rare).nonzero()[:, 0].tolist())
    for unit in range(units.d_sae):
        positions, values = firing(units, unit)
        if len(positions) < top:
            continue
        strongest = positions[values.topk(top).indices].tolist()
        active = {p: set(features[starts[p] : starts[p + 1]].tolist()) - common for p in strongest}
        groups: list[Group] = []
        while active:
            counts = Counter(feature for found in active.values() for feature in found)
            if not counts or counts.most_common(1)[0][1] < smallest:
                break
            feature = counts.most_common(1)[0][0]
            groups.append(Group(feature, [p for p, found in active.items() if feature in found]))
            active = {p: found for p, found in active.items() if feature not in found}
        yield unit, groups
