"""Write docs/ranking.md and its figures from the committed results: ranks over problems, and what the best epoch adds.

python docs/ranking.py
"""

from __future__ import annotations

from pathlib import Path

from anomaly_lab import figures, ranking, results

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs/ranking.md"
FIGURE = ROOT / "docs/ranking.png"
DRAWN = {("mnist", "official"): ROOT / "docs/ranking_mnist.png"}  # other protocols with a figure: many methods
FEWEST = 6  # problems of a protocol below which its ranking says nothing that its table does not

HEAD = """\
<!-- Written by docs/ranking.py from experiments/*/results.csv: edit those. -->
# Methods ranked over problems

A problem is one class of one protocol; seeds are averaged within it, and a supervised ceiling is left out. Each table
ranks the methods that have all its problems (1: the best). Friedman's test asks whether any method differs, Nemenyi's
whether two do; the last column names those that are worse after Holm's correction over all pairs (normal approximation
of the difference of mean ranks, Demšar 2006). A test of ranks depends on which other methods are in the table and may
disagree with the Wilcoxon tests of a page; where it does, no difference is shown. A trained method stands for its small
size, and for its full one where `_small` stands beside it. Your own runs: `anomaly-lab-report runs --ranking`.
"""

EVERYTHING = """
## Every method, at its small size

Of [everything](../experiments/everything/README.md): 2000 training and 2000 test images of each class, one seed, small
sizes that nobody tuned; three digits and one class of CIFAR-10. Methods of few problems can be ordered by such a table,
not told apart: read the critical difference first.
"""

OWED = """
## What the best epoch by test labels adds

Published code often reports the epoch with the best test AUROC. Here nothing is chosen so: `oracle_auroc` was recorded
beside `auroc` after every epoch, in the runs of all pages that watch it. The difference is what a method's figure would
owe to the test labels from that choice alone; [another page](practice.md) has what each method's published practice
decides by them. Left out are runs whose page changes a setting of the method, methods that train nothing, and those
that have scores only when the fit has ended, so that no epoch can be chosen: {late}.
"""


def page() -> tuple[str, dict[Path, tuple[str, ranking.Ranking]]]:
    """The whole page, and the title and the ranking of each of its figures."""
    pages = results.read_pages(ROOT / "experiments")
    every, frame = ranking.ranking(pages["everything"]), results.union(pages)
    drawn = {FIGURE: ("Every method at its small size", every)}
    out = [HEAD, EVERYTHING, *ranking.markdown(every), f"![Mean ranks of every method]({FIGURE.name})", ""]
    whole = frame[frame["changed"] == frame["problem"]]
    for (dataset, split, problem), runs in whole.groupby(["dataset", "split", "problem"]):
        if runs["normal_class"].nunique() >= FEWEST and not problem:
            shown = ranking.ranking(runs)
            out += [f"## {dataset}, {split}", "", *ranking.markdown(shown)]
            if figure := DRAWN.get((dataset, split)):
                drawn[figure] = f"{dataset}, {split}", shown
                out += [f"![Mean ranks on {dataset}, {split}]({figure.name})", ""]
    late = ", ".join(f"`{name}`" for name in ranking.unwatched(pages["everything"]))
    out += [OWED.format(late=late), *ranking.best_epochs_markdown(whole)]
    return "\n".join(out).rstrip() + "\n", drawn


if __name__ == "__main__":
    text, drawn = page()
    PAGE.write_text(text, encoding="utf-8")
    for figure, (title, shown) in drawn.items():
        figures.save(figures.critical_difference(shown, title), figure)
