"""Write docs/study.md and docs/study.png: which criterion that needs no label goes with AUROC, over all committed runs.

python docs/study.py
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from scipy import stats

from anomaly_lab import figures, results
from anomaly_lab.files import write_text

HERE = Path(__file__).parent
PAGE, PICTURE = HERE / "study.md", HERE / "study.png"

FEWEST = 3
"""Runs of a group, below which its rank correlation says nothing."""

DRAWS = 2000
"""Of the bootstrap over classes."""

CRITERIA = {
    "val_score": ("held-out score", -1),
    "explained_variance": ("explained variance", 1),
    "distinct_scores": ("distinct test scores", 1),
    "parameter_change": ("parameter change", 1),
    "epochs": ("epochs", 1),
}
"""Columns of results.csv that no label of an anomaly enters: their names, and the sign under which more is better."""

QUESTIONS = {
    "methods": "Which method? All that were trained and tested on the same images",
    "settings": "Which setting? One method with other hyper-parameters, on the same images",
    "epochs": "Which epoch? One run, the test AUROC watched after each of its epochs",
}


class Group(NamedTuple):
    """Runs, or epochs, among which a criterion could choose."""

    problem: tuple[str, str]  # data set and class: what the bootstrap draws
    criterion: np.ndarray  # (n,), more is better
    auroc: np.ndarray  # (n,)


class Finding(NamedTuple):
    """Means over groups: of Spearman's rank correlation, with its interval, and of what a choice gains in AUROC."""

    rho: float
    low: float
    high: float
    groups: int
    problems: int
    gain: float  # AUROC of the criterion's choice, above the mean of the group; of ties the mean
    best: float  # the same of the choice by test labels


def finding(groups: Sequence[Group]) -> Finding | None:
    """None where fewer than three (data set, class) have a group in which criterion and AUROC vary."""
    rows = []
    for problem, criterion, auroc in groups:
        if len(auroc) >= FEWEST and np.ptp(criterion) > 0 and np.ptp(auroc) > 0:
            chosen = auroc[criterion == criterion.max()].mean()
            rho = float(stats.spearmanr(criterion, auroc).statistic)
            rows.append((problem, rho, chosen - auroc.mean(), auroc.max() - auroc.mean()))
    frame = pd.DataFrame(rows, columns=["problem", "rho", "gain", "best"])
    means = frame.groupby("problem")[["rho", "gain", "best"]].mean()  # a class counts once
    if len(means) < 3:
        return None
    rho = means["rho"].to_numpy()
    drawn = np.random.RandomState(0).randint(len(rho), size=(DRAWS, len(rho)))
    low, high = np.quantile(rho[drawn].mean(1), [0.025, 0.975])
    return Finding(rho.mean(), low, high, len(frame), len(means), means["gain"].mean(), means["best"].mean())


