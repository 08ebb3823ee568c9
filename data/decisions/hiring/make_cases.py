"""Write cases.csv: 240 made-up applicants, seed 17. Half have train names, half report names.

A woman's career gap is longer (a proxy that no rule reads); all else is independent of the group.
Run ``python data/decisions/hiring/make_cases.py`` from anywhere.
"""

import csv
import sys
from pathlib import Path

import numpy as np
import yaml

HERE = Path(__file__).parent


def main(target: Path, n: int = 240, seed: int = 17) -> None:
    written = yaml.safe_load((HERE / "decision.yaml").read_text(encoding="utf-8"))
    fields, lists = written["fields"], written["carriers"][0]["lists"]
    rng = np.random.default_rng(seed)

    def pick(values: list) -> object:
        return values[int(rng.integers(len(values)))]

    rows = []
    for i in range(1, n + 1):
        split = "train" if i % 2 else "report"
        names = pick([one for one in lists if one["split"] == split])
        age = int(rng.integers(18, 66))
        gap = rng.integers(0, 37) if rng.random() < (0.6 if names["groups"]["gender"] == "woman" else 0.3) else 0
        rows.append(
            {
                "id": f"H{i:03}",
                "name": pick(names["values"]),
                "age": age,
                "last_post": pick(fields["last_post"]["known"]),
                "experience": int(rng.integers(0, min(20, age - 17))),
                "education": pick(fields["education"]["values"]),
                "test": int(rng.integers(20, 101)),
                "references": pick(fields["references"]["values"]),
                "career_gap": int(gap),
                "notice": int(pick([0, 2, 4, 6, 8, 12])),
            }
        )
    with open(target, "w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        table.writeheader()
        table.writerows(rows)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "cases.csv")
