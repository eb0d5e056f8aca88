"""The scores of many runs in one file, from which every figure of their table follows (docs/scores.md).

    scores.npz:  rows.json             {"schema": 1, "entries": [an `entry` a run, with its row of results.csv and
                                       "arrays": the members that hold its arrays, by name]}
                 <name>/<hash>.npy     score      (M,) of the test images, float32 as the run wrote it
                                       truth      uint8 (M,): 0 normal, 1 anomalous
                                       label      their classes (M,)
                                       index      their positions in the data set (M,)
                                       val_score  (V,) of the held-out normals, for the threshold
                                       decided    bool (M,), of methods with a rule of their own

Members are named by their content, so what several runs share is there once. `numpy.load` reads them without this
package.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from anomaly_lab import record, results
from anomaly_lab.files import refuse_bomb, write_atomically

if TYPE_CHECKING:
    import pandas as pd

SCHEMA = 1
ARRAYS = ("score", "truth", "label", "index", "val_score", "decided")


class Archive:
    """The runs of an archive: their frame, as `results.read` gives it, and their arrays.

    Raises:
        ValueError: the file is no archive of scores.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            refuse_bomb(self.path)
            with zipfile.ZipFile(self.path) as file:
                said = json.loads(file.read("rows.json"))
            assert said["schema"] == SCHEMA, f"schema {said['schema']}, this code reads {SCHEMA}"
            self.entries: dict[str, dict[str, Any]] = {entry["row"]["path"]: entry for entry in said["entries"]}
            self.frame: pd.DataFrame = results.from_rows([entry["row"] for entry in self.entries.values()])
        except Exception as error:  # as many kinds as there are damages
            raise ValueError(f"{path} is no archive of scores ({type(error).__name__}: {error})") from error

    def scores(self, path: str) -> dict[str, NDArray[Any]]:
        """The arrays of the run that the frame calls ``path``, by the names that its scores.npz had.

        Raises:
            ValueError: there is none, or its arrays are damaged.
        """
        if path not in self.entries:
            raise ValueError(f"{self.path} has no run {path}")
        try:
            with np.load(self.path, allow_pickle=False) as file:
                found = {name: file[member] for name, member in self.entries[path]["arrays"].items()}
            assert digest(found) == self.entries[path]["scores_sha256"], "its scores are others than the run wrote"
        except Exception as error:
            raise ValueError(f"{self.path}: {path} is damaged ({type(error).__name__}: {error})") from error
        return found

    def entry(self, path: str) -> dict[str, Any]:
        """What `entry` said of the run that the frame calls ``path`` when it was archived, held to its arrays.

        Raises:
            ValueError: there is none, its arrays are damaged, or its row says something else.
        """
        arrays = self.scores(path)
        said = {name: value for name, value in self.entries[path].items() if name != "arrays"}
        found = record.of_scores(arrays, said["threshold_quantile"])
        columns = {name: value for name, value in found.items() if name in said["row"]}
        record.refuse_other(columns, said["row"], f"{self.path}: {path}")
        return said


def digest(arrays: Mapping[str, NDArray[Any]]) -> str:
    """SHA-256 of what a run's metrics are computed from, whatever file it lies in."""
    total = hashlib.sha256()
    for name in ("score", "truth", "val_score", "decided"):
        if name in arrays:
            values = np.ascontiguousarray(arrays[name])
            total.update(f"{name}/{values.dtype.str}/{len(values)}/".encode() + values.tobytes())
    return total.hexdigest()


def entry(runs: Path, row: Mapping[str, Any]) -> dict[str, Any]:
    """What an archive and a submission say of the run of ``runs`` that has that row.

    Raises:
        ValueError: its result or its scores are damaged, or say something else.
    """
    folder = runs / row["path"]
    result = record.read(folder)
    record.recompute(result, folder)
    return {
        "row": {**row, "path": record.place(result["identity"], result.get("role") or "normal").as_posix()},
        "identity": result["identity"],
        "images": (result.get("settings") or {}).get("images"),  # SHA-256 of the data set
        "split_version": result["partition"].get("version"),
        "threshold_quantile": result["config"]["trainer"]["threshold_quantile"],
        "scores_sha256": digest(_arrays(folder)),
    }


def write(runs: Path, frame: pd.DataFrame, out: Path) -> None:
    """Write the archive ``out`` of the runs of ``frame``. The same runs give the same bytes.

    Raises:
        ValueError: the scores of one are gone, or say something else than its result.
    """
    members: dict[str, bytes] = {}
    entries = []
    for row in results.rows_of(frame):
        made = entry(runs, row)
        made["arrays"] = {}
        for name, values in _arrays(runs / row["path"]).items():
            content = io.BytesIO()
            np.save(content, values, allow_pickle=False)
            member = f"{name}/{hashlib.sha256(content.getvalue()).hexdigest()[:16]}"
            made["arrays"][name], members[f"{member}.npy"] = member, content.getvalue()
        entries.append(made)
    said = json.dumps({"schema": SCHEMA, "entries": entries}, sort_keys=True, allow_nan=False)

    def fill(file: IO[bytes]) -> None:
        with zipfile.ZipFile(file, "w") as packed:
            for name, content in {"rows.json": said.encode(), **members}.items():
                # ZipInfo has a fixed time.
                packed.writestr(zipfile.ZipInfo(name), content, zipfile.ZIP_DEFLATED, compresslevel=9)

    write_atomically(out, fill)


def _arrays(folder: Path) -> dict[str, NDArray[Any]]:
    """All of a run's scores.npz but the terms of its score."""
    with np.load(folder / "scores.npz", allow_pickle=False) as file:
        return {name: file[name] for name in ARRAYS if name in file}
