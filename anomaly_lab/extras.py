"""Tables that only some runs have: kinds of anomaly, rejected training images, what is owed to test labels."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from anomaly_lab import results
from anomaly_lab.tables import signed

if TYPE_CHECKING:
    import pandas as pd


class Extra(NamedTuple):
    """A further table of a section. The first cell of each row is a method."""

    title: str
    note: str
    header: list[str]
    rows: list[list[str]]


def extras(frame: pd.DataFrame, common: Sequence[str]) -> list[Extra]:
    """The tables of a section's runs.

    Args:
        frame: a row a run, as `anomaly_lab.results` reads them; ``own`` says whether its setting is the shipped one.
        common: changes that all the runs share, to be named with the tables.
    """
    makers = {"auroc_seen": _kinds, "rejected_images": _rejected, "oracle_sorted_auroc": _leaks, "model": _settings}
    found = []
    for column, make in makers.items():
        part = frame[frame[column].notna() & (frame[column] != "")]
        if len(part) and (extra := make(part)).rows:
            found.append(extra._replace(note=f"{extra.note} All with {', '.join(common)}.") if common else extra)
    return found


def _kinds(frame: pd.DataFrame) -> Extra:
    header = ["method", "class", "seed", "AUROC", "seen", "unseen", "bal. acc. seen", "unseen", "epochs"]
    rows: list[list[str]] = []
    for run in frame.itertuples():
        values = [run.auroc, run.auroc_seen, run.auroc_unseen, run.balanced_accuracy_seen, run.balanced_accuracy_unseen]
        texts = ["n/a" if math.isnan(value) else f"{value:.3f}" for value in values]
        rows.append([run.label, run.class_name, str(run.seed), *texts, str(run.epochs)])
        figures = [
            results.published_kind(run.published_as, run.dataset, run.split, run.problem, kind)
            for kind in ("seen", "unseen")
        ]
        if any(figures):
            size = ", full size" if run.model != run.method else ""
            status = ", ".join(sorted({figure.status for figure in figures if figure}))
            texts = [f"{figure.value:.2f}" if figure else "" for figure in figures]
            rows.append([f"published ({status}{size})", "", "", "", "", "", *texts, ""])
    note = (
        "The anomalies apart: those of the kinds that contaminate the training set (seen; named at rate 0 as well) and "
        "the others (unseen), each against all test normals."
    )
    return Extra("Kinds of anomaly", note, header, rows)


def _rejected(frame: pd.DataFrame) -> Extra:
    rows = []
    for run in frame.itertuples():
        for entry in json.loads(run.rejected_images):
            shares = ["n/a" if entry[name] is None else f"{entry[name]:.3f}" for name in ("precision", "recall")]
            rows.append([run.label, run.class_name, str(run.seed), entry["name"], str(entry["images"]), *shares])
    note = (
        "Training images that a method took for anomalies, with the share of true ones among them (precision) and the "
        "share of the true ones that it found (recall); no method sees either."
    )
    return Extra(
        "Rejected training images", note, ["method", "class", "seed", "set", "images", "precision", "recall"], rows
    )


_LEAKS = {
    "auroc": "honest",
    "oracle_auroc": "best epoch",
    "oracle_shuffled_auroc": "mixed",
    "oracle_sorted_auroc": "sorted",
    "oracle_sorted_best_auroc": "sorted, best epoch",
}


def _leaks(frame: pd.DataFrame) -> Extra:
    rows = []
    frame = frame[(frame["oracle_sorted_auroc"] != frame["auroc"]) | frame["oracle_auroc"].notna()]  # has batch norm
    for name, part in frame.groupby("label", sort=False):
        runs = [*part.itertuples()]
        means = part[[*_LEAKS]].mean(skipna=False)  # over the same runs in every column, or not at all
        lines = [(f"mean of {len(runs)}", "", means)] if len(runs) > 1 else []
        for class_name, seed, values in [*lines, *((run.class_name, str(run.seed), run._asdict()) for run in runs)]:
            texts = ["" if math.isnan(values[key]) else f"{values[key]:.3f}" for key in _LEAKS]
            bought = max(value for key in _LEAKS if not math.isnan(value := values[key])) - values["auroc"]
            rows.append([str(name), class_name, seed, *texts, signed(bought)])
    note = (
        "What scores would owe to test labels: the honest AUROC; that of the best epoch on test; those of the last "
        "epoch with batch norm in training mode, in mixed batches and in batches of a test set sorted by truth, whose "
        "statistics know the label; that of the best epoch of such sorted batches. None but the first is a result."
    )
    return Extra("Owed to test labels", note, ["method", "class", "seed", *_LEAKS.values(), "most - honest"], rows)


def _settings(frame: pd.DataFrame) -> Extra:
    """A row a method and problem of several settings, over the classes and seeds that all of them have."""
    rows = []
    for (model, problem), part in frame.groupby(["model", "problem"], sort=False):
        grid = part.pivot_table(index="label", columns=["normal_class", "seed"], values="auroc").dropna(axis=1)
        if len(grid) < 2 or grid.columns.empty:
            continue
        classes = grid.T.groupby(level=0).mean()  # a row a class
        one, each = classes.mean().max(), classes.max(axis=1).mean()
        own = [classes[label].mean() for label in part["label"][part["own"]].unique() if label in classes]
        texts = [f"{own[0]:.3f}" if own else "", f"{one:.3f}", f"{each:.3f}", signed(each - own[0] if own else None)]
        name = results.label(str(model), str(problem) if frame["problem"].nunique() > 1 else "")
        rows.append([name, str(len(grid)), str(len(classes)), *texts])
    note = (
        "What a choice of the setting by test labels would add, over the classes and seeds that all settings have: the "
        "AUROC of the shipped setting (empty: not among them); that of the best one, for all classes or for each. "
        "Rules that see test labels reach the last two; neither is a result, and of noisy runs the best is never worse."
    )
    header = ["method", "settings", "classes", "shipped", "best for all", "best for each", "each - shipped"]
    return Extra("Settings chosen by test labels", note, header, rows)
