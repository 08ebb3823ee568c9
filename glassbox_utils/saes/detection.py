"""Features as detectors: find those that tell two sets of texts apart, and test them on new texts."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from glassbox_utils.core import coding, corpora, files, prepared
from glassbox_utils.core.arguments import shown, some_texts, whole
from glassbox_utils.core.devices import result
from glassbox_utils.core.interventions import not_first
from glassbox_utils.core.models import Model
from glassbox_utils.core.text import tokenize
from glassbox_utils.saes import quality, reading
from glassbox_utils.saes.config import SaeError
from glassbox_utils.saes.harvest import OUTLIER, activations
from glassbox_utils.saes.store import load_sae

ALIKE = 60
"""letters by which two sentences count as the same one"""


@torch.inference_mode()
def text_scores(model: Model, sae: Any, texts: Sequence[str], batch_size: int = 16) -> Float[Tensor, "text d_sae"]:
    """Strongest activation of every feature in each text (first token and outliers left out).

    SaeError for an SAE of another model, and for what is no list of texts.
    """
    site, texts, scores = reading.check_fits(model, sae), some_texts("texts", texts, SaeError), []
    median = reading.median_norm(model, sae)
    whole("batch_size", batch_size, 1, SaeError)
    for start in range(0, len(texts), batch_size):
        batch = tokenize(model, texts[start : start + batch_size])
        x = activations(model, batch.input_ids, [site], batch.attention_mask)[site].float()
        keep = not_first(batch) & (x.norm(dim=-1) <= OUTLIER * median)
        scores.append(result((coding.encode(sae, x) * keep[..., None]).amax(1)))
    return torch.cat(scores)


@dataclass(frozen=True)
class Hit:
    """A feature that tells two sets of texts apart."""

    feature: int
    auc: float
    """chance that a text of the first set scores above one of the second; ties count half"""
    mean_here: float
    mean_there: float


def areas(
    here: Float[Tensor, "text d_sae"], there: Float[Tensor, "other d_sae"], chunk: int = 512
) -> Float[Tensor, " d_sae"]:
    """Each feature's area under the curve: the chance that it fires more in a text of ``here`` than in one of
    ``there``."""
    parts = []
    for start in range(0, here.shape[1], chunk):
        a, b = here[:, None, start : start + chunk], there[None, :, start : start + chunk]
        parts.append(((a > b).float() + 0.5 * (a == b).float()).mean((0, 1)))
    return torch.cat(parts)


def separates(
    here: Float[Tensor, "text d_sae"], there: Float[Tensor, "other d_sae"], n: int = 10, chunk: int = 512
) -> list[Hit]:
    """Features that fire in ``here`` and not ``there`` (from ``text_scores``), the best separation first.

    SaeError for scores of no text, of another number of features, or that are no finite numbers.
    """
    _check_scores(here, there)
    whole("n", n, 1, SaeError), whole("chunk", chunk, 1, SaeError)
    auc = areas(here, there, chunk)
    gap = here.mean(0) - there.mean(0)
    order = (auc + 1e-3 * gap / gap.abs().max().clamp(min=1e-9)).topk(min(n, len(auc))).indices.tolist()
    return [Hit(f, float(auc[f]), float(here[:, f].mean()), float(there[:, f].mean())) for f in order]


def _check_scores(*sets: Tensor) -> None:
    """SaeError unless each is a table of finite numbers [text, d_sae] with a text in it, all of one width."""
    shapes = [tuple(x.shape) if isinstance(x, Tensor) else shown(x) for x in sets]
    fit = all(isinstance(x, Tensor) and x.ndim == 2 and x.numel() and x.isfinite().all() for x in sets)
    if not fit or len({x.shape[1] for x in sets}) > 1:
        raise SaeError(
            f"Scores of the shapes {' and '.join(map(str, shapes))} can't be compared. Allowed: what text_scores gives "
            "for at least one text each, with one SAE; finite numbers only."
        )


def search(model: Model, sae: Any, here: Sequence[str], there: Sequence[str], n: int = 10) -> list[Hit]:
    """Which features fire in these texts and not in those? SaeError for an empty list."""
    some_texts("here", here, SaeError), some_texts("there", there, SaeError)
    return separates(text_scores(model, sae, here), text_scores(model, sae, there), n)


@dataclass(frozen=True)
class Detection:
    """A feature as a detector with a threshold that was fixed on other text."""

    feature: int
    threshold: float
    precision: float
    recall: float
    n_positive: int
    n_negative: int
    false_alarms: tuple[str, ...]
    missed: tuple[str, ...]


def choose_detector(
    positive: Float[Tensor, "text d_sae"], negative: Float[Tensor, "other d_sae"]
) -> tuple[int, float, float]:
    """The (feature, threshold, F1) with the best F1 on two sets of texts: the fitting half of a detection test."""
    _check_scores(positive, negative)
    scores = torch.cat([positive, negative])
    truth = torch.cat([torch.ones(len(positive)), torch.zeros(len(negative))])
    order = scores.argsort(0, descending=True)
    hits = truth[order].cumsum(0)
    called = torch.arange(1, len(scores) + 1)[:, None]
    f1 = 2 * hits / (called + len(positive))
    ranked = scores.gather(0, order)
    below = torch.cat([ranked[1:], torch.zeros(1, scores.shape[1])])
    f1[(ranked <= 0) | (ranked == below)] = 0  # a threshold must lie between two different values, above zero
    best, where = f1.max(0)
    feature = int(best.argmax())
    rank = int(where[feature])
    return feature, float((ranked[rank, feature] + below[rank, feature]) / 2), float(best[feature])


def detect(
    model: Model, sae: Any, feature: int, threshold: float, positive: Sequence[str], negative: Sequence[str]
) -> Detection:
    """Precision and recall of one feature at a fixed threshold on new texts; lists its errors.

    SaeError for a feature or a threshold that is none, or an empty list of texts.
    """
    reading.check_index(feature, sae.cfg.d_sae, SaeError)
    if isinstance(threshold, bool) or not isinstance(threshold, Real) or not math.isfinite(threshold):
        raise SaeError(f"The threshold is {shown(threshold)}. Allowed: a finite number.")
    yes = text_scores(model, sae, positive)[:, feature] > threshold
    no = text_scores(model, sae, negative)[:, feature] > threshold
    called = int(yes.sum() + no.sum())
    return Detection(
        feature=feature,
        threshold=threshold,
        precision=float(yes.sum()) / called if called else math.nan,
        recall=float(yes.float().mean()),
        n_positive=len(positive),
        n_negative=len(negative),
        false_alarms=tuple(t for t, wrong in zip(negative, no.tolist(), strict=True) if wrong),
        missed=tuple(t for t, right in zip(positive, yes.tolist(), strict=True) if not right),
    )


def golden_gate(model: Model, sae: Any) -> Detection:
    """Is there a Golden Gate Bridge feature? Chosen on written passages, tested on real sentences.

    Feature and threshold are the best by F1 on sentences of the project-written training passages: about the bridge
    against about everything else in them, other bridges, gates and golden things included. The test is every real
    sentence that names the bridge (none is in the corpus) against held-out real sentences with the words bridge, gate
    or golden (a share of each where the folder in use is smaller). Raises AssetError if the packages are not there.
    """
    name = r"golden gate bridge"
    written = corpora.load_corpus("landmarks", "train")
    with_name = corpora.sentences(written, name)[:100]
    without = [d for d in corpora.sentences(written, r"\w") if name not in d.text.lower()][:400]
    parts = (with_name, 30), (without, 120)
    fit = (text_scores(model, sae, _share([d.text for d in part], least)) for part, least in parts)
    feature, threshold, _ = choose_detector(*fit)
    return detect(model, sae, feature, threshold, *golden_gate_test())


def golden_gate_test() -> tuple[list[str], list[str]]:
    """Real sentences that name the bridge, and real sentences about other bridges, gates and golden things; of those
    that begin alike (a sentence of two sources) the first."""
    real = corpora.sentences(corpora.load_corpus("mix", "golden_gate"), r"golden gate bridge")
    held = [d for d in corpora.load_corpus("mix", "held") if d.source != "landmarks"]
    other = corpora.sentences(held, r"\b(bridges?|gates?|golden)\b")
    return _share(_once(real), 40), _share(_once(other), 60)


def _once(found: Sequence[corpora.Document]) -> list[str]:
    """The sentences' texts, each beginning once."""
    texts: dict[str, str] = {}
    for document in found:
        texts.setdefault(document.text[:ALIKE], document.text)
    return list(texts.values())


def _share(texts: list[str], least: int) -> list[str]:
    """Of texts in a row, evenly, the share that the folder in use takes of everything."""
    n = prepared.sized(len(texts), min(least, len(texts)))
    return [texts[i * len(texts) // n] for i in range(n)]


def add_golden_gate(model: Model, folder: str | Path) -> Detection:
    """Test a saved SAE for a Golden Gate Bridge feature and write the result into its card."""
    path = Path(folder) / "card.json"
    found = golden_gate(model, load_sae(folder, model))
    card = json.loads(path.read_text(encoding="utf-8"))
    card["golden_gate"] = {k: round(v, 4) if isinstance(v, float) else v for k, v in asdict(found).items()}
    # The sentences belong to their sources: the card keeps numbers only.
    card["golden_gate"] |= {"false_alarms": len(found.false_alarms), "missed": len(found.missed)}
    with files.atomic_path(path) as partial:
        partial.write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
    quality.write_readme(folder)
    return found
