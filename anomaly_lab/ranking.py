"""Methods ranked over many problems at once, and what the best epoch by test labels would add to each.

A problem is one class of one protocol (data set, split, what the data were changed to). Seeds are averaged within it.
"""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from anomaly_lab import results
from anomaly_lab.files import write_text
from anomaly_lab.report import markdown_table, selected
from anomaly_lab.tables import LEVEL, holm

if TYPE_CHECKING:
    import pandas as pd

PROBLEM = ["dataset", "split", "problem", "normal_class"]


@dataclass(frozen=True)
class Ranking:
    """Mean ranks of K methods over N problems, best first, and the tests of Demšar (JMLR 2006).

    Friedman's test in the form of Iman and Davenport asks whether any method differs; two methods differ by Nemenyi's
    test if their mean ranks are `critical_difference` apart. With few problems both are rough, and the critical
    difference is larger than most differences.
    """

    ranks: pd.Series[float]  # by method; 1 is the best, ties share their mean
    auroc: pd.Series[float]  # mean over the same problems
    problems: int
    left_out: dict[str, int]  # methods that lack problems: how many they have
    p: float  # of Friedman's test
    critical_difference: float
    pretrained: frozenset[str] = frozenset()  # methods with features of labelled images, which the others do not have

    def groups(self) -> list[tuple[str, str]]:
        """First and last of each largest group in which no two methods differ by Nemenyi's test."""
        found: list[tuple[int, int]] = []
        ranks = self.ranks.tolist()
        for first, rank in enumerate(ranks):
            last = max(i for i, other in enumerate(ranks) if other - rank <= self.critical_difference)
            if last > first and (not found or last > found[-1][1]):
                found.append((first, last))
        return [(str(self.ranks.index[first]), str(self.ranks.index[last])) for first, last in found]

    def pairs(self) -> list[tuple[str, str, float]]:
        """All pairs whose mean ranks differ by the normal approximation after Holm: better, worse, adjusted p."""
        names, ranks = [str(name) for name in self.ranks.index], self.ranks.tolist()
        every = list(itertools.combinations(range(len(ranks)), 2))
        spread = math.sqrt(len(ranks) * (len(ranks) + 1) / (6 * self.problems))
        p = holm([math.erfc((ranks[j] - ranks[i]) / spread / math.sqrt(2)) for i, j in every])
        return [(names[i], names[j], q) for (i, j), q in zip(every, p, strict=True) if q < LEVEL]


def ranking(frame: pd.DataFrame) -> Ranking:
    """The ranking of the methods that have every problem of `frame`; a supervised ceiling is none.

    Args:
        frame: of `anomaly_lab.results`; narrow it to the problems and runs that should count.

    Raises:
        ValueError: fewer than three methods have all of at least two problems.
    """
    from scipy.stats import f, friedmanchisquare, studentized_range

    frame = frame[~frame["labels"]]
    names = _names(frame)
    wide = frame.assign(name=names).groupby([*PROBLEM, "name"])["auroc"].mean().unstack("name")
    counts = wide.notna().sum()
    whole = wide[counts[counts == len(wide)].index].round(12)  # equal to the last bits of a float: tied
    n, k = whole.shape
    if n < 2 or k < 3:
        raise ValueError(f"a ranking needs three methods with all of at least two problems: {k} have all {n}")
    ranks = whole.rank(axis=1, ascending=False).mean().sort_values(kind="stable")
    if (whole.nunique(axis=1) == 1).all():
        p = 1.0  # all methods share every rank
    else:
        chi = float(friedmanchisquare(*(whole[name] for name in whole)).statistic)
        agreed = n * (k - 1) - chi  # 0: every problem ranks them alike
        p = float(f.sf((n - 1) * chi / agreed, k - 1, (k - 1) * (n - 1))) if agreed > 1e-9 else 0.0
    q = float(studentized_range.ppf(1 - LEVEL, k, math.inf)) / math.sqrt(2)
    left = {str(name): int(count) for name, count in counts.items() if count < n}
    pretrained = frozenset(name for name, run in zip(names, frame.itertuples(), strict=True) if run.pretrained)
    return Ranking(ranks, whole.mean()[ranks.index], n, left, p, q * math.sqrt(k * (k + 1) / (6 * n)), pretrained)


def _names(frame: pd.DataFrame) -> list[str]:
    """The method of each run; its small size stands for itself where the frame has both, on whatever data sets."""
    plain = [method_of(run.method, run.dataset) for run in frame.itertuples()]
    sizes = frame.assign(plain=plain, small=frame["model"] != frame["method"]).groupby("plain")["small"]
    both = sizes.transform("nunique") > 1
    return [
        method_of(run.model if two else run.method, run.dataset, run.changed, run.problem)
        for run, two in zip(frame.itertuples(), both, strict=True)
    ]


def method_of(method: str, dataset: str, changed: str = "", problem: str = "") -> str:
    """The name under which a method stands on all data sets: `hrn_cifar10` is `hrn` on CIFAR-10, its small size too.

    What a run changed, beyond the problem, stays part of it.
    """
    own = [item for item in changed.split() if item not in problem.split()]
    name = re.sub(rf"_{dataset.partition('_')[0]}(?=$|_small$)", "", method)
    return f"{name} [{' '.join(own)}]" if own else name


