"""Pages of the site about features of the shipped SAEs: top texts, effect on logits, label with its score.

Which features: of a sample drawn with a seed among those that fire often enough, the ones whose label detects best, and
some drawn without looking. The page says which is which, since the best are no picture of the rest.
"""

import html
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch

from glassbox_utils.core import corpora
from glassbox_utils.core.models import Model
from glassbox_utils.core.studies import resumed
from glassbox_utils.lab.site_notebooks import accessible
from glassbox_utils.saes import dashboard, features, labels
from glassbox_utils.saes.features import Scan
from glassbox_utils.saes.store import folder_of, load_sae, shipped

SEED = 0
ROWS, SAMPLE, OFTEN, DRAWN = 48, 300, 30, 6
"""rows of held-out text; features that are labelled to choose from; times that each must fire; shown without looking"""
SHORT = 64
"""tokens of a row of single sentences: a longer one would leave more of the last sentences out"""


def pages(model: Model, n: int, names: Sequence[str] = (), rows: int = ROWS) -> dict[str, str]:
    """File -> text: a page of at most ``n`` features for each SAE, and their index. What was computed once is kept.

    ``names``: SAEs in ``data/saes``; all that are shipped without.
    """
    names = list(names or shipped())
    cards = {name: json.loads((folder_of(name) / "card.json").read_text(encoding="utf-8")) for name in names}
    found = {
        name: resumed(
            "site_features", [name, card["model_hash"], model.hash, n, rows, SEED], described, model, name, n, rows
        )
        for name, card in cards.items()
    }
    for name, card in cards.items():
        if golden := card.get("golden_gate"):
            key = [name, card["model_hash"], model.hash, golden["feature"]]
            found[name]["bridge"] = resumed("site_bridge", key, bridge, model, name, golden["feature"])
    texts = {f"features/{name}.md": page(name, cards[name], found[name]) for name in names}
    lines = [f"- [{name}]({name}.md): {_about(cards[name])}" for name in names]
    words = (
        "Each shipped sparse autoencoder: what some of its features fire on and push, and what their label is worth."
    )
    tree = ["```{toctree}", ":hidden:", "", *names, "```"]
    texts["features/index.md"] = "\n".join(["# Features", "", words, "", *lines, "", *tree, ""])
    return texts


def described(model: Model, name: str, n: int, rows: int) -> dict[str, Any]:
    """What one page needs, as plain values."""
    sae = load_sae(name, model)
    documents = corpora.load_corpus("mix", "held")
    text = corpora.token_rows(model, documents, rows, min(256, model.n_context))
    scanned = features.scan(model, sae, text, documents)
    alive = (scanned.starts.diff() >= OFTEN).nonzero()[:, 0]
    order = torch.randperm(len(alive), generator=torch.Generator().manual_seed(SEED))
    sample = alive[order[:SAMPLE]].tolist()
    drawn = sample[: min(DRAWN, n)]
    scored = {feature: label for feature in sample if (label := labels.label(model, scanned, feature))}
    worth = [f for f in scored if not math.isnan(scored[f].detection) and f not in drawn]
    best = sorted(worth, key=lambda f: -scored[f].detection)[: max(0, n - len(drawn))]
    return {
        "tokens": int(scanned.usual.sum()),
        "alive": len(alive),
        "sample": len(sample),
        "best": [_feature(model, sae, scanned, f) for f in best],
        "drawn": [_feature(model, sae, scanned, f) for f in drawn],
    }


def bridge(model: Model, name: str, feature: int) -> dict[str, Any]:
    """What the section about the bridge's feature needs: read on the real sentences that tested it, not held-out text,
    in which the bridge is too rare to show anything.
    """
    sae = load_sae(name, model)
    documents = corpora.sentences(corpora.load_corpus("mix", "golden_gate"), "golden gate bridge")
    scanned = features.scan(model, sae, corpora.token_rows(model, documents, None, SHORT), documents)
    fires = bool(features.firing(scanned, feature)[0].numel())
    return _shown(model, sae, scanned, feature, fires) | {"sentences": len(documents)}


def _feature(model: Model, sae: Any, scanned: Scan, feature: int) -> dict[str, Any]:
    label = labels.label(model, scanned, feature)
    return _shown(model, sae, scanned, feature) | {"label": label and asdict(label)}


