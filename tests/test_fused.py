"""A run made of other runs: the sum of how rare its members' scores are among held-out normals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from anomaly_lab import config, results
from anomaly_lab.calibration import surprisal
from anomaly_lab.predict import load_run
from anomaly_lab.run import run


def fused(folder: Path, *words: str, members: str = "[mean_image,pca]") -> Any:
    where = [f"runs={folder / 'runs'}", f"data_dir={folder}", "trainer.progress=false"]
    return config.compose(["model=fused", f"model.members={members}", "normal_class=3", *where, *words])


def scores(folder: Path) -> dict[str, np.ndarray]:
    with np.load(folder / "scores.npz") as file:
        return dict(file)


@pytest.mark.drawn
def test_a_fused_run_adds_its_members_surprise_and_makes_those_that_are_missing(tmp_path: Path) -> None:
    cfg = fused(tmp_path)
    pca, mean = (job for job in reversed(config.members(cfg)))
    run(pca)
    before = (pca.out / "result.json").stat().st_mtime_ns
    result = run(cfg)
    assert result is not None and (pca.out / "result.json").stat().st_mtime_ns == before, "it was there"
    found, *members = (scores(job.out) for job in (config.job(cfg), mean, pca))
    for part in ("val_score", "score"):
        expected = sum(
            surprisal(torch.from_numpy(member[part]).double(), torch.from_numpy(np.sort(member["val_score"])).double())
            for member in members
        )
        np.testing.assert_allclose(found[part], expected)
    assert np.array_equal(found["index"], members[0]["index"]) and np.array_equal(found["truth"], members[0]["truth"])
    assert result["by_term"] == {
        job.identity["model"]: json.loads((job.out / "result.json").read_text())["metrics"]["auroc"]
        for job in (mean, pca)
    }
    assert result["metrics"]["auroc"] > min(result["by_term"].values())
    assert len(result["by_kind"]["auroc"]) == 9
    assert result["earlier_code"] == [], "its members were made by the same code"
    drawn = sorted(path.name for path in (config.job(cfg).out / "figures").iterdir())
    assert drawn == ["reconstructions.png", "roc.png", "scores.png"]
    assert run(cfg) == result, "it is not made twice"
    with pytest.raises(ValueError, match=r"members=\['mean_image', 'pca'\] scored and has no detector of its own"):
        load_run(config.job(cfg).out)
    frame = results.read(tmp_path / "runs")
    assert sorted(frame.model) == ["fused", "mean_image", "pca"]


def test_its_identity_is_its_members(tmp_path: Path) -> None:
    jobs = [
        config.job(cfg)
        for cfg in (
            fused(tmp_path),
            fused(tmp_path, members="[pca,knn]"),
            fused(tmp_path, members="[pca,ede]"),
            fused(tmp_path, "size=full", members="[pca,ede]"),
            fused(tmp_path, "seed=1"),
        )
    ]
    assert len({job.out for job in jobs}) == 5
    assert [job.identity["model"] for job in jobs] == ["fused", "fused", "fused_small", "fused", "fused"]
    assert "pca.model.detector.score" in jobs[0].settings, "a member of other defaults is another run"
    contaminated = fused(tmp_path, "split.contamination.rate=0.05")
    assert all(job.identity["changed"] for job in config.members(contaminated)), "members share the protocol"


def test_tables_keep_a_run_apart_that_has_a_member_of_another_kind(tmp_path: Path) -> None:
    cfg = fused(tmp_path)
    [mean, _] = config.members(cfg)
    run(mean)
    path = mean.out / "result.json"
    result = json.loads(path.read_text())
    result["config"]["model"] |= {"pretrained": "squeezenet"}
    path.write_text(json.dumps(result))
    made = run(cfg)
    assert made is not None and made["config"]["model"]["pretrained"] == "squeezenet"
    assert "labels" not in made["config"]["model"]


def test_what_cannot_be_a_member_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="fused is made of others itself"):
        run(fused(tmp_path, members="[pca,fused]"))
    with pytest.raises(Exception, match="nowhere"):
        run(fused(tmp_path, members="[nowhere]"))
    for some in ("null", "[]", "pca", "[pca]", "[pca,pca]"):
        with pytest.raises(ValueError, match=r"model.members=.*: name at least two different models"):
            run(fused(tmp_path, members=some))
    with pytest.raises(ValueError, match="knn has a detector of its own: use model=fused"):
        run(fused(tmp_path, "model=knn"))
    with pytest.raises(ValueError, match=r"model.input.size cannot be set: fused adds up its members' runs at their"):
        run(fused(tmp_path, "model.input.size=16"))


def test_what_only_batch_norm_has_is_not_asked_of_a_sum(tmp_path: Path) -> None:
    cfg = fused(tmp_path, "trainer.measure_leak=true", "trainer.watch_test=true")
    made = run(cfg)
    assert made is not None and config.job(cfg).finished() == made, "it counts as done"