def best_epochs(frame: pd.DataFrame) -> pd.DataFrame:
    """What choosing the epoch by test AUROC would add, a row a method, the largest mean first.

    Of runs whose test AUROC was watched after every one of several epochs. Columns: method, runs, problems, epochs (the
    most), mean and largest of `oracle_auroc - auroc`, the share of the runs whose last epoch was the best, and the mean
    on each data set by its name.
    """
    import pandas as pd

    watched = frame[frame["oracle_auroc"].notna() & (frame["epochs"] > 1)]
    names = _names(watched)
    watched = watched.assign(name=names, gain=watched["oracle_auroc"] - watched["auroc"])
    rows = []
    for name, runs in watched.groupby("name"):
        gain = runs["gain"]
        numbers = len(runs), len(runs[PROBLEM].drop_duplicates()), int(runs["epochs"].max())
        on = {str(dataset): float(mean) for dataset, mean in gain.groupby(runs["dataset"]).mean().items()}
        rows.append((name, *numbers, gain.mean(), gain.max(), (gain <= 1e-12).mean(), on))
    columns = ["method", "runs", "problems", "epochs", "mean", "largest", "last_is_best", "datasets"]
    return pd.DataFrame(rows, columns=columns).sort_values("mean", ascending=False, kind="stable", ignore_index=True)


def unwatched(frame: pd.DataFrame) -> list[str]:
    """The methods with epochs of which no run has an `oracle_auroc`, by their plain names.

    Where a page watches every run, these are the methods that have scores only when the fit has ended.
    """
    import pandas as pd

    trained = frame[frame["epochs"] > 0]
    names = pd.Series([method_of(run.method, run.dataset) for run in trained.itertuples()], trained.index, dtype=object)
    watched = trained["oracle_auroc"].notna().groupby(names).any()
    return [str(name) for name, found in watched.items() if not found]


def markdown(shown: Ranking) -> list[str]:
    """Lines: what was ranked, Friedman's test, the ranks with the pairs that differ."""
    worse: dict[str, list[str]] = {}
    for better, other, _ in shown.pairs():
        worse.setdefault(better, []).append(f"`{other}`")
    rows = []
    for name, rank in shown.ranks.items():
        above = worse.get(str(name), [])
        said = ", ".join(above) if len(above) < 4 else f"{len(above)} methods: {above[0]} to {above[-1]}"
        mark = " ‡" if name in shown.pretrained else ""
        rows.append([f"`{name}`{mark}", f"{rank:.1f}", f"{shown.auroc[name]:.3f}", said])
    k, n = len(shown.ranks), shown.problems
    text = (
        f"{k} methods on {n} problems. Friedman's test (Iman-Davenport): p = {shown.p:.2g}. Nemenyi's critical "
        f"difference at {LEVEL:.0%}: {shown.critical_difference:.1f} ranks."
    )
    if shown.left_out:
        some = ", ".join(f"`{name}` ({count})" for name, count in shown.left_out.items())
        text += f" Left out, for they have not all {n} problems: {some}."
    if shown.pretrained & {*shown.ranks.index}:
        text += " ‡: with features that were pretrained on labelled images, which the others do not have."
    header = ["method", "mean rank", "mean AUROC", "better than, after Holm"]
    return [text, "", *markdown_table(header, rows), ""]


def best_epochs_markdown(frame: pd.DataFrame) -> list[str]:
    """Lines: the table of `best_epochs`."""
    header = ["method", "runs", "problems", "epochs", "best epoch adds, mean", "largest", "last epoch is the best"]
    rows = []
    for run in best_epochs(frame).itertuples():
        gain = f"{run.mean:+.3f}", f"{run.largest:+.3f}", f"{run.last_is_best:.0%}"
        rows.append([f"`{run.method}`", str(run.runs), str(run.problems), str(run.epochs), *gain])
    return markdown_table(header, rows) if rows else ["No run watched the test AUROC after each of several epochs."]


def write(runs: Path, out: Path | None = None, experiment: str | None = None) -> None:
    """Print the ranking of the finished runs under `runs`, or of those of an experiment; write ranking.md and .png, by
    default where a report goes.

    Raises:
        ValueError: too few methods share problems (`ranking`), or runs that cannot share a table; or there are none.
    """
    from anomaly_lab import figures

    frame, _, _ = selected(runs, experiment)
    results.refuse_mixtures(frame)
    shown = ranking(frame)
    out = out or runs / "report"
    text = "\n".join(
        ["# Ranking", "", *markdown(shown), "![Mean ranks](ranking.png)", "", *best_epochs_markdown(frame)]
    )
    figures.save(figures.critical_difference(shown, "Mean ranks"), out / "ranking.png")
    write_text(out / "ranking.md", text + "\n")
    print(text)
    print(f"written: {out / 'ranking.md'} and ranking.png beside it")
