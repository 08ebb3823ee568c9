"""Computes what models of several sizes cost, and writes models.md: ``python docs/models.py`` (no model is run).

Rates are those that ``scaling.py`` measured on two cores with the embedded model; all else is arithmetic.
"""

import json
from pathlib import Path
from typing import NamedTuple

from scaling import Shape, sae_flops

from glassbox_utils.core import assets, pages

HERE = Path(__file__).resolve().parent
HARVEST, TRAINING = 869, 4476
"""measured (scaling.md, two cores, float32): tokens/s to layer 14, and samples/s at 8,192 features, k 50"""
TOKENS, SAMPLES, D_SAE, BATCH = 1_638_400, 4_915_200, 8192, 2048
"""the main SAE of the embedded model"""
GIB = 2**30


class Whole(NamedTuple):
    """A whole model: its layers, and what reads and writes words."""

    shape: Shape
    vocabulary: int
    tied: bool

    @property
    def parameters(self) -> float:
        return self.shape.weights + (1 if self.tied else 2) * self.vocabulary * self.shape.d_model

    @property
    def flops(self) -> float:
        """Of a token through all layers."""
        return self.shape.flops

    @property
    def logits(self) -> float:
        """Of the logits at one position."""
        return 2 * self.vocabulary * self.shape.d_model


MODELS = [
    Whole(Shape("SmolLM2-135M", 30, 576, 576, 192, 1536, True, 0.0), 49_152, True),
    Whole(Shape("Gemma-3-270M", 18, 640, 1024, 256, 2048, True, 0.0), 262_144, True),
    Whole(Shape("Qwen2.5-0.5B", 24, 896, 896, 128, 4864, True, 0.0), 151_936, True),
    Whole(Shape("Llama-3.2-1B", 16, 2048, 2048, 512, 8192, True, 0.0), 128_256, True),
    Whole(Shape("Llama-3.1-8B", 32, 4096, 4096, 1024, 14_336, True, 0.0), 128_256, False),
]


def hours(seconds: float) -> str:
    return f"{seconds / 3600:,.1f} h" if seconds < 100 * 3600 else f"{seconds / 86400:,.0f} days"


def rows() -> list[list[str]]:
    """One for each model, columns as in the template."""
    half = MODELS[0].shape._replace(layers=15)
    speed = HARVEST * half.flops  # operations a second
    trained = TRAINING * sae_flops(576, D_SAE, BATCH)
    made = []
    for m in MODELS:
        d = m.shape.d_model
        middle = m.shape._replace(layers=m.shape.layers // 2)
        harvest = TOKENS * middle.flops / speed
        training = SAMPLES * sae_flops(d, D_SAE, BATCH) / trained
        made.append([
            m.shape.name,
            f"{m.parameters / 1e6:,.0f} M",
            f"{4 * m.parameters / GIB:,.1f} GiB",
            f"{2 * m.parameters / GIB:,.1f} GiB",
            f"{m.flops / 1e9:,.2f}",
            f"{m.logits / 1e9:,.2f}",
            f"{m.flops / MODELS[0].flops:,.1f} / {(m.flops + m.logits) / (MODELS[0].flops + MODELS[0].logits):,.1f}",
            hours(harvest),
            hours(training),
            f"{TOKENS * 2 * d / GIB:,.1f} GiB",
        ])  # fmt: skip
    return made


def studies() -> str:
    """What all steps of ``glassbox prepare`` but the SAEs take at full size for the embedded model, by its own log."""
    steps = json.loads((assets.DATA / "prepare.json").read_text(encoding="utf-8"))["steps"]
    largest = {name: max(rows, key=lambda row: row["size"]) for name, rows in steps.items()}
    full = sum(row["seconds"] / row["size"] for name, row in largest.items() if not name.startswith("sae-"))
    return f"{full / 3600:.1f} h"


def least() -> str:
    """Minutes that the smallest ``glassbox prepare`` took for the embedded model, by its own log."""
    steps = json.loads((assets.DATA / "prepare.json").read_text(encoding="utf-8"))["steps"]
    return f"{sum(min(rows, key=lambda row: row['size'])['seconds'] for rows in steps.values()) / 60:.0f}"


def main() -> None:
    import sys

    sys.path.insert(0, str(HERE.parent / "tests"))
    import tiny
    import zoo

    text = pages.render(
        HERE / "models.md.jinja",
        rows=rows(),
        studies=studies(),
        least=least(),
        kinds=", ".join(sorted(zoo.BUILT)),
        n_kinds=len(zoo.BUILT),
        tiny=", ".join(tiny.KINDS),
        harvest=HARVEST,
        training=f"{TRAINING:,}",
    )
    (HERE / "models.md").write_text(text.rstrip() + "\n", encoding="utf-8")
    print(f"written to {HERE / 'models.md'}")


if __name__ == "__main__":
    main()
