"""Features of a sparse autoencoder: find them, describe them, test the description, show them on a page.

Everything starts from ``scan``, which runs model and SAE over packed rows once and keeps only what is active.
A description is a claim like any other: labels come with an enrichment p-value from one half of the text and a
detection score from the other half.
"""

import html
import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from glassbox_utils import GlassboxError, assets, corpora, saes
from glassbox_utils.corpora import Document, Rows
from glassbox_utils.interventions import not_first
from glassbox_utils.models import Model, Site, check_site, progress, str_tokens, tokenize


class FeatureError(GlassboxError, ValueError):
    """A feature that does not exist or never fires; the message names the allowed range."""


@dataclass(frozen=True, eq=False)
class Scan:
    """What every feature did on some rows, kept sparsely and sorted by feature."""

    rows: Rows
    documents: Sequence[Document]
    features: Int[Tensor, " active"]
    positions: Int[Tensor, " active"]
    """index into the flattened rows"""
    values: Float[Tensor, " active"]
    starts: Int[Tensor, " d_sae_and_one"]
    """entries of feature f are starts[f] to starts[f + 1]"""
    usual: Float[Tensor, "row pos"]
    """boolean: neither first token nor outlier; features are kept only there"""

    @property
    def d_sae(self) -> int:
        return len(self.starts) - 1

    @property
    def density(self) -> Float[Tensor, " d_sae"]:
        """Fraction of ordinary tokens on which each feature fires."""
        return self.starts.diff() / int(self.usual.sum())


def site_of_sae(sae: Any) -> Site:
    """Where an SAE reads, from its metadata."""
    return saes.site_of(sae.cfg.metadata.hook_name)


@torch.inference_mode()
def scan(model: Model, sae: Any, rows: Rows, documents: Sequence[Document], rows_per_batch: int = 8) -> Scan:
    """Run model and SAE over packed rows (``corpora.token_rows``) and keep every activation above zero."""
    site, median = site_of_sae(sae), sae.cfg.metadata.median_norm
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    usual = torch.zeros_like(rows.tokens, dtype=torch.bool)
    width = rows.tokens.shape[1]
    for start in progress(range(0, len(rows.tokens), rows_per_batch), "scan"):
        x = saes.activations(model, rows.tokens[start : start + rows_per_batch].long(), [site])[site].float()
        keep = saes.ordinary(x, median)
        usual[start : start + rows_per_batch] = keep
        code = sae.encode(x[keep])
        where = keep.flatten().nonzero()[:, 0] + start * width
        token, feature = code.nonzero(as_tuple=True)
        found.append((feature, where[token], code[token, feature]))
    features, positions, values = (torch.cat(parts) for parts in zip(*found, strict=True))
    order = features.argsort(stable=True)
    starts = torch.zeros(sae.cfg.d_sae + 1, dtype=torch.long)
    starts[1:] = torch.bincount(features, minlength=sae.cfg.d_sae).cumsum(0)
    return Scan(rows, documents, features[order], positions[order], values[order], starts, usual)


@torch.inference_mode()
def scan_neurons(model: Model, layer: int, rows: Rows, documents: Sequence[Document], usual: Tensor) -> Scan:
    """The same for the neurons of one MLP: what enters its output projection, positive values only.

    ``usual``: the positions to keep, as in a scan of the same rows.
    """
    module = model.sites[check_site(model, Site("mlp_out", layer))][0]
    store: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, args: store.append(args[0].float().relu()))
    try:
        for start in range(0, len(rows.tokens), 8):
            saes.activations(model, rows.tokens[start : start + 8].long(), [Site("mlp_out", layer)])
    finally:
        handle.remove()
    values = torch.cat(store).flatten(0, 1) * usual.flatten()[:, None]
    features, positions = values.t().nonzero(as_tuple=True)
    starts = torch.zeros(values.shape[1] + 1, dtype=torch.long)
    starts[1:] = torch.bincount(features, minlength=values.shape[1]).cumsum(0)
    return Scan(rows, documents, features, positions, values[positions, features], starts, usual)


