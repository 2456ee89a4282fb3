"""metrics.csv of a run, read."""

import csv
import math
from pathlib import Path


def read_history(path: Path) -> list[dict[str, float]]:
    """Rows of metrics.csv as numbers; NaN where a cell is empty."""
    with open(path, newline="", encoding="utf-8") as file:
        return [{k: float(v) if v else math.nan for k, v in row.items()} for row in csv.DictReader(file)]
