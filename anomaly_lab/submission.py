"""One file of a method on a protocol: what was run, on which data, by which code, and what came out (docs/scores.md).

A check holds such a file to the scores behind it. It guards against accident (another partition, a missing class, a
number that was typed), not against forgery: whoever makes scores up can make up both.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anomaly_lab import archive, record, results
from anomaly_lab.errors import printable, shortened
from anomaly_lab.files import read_json, write_json

if TYPE_CHECKING:
    import pandas as pd

SCHEMA = 1
PROTOCOL = ("dataset", "images", "split", "split_version", "problem", "role", "classes")
"""In what runs must agree to share a mean. ``images``: checksum of the data set. ``problem``: changes to it, such as
contamination. ``classes``: how many one-class problems there are."""


NAME = re.compile(r"\w[\w.+-]*(/\w[\w.+-]*)*")
"""Of a model, data set or split: a part of a path that leads nowhere else."""


def entries(source: Path, frame: pd.DataFrame | None = None) -> list[dict[str, Any]]:
    """What submissions say of runs, each an `archive.entry`, held to its scores.

    Args:
        source: the folder of runs that ``frame`` is of, or an archive, all of whose runs are meant.

    Raises:
        ValueError: it is no archive; or scores are gone or say something else.
    """
    if frame is not None:
        return [archive.entry(source, row) for row in results.rows_of(frame)]
    kept = archive.Archive(source)
    return [kept.entry(path) for path in kept.entries]


def write(entries: Sequence[Mapping[str, Any]], out: Path, what: str = "these runs") -> dict[str, Any]:
    """Write the submission ``out`` of runs of one method on one protocol; its content.

    Raises:
        ValueError: they are of several, or classes are missing. One line, which begins with ``what``.
    """
    content = summary(entries)
    refuse_unsound(content, what)
    write_json(out, content)
    return content


def write_each(entries: Sequence[Mapping[str, Any]], folder: Path) -> Iterator[tuple[Path, dict[str, Any] | str]]:
    """Write a submission of each method on each protocol into ``folder``, named by both.

    Yields:
        Each file with its content; or with the line that says why it was not written.
    """
    files: dict[str, list[Mapping[str, Any]]] = {}
    for entry in entries:
        row = results.named(entry["row"])
        changed = "" if row["label"] == row["model"] else "-" + hashlib.sha256(row["label"].encode()).hexdigest()[:8]
        name = f"{row['model']}-{row['dataset']}-{row['split']}{changed}.json"
        files.setdefault(name.replace("/", "-"), []).append(entry)
    for name, own in sorted(files.items()):
        row = results.named(own[0]["row"])
        what = f"{row['label']} on {row['dataset']} · {row['split']}"
        try:
            yield folder / name, write(own, folder / name, what)
        except ValueError as error:
            yield folder / name, str(error)


def read(path: str | Path) -> dict[str, Any]:
    """The content of a submission, which agrees with itself: see `refuse_unsound`.

    Raises:
        ValueError: it is none, or does not. One line.
    """
    try:
        content: dict[str, Any] = read_json(Path(path))
    except (ValueError, RecursionError, OSError) as error:
        raise ValueError(f"{path} is no submission ({type(error).__name__}: {shortened(error)})") from error
    try:
        if content["schema"] != SCHEMA:
            raise ValueError(f"{path}: schema {content['schema']}, this code reads {SCHEMA}")
        refuse_unsound(content, str(path))
    except (KeyError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"{path} is no submission ({type(error).__name__}: {error})") from error
    return content


def read_pages(folder: Path) -> dict[str, pd.DataFrame]:
    """The `frame` of every experiment's submissions below ``folder``, as ``NAME/submissions/FILE.json``, held to its
    scores.

    Raises:
        ValueError: one does not agree with itself, or not with ``NAME/scores.npz``.
    """
    pages = {}
    for archived in sorted({file.parent.parent for file in folder.glob("*/submissions/*.json")}):
        scores = archive.Archive(archived / "scores.npz")
        for file in sorted(archived.glob("submissions/*.json")):
            content = read(file)
            refuse_unfounded(content, str(file), None, scores)
            pages[file.relative_to(folder).as_posix()] = frame([content])
    return pages


def frame(submissions: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """The runs of all ``submissions`` as `results.read` gives them: what tables and figures are made of.

    Raises:
        ValueError: they cannot share tables: `results.refuse_mixtures`.
    """
    rows = results.from_rows([entry["row"] for content in submissions for entry in content["runs"]])
    results.refuse_mixtures(rows)
    return rows


def _shown(value: object) -> str:
    """A value of a `protocol`, as a reader knows it."""
    if value is None or value == "":
        return "unknown" if value is None else "no changed key"
    return f"{value:g}" if isinstance(value, float) else str(value)


def refuse_unsound(content: Mapping[str, Any], where: str) -> None:
    """Hold a submission to itself: one method, one protocol, every class with every seed, and its own head.

    Raises:
        ValueError: one line, which begins with ``where``.
    """
    entries = content["runs"]
    if not entries:
        raise ValueError(f"{where}: holds no runs")
    for entry in entries:
        if lacking := sorted({"scores_sha256", "threshold_quantile", "identity"} - entry.keys()):
            raise ValueError(f"{where}: {entry['row'].get('path')} does not say its {lacking[0]}")
        if fault := results.fault(entry["row"]):
            raise ValueError(f"{where}: {fault}, which no run writes")
    protocols = {json.dumps(protocol(entry), sort_keys=True): protocol(entry) for entry in entries}
    if len(protocols) > 1:
        one, two = list(protocols.values())[:2]
        differ = ", ".join(f"{k} {_shown(one[k])} and {_shown(two[k])}" for k in PROTOCOL if one[k] != two[k])
        raise ValueError(f"{where}: mixes protocols ({differ}): give a file to each")
    for entry in entries:
        identity, row = entry["identity"], entry["row"]
        for name in ("model", "dataset", "split"):
            if not NAME.fullmatch(row[name]):
                raise ValueError(f"{where}: {name} is {row[name]!r}, which is no name")
        if any(row[name] != value for name, value in results.named_by(identity).items()):
            raise ValueError(f"{where}: {row['path']} is not the run that its identity names")
        own = record.place(identity, row["role"]).as_posix()
        if row["path"] != own:
            raise ValueError(f"{where}: {row['path']} has the identity of {own}")
    rows = results.from_rows([entry["row"] for entry in entries])
    if len(labels := sorted(set(rows["label"]))) > 1:
        raise ValueError(f"{where}: holds {' and '.join(labels)}: give a file to each method")
    try:
        results.refuse_mixtures(rows)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    count, known = protocol(entries[0])["classes"], sorted(set(rows["normal_class"]), key=results.class_order)
    for seed, group in rows.groupby("seed"):
        missing = [str(known_class) for known_class in known if known_class not in set(group["normal_class"])]
        if missing or (count is not None and len(known) != count):
            words = f"class {', '.join(missing)} is missing" if missing else f"{len(known)} of {count:g} classes"
            raise ValueError(f"{where}: seed {seed} has {words}: run the others")
    for name, value in summary(entries).items():
        if name != "runs" and content.get(name) != value:
            if name == "single_seed" and value:
                raise ValueError(f'{where}: has a single seed and is not marked so: "single_seed" must be true')
            said = json.dumps(content.get(name))
            raise ValueError(f"{where}: says {name} {said}, its runs say {json.dumps(value)}")


def refuse_unfounded(content: Mapping[str, Any], where: str, runs: Path | None, scores: archive.Archive | None) -> None:
    """Hold every run of a submission to its scores, in a folder of runs or in an archive.

    Raises:
        ValueError: a run is not there, saw another partition, or has other scores or metrics. One line.
    """
    if runs is not None:  # RUNS/METHOD/DATASET/SPLIT, of which it was written, is taken for RUNS
        first = content["runs"][0]["row"]["path"]
        runs = next((at for at in (runs, *runs.parents[:3]) if (at / first / "result.json").is_file()), runs)
    for said in content["runs"]:
        path = said["row"]["path"]
        if runs is not None:
            if not (runs / path / "result.json").is_file():
                raise ValueError(f"{where}: {runs} has no run {path}")
            row, _ = results.read_run(runs / path, path)
            found = archive.entry(runs, row)
        else:
            assert scores is not None
            matching = [own for own, entry in scores.entries.items() if entry["identity"] == said["identity"]]
            if not matching:
                raise ValueError(f"{where}: {scores.path} has no run {path}")
            found = scores.entry(matching[0])
        for name in ("fingerprint", "images"):
            if said["row"][name] != found["row"][name]:
                raise ValueError(f"{where}: {path} has {name} {said['row'][name]}, its scores {found['row'][name]}")
        if said["scores_sha256"] != found["scores_sha256"]:
            raise ValueError(f"{where}: {path} was made of other scores: their checksums differ")
        # A run's own row has the parameters of all that it was read with, or none.
        names = [column.name for column in results.COLUMNS] + [key for key in said["row"] if key in found["row"]]
        for one, other, keys in ((said["row"], found["row"], names), (said, found, (*PROTOCOL, "threshold_quantile"))):
            for name in keys:
                if one.get(name) != other.get(name):
                    raise ValueError(f"{where}: {path} says {name} {one.get(name)}, its run {other.get(name)}")


def protocol(entry: Mapping[str, Any]) -> dict[str, Any]:
    """What of a run's `archive.entry` says which problem it solved: the keys are `PROTOCOL`."""
    row = results.named(entry["row"])
    return {name: entry[name] if name in entry else row[name] for name in PROTOCOL}