def committed(folder: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Every committed run once, and the epochs of those that were watched, with data set and class; no ceiling."""
    pages, epochs = results.read_pages(folder), []
    for name, frame in pages.items():
        if (watched := folder / name / "epochs.csv").exists():
            of_run = frame[~frame["labels"]].set_index("path")[["dataset", "class_name"]]
            table = pd.read_csv(watched).join(of_run, on="path", how="inner")
            epochs.append(table.assign(run=f"{name}/" + table["path"]))
    runs = results.union(pages)
    return runs[~runs["labels"]], pd.concat(epochs, ignore_index=True)


def groups_of(table: pd.DataFrame, keys: Sequence[str], criterion: str, sign: int, auroc: str = "auroc") -> list[Group]:
    """The groups of equal ``keys``, of the rows that have the criterion."""
    table = table[table[criterion].notna() & table[auroc].notna()]
    return [
        Group(
            (str(rows["dataset"].iloc[0]), str(rows["class_name"].iloc[0])),
            sign * rows[criterion].to_numpy(float),
            rows[auroc].to_numpy(float),
        )
        for _, rows in table.groupby(list(keys), sort=True)
    ]


def findings(runs: pd.DataFrame, epochs: pd.DataFrame) -> dict[str, dict[str, Finding]]:
    """By question and criterion."""
    found: dict[str, dict[str, Finding | None]] = {question: {} for question in QUESTIONS}
    plain = runs.iloc[runs["changed"].str.len().argsort(kind="stable")].drop_duplicates(["fingerprint", "model"])
    for column, (name, sign) in CRITERIA.items():
        found["methods"][name] = finding(groups_of(plain, ["fingerprint"], column, sign))
        if column == "explained_variance":  # it is 0 for the mean image, the weakest floor, by definition
            others = plain[plain["method"] != "mean_image"]
            found["methods"][f"{name}, mean_image left out"] = finding(groups_of(others, ["fingerprint"], column, sign))
        if column == "val_score":
            trained = plain[plain["epochs"] > 0]
            found["methods"][f"{name}, trained methods"] = finding(groups_of(trained, ["fingerprint"], column, sign))
        found["settings"][name] = finding(groups_of(runs, ["fingerprint", "model"], column, sign))
    for column, name, sign in (("val_score", "held-out score", -1), ("epoch", "epoch", 1)):
        found["epochs"][name] = finding(groups_of(epochs, ["run"], column, sign, "oracle_auroc"))
    return {asked: {name: one for name, one in rows.items() if one is not None} for asked, rows in found.items()}


def draw(found: Mapping[str, Mapping[str, Finding]]) -> Figure:
    """Mean rank correlation and its interval, a row a criterion."""
    figure = Figure(figsize=(8, 4.6), layout="constrained")
    axes = figure.subplots(len(found), 1, sharex=True, height_ratios=[len(rows) + 0.5 for rows in found.values()])
    for axis, (question, rows) in zip(axes, found.items(), strict=True):
        for place, one in enumerate(rows.values()):
            axis.plot([one.low, one.high], [place, place], color="tab:blue", linewidth=2)
            axis.plot(one.rho, place, "o", color="tab:blue")
        axis.set_yticks(range(len(rows)), [f"{name} ({one.problems})" for name, one in rows.items()])
        axis.set_ylim(len(rows) - 0.5, -0.5)
        axis.axvline(0, color="0.7", linewidth=1, zorder=0)
        axis.set_title(QUESTIONS[question].partition("?")[0] + "?", fontsize=9, loc="left")
    axes[-1].set_xlim(-1, 1)
    figure.supxlabel("rank correlation with AUROC: mean over classes (their number), 95 % interval", fontsize=9)
    return figure


def tables(found: Mapping[str, Mapping[str, Finding]]) -> str:
    out = []
    for question, rows in found.items():
        out += [f"### {QUESTIONS[question]}", ""]
        out += ["| criterion | rank correlation | 95 % | groups | classes | its choice | the best |"]
        out += ["| --- | ---: | ---: | ---: | ---: | ---: | ---: |"]
        for name, one in rows.items():
            interval = f"{one.low:+.2f} to {one.high:+.2f}"
            out.append(
                f"| {name} | {one.rho:+.2f} | {interval} | {one.groups} | {one.problems} | "
                f"{one.gain:+.3f} | {one.best:+.3f} |"
            )
        out.append("")
    return "\n".join(out)


def page(runs: pd.DataFrame, epochs: pd.DataFrame, found: Mapping[str, Mapping[str, Finding]]) -> str:
    numbers = f"{len(runs)} runs of {runs['model'].nunique()} models"
    numbers += f", and {len(epochs)} epochs of {epochs['run'].nunique()} watched runs"
    return TEXT.format(numbers=numbers, tables=tables(found), fewest=FEWEST)


TEXT = """<!-- Written by docs/study.py from experiments/*/results.csv and epochs.csv: edit that. -->
# Which criterion that needs no label goes with AUROC?

Whoever has normal images only must still choose a method, its settings and when to stop. A run records numbers that
no anomaly enters: the mean score of held-out normals, the share of their variance that the reconstructions explain,
how many test scores are distinct, how far the parameters moved. This page asks of the committed runs ({numbers})
whether a better value of one of them goes with a higher test AUROC.

```sh
python docs/study.py     # this page and its figure, from the committed tables alone; no training
```

![mean rank correlations with their intervals](study.png)

{tables}
*Rank correlation*: Spearman's, among the runs (or epochs) of a group, which share their training and test images;
signed so that a positive one means that the criterion points the right way (a low held-out score, a high explained
variance). Mean over groups, then over (data set, class), so that a class counts once; the interval is the percentile
bootstrap over classes. *Its choice*: by how much the AUROC of the run that the criterion picks is above the group's
mean, which is what a choice by lot would give; *the best*: the same for the choice by test labels. Groups of fewer
than {fewest} runs, or in which the criterion does not vary, are left out, and a criterion with fewer than three
classes has no row. A method counts once in a group, with the fewest changed keys.

## What it says

* *Between methods* held-out scores have different units: over all methods nothing is left of the correlation. Among
  the trained ones, most of them autoencoders that score by some reconstruction error, it is positive; whether by
  merit or by the accident of their units these runs cannot tell. Explained variance looks good until the mean image is
  left out, whose explained variance is 0 by definition and which is mostly the weakest floor: nothing of it
  is shown to remain. What it chooses is mostly PCA, which explains most; of the ablation's four small networks on
  MNIST the plain autoencoder explains most and detects worst, while GANomaly explains more and detects best. So it
  tells a network that learned no more than the mean image, and hardly ranks the others.
* *Between settings of one method* a low held-out score and a high explained variance go with AUROC. Explained variance
  does so where some settings learn nothing, as shared autoencoders do under some weights: learning is told from not
  learning, and these settings were also looked at when the criterion was proposed. Where all settings learn it may
  point the wrong way: with a larger code the plain autoencoder explains more of two digits and, above a size of 16,
  [detects worse](../experiments/sensitivity/README.md). Most of the groups behind the held-out score are classical
  methods on digits.
* *Between epochs of one run* the held-out score says no more than the number of the epoch, for it falls while a
  network trains. Later is better for encoder-decoder-encoders weighted 50 to 1, and worse for the adversarial ones
  weighted 1 to 1, the plain autoencoder on digits and HRN on Fashion-MNIST. Over all of them neither goes with AUROC.
* Distinct scores guard against collapse and are no way to rank: between methods more of them go with a lower AUROC. The
  parameter change hardly ranks settings of one method, and the one that moves farthest is hardly better than one drawn
  by lot; between methods a larger change goes with a lower AUROC, and more epochs with a slightly higher
  one.

## What it does not say

The classes are few, at the small size, on one seed to three, and runs of one class share its
images, so even an interval over classes is an interval over these classes. With three to five of them a percentile
bootstrap is too short. Seeds are not compared: another seed holds out other normals. The share of held-out normals
above the threshold is no criterion, because the threshold is their quantile.
No choice on any other page was made by this one.
"""


def main() -> int:
    runs, epochs = committed(HERE.parent / "experiments")
    found = findings(runs, epochs)
    figures.save(draw(found), PICTURE)
    write_text(PAGE, page(runs, epochs, found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
