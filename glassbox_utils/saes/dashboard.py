"""A feature as a page: density, label, effects on logits, neighbours, examples by quantile."""

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from glassbox_utils.core.models import Model
from glassbox_utils.saes import labels
from glassbox_utils.saes.features import Example, Scan, examples, firing, logit_effect, neighbours


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


def dashboard(model: Model, sae: Any, scanned: Scan, feature: int) -> str:
    """One feature as a self-contained page: density, label, effects on logits, neighbours, examples by quantile."""
    positions, values = firing(scanned, feature)
    described, effect = labels.label(model, scanned, feature), logit_effect(model, sae, feature)

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
