"""Tables and tests of difference over the frame of `anomaly_lab.results`: numbers, without formatting."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from anomaly_lab import results
from anomaly_lab.record import LEARNED, MOVED
from anomaly_lab.results import Published

if TYPE_CHECKING:
    import pandas as pd

    from anomaly_lab.config import Job

LEVEL = 0.05
"""A p-value below it is called a difference."""

MINIMUM_PAIRS = 6  # with five classes the smallest two-sided p-value of the signed-rank test is 0.0625


BLOCKS = ("floor", "from scratch", "pretrained", "ceiling")
"""Of methods that must not be ranked among each other."""

FLOORS = ("mean_image", "pca", "knn")
"""Methods without a gradient that a detector has to be above to have learned anything."""


@dataclass(frozen=True)
class Cell:
    """One method on one class, or on the mean over classes; `mean` is None where there is no run."""

    mean: float | None
    sd: float | None  # over seeds, n - 1; None with fewer than two
    present: int
    expected: int
    flag: str = ""  # why a mean over classes is not the whole mean
    oracle: float | None = None  # mean of the best epochs on test, over the same runs
    honest: float | None = None  # mean AUROC of those runs
    published: Published | None = None
    comparable: bool = True  # the published figure is for the same classes
    unlearned: int = 0  # runs whose reconstructions say no more than the mean image, or whose parameters never moved

    @property
    def difference(self) -> float | None:
        """Ours minus the published figure; None where there is none, or where it is over other classes."""
        if self.published is None or self.mean is None or not self.comparable:
            return None
        return self.mean - self.published.value

    @property
    def gap(self) -> float | None:
        """What choosing the epoch on the test labels would have added."""
        return None if self.oracle is None or self.honest is None else self.oracle - self.honest


@dataclass(frozen=True)
class Row:
    label: str
    cells: dict[int | str, Cell]  # by class index, and "mean"
    seeds: int
    reduced: bool  # a reduced size, compared with the figure of the full size
    pretrained: str
    labels: bool  # a supervised ceiling
    published_as: str  # the method whose published figures stand beside it, where that is another; else empty


@dataclass(frozen=True)
class Table:
    dataset: str
    split: str
    role: str  # whether the named class is the normal one or the abnormal one
    classes: dict[int | str, str]
    seeds: int  # expected
    rows: tuple[Row, ...]
    runs: int


def table(frame: pd.DataFrame, dataset: str, split: str, expected: Sequence[Job] = ()) -> Table:
    """AUROC of all methods on the classes of one protocol, each the mean ± sd over seeds.

    Args:
        frame: of `results.read` or `results.read_csv`.
        expected: the grid of an experiment: what is missing is counted against it; without one, against all
            the seeds that any method of this table has.

    The mean over classes is the mean of the class means; its sd is over the seeds that have all the method's
    classes. It is flagged where classes or runs are missing, or where nothing says how many classes the protocol has;
    it is compared with a published mean only where it is known to be over all classes.
    """
    part = frame[(frame["dataset"] == dataset) & (frame["split"] == split)]
    grid: dict[str, dict[int | str, set[int]]] = {}
    about: dict[str, Mapping[str, Any]] = {}  # by label: a run, made or planned
    for job in map(results.planned, expected):
        if (job["dataset"], job["split"]) == (dataset, split):
            grid.setdefault(job["label"], {}).setdefault(job["normal_class"], set()).add(job["seed"])
            about[job["label"]] = job
    about |= {run["label"]: run for run in part.to_dict("records")}
    classes = {c: str(c) for wanted in grid.values() for c in wanted}
    classes |= {c: str(n) for c, n in zip(part["normal_class"].tolist(), part["class_name"], strict=True)}
    classes = {c: classes[c] for c in sorted(classes, key=results.class_order)}
    seeds = {int(seed) for seed in part["seed"]} | {s for wanted in grid.values() for c in wanted.values() for s in c}
    rows = []
    for name in sorted(about, key=lambda name: results.natural(name.rstrip("]"))):  # as the frame is sorted
        run = about[name]
        own = part.loc[part["label"] == name, [*_OF_A_RUN]]
        figures = {} if run["problem"] else results.published(run["published_as"], dataset, split)
        cells: dict[int | str, Cell] = {}
        for c in classes:
            runs = own[own["normal_class"] == c]
            wanted = (grid[name].get(c, set()) | set(runs["seed"])) if name in grid else seeds
            cells[c] = _cell(runs, runs["auroc"].tolist(), len(runs), len(wanted), published=figures.get(c))
        whole = part["classes"][part["problem"] == run["problem"]].max()  # NaN where no run recorded it
        cells["mean"] = _mean_cell(own, cells, None if math.isnan(whole) else int(whole), figures.get("mean"))
        other = run["published_as"] if run["published_as"] != run["method"] else ""
        reduced = run["model"] != run["method"]  # a method of one size has it in full, whatever size= was
        rows.append(Row(name, cells, own["seed"].nunique(), reduced, run["pretrained"], run["labels"], other))
    role = str(part["role"].iloc[0]) if len(part) else "normal"
    return Table(dataset, split, role, classes, len(seeds), tuple(rows), len(part))


_OF_A_RUN = ("normal_class", "seed", "auroc", "oracle_auroc", "explained_variance", "parameter_change")
"""The columns that cells are made of: selecting rows of all sixty takes most of a table's time."""