def check_feature(scanned: Scan, feature: int) -> int:
    if not 0 <= feature < scanned.d_sae:
        raise FeatureError(f"There is no feature {feature!r}. Allowed: 0 to {scanned.d_sae - 1}.")
    return feature


def firing(scanned: Scan, feature: int) -> tuple[Int[Tensor, " n"], Float[Tensor, " n"]]:
    """Flat positions and values where one feature is active."""
    start, end = scanned.starts[check_feature(scanned, feature) :][:2].tolist()
    return scanned.positions[start:end], scanned.values[start:end]


def dense(scanned: Scan, feature: int) -> Float[Tensor, "row pos"]:
    """One feature's activation at every token of the scan, zero where it is silent."""
    positions, values = firing(scanned, feature)
    out = torch.zeros(scanned.rows.tokens.numel())
    out[positions] = values
    return out.view(scanned.rows.tokens.shape)


# --- examples and effects -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Example:
    """A stretch of text around one activation."""

    tokens: list[str]
    values: list[float]
    peak: int
    """index of the token that was chosen"""
    quantile: float
    """rank of its activation among all activations of the feature: 1 is the strongest"""
    source: str
    licence: str


def examples(
    model: Model, scanned: Scan, feature: int, n: int = 8, spread: bool = True, context: int = 12
) -> list[Example]:
    """Stretches of text on which a feature fires, at most one from a document.

    ``spread``: from the strongest activation down to the weakest in even steps, because the strongest alone make any
    feature look cleaner than it is; False: the strongest only. Raises FeatureError for a silent feature.
    """
    positions, values = firing(scanned, feature)
    if not len(positions):
        raise FeatureError(f"Feature {feature} never fires on these {int(scanned.usual.sum()):,} tokens.")
    order = values.argsort(descending=True)
    wanted = torch.linspace(0, len(order) - 1, n).round().int().tolist() if spread else range(len(order))
    activation, width = dense(scanned, feature), scanned.rows.tokens.shape[1]
    chosen: list[Example] = []
    used: set[int] = set()
    for rank in wanted:
        row, pos = divmod(int(positions[order[rank]]), width)
        owner = int(scanned.rows.documents[row, pos])
        if owner in used:
            continue
        used.add(owner)
        span = slice(max(0, pos - context), min(width, pos + context + 1))
        document = scanned.documents[owner]
        chosen.append(
            Example(
                tokens=str_tokens(model, scanned.rows.tokens[row, span]),
                values=activation[row, span].tolist(),
                peak=pos - span.start,
                quantile=1 - rank / len(order),
                source=document.source,
                licence=document.licence,
            )
        )
        if len(chosen) == n:
            break
    return chosen


def example_html(example: Example, maximum: float) -> str:
    """One example as a line of HTML: darker means stronger, the chosen token is underlined."""
    spans = []
    for index, (token, value) in enumerate(zip(example.tokens, example.values, strict=True)):
        shade = f"background:rgba(0,114,178,{min(1.0, value / maximum) * 0.8:.2f});" if value > 0 else ""
        line = "text-decoration:underline;" if index == example.peak else ""
        shown = html.escape(token.replace("\n", "⏎"))
        spans.append(f'<span style="white-space:pre-wrap;{shade}{line}" title="{value:.2f}">{shown}</span>')
    note = f'<small style="color:#666"> [{html.escape(example.source)}, {html.escape(example.licence)}]</small>'
    return f'<div style="margin:.3em 0">{"".join(spans)}{note}</div>'


@dataclass(frozen=True)
class LogitEffect:
    """Tokens that a feature's decoder row pushes up and down, seen straight from its layer."""

    up: list[tuple[str, float]]
    down: list[tuple[str, float]]


