"""A feature as a page: density, label, effects on logits, neighbours, examples by quantile."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from glassbox_utils.core import pages
from glassbox_utils.core.models import Model
from glassbox_utils.saes import labels
from glassbox_utils.saes.features import Example, Scan, examples, firing, logit_effect, neighbours

TEMPLATES = Path(__file__).parent / "templates"


def example_html(example: Example, maximum: float) -> str:
    """One example as a line of HTML: darker means stronger, the chosen token is underlined."""
    return pages.render(TEMPLATES / "example.html", example=example, maximum=maximum)


def dashboard(model: Model, sae: Any, scanned: Scan, feature: int) -> str:
    """One feature as a self-contained page: density, label, effects on logits, neighbours, examples by quantile."""
    positions, values = firing(scanned, feature)
    kinds = {"Strongest": False, "From strongest to weakest": True} if len(positions) else {}
    return pages.render(
        TEMPLATES / "feature.html",
        feature=feature,
        fires=f"{len(positions):,}",
        read=f"{int(scanned.usual.sum()):,}",
        density=float(scanned.density[feature]),
        label=labels.label(model, scanned, feature),
        effect=logit_effect(model, sae, feature),
        near=neighbours(sae, feature),
        shown={title: examples(model, scanned, feature, spread=spread) for title, spread in kinds.items()},
        maximum=float(values.max()) if len(positions) else 0.0,
    )


def write_dashboards(model: Model, sae: Any, scanned: Scan, features: Sequence[int], folder: Path) -> list[Path]:
    """A page for each feature; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"feature-{feature}.html" for feature in features]
    for path, feature in zip(paths, features, strict=True):
        path.write_text(dashboard(model, sae, scanned, feature), encoding="utf-8")
    return paths