def _shown(model: Model, sae: Any, scanned: Scan, feature: int, fires: bool = True) -> dict[str, Any]:
    effect = features.logit_effect(model, sae, feature, 8)
    shown = features.examples(model, scanned, feature, n=5, spread=False) if fires else []
    maximum = max((example.values[example.peak] for example in shown), default=0.0)
    return {
        "feature": feature,
        "density": float(scanned.density[feature]),
        "up": effect.up,
        "down": effect.down,
        "near": features.neighbours(sae, feature, 3),
        "texts": [dashboard.example_html(example, maximum) for example in shown],
    }


# --- as text ------------------------------------------------------------------------------------------


def page(name: str, card: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """One SAE's page in MyST Markdown."""
    lines = [
        f"# {name}",
        "",
        f"{_about(card)} Made by `{card['command']}`, seed {card['seed']}.",
        "",
        f"Read on {found['tokens']:,} tokens of text that it was not trained on. {found['alive']:,} features fire on "
        "at least "
        f"{OFTEN} of them; {found['sample']} of those were drawn with seed {SEED} and labelled. A label is the word "
        "or topic "
        "that is over-represented where the feature fires, in one half of the text. Its score is how well it predicts "
        "firing in the other half: balanced accuracy, where 0.5 is chance.",
    ]
    if golden := card.get("golden_gate"):
        lines += [
            "",
            f"Its Golden Gate Bridge feature is {golden['feature']}: precision {golden['precision']:.2f} and recall "
            f"{golden['recall']:.2f} on {golden['n_positive']} real sentences that name the bridge and "
            f"{golden['n_negative']} others.",
        ]
    if one := found.get("bridge"):
        lines += [
            "",
            "## The Golden Gate Bridge",
            "",
            f"The feature that tells it best, chosen on passages that we wrote, and here read on {one['sentences']} "
            "real sentences that name the bridge. Notebook [04](../notebooks/04_feature_clamping.ipynb) clamps such a "
            "feature.",
            *_lines(one),
        ]
    groups = {
        "Drawn without looking": (found["drawn"], "What a feature of this SAE is usually like."),
        "Best label": (
            found["best"],
            f"Of the {found['sample']} drawn, those whose label detects best. Most are less clear.",
        ),
    }
    for title, (some, words) in groups.items():
        if some:
            lines += ["", f"## {title}", "", words]
            lines += [line for one in some for line in _lines(one)]
    return "\n".join(lines) + "\n"


def _about(card: Mapping[str, Any]) -> str:
    m = card["metrics"]["sae"]
    return (
        f"{card['architecture']}, {card['d_sae']} features for `{card['hook']}`; {m['l0']:.0f} active per token, "
        "explained "
        f"variance {m['explained_variance']:.2f} on ordinary positions ({m['explained_variance_all']:.2f} on all)."
    )


def _lines(one: Mapping[str, Any]) -> list[str]:
    label = one.get("label")
    said = (
        f"{label['kind']} “{label['text']}”, score {label['detection']:.2f}; on {label['share']:.0%} of its "
        "activations and "
        f"{label['base_rate']:.2%} of all tokens"
        if label
        else "no word or topic passes p < 0.01"
    )
    rows = {
        "Fires on": f"{one['density']:.2%} of {'their ' if 'sentences' in one else ''}tokens",
        **({"Label": said} if "label" in one else {}),
        "Pushes up": _tokens(one["up"]),
        "Pushes down": _tokens(one["down"]),
        "Nearest decoder rows": ", ".join(f"{row} ({cosine:.2f})" for row, cosine in one["near"]),
    }
    cells = "".join(f"<dt>{k}</dt><dd>{v if k.startswith('Pushes') else html.escape(v)}</dd>" for k, v in rows.items())
    texts = "".join(accessible(text, "").replace("\n", "") for text in one["texts"])
    heading = f"### Feature {one['feature']}"
    return ["", heading, "", f'<dl class="facts">{cells}</dl><div class="texts">{texts}</div>', ""]


def _tokens(pairs: Sequence[tuple[str, float]]) -> str:
    return ", ".join(f"<code>{html.escape(repr(token)[1:-1])}</code> {value:+.2f}" for token, value in pairs)
