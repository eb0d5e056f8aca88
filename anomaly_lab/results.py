"""Finished runs as a frame, a row a run, and the figures that papers publish.

    runs/**/result.json --read--> frame --write_csv--> results.csv --read_csv--> frame

`COLUMNS` says what a row holds and where a result.json has it; reading, writing and showing a row follow from it. A new
metric is computed by the run and gets one line there.

A run is compared with another one, and with a published figure, only where both saw the same problem: keys under
`split.` or `dataset.` that a run changed (contamination, fewer images) are part of what it is compared under.
"""

from __future__ import annotations

import csv
import functools
import hashlib
import io
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from anomaly_lab import record
from anomaly_lab.files import FORMULAS, cell, write_text

if TYPE_CHECKING:
    import pandas as pd

    from anomaly_lab.config import Job

# ------------------------------------------------------------------------------------------------- columns

Result = Mapping[str, Any]
"""The content of a result.json, with the run's folder under "path"."""


class Column(NamedTuple):
    name: str
    kind: Any  # str, int, float, bool; int | str for a class, or several; object for the value of a configuration's key
    of: Callable[[Result], Any]  # the value in a result.json
    heading: str = ""  # of its means in a report; a column without one is not shown there
    optional: bool = False  # a result.json or results.csv may lack it: an empty text, or None


def _key(path: str) -> Callable[[Result], Any]:
    """The value under a dotted key; KeyError where there is none."""

    def value(result: Result) -> Any:
        found: Any = result
        for part in path.split("."):
            if not isinstance(found, Mapping) or part not in found:
                raise KeyError(path)
            found = found[part]
        return found

    return value


def _metric(name: str, heading: str = "") -> Column:
    return Column(name, float, _key(f"metrics.{name}"), heading, optional=True)


def _of_kind(metric: str, kind: str) -> Column:
    """A metric on one kind of anomaly: those that contaminate the training set (seen), or the others (unseen)."""
    return Column(f"{metric}_{kind}", float, _key(f"by_kind.{kind}.{metric}"), optional=True)


def _method_and_size(result: Result) -> tuple[str, str]:
    """A run's method by its plain name, and its size: ("ganomaly", "small").

    In results of earlier code, configurations have no `size`, and a method's small size is a model, `ganomaly_small`.
    """
    config = result.get("config") or {}
    if "size" in config:
        return config["choices"]["model"], config["size"]
    model = str(result["identity"]["model"])
    method = model.removesuffix("_small")
    return method, "full" if method == model else "small"


def _rejected_images(result: Result) -> str:
    """The sets of rejected training images as JSON; earlier code called them ``set_aside``."""
    return csv_cell(result.get("rejected_images") or result.get("set_aside") or None)


def _by_kind(result: Result) -> str:
    """The AUROC against each class of anomalies as JSON, four digits."""
    kinds = _key("by_kind.auroc")(result)
    return csv_cell({name: round(value, 4) for name, value in kinds.items()} or None)


def _fitted(result: Result) -> str:
    """Numbers that fitting found, six digits, and the shapes of arrays, as JSON."""
    found = _key("fitted")(result)
    return csv_cell({name: float(csv_cell(v)) if isinstance(v, float) else v for name, v in found.items()} or None)


def _published_as(result: Result) -> str:
    """The method of published.csv that a run is compared with: what its model's yaml names, else its own."""
    model = (result.get("config") or {}).get("model") or {}
    return model.get("published") or _method_and_size(result)[0]


def _all_code(result: Result) -> list[Mapping[str, Any]]:
    """The commit that finished a run, then what trained its first epochs where that was another one."""
    return [result.get("git") or {}, *(result.get("earlier_code") or [])]


def _commits(codes: Iterable[Mapping[str, Any]]) -> str:
    return " ".join(dict.fromkeys((code.get("sha") or "unknown")[:12] for code in codes))


