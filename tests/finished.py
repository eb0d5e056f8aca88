"""A folder of finished runs, written one by one, for tests of what is made from them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from anomaly_lab import record, results, tables
from anomaly_lab.config import Job

AE, SHARED = "autoencoder_small", "shared_ae_small"


def identity(model: str = AE, dataset: str = "mnist", split: str = "official", c: int = 0, seed: int = 0, changed=None):
    return {
        "model": model,
        "dataset": dataset,
        "split": split,
        "normal_class": c,
        "seed": seed,
        "changed": changed or {},
    }


def configured(model: str, config: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The configuration that a result.json holds, as far as anything is made from it."""
    method = model.removesuffix("_small")
    return {"size": "full" if method == model else "small", "choices": {"model": method}, **(config or {})}


def folder_of(who: Mapping[str, Any], role: str = "normal") -> Path:
    return record.place(who, role)


class Runs:
    """A folder of runs, written one by one."""

    def __init__(self, root: Path) -> None:
        self.root = root
        root.mkdir()

    def add(
        self,
        auroc: float,
        *,
        name: str | None = None,
        role: str = "normal",
        config: Mapping[str, Any] | None = None,
        fingerprint: str | None = None,
        experiment: str | None = None,
        dirty: bool = False,
        oracle: float | None = None,
        metrics: Mapping[str, float] | None = None,
        learned: Mapping[str, float | None] | None = None,
        more: Mapping[str, Any] | None = None,
        **who: Any,
    ) -> Path:
        """A finished run; `who` as for `identity`. The fingerprint follows from the problem unless given."""
        who = identity(**who)
        problem = {key: value for key, value in who["changed"].items() if key.startswith(("split.", "dataset."))}
        images = str((who["dataset"], who["split"], who["normal_class"], who["seed"], problem))
        result = {
            "schema": 1,
            "identity": who,
            "class_name": name or str(who["normal_class"]),
            "role": role,
            "classes": 10,
            "metrics": dict.fromkeys(["fpr95", "balanced_accuracy", "f1", "precision", "recall", "threshold"])
            | {
                "auroc": auroc,
                "auroc_low": max(auroc - 0.01, 0),
                "auroc_high": min(auroc + 0.01, 1),
                "average_precision": 2 / 3,
            }
            | {"val_score": 1.23456789e-7, "oracle_auroc": oracle}
            | dict(metrics or {}),
            "partition": {"fingerprint": fingerprint or format(hash(images) % 16**16, "016x")},
            "config": configured(who["model"], config),
            "experiment": experiment,
            "git": {"sha": "0123456789abcdef0123", "dirty": dirty},
            "device": "cpu",
            "seconds": {"fit": 60.0, "score": 1.5},
            "images_per_second": 812.345678,
            "epochs": 2,
            "history": [{"epoch": e, "val_score": 1.0, "oracle_auroc": oracle} for e in (1, 2)] if oracle else [],
            "learned": learned or {},
            **(more or {}),
        }
        folder = self.root / folder_of(who, role)
        folder.mkdir(parents=True)
        (folder / "result.json").write_text(json.dumps(result))
        return folder

    def other(self, file: str, text: str, **who: Any) -> Path:
        """A run that did not finish, with this file in its folder."""
        folder = self.root / folder_of(identity(**who))
        folder.mkdir(parents=True)
        (folder / file).write_text(text)
        return folder

    def table(
        self, dataset: str = "mnist", split: str = "official", expected: Sequence[Job] = ()
    ) -> dict[str, dict[Any, tables.Cell]]:
        shown = tables.table(results.read(self.root), dataset, split, expected)
        return {row.label: row.cells for row in shown.rows}


def grid(*members: Mapping[str, Any]) -> list[Job]:
    cfgs = [OmegaConf.create(configured(who["model"], {"runs": "/elsewhere/runs", "model": {}})) for who in members]
    return [Job(cfg, who, Path(cfg.runs) / folder_of(who)) for cfg, who in zip(cfgs, members, strict=True)]
