"""Write docs/rounding.md: what rounding alone changes in an AUROC, with one seed on two instruction sets of a CPU.

python docs/rounding.py [RUNS]    # RUNS: those of the command on the page, whose rows become docs/rounding.csv
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pandas as pd

from anomaly_lab import results
from anomaly_lab.files import write_text

HERE = Path(__file__).parent
PAGE, ROWS = HERE / "rounding.md", HERE / "rounding.csv"
COMMITTED = HERE.parent / "experiments/jia2022_fashion_mnist_small/results.csv"
"""Whose rows of seed 0 were made with AVX2, and those of the others with AVX-512."""


def table(wide: pd.DataFrame, committed: pd.DataFrame) -> list[str]:
    """A row a method, of the runs `wide`, with AVX-512, and those of the same seed in `committed`, with AVX2."""
    rows = []
    for name in wide["label"].unique():
        some, all_seeds = wide[wide["label"] == name], committed[committed["label"] == name]
        narrow = all_seeds[all_seeds["seed"] == 0]
        assert some["device"].str.contains(", AVX512").all() and narrow["device"].str.contains(", AVX2").all()
        one, other = (part.set_index("class_name")["auroc"] for part in (some, narrow))
        difference = one - other
        by_seed = pd.concat([some, all_seeds[all_seeds["seed"] > 0]]).groupby("class_name")["auroc"].var()
        cells = [
            f"`{name}`",
            f"{other.mean():.4f}",
            f"{one.mean():.4f}",
            f"{np.sqrt((difference**2).mean() / 2):.4f}",
            f"{np.sqrt((difference.drop(difference.abs().idxmax()) ** 2).mean() / 2):.4f}",
            f"{np.sqrt(by_seed.mean()):.4f}",
            f"{difference.abs().max():.4f}" + (f" ({difference.abs().idxmax()})" if difference.any() else ""),
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def main(runs: str | None = None) -> None:
    if runs is not None:
        results.write_csv(results.read(runs), ROWS)
    head, _, rest = PAGE.read_text(encoding="utf-8").partition("<!-- table -->\n")
    after = rest.partition("<!-- end -->")[2]
    lines = [
        "| method | mean, AVX2 | mean, AVX-512 | sd by rounding | without the largest | sd by seed | largest |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        *table(results.read_csv(ROWS), results.read_csv(COMMITTED)),
    ]
    write_text(PAGE, head + "<!-- table -->\n" + "\n".join(lines) + "\n<!-- end -->" + after)


if __name__ == "__main__":
    main(*sys.argv[1:])
