"""The benchmarks' loops have the lab's losses, step by step, and what they measure is what they say."""

from __future__ import annotations

import functools
import json
import os
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, LightningModule, Trainer
from omegaconf import DictConfig, OmegaConf
from test_methods import SHRINK
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import benchmarks
from anomaly_lab import build, config
from anomaly_lab.data import OneClassData
from anomaly_lab.detector import Batch, Detector
from benchmarks import __main__ as main
from benchmarks import compare, peers, shallow, training
from benchmarks.bare import LOOPS, PASSES, Bare
from benchmarks.published import Published

STEPS, EPOCHS = 3, 2
CPU = torch.device("cpu")


def tiny(model: str) -> DictConfig:
    """Two short epochs, in which shared autoencoders change their weights and PIAD chooses its gammas."""
    plain = config.compose([f"model={model}"])
    smaller = [f"{key}={value}" for key, value in SHRINK.items() if OmegaConf.select(plain, key) is not None]
    if "gamma_every" in plain.model.detector:
        smaller.append("model.detector.gamma_every=2")
    return training.compose(model, STEPS, EPOCHS, *smaller)


class Witness(Callback):
    """Keeps which images each step of the lab saw, and the losses of its moves.

    In double precision: in single, sums taken in another order tip the signs that L1 losses and Adam go by, and after a
    few steps the same algorithm differs by some 1e-6.
    """

    def __init__(self) -> None:
        self.batches: list[Batch] = []
        self.further: list[Batch] = []
        self.epochs: list[int] = []
        self.losses: list[float] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, Detector)
        pl_module.double()
        plays, next_batch = pl_module.plays, pl_module.next_batch
        score, terms = pl_module.score, pl_module.terms

        def watched_plays(batch: Batch) -> Iterator[Mapping[str, Tensor]]:
            self.batches.append(batch)
            self.epochs.append(int(pl_module.epoch))
            for losses in plays(batch._replace(x=batch.x.double())):
                self.losses += [loss.item() for loss in losses.values()]
                yield losses

        def watched_next_batch() -> Batch:
            self.further.append(next_batch())
            return self.further[-1]._replace(x=self.further[-1].x.double())

        pl_module.plays, pl_module.next_batch = watched_plays, watched_next_batch  # type: ignore[method-assign]
        pl_module.score = lambda x: score(x.double())  # type: ignore[method-assign]
        pl_module.terms = lambda x: terms(x.double())  # type: ignore[method-assign]
        pl_module.after_fit = lambda images: None  # type: ignore[method-assign]  # training alone is compared

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.should_stop = len(self.batches) == STEPS * EPOCHS


def positions(batches: Iterable[Batch], data: OneClassData) -> list[Tensor]:
    """Where the images of each batch stand among the training images, (B,) each."""
    where = torch.full((len(data.images.pixels),), -1)
    where[torch.from_numpy(data.partition.train)] = torch.arange(len(data.partition.train))
    return [where[batch.index.cpu()] for batch in batches]


@functools.cache
def witnessed(model: str) -> Witness:
    witness = Witness()
    training.fit(tiny(model), witness)
    assert len(witness.batches) == STEPS * EPOCHS
    return witness


def bare_losses(model: str, cfg: DictConfig, spoil: Callable[[Bare], None] = lambda bare: None) -> list[float]:
    """The bare loop's losses over the images that the lab saw."""
    witness, data = witnessed(model), build.make_data(config.job(cfg))
    bare = Bare(model, cfg, data, CPU)
    bare.images, _ = bare.images.double(), bare.detector.double()
    spoil(bare)
    batches, further = positions(witness.batches, data), positions(witness.further, data)
    rounds = len(further) // len(batches)
    found = []
    for number, (chosen, epoch) in enumerate(zip(batches, witness.epochs, strict=True)):
        for losses in bare.train([chosen], further[number * rounds : (number + 1) * rounds], epoch):
            found += [loss.item() for loss in losses]
    return found


