"""Fixed features: computed once, whatever asks for them, and the same as if they were computed each time."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from anomaly_lab import config, features
from anomaly_lab.data import OneClassData, Prepare
from anomaly_lab.features import FeatureStore
from anomaly_lab.images import Images
from anomaly_lab.predict import load_run
from anomaly_lab.run import run
from anomaly_lab.splits import Pooled

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "BLOCK", 8)


def images(count: int = 30, seed: int = 0, name: str = "some") -> Images:
    pixels = np.random.RandomState(seed).randint(0, 256, (count, 1, 8, 8)).astype(np.uint8)
    labels = np.arange(count) % 2
    return Images.canonical(pixels, labels, np.zeros(count, bool), ("zero", "one"), name=name)


class Squares(nn.Module):
    """(B,C,S,S) -> (B,2,S,S/2), and how many images it has seen."""

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.factor, self.seen = factor, 0

    def forward(self, x: Tensor) -> Tensor:
        self.seen += len(x)
        return (self.factor * x.square()).unflatten(-1, (2, -1)).transpose(2, 3)[:, 0]


def store(root: Path | None, *, factor: float = 1.0, limit: float = 1e9, of: Images | None = None) -> FeatureStore:
    made = FeatureStore(of or images(), Prepare(size=8, features=Squares(factor)), root, limit)
    return made


def seen(made: FeatureStore) -> int:
    return made._prepare.features.seen - PROBED  # type: ignore[attr-defined, no-any-return]


PROBED = 4
"""Images that the name of the folder is told from."""


def expected(index: np.ndarray) -> Tensor:
    return Prepare(size=8, features=Squares())(torch.from_numpy(images().pixels[index]))


def test_features_are_made_once_and_read_by_whoever_comes_later(tmp_path: Path) -> None:
    index = np.array([3, 29, 0, 12])  # blocks 0, 1 and 3 of four
    first = store(tmp_path)
    found = first(index, CPU)
    assert found.dtype == torch.float16 and torch.equal(found.float(), expected(index))
    assert seen(first) == 8 + 8 + 6, "whole blocks, and no other"
    again = store(tmp_path)
    assert torch.equal(again(index, CPU), found) and seen(again) == 0
    assert torch.equal(again(np.array([20, 3]), CPU).float(), expected(np.array([20, 3])))
    assert seen(again) == 8 + PROBED, "the block that was missing"
    [folder] = tmp_path.iterdir()
    assert sorted(path.name for path in folder.iterdir()) == [f"{block:05d}.npz" for block in range(4)]


def test_other_images_and_other_features_have_other_folders(tmp_path: Path) -> None:
    index = np.arange(4)
    made = [
        store(tmp_path)(index, CPU),
        store(tmp_path, factor=2.0)(index, CPU),
        store(tmp_path, of=images(seed=1))(index, CPU),
    ]
    assert len(list(tmp_path.iterdir())) == 3
    assert not torch.equal(made[0], made[1]) and not torch.equal(made[0], made[2])


@pytest.mark.parametrize("damage", ["cut", "other", "gone"])
def test_a_damaged_block_is_made_again(damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    index = np.arange(16)
    found = store(tmp_path)(index, CPU)
    [path, _] = sorted(tmp_path.glob("*/*.npz"))
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-40])
    elif damage == "other":
        np.savez(path, features=np.zeros((3, 2, 8, 4), np.float16))
    else:
        path.unlink()
    again = store(tmp_path)
    assert torch.equal(again(index, CPU), found) and seen(again) == 8
    assert ("made again" in caplog.text) == (damage != "gone")
    assert seen_by_a_third(tmp_path, index) == 0, "it was mended"


def seen_by_a_third(root: Path, index: np.ndarray) -> int:
    third = store(root)
    third(index, CPU)
    return seen(third)


def test_the_disk_is_bounded_and_what_was_not_used_for_longest_goes_first(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    index = np.arange(8)
    for factor in (1.0, 2.0):
        store(tmp_path, factor=factor)(index, CPU)
    one = sum(file.stat().st_size for file in next(tmp_path.iterdir()).iterdir())
    ages = {1.0: 100, 2.0: 200}
    for factor, age in ages.items():
        folder = store(tmp_path, factor=factor)._folder(CPU)
        assert folder is not None
        os.utime(folder, (age, age))
    store(tmp_path, factor=3.0, limit=2.5 * one)(index, CPU)
    left = {factor for factor in (1.0, 2.0, 3.0) if _exists(tmp_path, factor)}
    assert left == {2.0, 3.0}
    # What does not fit at all is computed and not kept.
    lonely = tmp_path / "lonely"
    found = store(lonely, limit=10)(index, CPU)
    assert torch.equal(found.float(), expected(index)) and not list(lonely.rglob("*.npz"))
    assert "trainer.feature_cache_gb" in caplog.text


def _exists(root: Path, factor: float) -> bool:
    folder = store(root, factor=factor)._folder(CPU)
    return folder is not None and folder.is_dir()


def test_a_folder_that_cannot_be_written_to_costs_time_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("no folder")
    found = store(tmp_path / "file")(np.arange(30), CPU)
    assert torch.equal(found.float(), expected(np.arange(30))) and caplog.text.count("cannot be kept") == 1


def test_what_another_process_renames_meanwhile_is_no_reason_to_keep_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = store(tmp_path)
    folder = made._folder(CPU)
    assert folder is not None
    folder.mkdir()
    (folder / ".00001.npz.0123abcd.part").symlink_to("nowhere")  # listed, and gone when it is asked for its size
    (tmp_path / "other").mkdir()
    made(np.arange(8), CPU)
    assert list(folder.glob("*.npz")) and not caplog.text


def test_values_beyond_half_precision_are_refused() -> None:
    with pytest.raises(ValueError, match="do not fit float16"):
        store(None, factor=1e6)(np.arange(4), CPU)


def test_a_method_sees_features_in_the_place_of_images_and_figures_see_images(tmp_path: Path) -> None:
    prepare = Prepare(size=8, features=Squares())
    kept = OneClassData(images(), Pooled(), "zero", prepare, batch_size=4, features=store(tmp_path))
    plain = OneClassData(images(), Pooled(), "zero", prepare, batch_size=4)
    assert kept.image_shape == (2, 8, 4)
    for data in (kept, plain):
        x = expected(data.partition.test)
        assert torch.equal(data.prepared("test"), x) and torch.equal(data.loader("test").everything().x, x)
        assert torch.equal(torch.cat([batch.x for batch in data.loader("test")]), x)
        shown = data.displayable("test", [0, 1])
        assert torch.allclose(shown, torch.from_numpy(images().pixels[data.partition.test[:2]]) / 255)


@pytest.mark.slow
def test_a_run_is_the_same_with_and_without_kept_features_and_scores_new_images(tmp_path: Path) -> None:
    def scores(*words: str) -> np.ndarray:
        overrides = ["model=scatter_subspace", "normal_class=3", "trainer.progress=false", "logger=none", *words]
        cfg = config.compose([*overrides, f"data_dir={tmp_path}"])
        result = run(cfg)
        assert result is not None and result["image_shape"] == [217, 4, 4] and result["epochs"] == 0
        assert set(result["by_term"]) == {"gaussian", "neighbours"} and result["metrics"]["auroc"] > 0.97
        found: np.ndarray = np.load(config.job(cfg).out / "scores.npz")["score"]
        return found

    first = scores(f"runs={tmp_path / 'a'}")
    assert list((tmp_path / "features").glob("digits-*/*.npz"))
    assert np.array_equal(scores(f"runs={tmp_path / 'b'}"), first)
    assert np.array_equal(scores(f"runs={tmp_path / 'c'}", "trainer.feature_cache_gb=0"), first)
    [path] = (tmp_path / "a").rglob("result.json")
    fitted = load_run(path.parent)
    cfg = config.compose(["dataset=digits", f"data_dir={tmp_path}"])
    index = np.load(path.parent / "scores.npz")["index"][:40]
    pixels = config.load_images(cfg).pixels[index]
    np.testing.assert_allclose(fitted.score(pixels), first[:40], rtol=1e-3, atol=1e-3)
    assert fitted.displayable(pixels).shape == (40, 1, 32, 32)
