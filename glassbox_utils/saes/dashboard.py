"""A feature as a page: density, label, effects on logits, neighbours, examples by quantile."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from glassbox_utils.core import files, pages
from glassbox_utils.core.models import Model
from glassbox_utils.saes import labels
from glassbox_utils.saes.features import (
    Example,
    FeatureError,
    Scan,
    check_feature,
    examples,
    firing,
    logit_effect,
    neighbours,
)

TEMPLATES = Path(__file__).parent / "templates"


def example_html(example: Example, maximum: float) -> str:
    """One example as a line of HTML: darker means stronger, the chosen token is underlined."""
    return pages.render(TEMPLATES / "example.html", example=example, maximum=maximum)


def dashboard(model: Model, sae: Any, scanned: Scan, feature: int) -> str:
    """One feature as a self-contained page: density, label, effects on logits, neighbours, examples by quantile.

    FeatureError for a feature that is none, or a scan with another SAE.
    """
    if scanned.d_sae != sae.cfg.d_sae:
        raise FeatureError(
            f"The scan is of {scanned.d_sae} features, this SAE has {sae.cfg.d_sae}. Scan with it first."
        )
    check_feature(scanned, feature)
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
    """A page for each feature; returns the files. Whatever is wrong is said before the first is written."""
    written = {feature: dashboard(model, sae, scanned, feature) for feature in features}
    folder = files.check_output(folder, "folder", folder=True)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"feature-{feature}.html" for feature in written]
    for path, page in zip(paths, written.values(), strict=True):
        with files.atomic_path(path) as partial:
            partial.write_text(page, encoding="utf-8")
    return paths
