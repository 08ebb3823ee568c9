"""Write cases.csv: 400 applicants of the loan officer with the names and districts of the report split, seed 17.

Run ``python data/decisions/loan-officer/make_cases.py`` from anywhere.
"""

import csv
import sys
from dataclasses import asdict
from pathlib import Path

from glassbox_utils.decisions.loans import applications


def main(target: Path) -> None:
    rows = [{"id": f"L{i:03}"} | asdict(a) for i, a in enumerate(applications(400, seed=17, split="report"), 1)]
    with open(target, "w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        table.writeheader()
        table.writerows(rows)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "cases.csv")