def logit_effect(model: Model, sae: Any, feature: int, n: int = 10) -> LogitEffect:
    """Decoder row through final-norm weights and unembedding: direct effects only, later layers ignored."""
    direction = sae.W_dec[feature].detach().float()
    names = ("norm", "ln_f", "final_layer_norm")
    [norm] = [module for name, module in model.hf.base_model.named_children() if name in names]
    weight = norm.weight.detach().float()
    direction = direction * (weight + 1 if "gemma" in model.config.model_type else weight)  # gemma keeps weight - 1
    logits = model.hf.get_output_embeddings().weight.detach().float() @ direction
    logits = logits - logits.mean()

    def listed(indices: Tensor) -> list[tuple[str, float]]:
        return [(model.tokenizer.decode([int(i)]), float(logits[i])) for i in indices]

    return LogitEffect(listed(logits.topk(n).indices), listed((-logits).topk(n).indices))


def neighbours(sae: Any, feature: int, n: int = 5) -> list[tuple[int, float]]:
    """Features with the most similar decoder rows, with their cosines."""
    rows = F.normalize(sae.W_dec.detach().float(), dim=-1)
    cosines = rows @ rows[feature]
    cosines[feature] = -1
    top = cosines.topk(min(n, len(cosines) - 1))
    return list(zip(top.indices.tolist(), top.values.tolist(), strict=True))


# --- search -------------------------------------------------------------------------------------------


@torch.inference_mode()
def text_scores(model: Model, sae: Any, texts: Sequence[str], batch_size: int = 16) -> Float[Tensor, "text d_sae"]:
    """Strongest activation of every feature in each text (first token and outliers left out)."""
    site, scores = site_of_sae(sae), []
    for start in range(0, len(texts), batch_size):
        batch = tokenize(model, list(texts[start : start + batch_size]))
        x = saes.activations(model, batch.input_ids, [site], batch.attention_mask)[site].float()
        keep = not_first(batch) & (x.norm(dim=-1) <= saes.OUTLIER * sae.cfg.metadata.median_norm)
        scores.append((sae.encode(x) * keep[..., None]).amax(1))
    return torch.cat(scores)


@dataclass(frozen=True)
class Hit:
    """A feature that tells two sets of texts apart."""

    feature: int
    auc: float
    """chance that a text of the first set scores above one of the second; ties count half"""
    mean_here: float
    mean_there: float


def separates(
    here: Float[Tensor, "text d_sae"], there: Float[Tensor, "other d_sae"], n: int = 10, chunk: int = 512
) -> list[Hit]:
    """Features that fire in ``here`` and not ``there`` (from ``text_scores``), the best separation first."""
    parts = []
    for start in range(0, here.shape[1], chunk):
        a, b = here[:, None, start : start + chunk], there[None, :, start : start + chunk]
        parts.append(((a > b).float() + 0.5 * (a == b).float()).mean((0, 1)))
    auc = torch.cat(parts)
    gap = here.mean(0) - there.mean(0)
    order = (auc + 1e-3 * gap / gap.abs().max().clamp(min=1e-9)).topk(min(n, len(auc))).indices.tolist()
    return [Hit(f, float(auc[f]), float(here[:, f].mean()), float(there[:, f].mean())) for f in order]