def _digest(settings: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


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


COLUMNS = (
    Column("model", str, _key("identity.model")),
    Column("dataset", str, _key("identity.dataset")),
    Column("split", str, _key("identity.split")),
    Column("normal_class", int | str, _key("identity.normal_class")),
    Column("seed", int, _key("identity.seed")),
    Column("auroc", float, _key("metrics.auroc")),
    _metric("average_precision", "AP"),
    _metric("fpr95", "FPR95"),
    _metric("balanced_accuracy", "bal. acc."),
    _metric("oracle_auroc"),
    Column("epochs", int, _key("epochs")),
    Column("images_per_second", float, _key("images_per_second"), optional=True),
    Column("git_sha", str, lambda result: _commits(code for code in _all_code(result)[:1] if code.get("sha"))),
    Column("dirty", bool, lambda result: any(code.get("dirty") for code in _all_code(result))),
    Column("changed", str, lambda result: _compact(result["identity"]["changed"])),
    Column("class_name", str, _key("class_name")),
    Column("role", str, lambda result: result.get("role") or "normal"),
    _metric("auroc_low"),
    _metric("auroc_high"),
    _metric("f1", "F1"),
    _metric("precision", "precision"),
    _metric("recall", "recall"),
    _metric("val_score"),
    Column("seconds", float, lambda result: sum(s for s in (result.get("seconds") or {}).values() if s is not None)),
    Column("fingerprint", str, _key("partition.fingerprint")),
    Column("device", str, _key("device"), optional=True),
    Column("experiment", str, _key("experiment"), optional=True),
    Column("pretrained", str, _key("config.model.pretrained"), optional=True),  # features that the model uses
    Column("published_as", str, _published_as),
    # Trained with the labels of anomalies: a ceiling, not a detector.
    Column("labels", bool, lambda result: bool(result["config"]["model"].get("labels")), optional=True),
    Column("path", str, _key("path")),
    # Checksums: of the data set, and of everything that can change the result.
    Column("images", str, lambda result: _key("settings.images")(result)[:12], optional=True),
    Column("settings", str, lambda result: _digest(result["settings"]), optional=True),
    _of_kind("auroc", "seen"),
    _of_kind("auroc", "unseen"),
    _of_kind("balanced_accuracy", "seen"),
    _of_kind("balanced_accuracy", "unseen"),
    _metric("oracle_shuffled_auroc"),
    _metric("oracle_sorted_auroc"),
    _metric("oracle_sorted_best_auroc"),
    Column("rejected_images", str, _rejected_images, optional=True),
    Column("earlier_code", str, lambda result: _commits(_all_code(result)[1:]), optional=True),
    Column("method", str, lambda result: _method_and_size(result)[0]),
    Column("size", str, lambda result: _method_and_size(result)[1]),
    # How many one-class problems the protocol has; None in results of code that did not record it.
    Column("classes", float, _key("classes"), optional=True),
    # Whether it learned: `anomaly_lab.measure.learned`.
    Column("explained_variance", float, _key("learned.explained_variance"), optional=True),
    Column("distinct_scores", float, _key("learned.distinct_scores"), optional=True),
    Column("parameter_change", float, _key("learned.parameter_change"), optional=True),
    Column("test_copies", float, _key("partition.test_copies"), optional=True),
    Column("by_term", str, lambda result: csv_cell(result.get("by_term") or None), optional=True),
    Column("by_kind", str, _by_kind, optional=True),
    # What calls an image anomalous: the method's "own rule", or "held-out normals", their threshold.
    Column("decided_by", str, _key("decided_by"), optional=True),
    # What fitting found beside networks, such as a bandwidth chosen by likelihood: numbers, and the shapes of arrays.
    Column("fitted", str, _fitted, optional=True),
)
"""What results.csv holds, in this order. Columns with a dot in their name follow: parameters in which runs differ."""

_PLANNED = (
    *("model", "dataset", "split", "normal_class", "seed", "changed"),
    *("method", "size", "published_as", "pretrained", "labels"),
)


def _number(value: Any) -> float | None:
    if value is not None and not math.isfinite(float(value)):
        raise ValueError(f"a metric is {value}")
    return None if value is None else float(value)


def _class(value: int | str) -> int | str:
    return int(value) if str(value).isdecimal() else str(value)


def class_order(one: int | str) -> tuple[bool, Any]:
    """Sort key of classes: single ones by their index, then several."""
    return isinstance(one, str), natural(str(one))


_TYPED: dict[Any, Callable[[Any], Any]] = {
    str: lambda value: "" if value is None else str(value),
    float: _number,
    int: int,
    int | str: _class,
    bool: bool,
    object: lambda value: value,
}


def _values(columns: Iterable[Column], result: Result) -> dict[str, Any]:
    """A row. KeyError, TypeError or ValueError where the result is damaged."""
    row: dict[str, Any] = {}
    for column in columns:
        try:
            value = column.of(result)
        except KeyError:
            if not column.optional:
                raise
            value = None
        row[column.name] = _TYPED[column.kind](value)
    return row


def named(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row with what is derived from it: `label` and `problem`."""
    problem = " ".join(item for item in row["changed"].split() if item.startswith(("split.", "dataset.")))
    shown = label(row["model"], row["changed"])
    if isinstance(row["normal_class"], str):  # a mean over single classes and pairs of them would mean nothing
        several = "classes=" + (
            row["normal_class"] if "+" not in row["normal_class"] else str(row["normal_class"].count("+") + 1)
        )
        problem, shown = f"{problem} {several}".strip(), label(row["model"], f"{row['changed']} {several}")
    return {**row, "label": shown, "problem": problem}


def named_by(identity: Mapping[str, Any]) -> dict[str, Any]:
    """What a row says of a run's identity."""
    return {**identity, "changed": _compact(identity["changed"])}


def label(model: str, changed: str) -> str:
    """The name of a table's row: the model and what was changed, `autoencoder [model.detector.latent_size=8]`."""
    return f"{model} [{', '.join(changed.split())}]" if changed else model


def planned(job: Job) -> dict[str, Any]:
    """What the row of a run will say that follows from its configuration alone, `label` and `problem` included."""
    columns = [column for column in COLUMNS if column.name in _PLANNED]
    return named(_values(columns, {"identity": job.identity, "config": job.cfg}))


# ------------------------------------------------------------------------------------------------- reading


def read(runs: str | Path, *, verify: bool = False) -> pd.DataFrame:
    """Every finished run under `runs`, a row a run, sorted; with `verify` only those whose scores say the same.

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
    for file in sorted(runs.glob("*/**/result.json")):
        try:
            row, config = read_run(file.parent, file.parent.relative_to(runs).as_posix(), verify=verify)
        except ValueError as error:
            damaged.append(str(error))
        else:
            rows.append(row)
            configs.append(config)
    keys = sorted({item.split("=", 1)[0] for row in rows for item in row["changed"].split()})
    changed = [Column(key, object, _key(key), optional=True) for key in keys]
    for row, config in zip(rows, configs, strict=True):
        row.update(_values(changed, config))
    frame = _frame(rows, keys)
    frame.attrs["damaged"] = damaged
    return frame


def read_run(folder: Path, path: str, *, verify: bool = False) -> tuple[dict[str, Any], Mapping[str, Any]]:
    """The row of the finished run in `folder`, which the row calls `path`, and its configuration.

    Raises:
        ValueError: result.json is damaged, or of another run; it is named. With `verify` also where its scores say
            something else.
    """
    result = record.read(folder)
    record.refuse_misplaced(result, folder)
    if verify:
        record.recompute(result, folder)
    try:
        row = _values(COLUMNS, result | {"path": path})
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{folder / 'result.json'} is damaged ({reason}): delete it and run again") from None
    return row, result["config"] if isinstance(result.get("config"), dict) else {}


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
    """Write the frame of `read` as results.csv: sorted, six significant digits, the same bytes for the same runs."""
    columns = [*(column.name for column in COLUMNS), *parameters(frame)]
    write_rows(path, columns, frame[columns].itertuples(index=False, name=None))


def read_csv(path: str | Path) -> pd.DataFrame:
    """The frame that `write_csv` wrote, to six digits.

    Raises:
        ValueError: the file is not such a table.
    """
    with open(path, newline="", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    missing = [column.name for column in COLUMNS if table and not column.optional and column.name not in table[0]]
    if missing:
        raise ValueError(f"{path} has no column {missing[0]}: write it again with anomaly-lab-report --experiment")
    changed = [name for name in (table[0] if table else ()) if "." in name]
    rows: list[dict[str, Any]] = []
    for line in table:
        row: dict[str, Any] = {}
        for name, kind, *_ in COLUMNS:
            text = line.get(name, "")
            if kind is bool:
                row[name] = text == "true"
            elif kind is str:
                row[name] = text[1:] if text[:1] == "'" and text[1:].startswith(FORMULAS) else text
            else:
                row[name] = _TYPED[kind](text) if text else None
        row.update({name: _parsed(line[name]) for name in changed})
        rows.append(row)
    return _frame(rows, changed)


def read_pages(folder: Path) -> dict[str, pd.DataFrame]:
    """The frame of every experiment's ``results.csv`` below ``folder``, by the name of its folder, sorted."""
    return {path.parent.name: read_csv(path) for path in sorted(folder.glob("*/results.csv"))}


def from_rows(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """The frame of rows by the names of its columns, such as `rows_of` gives; what a row lacks is an empty text in a
    column of texts, as `read_csv` has it, and None in others."""
    keys = sorted({key for row in rows for key in row if "." in key})
    empty: dict[str, Any] = {column.name: "" if column.kind is str else None for column in COLUMNS}
    lacking = empty | dict.fromkeys(keys)
    return _frame([lacking | {name: row[name] for name in lacking if row.get(name) is not None} for row in rows], keys)


def fault(row: Mapping[str, Any]) -> str:
    """What in a row by its columns' names, such as `rows_of` gives, no run writes; empty where there is nothing."""
    for name, kind, _, _, optional in COLUMNS:
        value = row.get(name)
        if value is None:
            # A metric that does not apply is None; other columns are there, unless earlier code did not have them.
            if (kind is float and name != "auroc") or (optional and name not in row):
                continue
            return f"{name} is missing"
        if kind is bool or isinstance(value, bool):
            fits = kind is bool and isinstance(value, bool)
        elif isinstance(value, str):
            fits = kind is str or kind == int | str
        else:
            fits = kind is not str and isinstance(value, int | float if kind is float else int)
            fits = fits and abs(value) < 2**63 and (name not in record.SHARES or 0 <= value <= 1)
        if not fits:
            return f"{name} is {value!r:.40}"
    return ""


def rows_of(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows of a frame as plain values, None for what is not a number."""
    columns = [*(column.name for column in COLUMNS), *parameters(frame)]
    plain = [[value.item() if hasattr(value, "item") else value for value in frame[name]] for name in columns]
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*plain, strict=True)]
    return [{name: None if value != value else value for name, value in row.items()} for row in rows]


def _frame(rows: Iterable[dict[str, Any]], changed: Sequence[str]) -> pd.DataFrame:
    import pandas as pd

    rows = sorted(
        map(named, rows),
        key=lambda row: [
            *(natural(row[key]) for key in ("dataset", "split", "model", "changed")),
            class_order(row["normal_class"]),
            row["seed"],
            row["path"],
        ],
    )
    columns = {}
    for name, kind in [
        *((column.name, column.kind) for column in COLUMNS),
        *((key, object) for key in changed),
        ("label", str),
        ("problem", str),
    ]:
        # Texts stay plain Python objects: an empty one must not become "not a number".
        # The column of classes is one of numbers unless a run has several.
        values = [row[name] for row in rows]
        plain = int if kind == int | str and all(isinstance(value, int) for value in values) else kind
        columns[name] = pd.Series(values, dtype=object if plain in (str, int | str) else plain)
    return pd.DataFrame(columns)


def parameters(frame: pd.DataFrame) -> list[str]:
    """The columns of `frame` that are keys of a configuration."""
    return [column for column in frame.columns if "." in column]


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


def union(frames: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """The runs of all frames, each once, in their order; the column ``sources`` has the names of those that hold it.

    Results of several devices differ, as `measure.processor` says, and none of them is wrong: that of the first frame
    counts, and the others are not its sources. Results of one device are equal to six digits.

    Args:
        frames: of `read`, `read_csv` or `submission.frame`, by name. Of equal results the row that says most is kept.

    Raises:
        ValueError: one run has two results of one device, or runs that share a name were made of other images or
            settings.
    """
    import pandas as pd

    plain = [column.name for column in COLUMNS] + ["label", "problem"]  # frames differ in their parameters
    runs = pd.concat([frame[plain].assign(source=name) for name, frame in frames.items()], ignore_index=True)
    key = ["dataset", "split", "label", "normal_class", "seed"]
    for (*_, label, _, _, _), same in runs[runs.duplicated(key, keep=False)].groupby([*key, "device"]):
        if same["auroc"].map(csv_cell).nunique() > 1:  # a results.csv has six digits, a submission all
            raise ValueError(f"{label} has two results in {' and '.join(same['source'])}: make the older one again")
    runs = runs[runs["device"] == runs.groupby(key)["device"].transform("first")]
    runs["sources"] = runs.groupby(key)["source"].transform(lambda names: [tuple(names)] * len(names))
    known = (runs.notna() & (runs != "")).sum(axis=1)
    fullest = runs.assign(known=known).sort_values("known", ascending=False, kind="stable")
    runs = fullest.drop_duplicates(key).drop(columns=["known", "source"]).sort_index()
    refuse_mixtures(runs)
    return runs


def natural(text: str) -> list[tuple[int, float, str]]:
    """Sort key under which 8 stands before 64, in any text."""
    parts = re.split(r"(\d+(?:\.\d+)?)", text)
    return [(0, float(part), "") if i % 2 else (1, 0.0, part) for i, part in enumerate(parts)]


def write_rows(path: str | Path, header: Sequence[str], rows: Iterable[Iterable[Any]]) -> None:
    """Write a CSV whose cells are `csv_cell`'s; texts that begin like a formula get an apostrophe (`files.cell`)."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows([cell(value) if isinstance(value, str) else csv_cell(value) for value in row] for row in rows)
    write_text(path, text.getvalue())


def csv_cell(value: Any) -> str:
    """Six significant digits; nothing for None and NaN; what is no plain value as JSON."""
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


# ------------------------------------------------------------------------------------------------- published


class Published(NamedTuple):
    value: float
    status: str  # verified | secondary | unverified
    setting: str  # what is not stated about the protocol, or lost from the table; empty when the split's own is stated
    source: str


@functools.cache
def _published_rows() -> tuple[dict[str, str], ...]:
    text = resources.files("anomaly_lab").joinpath("published.csv").read_text(encoding="utf-8")
    return tuple(csv.DictReader(text.splitlines()))


def published(method: str, dataset: str, split: str, metric: str = "auroc") -> dict[int | str, Published]:
    """Published figures of a method by zero-based class or "mean", under this split only.

    Of several rows for a cell the first counts. A row whose source does not state its split but very likely
    means `official` stands in where nothing better is known, and says so in `setting`; so does a row of a table whose
    column headers are lost, with the classes that its columns are read as.
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
            setting = _lost(row["source"]) if row in stated else "split not stated, likely official"
            cells.setdefault(key, Published(float(row["value"]), row["status"], setting, row["source"]))
    return cells


def _lost(source: str) -> str:
    """The words of a source on lost column headers: "column headers lost, read as digits 0 to 3"; else empty."""
    said = re.search(r"column headers lost.*", source)
    return re.sub(r"(\d)-(\d)", r"\1 to \2", said[0].replace(" - ", ", ")) if said else ""


def published_kind(method: str, dataset: str, split: str, problem: str, kind: str) -> Published | None:
    """The published balanced accuracy of a method on contaminated data, tested on one kind of anomaly."""
    for row in _published_rows():
        where = (row["model"], row["dataset"], row["split"], row["metric"], row["setting"])
        if where == (method, dataset, split, "balanced_accuracy", f"{problem} {kind}"):
            return Published(float(row["value"]), row["status"], row["setting"], row["source"])
    return None
