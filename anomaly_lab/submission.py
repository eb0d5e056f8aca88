"""One file of a method on a protocol: what was run, on which data, by which code, and what came out (docs/scores.md).

A check holds such a file to the scores behind it. It guards against accident (another partition, a missing class, a
number that was typed), not against forgery: whoever makes scores up can make up both.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anomaly_lab import archive, record, results
from anomaly_lab.files import write_json

if TYPE_CHECKING:
    import pandas as pd

SCHEMA = 1
PROTOCOL = ("dataset", "images", "split", "split_version", "problem", "role", "classes")
"""In what runs must agree to share a mean. ``images``: checksum of the data set. ``problem``: changes to it, such as
contamination. ``classes``: how many one-class problems there are."""


def write(runs: Path, frame: pd.DataFrame, out: Path) -> dict[str, Any]:
    """Write the runs of ``frame``, all of one method on one protocol, as the submission ``out``; its content.

    Raises:
        ValueError: they are of several, classes are missing, or scores are gone or say something else.
    """
    content = summary([archive.entry(runs, row) for row in results.rows_of(frame)])
    refuse_unsound(content, "these runs")
    write_json(out, content)
    return content


def read(path: str | Path) -> dict[str, Any]:
    """The content of a submission, which agrees with itself: see `refuse_unsound`.

    Raises:
        ValueError: it is none, or does not.
    """
    try:
        content: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
        if content["schema"] != SCHEMA:
            raise ValueError(f"{path}: schema {content['schema']}, this code reads {SCHEMA}")
        refuse_unsound(content, str(path))
    except (KeyError, TypeError, AttributeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is no submission ({type(error).__name__}: {error})") from error
    return content


def frame(submissions: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """The runs of all ``submissions`` as `results.read` gives them: what tables and figures are made of.

    Raises:
        ValueError: they cannot share tables: `results.refuse_mixtures`.
    """
    rows = results.from_rows([entry["row"] for content in submissions for entry in content["runs"]])
    results.refuse_mixtures(rows)
    return rows


def refuse_unsound(content: Mapping[str, Any], where: str) -> None:
    """Hold a submission to itself: one method, one protocol, every class with every seed, and its own head.

    Raises:
        ValueError: one line, which begins with ``where``.
    """
    entries = content["runs"]
    if not entries:
        raise ValueError(f"{where}: holds no runs")
    protocols = {json.dumps(protocol(entry), sort_keys=True): protocol(entry) for entry in entries}
    if len(protocols) > 1:
        one, two = list(protocols.values())[:2]
        differ = ", ".join(f"{name} {one[name]} and {two[name]}" for name in PROTOCOL if one[name] != two[name])
        raise ValueError(f"{where}: mixes protocols ({differ}): give a file to each")
    for entry in entries:
        identity, row = entry["identity"], entry["row"]
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
    for said in content["runs"]:
        path = said["row"]["path"]
        if runs is not None:
            if not (runs / path / "result.json").is_file():
                raise ValueError(f"{where}: {runs} has no run {path}")
            row, _ = results.read_run(runs / path, path)
            found = archive.entry(runs, row)
        else:
            assert scores is not None
            matching = [entry for entry in scores.entries.values() if entry["identity"] == said["identity"]]
            if not matching:
                raise ValueError(f"{where}: {scores.path} has no run {path}")
            found = matching[0]
        for name in ("fingerprint", "images"):
            if said["row"][name] != found["row"][name]:
                raise ValueError(f"{where}: {path} has {name} {said['row'][name]}, its scores {found['row'][name]}")
        if said["scores_sha256"] != found["scores_sha256"]:
            raise ValueError(f"{where}: {path} was made of other scores: their checksums differ")
        if scores is not None:
            arrays = scores.scores(found["row"]["path"])
            recomputed = record.of_scores(arrays, said["threshold_quantile"])
            columns = {name: value for name, value in recomputed.items() if name in said["row"]}
            record.refuse_other(columns, said["row"], f"{where}: {path}")
        for name in (column.name for column in results.COLUMNS if column.name in said["row"]):
            if said["row"][name] != found["row"].get(name):
                raise ValueError(f"{where}: {path} says {name} {said['row'][name]}, its run {found['row'].get(name)}")


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
    return (
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