def _cell(runs: pd.DataFrame, values: list[float], present: int, expected: int, **more: Any) -> Cell:
    watched = runs[runs["oracle_auroc"].notna()]
    return Cell(
        mean=sum(values) / len(values) if values else None,
        sd=_sd(values),
        present=present,
        expected=expected,
        oracle=float(watched["oracle_auroc"].mean()) if len(watched) else None,
        honest=float(watched["auroc"].mean()) if len(watched) else None,
        unlearned=int(((runs["explained_variance"] < LEARNED) | (runs["parameter_change"] < MOVED)).sum()),
        **more,
    )


def _mean_cell(own: pd.DataFrame, cells: Mapping[int | str, Cell], whole: int | None, figure: Published | None) -> Cell:
    asked = [cell for cell in cells.values() if cell.expected]
    have = [cell for cell in cells.values() if cell.mean is not None]
    present, wanted = sum(cell.present for cell in asked), sum(cell.expected for cell in asked)
    if not have:
        flag = ""  # the cell says how many runs there should be
    elif whole is None:
        flag = f"{len(have)} of an unknown number of classes"
    elif len(have) < whole:
        flag = f"{len(have)}/{whole} classes"
    elif present < wanted:
        flag = f"{present}/{wanted} runs"
    else:
        flag = ""
    per_seed = own.groupby("seed")["auroc"].agg(["mean", "size"])
    complete = per_seed[per_seed["size"] == len(have)]["mean"].tolist()
    means = [cell.mean for cell in have if cell.mean is not None]
    all_classes = whole is not None and len(have) >= whole
    cell = _cell(own, means, present, wanted, flag=flag, published=figure, comparable=all_classes)
    return replace(cell, sd=_sd(complete))


def _sd(values: Sequence[float]) -> float | None:
    if len(values) < 2:
        return None
    mean = sum(values) / len(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))


@dataclass(frozen=True)
class Entry:
    """A row of the table of everything: a method with its settings at one size on one data set under one protocol."""

    method: str
    label: str  # of the row: the model and what was changed
    size: str  # small | full: the paper's, or the only one
    changed: str  # `key=value key=value`
    problem: str  # the part of it that makes it another problem: contamination, fewer images, several classes
    dataset: str
    split: str
    block: str  # floor | from scratch | pretrained | ceiling
    mean: Cell  # over classes, with the published mean
    classes: dict[int | str, str]  # that have runs
    whole: int | None  # how many one-class problems the protocol has; None where nothing recorded it
    seeds: tuple[int, ...]
    published_as: str  # the method whose published figures stand beside it, where that is another; else empty
    sources: tuple[str, ...]  # names of the pages that hold its runs
    submissions: tuple[str, ...] = ()  # names of those that do
    verified: int = 0  # how many of its runs are in submissions
    archived: int = 0  # how many have their scores in archives

    @property
    def standing(self) -> str:
        """What its figure rests on: one of `STANDINGS`."""
        if self.verified:
            return STANDINGS[0 if self.verified == self.mean.present else 1]
        return STANDINGS[2 if self.archived else 3]


STANDINGS = ("verified from scores", "verified in part", "scores of some classes", "figures only")
"""Every run is in a submission; some are; none is, though scores are kept: a submission needs all classes; no score is
kept."""


