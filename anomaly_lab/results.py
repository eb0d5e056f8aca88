"""Finished runs as tables, tests of difference, figures and pages.

    runs/**/result.json --read--> frame, a row a run --table--> Table --> Markdown, CSV, LaTeX, HTML

Everything printed about an experiment is made from its `results.csv` alone (`experiment_readme`), so a
committed table can be made again from committed numbers. AUROC is written on the scale 0 to 1 with three
decimals.

A run is compared with another one, and with a published figure, only where both saw the same problem: keys
under `split.` or `dataset.` that a run changed (contamination, fewer images) are part of what it is compared
under.
"""

from __future__ import annotations

import argparse
import base64
import csv
import functools
import hashlib
import io
import itertools
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from anomaly_lab import slurm
from anomaly_lab.files import write_whole

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from anomaly_lab.config import Job

    Expected = Sequence[Job]  # every run of an experiment's grid

# The order of results.csv. Columns with a dot in their name follow: parameters in which the runs differ.
_TEXT = "text"
COLUMNS: dict[str, type | str] = {
    "model": _TEXT,
    "dataset": _TEXT,
    "split": _TEXT,
    "normal_class": int,
    "seed": int,
    "auroc": float,
    "average_precision": float,
    "fpr95": float,
    "balanced_accuracy": float,
    "oracle_auroc": float,
    "epochs": int,
    "images_per_second": float,
    "git_sha": _TEXT,
    "dirty": bool,
    "changed": _TEXT,
    "class_name": _TEXT,
    "role": _TEXT,
    "auroc_low": float,
    "auroc_high": float,
    "f1": float,
    "precision": float,
    "recall": float,
    "val_score": float,
    "seconds": float,
    "fingerprint": _TEXT,
    "device": _TEXT,
    "experiment": _TEXT,
    "pretrained": _TEXT,
    "published_as": _TEXT,
    "path": _TEXT,
    "images": _TEXT,
    "settings": _TEXT,
    "auroc_seen": float,
    "auroc_unseen": float,
    "balanced_accuracy_seen": float,
    "balanced_accuracy_unseen": float,
    "oracle_shuffled_auroc": float,
    "oracle_sorted_auroc": float,
    "set_aside": _TEXT,
    "earlier_code": _TEXT,
}
_METRICS = (
    *(
        "auroc",
        "auroc_low",
        "auroc_high",
        "average_precision",
        "fpr95",
        "balanced_accuracy",
        "f1",
        "precision",
    ),
    *("recall", "val_score", "oracle_auroc", "oracle_shuffled_auroc", "oracle_sorted_auroc"),
)

# How many one-class problems a protocol has: a mean over fewer is not the mean that papers publish.
_CLASSES = {
    ("mnist", "official"): 10,
    ("mnist", "pooled"): 10,
    ("fashion_mnist", "official"): 10,
    ("fashion_mnist", "pooled"): 10,
    ("cifar10", "official"): 10,
    ("cifar10", "pooled"): 10,
    ("cifar100", "official"): 100,
    ("cifar100", "superclass"): 20,
    ("cifar100", "subclass"): 10,
    ("coil100", "coil"): 30,
    ("coil100", "pooled"): 100,
    ("digits", "pooled"): 10,
    **{(name, "one_abnormal"): 10 for name in ("mnist", "fashion_mnist", "cifar10", "digits")},
}

MINIMUM_PAIRS = 6  # with five pairs the smallest two-sided p-value of the signed-rank test is 0.0625


# ------------------------------------------------------------------------------------------------- reading


def read(runs: str | Path) -> pd.DataFrame:
    """Every finished run under `runs`, a row a run, sorted.

    The columns are `COLUMNS`, parameters and derived ones. Parameters are the dotted keys that any run
    changed, with every run's own value. Derived are `label` (the model and what was changed: the row of a
    table), `problem` (the part of the changes that makes it another problem). `frame.attrs["damaged"]` names
    the result files that could not be read, a line each.

    Raises:
        ValueError: `runs` is not a folder.
    """
    runs = Path(runs)
    if not runs.is_dir():
        raise ValueError(f"{runs} is not a folder: name the one that holds the runs, such as runs/")
    rows, configs, damaged = [], [], []
    for folder in run_folders(runs):
        if not (folder / "result.json").exists():
            continue
        try:
            row, config = _row(folder, folder.relative_to(runs).as_posix())
        except ValueError as error:
            damaged.append(str(error))
        else:
            rows.append(row)
            configs.append(config)
    parameters = sorted({item.split("=", 1)[0] for row in rows for item in row["changed"].split()})
    for row, config in zip(rows, configs, strict=True):
        row.update({key: _lookup(config, key) for key in parameters})
    frame = _frame(rows, parameters)
    frame.attrs["damaged"] = damaged
    return frame


def read_epochs(runs: str | Path, frame: pd.DataFrame) -> pd.DataFrame:
    """The course of the runs of `frame` that were watched: a row an epoch with path, epoch, val_score, oracle_auroc.

    Only runs that recorded the test AUROC after every epoch are in it (`trainer.watch_test=true`).
    """
    import pandas as pd

    rows = []
    for path in frame["path"][frame["oracle_auroc"].notna()]:
        history = json.loads((Path(runs) / path / "result.json").read_text(encoding="utf-8")).get("history") or ()
        for entry in history:
            if entry.get("oracle_auroc") is not None:
                rows.append((path, int(entry["epoch"]), entry.get("val_score"), float(entry["oracle_auroc"])))
    return pd.DataFrame(rows, columns=["path", "epoch", "val_score", "oracle_auroc"])


def write_csv(frame: pd.DataFrame, path: str | Path) -> None:
    """Write the frame of `read` as `results.csv`:

    sorted, six significant digits, the same bytes for the same runs.
    """
    columns = [*COLUMNS, *_parameters(frame)]
    _write(Path(path), _csv_text(columns, frame[columns].itertuples(index=False, name=None)))