@pytest.mark.parametrize("model", [pytest.param(m, marks=[pytest.mark.slow] * ("piad" in m)) for m in LOOPS])
def test_the_bare_loop_has_the_labs_losses_step_by_step(model: str) -> None:
    witness = witnessed(model)
    found = bare_losses(model, tiny(model))
    assert len(witness.losses) >= STEPS * EPOCHS and witness.epochs == [1, 1, 1, 2, 2, 2]
    torch.testing.assert_close(found, witness.losses, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("model", ["aae", "ganomaly"])
def test_the_bare_loop_has_the_labs_adam(model: str) -> None:
    cfg = tiny(model)
    bare = Bare(model, cfg, build.make_data(config.job(cfg)), CPU)
    for player, optimizer in bare.optimizers.items():
        given = cfg.model.optimizer.get(player, cfg.model.optimizer)
        assert bool(optimizer.defaults["fused"]) == bool(given.get("fused")) == (model == "aae")


@pytest.mark.parametrize("model", [pytest.param(m, marks=[pytest.mark.slow] * (m != "ganomaly")) for m in LOOPS])
def test_a_bare_loop_that_trains_otherwise_would_be_noticed(model: str) -> None:
    witness = witnessed(model)
    for player in build.make_detector(tiny(model), (1, 32, 32)).players():

        def hold(bare: Bare, player: str = player) -> None:
            bare.optimizers[player].param_groups[0]["lr"] = 0.0

        with pytest.raises(AssertionError, match="not close"):
            found = bare_losses(model, tiny(model), hold)
            torch.testing.assert_close(found, witness.losses, rtol=1e-9, atol=1e-12)


def test_every_method_of_the_four_papers_has_a_bare_loop_and_its_saved_passes_are_said() -> None:
    assert set(PASSES) == set(LOOPS)
    variants = {"shared_ae_printed", "piad", "piad_cifar10", "piad_coil100", "piad_pixel_l1_cifar10"}  # same step
    variants |= {"piad_squeezenet_cifar10", "autoencoder_beggel_fashion", "itsr_fashion"}
    variants |= {"ede_50", "shared_ae_no_adversary_50", "shared_ae_50"}
    rooms = ("shared_autoencoder", "ganomaly", "piad", "adversarial_autoencoder")
    models = {path.stem for path in (config.CONFIG_DIR / "model").glob("*.yaml")} - variants
    targets = {m: OmegaConf.select(config.compose([f"model={m}"]), "model.detector._target_") for m in models}
    assert {m for m, target in targets.items() if target and target.split(".")[2] in rooms} == set(LOOPS)


def test_the_published_loop_has_the_labs_losses() -> None:
    """It sees the same images and computes the same losses by twice as many passes of the discriminator."""
    cfg, witness = tiny("ganomaly"), witnessed("ganomaly")
    data = build.make_data(config.job(cfg))
    published = Published(cfg, data, CPU)
    for network in (published.encoder, published.decoder, published.encoder2, published.netd):
        network.double()
    published.images, published.input = published.images.double(), published.input.double()
    published.real_label, published.fake_label = published.real_label.double(), published.fake_label.double()
    chosen = torch.cat(positions(witness.batches, data))
    passes = []
    published.netd.register_forward_hook(lambda *_: passes.append(1))
    ordered = DataLoader(TensorDataset(published.images[chosen], chosen), batch_size=cfg.model.batch_size)
    found = [loss.item() for losses in published.train(ordered) for loss in losses]
    torch.testing.assert_close(found, witness.losses, rtol=1e-9, atol=1e-12)
    assert len(passes) == 4 * STEPS * EPOCHS


def test_the_published_loader_shuffles_whole_batches() -> None:
    cfg = tiny("ganomaly")
    published = Published(cfg, build.make_data(config.job(cfg)), CPU)
    chosen = torch.arange(100)
    batches = list(published.loader(chosen))
    assert [len(images) for images, _ in batches] == [64]
    assert not torch.equal(batches[0][0], published.images[chosen[:64]])


def test_throughputs_are_compared_pair_by_pair() -> None:
    ours = [compare.Cost(1.0, 2.0).per(10), compare.Cost(2.0, 4.0).per(10)]
    theirs = [compare.Cost(3.0, 2.0).per(10), compare.Cost(6.0, 4.0).per(10)]
    found = compare.contest(ours, theirs)
    assert found["pairs"] == 2
    assert found["ratio_cpu"] == {"median": 3.0, "low": 3.0, "high": 3.0}
    assert found["ratio_wall"]["median"] == 1.0
    assert found["ours_per_cpu_second"]["median"] == 7.5


def test_the_labs_training_is_measured_against_both_loops() -> None:
    rows = training.against_loops("ganomaly", "size=small", "model.detector.width=4", pairs=2, seconds=0.01)
    assert [row["against"] for row in rows] == ["bare", "published"]
    for row in rows:
        assert row["size"] == "small" and row["pairs"] == 2 and row["steps"] >= 3
        assert 0.05 < row["ratio_cpu"]["low"] <= row["ratio_cpu"]["high"] < 20
    assert rows[0]["ours_per_second"] == rows[1]["ours_per_second"]
    json.dumps(rows, allow_nan=False)


def test_a_baseline_is_not_slowed_by_the_deterministic_algorithms_of_a_run() -> None:
    seen: list[Any] = []
    watch = training.Stopwatch(1, [lambda: seen.append(torch.are_deterministic_algorithms_enabled())])
    training.fit(tiny("autoencoder_beggel"), watch)
    assert seen == [False, False] and len(watch.own) == len(watch.theirs[0]) == 1


def test_images_are_stored_at_the_size_of_known_data_sets() -> None:
    data = build.make_data(config.job(training.compose("aae", 5, 1, stored=(32, 3))))
    assert data.images.pixels.shape == (1797, 3, 32, 32)
    assert data.steps == 5
    assert data.images.pixels.max() == 255 and data.images.pixels.std() > 50


# Packages that are compared with ------------------------------------------------------------------------------------


def test_pyods_network_and_ours_are_the_same() -> None:
    pytest.importorskip("pyod", reason=f"pyod is not installed: {peers.INSTALL}")
    cfg = peers.fully_connected([12, 5], batch_size=16, steps=3, epochs=2)
    data = build.make_data(config.job(cfg))
    ours = build.make_detector(cfg, data.image_shape)
    costs, theirs = peers.pyod_epochs(cfg, data.prepared("train").flatten(1).numpy(), epochs=2)
    assert len(costs) == 2 and all(cost.cpu > 0 for cost in costs)
    assert [p.shape for p in ours.parameters()] == [p.shape for p in theirs.parameters()]
    with torch.no_grad():
        network = ours.eval().get_submodule("network")
        for own, other in zip(network.state_dict().items(), theirs.state_dict().items(), strict=True):
            assert own[0].rpartition(".")[2] == other[0].rpartition(".")[2]
            own[1].copy_(other[1])
        x = data.prepared("val")
        torch.testing.assert_close(network(x).flatten(1), theirs.eval()(x.flatten(1)))


def test_the_lab_is_measured_beside_pyod() -> None:
    pytest.importorskip("pyod", reason=f"pyod is not installed: {peers.INSTALL}")
    row = peers.against_pyod([8, 4], batch_size=16, steps=3, pairs=1)
    assert row["hidden"] == [8, 4] and row["pairs"] == 1 and row["ratio_cpu"]["median"] > 0


def test_neighbours_and_components_have_pyods_scores() -> None:
    pytest.importorskip("pyod", reason=f"pyod is not installed: {peers.INSTALL}")
    cfg = config.compose(["model=knn", "dataset=digits", "normal_class=3", "model.input.size=8"])
    rows = shallow.compared(build.make_data(config.job(cfg)), 1, "cpu")
    assert [(row["against"], row["what"]) for row in rows] == [
        *(("PyOD KNN", what) for what in ("fitting", "scoring")),
        *(("PyOD PCA", what) for what in ("fitting", "scoring")),
    ]
    for row in rows:
        assert row["largest_difference_in_std"] < 1e-4 and row["auroc_ours"] == pytest.approx(
            row["auroc_theirs"], abs=1e-5
        )
        assert row["ours_seconds"] > 0 and row["theirs_seconds"] > 0


def test_the_lab_is_measured_beside_anomalib() -> None:
    pytest.importorskip("anomalib", reason=f"anomalib is not installed: {peers.INSTALL}")
    row = peers.against_anomalib("ganomaly", "size=small", "model.detector.width=4", steps=3, pairs=1)
    assert row["batch_size"] == 64 and row["ratio_cpu"]["median"] > 0


def test_a_missing_package_is_one_line_that_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(peers, "missing", lambda package: True)
    rows = peers.measure("cpu", quick=True)
    assert [row["missing"] for row in rows] == capsys.readouterr().out.splitlines()
    assert all("pip install 'anomaly-lab[bench]'" in row["missing"] for row in rows)


# The command --------------------------------------------------------------------------------------------------------


def test_a_section_measured_alone_leaves_the_others_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in main.SECTIONS:
        measured = types.SimpleNamespace(measure=lambda device, quick, name=name: [{"name": name, "quick": quick}])
        monkeypatch.setitem(sys.modules, f"benchmarks.{name}", measured)
    written: list[Path] = []
    page = types.SimpleNamespace(write=written.append)
    monkeypatch.setitem(sys.modules, "benchmarks.page", page)
    monkeypatch.setattr(benchmarks, "page", page, raising=False)
    for arguments in (["cpu", "--quick"], ["cpu", "--only", "peers"]):
        monkeypatch.setattr(sys, "argv", ["benchmarks", *arguments, "--out", str(tmp_path)])
        main.main()
    threads = torch.get_num_threads() if "OMP_NUM_THREADS" in os.environ else len(os.sched_getaffinity(0))
    content = json.loads((tmp_path / "cpu.json").read_text())
    assert set(content) == {"header", *main.SECTIONS}
    assert content["peers"] == [{"name": "peers", "quick": False}]
    assert content["training"] == [{"name": "training", "quick": True}]
    assert content["header"]["measured"]["training"]["quick"] and all(
        about["threads"] == threads for about in content["header"]["measured"].values()
    )
    assert written == [tmp_path, tmp_path]


def test_a_part_measured_alone_takes_the_place_of_its_rows_and_says_when(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"model": name, "size": size, "ratio": 1} for size in ("full", "small") for name in ("ede", "aae", "itsr")]
    about = {"training": {"git_sha": "before"}, "training.ede": {}}
    (tmp_path / "cpu.json").write_text(json.dumps({"training": rows, "header": {"measured": about}}))
    new = [{"model": "aae", "size": size, "ratio": 2} for size in ("full", "small")]
    measured = types.SimpleNamespace(measure=lambda device, quick, part: new if part == "aae" else None)
    monkeypatch.setitem(sys.modules, "benchmarks.training", measured)
    page = types.SimpleNamespace(write=lambda folder: None)
    monkeypatch.setitem(sys.modules, "benchmarks.page", page)
    monkeypatch.setattr(benchmarks, "page", page, raising=False)
    monkeypatch.setattr(sys, "argv", ["benchmarks", "cpu", "--only", "training.aae", "--out", str(tmp_path)])
    main.main()
    content = json.loads((tmp_path / "cpu.json").read_text())
    assert [(row["model"], row["ratio"]) for row in content["training"]] == 2 * [("ede", 1), ("aae", 2), ("itsr", 1)]
    found = content["header"]["measured"]
    assert found["training"] == {"git_sha": "before"} and found["training.aae"]["load"] >= 0
    for wrong in ("nothing", "peers.aae"):
        monkeypatch.setattr(sys, "argv", ["benchmarks", "cpu", "--only", wrong, "--out", str(tmp_path)])
        with pytest.raises(SystemExit):
            main.main()
        assert f"there is no {wrong} to measure: choose among" in capsys.readouterr().err


def test_more_rows_of_a_part_than_before_follow_its_last_one() -> None:
    rows = [{"what": "runs", "n": 1}, {"what": "size", "n": 2}, {"what": "runs", "n": 3}, {"what": "images", "n": 4}]
    new = [{"what": "runs", "n": n} for n in (10, 20, 30)]
    assert [row["n"] for row in main.replaced(rows, "what", "runs", new)] == [10, 2, 20, 30, 4]
    assert [row["n"] for row in main.replaced(rows, "what", "runs", new[:1])] == [10, 2, 4]