def overview(
    pages: Mapping[str, pd.DataFrame],
    submissions: Mapping[str, pd.DataFrame] | None = None,
    archives: Mapping[str, pd.DataFrame] | None = None,
) -> list[Entry]:
    """Every run of all frames, aggregated by method, settings, data set and protocol; sorted, the best mean first.

    A run that several frames hold counts once, as its submission has it. The seeds expected of a method are those that
    it has itself.

    Args:
        pages: as those of `results.union`; `Entry.sources` repeats their names.
        submissions: `submission.read_pages`.
        archives: the frames of archives of scores, by any other names.

    Raises:
        ValueError: see `results.union`.
    """
    submissions, archives = submissions or {}, archives or {}
    runs = results.union({**submissions, **archives, **pages})
    entries = []
    for (dataset, split, label), own in runs.groupby(["dataset", "split", "label"], sort=False):
        [row] = table(own, dataset, split).rows
        run = own.iloc[0]
        block = "floor" if run["method"] in FLOORS else "pretrained" if row.pretrained else "from scratch"
        entries.append(
            Entry(
                method=run["method"],
                label=label,
                size="full" if run["model"] == run["method"] else "small",
                changed=run["changed"],
                problem=run["problem"],
                dataset=dataset,
                split=split,
                block="ceiling" if row.labels else block,
                mean=row.cells["mean"],
                classes=dict(sorted(zip(own["normal_class"], own["class_name"], strict=True), key=_by_class)),
                whole=None if math.isnan(own["classes"].max()) else int(own["classes"].max()),
                seeds=tuple(sorted(set(own["seed"].tolist()))),
                published_as=row.published_as,
                sources=_holding(pages, own),
                submissions=_holding(submissions, own),
                verified=sum(not submissions.keys().isdisjoint(names) for names in own["sources"]),
                archived=sum(not archives.keys().isdisjoint(names) for names in own["sources"]),
            )
        )
    return sorted(entries, key=lambda e: (e.dataset, e.split, e.problem, -(e.mean.mean or 0.0), e.label))


def _holding(frames: Mapping[str, pd.DataFrame], runs: pd.DataFrame) -> tuple[str, ...]:
    return tuple(name for name in frames if any(name in names for names in runs["sources"]))


def _by_class(item: tuple[int | str, str]) -> tuple[bool, Any]:
    return results.class_order(item[0])


class Comparison(NamedTuple):
    first: str
    second: str
    classes: int  # that both have
    ties: int
    seeds: int  # fewest seeds that both have, of any of these classes
    difference: float  # mean of first - second
    p: float | None  # None: too few classes
    p_holm: float | None


def signed(value: float | None) -> str:
    """A difference of AUROC as text, with three decimals; nothing for None."""
    return "" if value is None else f"{value:+.3f}".replace("-", "−")


def holm(p: Sequence[float]) -> list[float]:
    """Holm's step-down correction (Holm 1979): adjusted p-values in the given order."""
    order = sorted(range(len(p)), key=p.__getitem__)
    adjusted = [0.0] * len(p)
    worst = 0.0
    for rank, index in enumerate(order):
        worst = max(worst, min(1.0, (len(p) - rank) * p[index]))
        adjusted[index] = worst
    return adjusted


def significance(frame: pd.DataFrame, dataset: str, split: str) -> list[Comparison]:
    """Wilcoxon signed-rank tests between methods, paired over classes; seeds are averaged first, within a class.

    Seeds of one class share the class's difference: tested as pairs of their own, three of them reject a true null in
    9 to 22 % of cases (`docs/statistics.md`). Two-sided and corrected after Holm; classes without a difference are
    left out of the test and counted as ties. Below `MINIMUM_PAIRS` classes that differ there is no p-value, and the
    comparison does not count in the correction. A supervised ceiling is no method to compare.
    Methods are compared under the same problem only (see `anomaly_lab.results`).
    """
    from scipy.stats import wilcoxon

    part = frame[(frame["dataset"] == dataset) & (frame["split"] == split) & ~frame["labels"]]
    found = []
    for _, same in part.groupby("problem", sort=True):
        wide = same.pivot(index=["normal_class", "seed"], columns="label", values="auroc")
        for first, second in itertools.combinations(dict.fromkeys(same["label"]), 2):
            paired = (wide[first] - wide[second]).dropna().groupby("normal_class")
            difference = paired.mean()
            untied = difference[difference.abs() > 1e-12]  # equal to the last bits of a float
            p = float(wilcoxon(untied).pvalue) if len(untied) >= MINIMUM_PAIRS else None
            if len(difference):
                mean = float(difference.mean())
                counts = len(difference), len(difference) - len(untied), int(paired.size().min())
                found.append(Comparison(first, second, *counts, mean, p, None))
    tested = [comparison for comparison in found if comparison.p is not None]
    adjusted = iter(holm([comparison.p for comparison in tested if comparison.p is not None]))
    return [c if c.p is None else c._replace(p_holm=next(adjusted)) for c in found]