def read_csv(path: str | Path) -> pd.DataFrame:
    """The frame that `write_csv` wrote, to six digits.

    Raises:
        ValueError: the file is not such a table.
    """
    with open(path, newline="", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    missing = [column for column in COLUMNS if table and column not in table[0]]
    if missing:
        raise ValueError(f"{path} has no column {missing[0]}: write it again with anomaly-lab-report --experiment")
    parameters = [column for column in (table[0] if table else ()) if "." in column]
    rows: list[dict[str, Any]] = []
    for line in table:
        row: dict[str, Any] = {}
        for column, kind in COLUMNS.items():
            text = line[column]
            if kind is bool:
                row[column] = text == "true"
            elif kind == _TEXT:
                row[column] = text
            else:
                row[column] = kind(text) if text else None  # type: ignore[operator]
        row.update({column: _parsed(line[column]) for column in parameters})
        rows.append(row)
    return _frame(rows, parameters)


def refuse_mixtures(frame: pd.DataFrame) -> None:
    """Raise where runs that would share a table cannot: other images under the same name, or one run twice.

    Raises:
        ValueError: names two runs of one (data set, split, class, seed) whose split fingerprints differ, of one
            data set's name on other images, of one method's name with other settings; or one run in two folders.
    """
    _refuse_unequal(frame, ["dataset", "problem"], "images", "on other images")
    _refuse_unequal(frame, ["dataset", "split", "label"], "settings", "with other settings (a yaml was edited)")
    for _, group in frame.groupby(["dataset", "split", "problem", "normal_class", "seed"], sort=True):
        first = group.iloc[0]
        for _, other in group.iloc[1:].iterrows():
            if other["fingerprint"] != first["fingerprint"]:
                one, two = (f"{run['path']} ({run['fingerprint']})" for run in (first, other))
                raise ValueError(
                    f"{one} and {two} saw different images under the same data set, split, class and seed: "
                    "delete the stale run"
                )
        twice = group[group.duplicated("label", keep=False)]
        if len(twice):
            one, two = twice[twice["label"] == twice.iloc[0]["label"]]["path"].iloc[:2]
            raise ValueError(f"{one} and {two} are the same run twice: move one of them elsewhere")


def _refuse_unequal(frame: pd.DataFrame, keys: Sequence[str], column: str, what: str) -> None:
    for _, group in frame[frame[column] != ""].groupby(list(keys), sort=True):
        other = group[group[column] != group.iloc[0][column]]
        if len(other):
            raise ValueError(
                f"{group.iloc[0]['path']} and {other.iloc[0]['path']} share a name but were made {what}: "
                "delete the stale one, or give it a name of its own"
            )


def _digest(settings: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def _row(folder: Path, path: str) -> tuple[dict[str, Any], Mapping[str, Any]]:
    """A run's row and its config; ValueError with the file's name when it is damaged."""
    file = folder / "result.json"
    try:
        result = json.loads(file.read_text(encoding="utf-8"))
        identity, measured, git = result["identity"], result["metrics"], result.get("git") or {}
        model = (result.get("config") or {}).get("model") or {}
        seconds = [value for value in (result.get("seconds") or {}).values() if value is not None]
        earlier = result.get("earlier_code") or []
        row = {
            **{key: str(identity[key]) for key in ("model", "dataset", "split")},
            **{key: int(identity[key]) for key in ("normal_class", "seed")},
            **{key: _number(measured.get(key)) for key in _METRICS},
            "epochs": int(result["epochs"]),
            "images_per_second": _number(result.get("images_per_second")),
            "git_sha": str(git.get("sha") or "")[:12],
            "dirty": any(code.get("dirty") for code in (git, *earlier)),
            "changed": _compact(identity["changed"]),
            "class_name": str(result["class_name"]),
            "role": str(result.get("role") or "normal"),
            "seconds": float(sum(seconds)),
            "fingerprint": str(result["partition"]["fingerprint"]),
            "device": str(result.get("device") or ""),
            "experiment": str(result.get("experiment") or ""),
            # Both are optional in a model's yaml: the pretrained features it uses, and the method of
            # published.csv it is to be compared with where that is not its own name.
            "pretrained": str(model.get("pretrained") or ""),
            "published_as": str(model.get("published") or re.sub("_small$", "", str(identity["model"]))),
            "path": path,
            # Checksums of the data set and of everything that could change the result.
            "images": str((result.get("settings") or {}).get("images") or "")[:12],
            "settings": _digest(result["settings"]) if result.get("settings") else "",
            # The kinds of anomaly that contaminate the training set and the others; what the method set aside.
            **{
                f"{name}_{kind}": _number(((result.get("by_kind") or {}).get(kind) or {}).get(name))
                for name in ("auroc", "balanced_accuracy")
                for kind in ("seen", "unseen")
            },
            "set_aside": json.dumps(result["set_aside"], separators=(",", ":")) if result.get("set_aside") else "",
            # What trained the run's first epochs, where that was not the commit that finished it.
            "earlier_code": " ".join(dict.fromkeys((code.get("sha") or "unknown")[:12] for code in earlier)),
        }
        if row["auroc"] is None:
            raise ValueError("no AUROC in it")
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is damaged ({type(error).__name__}: {error}): delete it and run again") from None
    except (ValueError, OSError) as error:
        raise ValueError(f"{file} is damaged ({error}): delete it and run again") from None
    return row, result["config"] if isinstance(result.get("config"), dict) else {}


def _frame(rows: list[dict[str, Any]], parameters: Sequence[str]) -> pd.DataFrame:
    import pandas as pd

    for row in rows:
        row["label"] = label(row["model"], row["changed"])
        row["problem"] = " ".join(i for i in row["changed"].split() if i.startswith(("split.", "dataset.")))
    rows = sorted(
        rows,
        key=lambda row: [
            *(_natural(row[key]) for key in ("dataset", "split", "model", "changed")),
            row["normal_class"],
            row["seed"],
            row["path"],
        ],
    )
    columns = {}
    for name, kind in [
        *COLUMNS.items(),
        *((key, object) for key in parameters),
        ("label", _TEXT),
        ("problem", _TEXT),
    ]:
        values = [row[name] for row in rows]
        # Texts stay plain Python objects: an empty one must not become "not a number".
        columns[name] = pd.Series(values, dtype=object if kind == _TEXT else kind)
    return pd.DataFrame(columns)


def label(model: str, changed: str) -> str:
    """The name of a table's row:

    the model and what was changed, `autoencoder [model.detector.latent_size=8]`.
    """
    return f"{model} [{', '.join(changed.split())}]" if changed else model


def _compact(changed: Mapping[str, Any]) -> str:
    """`key=value key=value`, sorted; values are JSON without blanks, plain words bare."""
    items = []
    for key, value in sorted(changed.items()):
        text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        if (
            isinstance(value, str)
            and re.fullmatch(r"[^\W\d][\w./+-]*", value)
            and value not in ("true", "false", "null")
        ):
            text = value
        items.append(f"{key}={text}".replace(" ", "\\u0020"))
    return " ".join(items)


def _parameters(frame: pd.DataFrame) -> list[str]:
    return [column for column in frame.columns if "." in column]


def _lookup(config: Mapping[str, Any], key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return None
        value = value[part]
    return value


def _number(value: Any) -> float | None:
    if value is None:
        return None
    if not math.isfinite(float(value)):
        raise ValueError(f"a metric is {value}")
    return float(value)


def _natural(text: str) -> list[tuple[int, float, str]]:
    """Sort key under which 8 stands before 64, in any text."""
    parts = re.split(r"(\d+(?:\.\d+)?)", text)
    return [(0, float(part), "") if i % 2 else (1, 0.0, part) for i, part in enumerate(parts)]


def _csv_text(header: Sequence[str], rows: Iterable[Iterable[Any]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows([_csv_cell(value) for value in row] for row in rows)
    return text.getvalue()


def _csv_cell(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:.6g}"
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))


def _parsed(text: str) -> Any:
    try:
        return json.loads(text) if text else None
    except ValueError:
        return text


def _write(path: Path, text: str) -> None:
    write_whole(path, lambda file: file.write(text.encode()))


# ------------------------------------------------------------------------------------------------- published


class Published(NamedTuple):
    value: float
    status: str  # verified | secondary | unverified
    setting: str  # what differs or is not stated about the protocol; empty when it is the split's own
    source: str


@functools.cache
def _published_rows() -> tuple[dict[str, str], ...]:
    text = resources.files("anomaly_lab").joinpath("published.csv").read_text(encoding="utf-8")
    return tuple(csv.DictReader(text.splitlines()))


def published(method: str, dataset: str, split: str, metric: str = "auroc") -> dict[int | str, Published]:
    """Published figures of a method by zero-based class or "mean", under this split only.

    Of several rows for a cell the first counts. A row whose source does not state its split but very likely
    means `official` stands in where nothing better is known, and says so in `setting`.
    """
    cells: dict[int | str, Published] = {}
    own = [
        row for row in _published_rows() if (row["model"], row["dataset"], row["metric"]) == (method, dataset, metric)
    ]
    stated = [row for row in own if row["split"] == split and not row["setting"]]
    likely = [row for row in own if split == "official" and row["setting"] == "unstated (P2 likely)"]
    for row in [*stated, *likely]:
        name = row["normal_class"]
        if name == "mean" or name.isdigit():  # "column3": a table whose headers are lost
            key = name if name == "mean" else int(name)
            setting = "" if row in stated else "split not stated, likely official"
            cells.setdefault(key, Published(float(row["value"]), row["status"], setting, row["source"]))
    return cells


# ------------------------------------------------------------------------------------------------- tables


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
    published_as: str  # the method whose published figures stand beside it, where that is another; else empty


@dataclass(frozen=True)
class Table:
    dataset: str
    split: str
    role: str  # whether the named class is the normal one or the abnormal one
    classes: dict[int, str]
    seeds: int  # expected
    rows: tuple[Row, ...]
    runs: int


def table(frame: pd.DataFrame, dataset: str, split: str, expected: Expected | None = None) -> Table:
    """AUROC of all methods on the classes of one protocol, each the mean ± sd over seeds.

    Args:
        frame: of `read` or `read_csv`.
        expected: the grid of an experiment: what is missing is counted against it; without one, against all
            the seeds that any method of this table has.

    The mean over classes is the mean of the class means; its sd is over the seeds that have all the method's
    classes. It is flagged where classes or runs are missing, and with classes missing not compared with a
    published mean.
    """
    part = frame[(frame["dataset"] == dataset) & (frame["split"] == split)]
    grid: dict[str, dict[int, set[int]]] = {}
    details: dict[str, tuple[str, str, str, str]] = {}
    for identity in (job.identity for job in expected or ()):
        if (identity["dataset"], identity["split"]) == (dataset, split):
            changed = _compact(identity["changed"])
            name = label(identity["model"], changed)
            grid.setdefault(name, {}).setdefault(int(identity["normal_class"]), set()).add(int(identity["seed"]))
            method = re.sub("_small$", "", identity["model"])
            details[name] = (identity["model"], "", method, _compact(_problem(identity["changed"])))
    for row in part.itertuples():
        details[row.label] = (row.model, row.pretrained, row.published_as, row.problem)
    classes = {c: str(c) for wanted in grid.values() for c in wanted}
    classes |= {int(c): str(n) for c, n in zip(part["normal_class"], part["class_name"], strict=True)}
    classes = dict(sorted(classes.items()))
    seeds = {int(seed) for seed in part["seed"]} | {s for wanted in grid.values() for c in wanted.values() for s in c}
    rows = []
    for name in sorted(details, key=lambda name: _natural(name.rstrip("]"))):  # as the frame is sorted
        model, pretrained, method, problem = details[name]
        own = part[part["label"] == name]
        figures = {} if problem else published(method, dataset, split)
        cells: dict[int | str, Cell] = {}
        for c in classes:
            runs = own[own["normal_class"] == c]
            wanted = (grid[name].get(c, set()) | set(runs["seed"])) if name in grid else seeds
            cells[c] = _cell(runs, runs["auroc"].tolist(), len(runs), len(wanted), published=figures.get(c))
        cells["mean"] = _mean_cell(own, cells, _CLASSES.get((dataset, split), len(classes)), figures.get("mean"))
        other = method if method != re.sub("_small$", "", model) else ""
        rows.append(Row(name, cells, own["seed"].nunique(), model.endswith("_small"), pretrained, other))
    role = str(part["role"].iloc[0]) if len(part) else "normal"
    return Table(dataset, split, role, classes, len(seeds), tuple(rows), len(part))


def _problem(changed: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in changed.items() if key.startswith(("split.", "dataset."))}


def _cell(runs: pd.DataFrame, values: list[float], present: int, expected: int, **more: Any) -> Cell:
    watched = runs[runs["oracle_auroc"].notna()]
    return Cell(
        mean=sum(values) / len(values) if values else None,
        sd=_sd(values),
        present=present,
        expected=expected,
        oracle=float(watched["oracle_auroc"].mean()) if len(watched) else None,
        honest=float(watched["auroc"].mean()) if len(watched) else None,
        **more,
    )


def _mean_cell(own: pd.DataFrame, cells: Mapping[int | str, Cell], whole: int, figure: Published | None) -> Cell:
    asked = [cell for cell in cells.values() if cell.expected]
    have = [cell for cell in cells.values() if cell.mean is not None]
    present, wanted = sum(cell.present for cell in asked), sum(cell.expected for cell in asked)
    total = max(whole, len(asked))
    flag = ""
    if len(have) < total:
        flag = f"{len(have)}/{total} classes"
    elif present < wanted:
        flag = f"{present}/{wanted} runs"
    per_seed = own.groupby("seed")["auroc"].agg(["mean", "size"])
    complete = per_seed[per_seed["size"] == len(have)]["mean"].tolist()
    means = [cell.mean for cell in have if cell.mean is not None]
    cell = _cell(own, means, present, wanted, flag=flag, published=figure, comparable=len(have) >= whole)
    return Cell(**{**cell.__dict__, "sd": _sd(complete)})


def _sd(values: Sequence[float]) -> float | None:
    if len(values) < 2:
        return None
    mean = sum(values) / len(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))


# ------------------------------------------------------------------------------------------------ differences


class Comparison(NamedTuple):
    first: str
    second: str
    pairs: int
    ties: int
    difference: float  # mean of first - second
    p: float | None  # None: too few pairs
    p_holm: float | None


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
    """Wilcoxon signed-rank tests between methods, paired over the (class, seed) that both have.

    Two-sided and corrected after Holm; pairs without a difference are left out of the test and counted as
    ties. Below `MINIMUM_PAIRS` pairs that differ there is no p-value, and the comparison does not count in
    the correction. Methods are compared under the same problem only (see the module's head).
    """
    from scipy.stats import wilcoxon

    part = frame[(frame["dataset"] == dataset) & (frame["split"] == split)]
    found = []
    for _, same in part.groupby("problem", sort=True):
        wide = same.pivot(index=["normal_class", "seed"], columns="label", values="auroc")
        for first, second in itertools.combinations(dict.fromkeys(same["label"]), 2):
            difference = (wide[first] - wide[second]).dropna()
            untied = difference[difference.abs() > 1e-12]  # equal to the last bits of a float
            p = float(wilcoxon(untied).pvalue) if len(untied) >= MINIMUM_PAIRS else None
            if len(difference):
                mean = float(difference.mean())
                found.append(Comparison(first, second, len(difference), len(difference) - len(untied), mean, p, None))
    tested = [comparison for comparison in found if comparison.p is not None]
    adjusted = iter(holm([comparison.p for comparison in tested if comparison.p is not None]))
    return [c if c.p is None else c._replace(p_holm=next(adjusted)) for c in found]


# ------------------------------------------------------------------------------------------------- pages


class _Line(NamedTuple):
    kind: str  # method | published | difference | oracle | gap | block
    label: str
    cells: list[str]


@dataclass(frozen=True)
class Section:
    """All that is shown of one (data set, split)."""

    table: Table
    title: str
    slug: str
    frame: pd.DataFrame
    comparisons: list[Comparison]
    figures: dict[str, Callable[[], Figure]]  # file name -> how to draw it


def sections(
    frame: pd.DataFrame, expected: Expected | None = None, epochs: pd.DataFrame | None = None
) -> list[Section]:
    """What a report consists of: a section for every (data set, split); figures are drawn when called.

    `epochs` is the frame of `read_epochs`; without it the figure of the course over epochs cannot be drawn.
    """
    from anomaly_lab import figures

    pairs = [*zip(frame["dataset"], frame["split"], strict=True)]
    pairs += [(identity["dataset"], identity["split"]) for identity in (job.identity for job in expected or ())]
    found = []
    for dataset, split in sorted(set(pairs)):
        part = frame[(frame["dataset"] == dataset) & (frame["split"] == split)]
        title, slug = f"{dataset} · {split}", re.sub(r"[^\w.-]", "_", f"{dataset}-{split}")
        draw: dict[str, Callable[[], Figure]] = {}
        short, common = _short(part)
        heading = f"{title} ({', '.join(common)})" if common else title
        if len(part):
            draw[f"{slug}-classes.png"] = functools.partial(figures.class_heat_map, short, heading)
        if part["label"].value_counts().max() > 2:
            draw[f"{slug}-spread.png"] = functools.partial(figures.box_plot, short, heading)
        for key, curve in _sensitivities(short).items():
            draw[f"{slug}-{key}.png"] = functools.partial(
                figures.lines, curve, key, "auroc", "line", heading, xlabel=key.partition(".")[2]
            )
        if part["oracle_auroc"].notna().any():
            draw[f"{slug}-epochs.png"] = functools.partial(_course, short, epochs, heading)
        comparisons = significance(frame, dataset, split)
        found.append(Section(table(frame, dataset, split, expected), title, slug, part, comparisons, draw))
    return found


def _short(part: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """For figures: labels with the last word of a key, and without the changes that all the runs share (second)."""
    items = [changed.split() for changed in part["changed"]]
    shared = set(items[0]).intersection(*items[1:]) if items else set()
    keys = {item.split("=", 1)[0] for run in items for item in run}
    last = {key: key.rpartition(".")[2] for key in keys}
    clear = len(set(last.values())) == len(last)

    def word(item: str) -> str:
        key, _, value = item.partition("=")
        return f"{last[key] if clear else key}={value}"

    changed = [" ".join(item for item in run if item not in shared) for run in items]
    labels = [
        label(model, " ".join(map(word, text.split()))) for model, text in zip(part["model"], changed, strict=True)
    ]
    return part.assign(label=labels, changed=changed), [word(item) for item in sorted(shared)]


def _sensitivities(short: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Frames to draw AUROC against a parameter: those that take three values or more, a line a method."""
    curves = {}
    for key in _parameters(short):
        values = short[key].map(
            lambda v: float(v) if isinstance(v, int | float) and not isinstance(v, bool) else math.nan
        )
        rest = [
            label(model, " ".join(item for item in changed.split() if not item.startswith(f"{key}=")))
            for model, changed in zip(short["model"], short["changed"], strict=True)
        ]
        curve = short.assign(**{key: values, "line": rest}).dropna(subset=[key])
        curve = curve[curve.groupby("line")[key].transform("nunique") > 1]
        if curve[key].nunique() > 2:
            curves[key] = curve
    return curves


def _course(short: pd.DataFrame, epochs: pd.DataFrame | None, heading: str) -> Figure:
    from anomaly_lab import figures

    assert epochs is not None, "the course over epochs is drawn from the frame of read_epochs"
    joined = epochs[["path", "epoch", "oracle_auroc"]].merge(
        short[["path", "label", "normal_class", "seed"]], on="path"
    )
    title = f"{heading}: test AUROC after every epoch (looks at test labels)"
    return figures.lines(joined, "epoch", "oracle_auroc", "label", title)


def _header(shown: Table) -> list[str]:
    return ["method", *shown.classes.values(), "mean", "seeds"]


def _lines(shown: Table, oracle: bool) -> Iterator[_Line]:
    keys: list[int | str] = [*shown.classes, "mean"]
    plain = [row for row in shown.rows if not row.pretrained]
    blocks = [("", plain), ("with features pretrained on ImageNet", [r for r in shown.rows if r.pretrained])]
    for heading, rows in blocks:
        if heading and rows:
            yield _Line("block", heading, [""] * (len(keys) + 1))
        for row in rows:
            cells = [row.cells[key] for key in keys]
            seeds = str(row.seeds) if row.seeds == shown.seeds else f"{row.seeds}/{shown.seeds}"
            yield _Line("method", row.label, [*map(_cell_text, cells), seeds])
            kinds = dict.fromkeys((c.published.status, c.published.setting) for c in cells if c.published)
            if all(c.difference is None for c in cells):
                kinds = {}  # nothing of this row can be compared
            for status, setting in kinds:
                words = [status, *([setting] if setting else []), *(["full size"] if row.reduced else [])]
                texts = [
                    f"{c.published.value:.3f}" if c.published and c.published[1:3] == (status, setting) else ""
                    for c in cells
                ]
                whose = f" for {row.published_as}" if row.published_as else ""
                yield _Line("published", f"published{whose} ({', '.join(words)})", [*texts, ""])
            if any(c.difference is not None for c in cells):
                yield _Line("difference", "difference", [*(_signed(c.difference) for c in cells), ""])
            if oracle and any(c.oracle is not None for c in cells):
                texts = ["" if c.oracle is None else f"{c.oracle:.3f}" for c in cells]
                yield _Line("oracle", "oracle (best epoch on test)", [*texts, ""])
                yield _Line("gap", "oracle - honest", [*(_signed(c.gap) for c in cells), ""])


def _cell_text(cell: Cell) -> str:
    if cell.mean is None:
        return f"0/{cell.expected}" if cell.expected else ""
    text = f"{cell.mean:.3f}" + (f" ± {cell.sd:.3f}" if cell.sd is not None else "")
    if cell.flag:
        return f"{text} ({cell.flag})"
    return f"{text} ({cell.present}/{cell.expected})" if cell.present < cell.expected else text


def _signed(value: float | None) -> str:
    return "" if value is None else f"{value:+.3f}".replace("-", "−")


def _caption(section: Section) -> str:
    shown = section.table
    if not shown.runs:
        return "No finished runs yet."
    seeds = sorted(set(section.frame["seed"]))
    spread = "mean ± sd over" if len(seeds) > 1 else "only"
    names = f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"
    text = f"AUROC, {spread} {names}; {shown.runs} run{'s' if shown.runs > 1 else ''}."
    text += f" Columns: the {shown.role} class."
    if shown.role == "abnormal":
        text += " All the other classes are normal."
    if any(row.reduced and any(c.difference is not None for c in row.cells.values()) for row in shown.rows):
        text += " Methods named _small are a reduced size, the published figures beside them of the full size."
    means = [row.cells["mean"] for row in shown.rows]
    if any(cell.flag for cell in means):
        text += " Brackets name a mean over fewer classes or runs than there should be"
        partial = any(cell.published and not cell.comparable for cell in means)
        text += "; over fewer classes it is not compared with a published mean." if partial else "."
    return text


def _summary(frame: pd.DataFrame) -> tuple[list[str], list[list[str]]]:
    """The other metrics of one section, each the mean over its runs."""
    columns = ["average_precision", "fpr95", "balanced_accuracy", "f1", "precision", "recall"]
    header = ["method", "runs", "AP", "FPR95", "bal. acc.", "F1", "precision", "recall", "epochs", "images/s"]
    rows = []
    for name, part in frame.groupby("label", sort=False):
        texts = ["n/a" if math.isnan(v) else f"{v:.3f}" for v in (part[column].mean() for column in columns)]
        epochs = sorted(set(part["epochs"]))
        span = str(epochs[0]) if len(epochs) == 1 else f"{epochs[0]}-{epochs[-1]}"
        speed = part["images_per_second"].mean()
        rows.append([str(name), str(len(part)), *texts, span, "" if math.isnan(speed) else f"{speed:,.0f}"])
    return header, rows


def _tests(comparisons: Sequence[Comparison]) -> tuple[list[list[str]], int]:
    """Rows of the table of differences, and how many comparisons had too few pairs."""
    rows = []
    for c in comparisons:
        if c.p is not None and c.p_holm is not None:
            pairs = f"{c.pairs} ({c.ties} ties)" if c.ties else str(c.pairs)
            rows.append([c.first, c.second, pairs, _signed(c.difference), _p_text(c.p), _p_text(c.p_holm)])
    return rows, len(comparisons) - len(rows)


class _Extra(NamedTuple):
    """A further table of a section: what it shows, its header and its rows, the first cell of each a method."""

    title: str
    note: str
    header: list[str]
    rows: list[list[str]]


def _extras(frame: pd.DataFrame) -> list[_Extra]:
    """Tables that only some runs have something for: kinds of anomaly, images set aside, what batch norm leaks."""
    makers = {
        "auroc_seen": _kinds,
        "set_aside": _sets_aside,
        "oracle_sorted_auroc": _leaks,
    }
    short, common = _short(frame)
    found = []
    for column, make in makers.items():
        part = short[short[column].notna() & (short[column] != "")]
        if len(part):
            extra = make(part)
            found.append(extra._replace(note=f"{extra.note} All with {', '.join(common)}.") if common else extra)
    return found


def _kinds(frame: pd.DataFrame) -> _Extra:
    header = ["method", "class", "seed", "AUROC", "seen", "unseen", "bal. acc. seen", "unseen", "epochs"]
    rows: list[list[str]] = []
    for run in frame.itertuples():
        values = [run.auroc, run.auroc_seen, run.auroc_unseen, run.balanced_accuracy_seen, run.balanced_accuracy_unseen]
        texts = ["n/a" if math.isnan(value) else f"{value:.3f}" for value in values]
        rows.append([run.label, run.class_name, str(run.seed), *texts, str(run.epochs)])
        figures = [
            _published_kind(run.published_as, run.dataset, run.split, run.problem, kind) for kind in ("seen", "unseen")
        ]
        if any(figures):
            size = ", full size" if run.model.endswith("_small") else ""
            status = ", ".join(sorted({figure.status for figure in figures if figure}))
            texts = [f"{figure.value:.2f}" if figure else "" for figure in figures]
            rows.append([f"published ({status}{size})", "", "", "", "", "", *texts, ""])
    note = (
        "The anomalies apart: those of the kinds that contaminate the training set (seen; named at rate 0 as well) and "
        "the others (unseen), each against all test normals."
    )
    return _Extra("Kinds of anomaly", note, header, rows)


def _published_kind(method: str, dataset: str, split: str, problem: str, kind: str) -> Published | None:
    """The published balanced accuracy of a method on contaminated data, tested on one kind of anomaly."""
    for row in _published_rows():
        where = (row["model"], row["dataset"], row["split"], row["metric"], row["setting"])
        if where == (method, dataset, split, "balanced_accuracy", f"{problem} {kind}"):
            return Published(float(row["value"]), row["status"], row["setting"], row["source"])
    return None


def _sets_aside(frame: pd.DataFrame) -> _Extra:
    rows = []
    for run in frame.itertuples():
        for entry in json.loads(run.set_aside):
            shares = ["n/a" if entry[name] is None else f"{entry[name]:.3f}" for name in ("precision", "recall")]
            rows.append([run.label, run.class_name, str(run.seed), entry["name"], str(entry["images"]), *shares])
    note = (
        "Training images that a method took for anomalies, with the share of true ones among them (precision) and the "
        "share of the true ones that it found (recall); no method sees either."
    )
    return _Extra("Images set aside", note, ["method", "class", "seed", "set", "images", "precision", "recall"], rows)


def _leaks(frame: pd.DataFrame) -> _Extra:
    rows = []
    for run in frame.itertuples():
        mixed, by_truth = run.oracle_shuffled_auroc, run.oracle_sorted_auroc
        texts = [f"{value:.3f}" for value in (run.auroc, mixed, by_truth)]
        rows.append([run.label, run.class_name, str(run.seed), *texts, _signed(by_truth - run.auroc)])
    note = (
        "What batch norm in training mode would have given: the honest AUROC, that of scores taken in mixed batches "
        "normalised by their own statistics, and that of batches of a test set sorted by truth, where these statistics "
        "know the label. The last two are no results."
    )
    return _Extra(
        "Batch norm in training mode",
        note,
        ["method", "class", "seed", "AUROC", "mixed", "sorted", "sorted - honest"],
        rows,
    )


_TESTS_HEADER = ["method", "against", "pairs", "mean difference", "p", "p (Holm)"]
_TESTS_NOTE = (
    "Wilcoxon signed-rank tests, two-sided, paired over (class, seed), "
    "with Holm's correction over all the tests of this table."
)
_SUMMARY_NOTE = "Other metrics, each the mean over the runs; thresholds are from held-out normals alone."


def _too_few(count: int) -> str:
    text = "1 comparison has" if count == 1 else f"{count} comparisons have"
    return f"{text} too few pairs (fewer than {MINIMUM_PAIRS} that differ) for a test."


def _p_text(p: float) -> str:
    return f"{p:.3f}" if p >= 0.001 else f"{p:.1e}"


def markdown(parts: Sequence[Section], *, oracle: bool = False, folder: str = "") -> str:
    """Tables, tests of difference and links to the figures in `folder` (none without it)."""
    return "\n".join(_markdown_section(section, oracle, folder) for section in parts)


def _markdown_section(section: Section, oracle: bool, folder: str) -> str:
    shown = section.table
    rows = []
    for line in _lines(shown, oracle):
        name = f"`{line.label}`" if line.kind == "method" else f"*{line.label}*"
        rows.append([name, *(f"*{cell}*" if cell and line.kind != "method" else cell for cell in line.cells)])
    out = [f"## {section.title}", "", _caption(section), "", *_markdown_table(_header(shown), rows), ""]
    if folder:
        for name in section.figures:
            out += [f"![{_figure_text(section, name)}]({folder}/{name})", ""]
    if len(section.frame):
        header, summary = _summary(section.frame)
        out += [
            _SUMMARY_NOTE,
            "",
            *_markdown_table(header, [[f"`{row[0]}`", *row[1:]] for row in summary]),
            "",
        ]
    for extra in _extras(section.frame):
        named = [[row[0] if row[0].startswith("published") else f"`{row[0]}`", *row[1:]] for row in extra.rows]
        block = [extra.note, "", *_markdown_table(extra.header, named)]
        out += [*_folded(extra.title, block, len(named) > 24), ""]
    tests, few = _tests(section.comparisons)
    if tests:
        body = _markdown_table(_TESTS_HEADER, [[f"`{row[0]}`", f"`{row[1]}`", *row[2:]] for row in tests])
        out += [*_folded("Tests of difference", [_TESTS_NOTE, "", *body], len(tests) > 12), ""]
    if few:
        out += [_too_few(few), ""]
    return "\n".join(out)


def _folded(title: str, block: list[str], long: bool) -> list[str]:
    return [f"<details><summary>{title}</summary>", "", *block, "", "</details>"] if long else block


def _figure_text(section: Section, name: str) -> str:
    kind = name.removeprefix(section.slug + "-").removesuffix(".png")
    words = {
        "classes": "AUROC by method and class",
        "spread": "AUROC of every run by method",
        "epochs": "Test AUROC after every epoch, which no training looked at",
    }
    return f"{words.get(kind, f'AUROC against {kind}')}, {section.title}"


def _markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    cells = [[re.sub(r"([|<])", r"\\\1", text) for text in row] for row in [header, *rows]]
    align = ["---", *["---:"] * (len(header) - 1)]
    return ["| " + " | ".join(row) + " |" for row in [cells[0], align, *cells[1:]]]


_LATEX = {
    "\\": r"\textbackslash{}",
    **{character: f"\\{character}" for character in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "−": "$-$",
    "–": "--",
    "·": r"$\cdot$",
}


def _latex_text(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in text)


def latex(parts: Sequence[Section], *, oracle: bool = False) -> str:
    r"""A `table` environment for every section; needs `\usepackage{booktabs,graphicx}`."""
    out = [r"% needs \usepackage{booktabs,graphicx}"]
    for section in parts:
        header = _header(section.table)
        wide = len(header) > 9
        out += [
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{_latex_text(f'{section.title}. {_caption(section)}')}}}",
        ]
        out += [rf"\label{{tab:{section.slug}}}", *([r"\resizebox{\linewidth}{!}{%"] if wide else [])]
        out += [rf"\begin{{tabular}}{{l{'r' * (len(header) - 1)}}}", r"\toprule"]
        out += [" & ".join(map(_latex_text, header)) + r" \\", r"\midrule"]
        for line in _lines(section.table, oracle):
            if line.kind == "block":
                out += [r"\midrule", rf"\multicolumn{{{len(header)}}}{{l}}{{{_latex_text(line.label)}}} \\"]
                continue
            name = _latex_text(line.label)
            name = name if line.kind == "method" else rf"\quad\emph{{{name}}}"
            out.append(" & ".join([name, *map(_latex_text, line.cells)]) + r" \\")
        out += [r"\bottomrule", r"\end{tabular}" + ("}" if wide else ""), r"\end{table}", ""]
    return "\n".join(out)


def _tables_csv(parts: Sequence[Section]) -> str:
    """The tables as a CSV, a row a cell."""
    rows = [
        {
            "dataset": section.table.dataset,
            "split": section.table.split,
            "method": row.label,
            "pretrained": row.pretrained,
            "class": key,
            "class_name": section.table.classes[key] if isinstance(key, int) else key,
            "mean": cell.mean,
            "sd": cell.sd,
            "runs": cell.present,
            "expected": cell.expected,
            "flag": cell.flag,
            "published": cell.published and cell.published.value,
            "status": cell.published and cell.published.status,
            "setting": cell.published and cell.published.setting,
            "published_as": row.published_as,
            "difference": cell.difference,
            "oracle": cell.oracle,
            "gap": cell.gap,
        }
        for section in parts
        for row in section.table.rows
        for key, cell in row.cells.items()
    ]
    return _csv_text(list(rows[0]), [[*row.values()] for row in rows])


def _tests_csv(parts: Sequence[Section]) -> str:
    rows = [[s.table.dataset, s.table.split, *comparison] for s in parts for comparison in s.comparisons]
    return _csv_text(["dataset", "split", *Comparison._fields], rows)


def html(
    parts: Sequence[Section],
    frame: pd.DataFrame,
    pictures: Mapping[str, bytes],
    *,
    oracle: bool = False,
    notices: Sequence[str] = (),
) -> str:
    """One page that needs nothing else: styles and figures are in it, light or dark as the system asks.

    `pictures` are the sections' figures as PNG, by file name; `notices` are lines to read first.
    """
    import jinja2

    shown = []
    for section in parts:
        images = [(_figure_text(section, name), base64.b64encode(pictures[name]).decode()) for name in section.figures]
        tests, few = _tests(section.comparisons)
        shown.append(
            {
                "title": section.title,
                "slug": section.slug,
                "caption": _caption(section),
                "header": _header(section.table),
                "lines": list(_lines(section.table, oracle)),
                "images": images,
                "summary": _summary(section.frame) if len(section.frame) else ([], []),
                "extras": _extras(section.frame),
                "tests": tests,
                "too_few": _too_few(few) if few else "",
            }
        )
    columns = [
        *("model", "changed", "dataset", "split", "class_name", "seed", "auroc", "auroc_low", "auroc_high"),
        *("epochs", "seconds", "git_sha", "path"),
    ]
    source = resources.files("anomaly_lab").joinpath("templates/report.html.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    return environment.from_string(source).render(
        title="Results",
        notices=list(notices),
        provenance=_provenance(frame),
        sections=shown,
        tests_header=_TESTS_HEADER,
        tests_note=_TESTS_NOTE,
        summary_note=_SUMMARY_NOTE,
        run_header=columns,
        runs=[[_csv_cell(v) for v in row] for row in frame[columns].itertuples(index=False, name=None)],
    )


def _provenance(frame: pd.DataFrame) -> str:
    if not len(frame):
        return "No finished runs."
    shas = ", ".join(sorted({sha or "unknown" for sha in frame["git_sha"]}))
    devices = ", ".join(sorted({device or "unknown" for device in frame["device"]}))
    hours = frame["seconds"].sum() / 3600
    text = f"{len(frame)} run{'s' if len(frame) > 1 else ''}, {hours:.1f} hours in all, on {devices}; code {shas}"
    resumed = [sha for shas in frame["earlier_code"] for sha in shas.split()]
    if resumed:
        number = int((frame["earlier_code"] != "").sum())
        text += f"; {number} of them begun by other code ({', '.join(sorted(set(resumed)))})"
    dirty = int(frame["dirty"].sum())
    return text + (f"; {dirty} of them from a tree with uncommitted changes." if dirty else ".")


def experiment_readme(frame: pd.DataFrame, notes: str, command: str) -> str:
    """The README of a committed experiment, from the frame of its `results.csv`, its notes, the command."""
    out = [
        "<!-- Written by anomaly-lab-report from results.csv and notes.md: edit notes.md, not this file. -->",
        notes.strip(),
        "",
        "## The command",
        "",
        "```sh",
        command.strip(),
        "```",
        "",
        f"{_provenance(frame)} Every number below is made from [results.csv](results.csv), a row a run.",
        "",
        markdown(sections(frame), oracle=bool(frame["oracle_auroc"].notna().any()), folder="figures"),
    ]
    return "\n".join(out).rstrip() + "\n"


def run_folders(runs: Path) -> Iterator[Path]:
    """The folders of runs under ``runs``: by what lies in them, or while still empty by their name, n8/s0 or a8/s0."""
    marks = {"result.json", "failure.json", "last.ckpt", ".lock", slurm.JOB_FILE}
    for folder, inner, files in os.walk(runs):
        inner.sort()
        path = Path(folder)
        if path == runs:
            continue
        named = re.fullmatch(r"s\d+(-[0-9a-f]{8})?", path.name) and re.fullmatch(r"[na]\d+", path.parent.name)
        if named or not marks.isdisjoint(files):
            inner.clear()
            yield path


natural, read_run = _natural, _row


# ----------------------------------------------------------------------------------------- the command


def main(argv: Sequence[str] | None = None, expected_runs: Callable[[str], Expected] | None = None) -> int:
    """`anomaly-lab-report`. `expected_runs` gives the grid of an experiment; by default that of its yaml."""
    parser = argparse.ArgumentParser(
        prog="anomaly-lab-report",
        description="Tables, tests of difference and figures from finished runs, "
        "as Markdown, CSV, LaTeX and one HTML page.",
    )
    parser.add_argument(
        "runs", nargs="?", default="runs", type=Path, metavar="RUNS", help="folder of runs (default: runs)"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="where to write (default: RUNS/report)")
    parser.add_argument(
        "--experiment",
        metavar="NAME",
        help="only the runs of conf/experiment/NAME.yaml; writes results.csv, figures and README.md "
        "(default for --out: experiments/NAME); what you write into notes.md there opens the README",
    )
    parser.add_argument(
        "--oracle",
        action="store_true",
        help="also show oracle_auroc, which looks at the test labels (an experiment's README always does)",
    )
    parser.add_argument(
        "--status", action="store_true", help="list running, queued, failed, interrupted and missing runs"
    )
    parser.add_argument(
        "--prune",
        action="store_true",
        help="instead of a report: reduce the last.ckpt of finished runs to what scores new images",
    )
    parser.add_argument(
        "--dashboard",
        metavar="ENTITY/PROJECT",
        help="instead of a report: lay out a workspace for the runs that logger=wandb has sent there",
    )
    arguments = parser.parse_args(argv)
    try:
        if arguments.dashboard:
            return _dashboard(arguments.dashboard)
        return _prune(arguments.runs) if arguments.prune else _report(arguments, expected_runs)
    except (ValueError, OSError) as error:
        print(f"anomaly-lab-report: error: {error}", file=sys.stderr)
        return 2


def _dashboard(place: str) -> int:
    from anomaly_lab.tracking import workspace  # Lightning and wandb: seconds

    entity, slash, project = place.partition("/")
    if not (entity and slash and project) or "/" in project:
        raise ValueError(f"--dashboard {place}: give ENTITY/PROJECT, as in the address of the project's page")
    made = workspace(entity, project)
    try:
        made.save()
    except Exception as error:  # no key, no project, no network: wandb's errors have no common base
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"the dashboard could not be saved ({type(error).__name__}: {reason}): see wandb login"
        ) from error
    print(f"written: {made.url}")
    return 0


def _prune(runs: Path) -> int:
    from anomaly_lab import status
    from anomaly_lab.run import prune  # torch and Lightning: seconds

    folders = [runs / state.path for state in status.under(runs) if state.state == "done"]
    freed = [prune(folder) for folder in folders]
    pruned = sum(amount > 0 for amount in freed)
    print(f"pruned {pruned} of {len(folders)} finished runs: {sum(freed) / 1e6:.1f} MB less")
    return 0


def _grid(experiment: str) -> Expected:
    from hydra.errors import HydraException  # late, so that --help is quick

    from anomaly_lab.config import expected_runs

    try:
        return expected_runs(experiment)
    except HydraException as error:  # an unknown name, with the known ones, over many lines
        text = str(error).partition("Config search path")[0]
        raise ValueError(" ".join(text.split())) from None


def _report(arguments: argparse.Namespace, expected_runs: Callable[[str], Expected] | None) -> int:
    from anomaly_lab import status  # which reads results with this module

    name: str | None = arguments.experiment
    expected: Expected | None = None
    if name is not None:
        try:
            expected = (expected_runs or _grid)(name)
        except ValueError as error:
            # Class names are looked up in the data set, which a machine that only reports need not have.
            if arguments.status or not _recorded_under(arguments.runs, name):
                raise
            print(f"only runs recorded under the name {name}, for its grid is not known here: {error}", file=sys.stderr)
    if arguments.status:
        print(status.text(status.under(arguments.runs, expected)))
        return 0
    frame = read(arguments.runs)
    notices: list[str] = frame.attrs["damaged"]
    notices += [f"{s.path} failed: {s.detail}" for s in status.under(arguments.runs, expected) if s.state == "failed"]
    for line in notices:
        print(line, file=sys.stderr)
    if name is not None:
        # Those of the grid, whoever made them, and those made under its name with further seeds or settings.
        grid = {job.path for job in expected or ()}
        frame = _selection(frame, frame["path"].isin(grid) | (frame["experiment"] == name))
    if not len(frame):
        what = f"run of experiment {name}" if name else "run"
        raise ValueError(f"no finished {what} under {arguments.runs}: see anomaly-lab-report {arguments.runs} --status")
    refuse_mixtures(frame)
    if name is not None:
        out = arguments.out or Path("experiments", name)
        _write_experiment(frame, read_epochs(arguments.runs, frame), name, out)
        print(markdown(sections(frame, expected), oracle=arguments.oracle))
        missing = "" if expected is None else f"; {len(grid - set(frame['path']))} of the grid are missing"
        print(f"written: {out / 'README.md'} from {len(frame)} runs{missing}")
        return 0
    out = arguments.out or arguments.runs / "report"
    parts = sections(frame, epochs=read_epochs(arguments.runs, frame))
    _write_report(frame, parts, out, arguments.oracle, notices)
    print(markdown(parts, oracle=arguments.oracle))
    print(f"written: {out / 'report.html'} (one file, opens anywhere), beside it report.md, report.tex, CSVs")
    return 0


def _recorded_under(runs: Path, name: str) -> bool:
    return runs.is_dir() and bool((read(runs)["experiment"] == name).any())


def _selection(frame: pd.DataFrame, chosen: pd.Series[bool]) -> pd.DataFrame:
    """Some of the runs, without the parameters in which only others differ."""
    frame = frame[chosen].reset_index(drop=True)
    used = {item.split("=", 1)[0] for changed in frame["changed"] for item in changed.split()}
    return frame.drop(columns=[key for key in _parameters(frame) if key not in used])


def _write_experiment(frame: pd.DataFrame, epochs: pd.DataFrame, name: str, out: Path) -> None:
    from anomaly_lab import figures

    write_csv(frame, out / "results.csv")
    # From here on only what was written counts: the README must be the one that anybody makes from it.
    frame = read_csv(out / "results.csv")
    if len(epochs):
        rows = epochs.itertuples(index=False, name=None)
        _write(out / "epochs.csv", _csv_text(list(epochs.columns), rows))
    for section in sections(frame, epochs=epochs):
        for file, draw in section.figures.items():
            figures.save(draw(), out / "figures" / file)
    notes = out / "notes.md"
    if not notes.exists():
        print(f"write {notes}: what was expected, what came out, and why", file=sys.stderr)
    text = notes.read_text(encoding="utf-8") if notes.exists() else f"# {name}\n"
    _write(out / "README.md", experiment_readme(frame, text, experiment_command(name)))


def experiment_command(name: str) -> str:
    """The two commands that make an experiment's runs and its page."""
    return f"anomaly-lab -m experiment={name}\nanomaly-lab-report runs --experiment {name} --out experiments/{name}"


def _write_report(
    frame: pd.DataFrame, parts: Sequence[Section], out: Path, oracle: bool, notices: Sequence[str]
) -> None:
    from anomaly_lab import figures

    pictures = {}
    for section in parts:
        for file, draw in section.figures.items():
            pictures[file] = figures.save(draw(), out / "figures" / file, dpi=110).read_bytes()
    head = "\n".join(["# Results", "", *(f"> {line}\n" for line in notices), _provenance(frame), "", ""])
    _write(out / "report.md", head + markdown(parts, oracle=oracle, folder="figures"))
    _write(out / "report.tex", latex(parts, oracle=oracle))
    _write(out / "report.html", html(parts, frame, pictures, oracle=oracle, notices=notices))
    write_csv(frame, out / "results.csv")
    _write(out / "tables.csv", _tables_csv(parts))
    _write(out / "significance.csv", _tests_csv(parts))