def line(content: Mapping[str, Any]) -> str:
    """A submission in a line."""
    of = content["protocol"]
    marks = [word for name, word in (("single_seed", "single seed"), ("dirty", "unclean code")) if content[name]]
    marks += ["saw labels"] * content["labels"]
    seeds, classes = len(content["seeds"]), len({str(run["identity"]["normal_class"]) for run in content["runs"]})
    return printable(
        f"{content['method']} on {of['dataset']} · {of['split']}{of['problem'] and ' · ' + of['problem']}: AUROC "
        f"{content['auroc']:.4f}, {classes} classes × {seeds} seed{'s' * (seeds > 1)}"
        + (f" [{', '.join(marks)}]" if marks else "")
    )


def summary(entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The whole content of the submission of these runs, each an `archive.entry`."""
    rows = results.from_rows([entry["row"] for entry in entries])
    seeds = sorted({int(seed) for seed in rows["seed"]})
    return {
        "schema": SCHEMA,
        "method": rows["label"].iloc[0],
        "protocol": protocol(entries[0]),
        "seeds": seeds,
        "single_seed": len(seeds) == 1,
        "labels": bool(rows["labels"].any()),  # a ceiling that learned from anomalies
        "dirty": bool(rows["dirty"].any()),
        "code": sorted({sha for text in (*rows["git_sha"], *rows["earlier_code"]) for sha in text.split()}),
        "auroc": round(float(rows["auroc"].mean()), 9),  # over classes and seeds
        "runs": sorted(entries, key=lambda entry: entry["row"]["path"]),
    }