def search(model: Model, sae: Any, here: Sequence[str], there: Sequence[str], n: int = 10) -> list[Hit]:
    """Which features fire in these texts and not in those?"""
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
    """Precision and recall of one feature at a fixed threshold on new texts; lists its errors."""
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
    sentence that names the bridge (never trained on) against held-out real sentences with the words bridge, gate or
    golden. Raises AssetError if the packages are not there.
    """
    name = r"golden gate bridge"
    written = corpora.load_corpus("landmarks", "train")
    with_name = corpora.sentences(written, name)[:100]
    without = [d for d in corpora.sentences(written, r"\w") if name not in d.text.lower()][:400]
    fit = (text_scores(model, sae, [d.text for d in part]) for part in (with_name, without))
    feature, threshold, _ = choose_detector(*fit)
    return detect(model, sae, feature, threshold, *golden_gate_test())


def golden_gate_test() -> tuple[list[str], list[str]]:
    """Real sentences that name the bridge, and real sentences about other bridges, gates and golden things."""
    real = corpora.sentences(corpora.load_corpus("mix", "golden_gate"), r"golden gate bridge")
    held = [d for d in corpora.load_corpus("mix", "held") if d.source != "landmarks"]
    other = corpora.sentences(held, r"\b(bridges?|gates?|golden)\b")
    return [d.text for d in real], [d.text for d in other]


# --- labels -------------------------------------------------------------------------------------------


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


# --- pages --------------------------------------------------------------------------------------------


def dashboard(model: Model, sae: Any, scanned: Scan, feature: int) -> str:
    """One feature as a self-contained page: density, label, effects on logits, neighbours, examples by quantile."""
    positions, values = firing(scanned, feature)
    described, effect = label(model, scanned, feature), logit_effect(model, sae, feature)

    def tokens(pairs: list[tuple[str, float]]) -> str:
        return ", ".join(f"<code>{html.escape(t)}</code> {v:+.2f}" for t, v in pairs)

    name = "no label passes p &lt; 0.01"
    if described:
        name = (
            f"{described.kind} “{html.escape(described.text)}” on {described.share:.0%} of activations "
            f"({described.base_rate:.2%} of tokens); "
            f"detects on other text with balanced accuracy {described.detection:.2f}"
        )
    near = ", ".join(f"{f} ({c:.2f})" for f, c in neighbours(sae, feature))
    parts = [
        f"<h1>Feature {feature}</h1>",
        f"<p>Fires on {len(positions):,} of {int(scanned.usual.sum()):,} tokens "
        f"({float(scanned.density[feature]):.3%}). Label: {name}.</p>",
        f"<p>Pushes up: {tokens(effect.up)}</p><p>Pushes down: {tokens(effect.down)}</p>",
        f"<p>Nearest decoder rows (cosine): {near}</p>",
    ]
    if len(positions):
        top = float(values.max())
        for title, spread in (("Strongest", False), ("From strongest to weakest", True)):
            parts.append(f"<h2>{title}</h2>")
            parts += [example_html(e, top) for e in examples(model, scanned, feature, spread=spread)]
    body = "\n".join(parts)
    style = "<style>body{font:15px sans-serif;max-width:60em;margin:2em auto}</style>"
    head = f'<meta charset="utf-8"><title>Feature {feature}</title>{style}'
    return f"<!doctype html><html lang='en'><head>{head}</head><body>{body}</body></html>"


def write_dashboards(model: Model, sae: Any, scanned: Scan, features: Sequence[int], folder: Path) -> list[Path]:
    """A page for each feature; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"feature-{feature}.html" for feature in features]
    for path, feature in zip(paths, features, strict=True):
        path.write_text(dashboard(model, sae, scanned, feature))
    return paths


def add_golden_gate(model: Model, folder: str | Path) -> Detection:
    """Test a saved SAE for a Golden Gate Bridge feature and write the result into its card."""
    path = Path(folder) / "card.json"
    found = golden_gate(model, saes.load_sae(folder, model))
    card = json.loads(path.read_text())
    card["golden_gate"] = {k: round(v, 4) if isinstance(v, float) else v for k, v in asdict(found).items()}
    # The sentences belong to their sources: the card keeps numbers only.
    card["golden_gate"] |= {"false_alarms": len(found.false_alarms), "missed": len(found.missed)}
    with assets.atomic_path(path) as partial:
        partial.write_text(json.dumps(card, indent=1) + "\n")
    readme = Path(folder) / "README.md"
    line = (
        f"Golden Gate Bridge: feature {found.feature} at a threshold of {found.threshold:.2f} (both fixed on "
        f"project-written passages) has precision {found.precision:.2f} and recall {found.recall:.2f} on "
        f"{found.n_positive} real sentences that name the bridge and {found.n_negative} about other bridges, gates and "
        "golden things, none of them trained on."
    )
    text = readme.read_text().split("\nGolden Gate Bridge:")[0].rstrip("\n")
    readme.write_text(f"{text}\n\n{line}\n")
    return found
