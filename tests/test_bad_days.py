"""Full disks, read-only folders, flipped bits, too little memory: what happens to a run, and how it goes on."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Command, Said
from lightning import Callback
from omegaconf import DictConfig

from anomaly_lab import cli, config, grids
from anomaly_lab.build import load_checkpoint
from anomaly_lab.config import Job
from anomaly_lab.errors import RunFailed
from anomaly_lab.predict import load_run
from anomaly_lab.run import OutOfMemory, run

pytestmark = [pytest.mark.slow, pytest.mark.drawn]  # whatever a run writes may fail

TINY = (
    "model.budget.epochs=4 model.budget.epoch_steps=1 model.detector.width=4 trainer.progress=false trainer.threads=1"
)


def tiny(runs: Path, data: Path, *overrides: str) -> DictConfig:
    return config.compose([*TINY.split(), f"runs={runs}", f"data_dir={data}", *overrides])


def scores(cfg: DictConfig) -> bytes:
    with np.load(config.job(cfg).out / "scores.npz") as file:
        return bytes(file["score"].tobytes())


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, data: Path) -> DictConfig:
    cfg = tiny(tmp_path_factory.mktemp("undisturbed"), data)
    assert run(cfg) is not None
    return cfg


class At(Callback):
    """Does something when the given epoch (counted from 0) starts."""

    def __init__(self, epoch: int, action: Callable[[], object]) -> None:
        self._epoch, self._action = epoch, action

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch == self._epoch:
            self._action()


def stop() -> None:
    raise RuntimeError("stopped on purpose")


def stopped(runs: Path, data: Path) -> tuple[DictConfig, Path]:
    """A run that was stopped after its second epoch, and its checkpoint."""
    cfg = tiny(runs, data)
    with pytest.raises(RuntimeError, match="on purpose"):
        run(cfg, [At(2, stop)])
    return cfg, config.job(cfg).out / "last.ckpt"


@pytest.fixture
def lab(lab: Command, capfd: pytest.CaptureFixture[str]) -> Command:
    """``anomaly-lab`` for runs of a second, without Lightning's hint about srun."""

    def command(words: str) -> Said:
        capfd.readouterr()
        said = lab(f"{words} {TINY}")
        return said._replace(err="".join(line for line in said.err.splitlines(True) if "srun" not in line))

    return command


def mounted(target: Path, *words: str) -> Path:
    target.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(["mount", *words, str(target)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no right to mount: {done.stderr.strip()}")
    return target


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 12 MB, for as long as the test lasts."""
    target = mounted(tmp_path / "small", "-t", "tmpfs", "-o", "size=12m", "tmpfs")
    yield target
    subprocess.run(["umount", "--lazy", str(target)], check=True)


def fill(disk: Path) -> Path:
    filler = disk / "filler"
    with open(filler, "wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
        while True:
            file.write(bytes(4096))
    return filler


def test_a_full_disk_leaves_the_old_checkpoint_whole_and_the_run_resumable(
    small_disk: Path, data: Path, undisturbed: DictConfig
) -> None:
    cfg, checkpoint = stopped(small_disk / "runs", data)
    before = checkpoint.read_bytes()
    filler = small_disk / "filler"
    with pytest.raises(OSError, match="No space left on device") as caught:
        run(cfg, [At(2, lambda: fill(small_disk))])
    assert caught.value.filename in (str(checkpoint), str(checkpoint.with_name("metrics.csv")))
    assert checkpoint.read_bytes() == before
    assert not list(small_disk.rglob("*.part"))
    filler.unlink()
    assert run(cfg, [At(0, stop), At(1, stop)]) is not None, "it did not go on after its second epoch"
    assert scores(cfg) == scores(undisturbed)


def test_a_full_disk_is_one_line_that_says_what_to_do(lab: Command, small_disk: Path) -> None:
    runs = small_disk / "runs"
    runs.mkdir()
    filler = fill(small_disk)
    for words in ("", "-m normal_class=0,1,2 "):  # no run of a sweep could be written: it ends at once
        code, out, err = lab(f"{words}runs={runs}")
        assert (code, out) == (cli.FAILED, "")
        assert err.count("\n") == 1 and err.startswith("anomaly-lab: error: ")
        assert "cannot be written: the file system is full. Make room" in err and "runs=DIR" in err
    filler.unlink()
    assert lab(f"-m normal_class=0,1 runs={runs}").out.endswith("2 runs: 2 done\n")


def test_a_sweep_whose_disk_fills_in_the_middle_keeps_what_is_done_and_goes_on_later(
    lab: Command, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import anomaly_lab.run as module

    real = module.run

    def fills_before_the_second(job: Job) -> Any:
        if job.cfg.normal_class == 1 and not (small_disk / "filler").exists():
            fill(small_disk)
        return real(job)

    monkeypatch.setattr(module, "run", fills_before_the_second)
    code, out, err = lab(f"-m normal_class=0,1,2 runs={small_disk / 'runs'}")
    assert code == cli.FAILED and out.count("AUROC") == 1
    assert err.splitlines()[-1].startswith("anomaly-lab: error: ") and "the file system is full" in err
    (small_disk / "filler").write_bytes(b"")
    code, out, _ = lab(f"-m normal_class=0,1,2 runs={small_disk / 'runs'}")
    assert code == 0 and out.count("(done before)") == 1 and out.endswith("3 runs: 3 done\n")
    assert not list(small_disk.rglob("*.part")) and not list(small_disk.rglob(".sweep-*"))


def test_a_report_below_a_file_prints_its_tables_and_says_what_to_do(
    lab: Command, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert lab("runs=written").code == 0
    (tmp_path / "file").write_text("")
    assert cli.report(["written", "--out", str(tmp_path / "file" / "report")]) == cli.MISTAKE
    out, err = capfd.readouterr()
    assert "`shared_ae_50_small [" in out and "Errno" not in err
    assert str(tmp_path / "file") in err and err.endswith(
        "cannot be written: not a directory; name another place with --out DIR\n"
    )


def test_a_read_only_folder_is_one_line_and_what_is_done_there_is_still_read(
    lab: Command, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert lab("runs=written").code == 0
    target = mounted(tmp_path / "mount", "--bind", str(tmp_path / "written"))
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", str(target)], check=True)
        code, out, err = lab("runs=mount normal_class=1")
        assert (code, out) == (cli.FAILED, "")
        assert err.count("\n") == 1 and "cannot be written: the file system is read-only" in err
        code, out, _ = lab("runs=mount")
        assert code == 0 and "AUROC" in out
        code, out, err = lab("-m runs=mount normal_class=0")
        assert code == 0 and "(done before)" in out and out.endswith("1 run: 1 done\n"), err
        code, out, err = lab("-m runs=mount normal_class=0,1")
        assert (code, out) == (cli.FAILED, "") and err.count("\n") == 1 and "read-only" in err
        assert cli.report(["mount"]) == cli.FAILED
        out, err = capfd.readouterr()
        assert "`shared_ae_50_small [" in out and "| 1.0" not in err and err.endswith("with --out DIR\n")
        assert cli.report(["mount", "--out", "report"]) == 0
    finally:
        subprocess.run(["umount", "--lazy", str(target)], check=True)


def test_a_run_whose_folder_is_removed_ends_and_writes_nothing_into_the_next_ones(tmp_path: Path, data: Path) -> None:
    cfg = tiny(tmp_path / "runs", data)
    out = config.job(cfg).out

    def removed() -> None:
        shutil.rmtree(out)
        out.mkdir()
        (out / ".lock").touch()  # as another process that makes the same run

    with pytest.raises(RunFailed, match="was removed while its run was made, so it ends: start it again"):
        run(cfg, [At(1, removed)])
    assert [path.name for path in out.iterdir()] == [".lock"]


def truncated(raw: bytes) -> bytes:
    return raw[: len(raw) // 2]


def flipped(raw: bytes) -> bytes:
    """One bit of one weight, which torch.load does not notice."""
    changed = bytearray(raw)
    changed[len(raw) // 2] ^= 16
    return bytes(changed)


@pytest.mark.parametrize("damage", [truncated, flipped, lambda raw: b""], ids=["truncated", "flipped", "empty"])
def test_a_damaged_checkpoint_is_noticed_and_the_run_made_anew(
    damage: Callable[[bytes], bytes],
    tmp_path: Path,
    data: Path,
    undisturbed: DictConfig,
    caplog: pytest.LogCaptureFixture,
) -> None:
    cfg, checkpoint = stopped(tmp_path / "runs", data)
    checkpoint.write_bytes(damage(checkpoint.read_bytes()))
    if damage is flipped:
        torch.load(checkpoint, weights_only=True)
    with caplog.at_level(logging.WARNING):
        assert run(cfg) is not None
    assert "cannot be read: starting again" in caplog.text
    assert scores(cfg) == scores(undisturbed)


def test_a_flipped_bit_in_a_finished_run_is_not_scored_with(tmp_path: Path, data: Path) -> None:
    cfg = tiny(tmp_path / "runs", data, "model.budget.epochs=1")
    assert run(cfg) is not None
    checkpoint = config.job(cfg).out / "last.ckpt"
    checkpoint.write_bytes(flipped(checkpoint.read_bytes()))
    with pytest.raises(ValueError, match="damaged"):
        load_run(config.job(cfg).out)


def test_a_data_cache_damaged_since_is_one_line_and_nothing_is_trained_on_it(lab: Command, tmp_path: Path) -> None:
    assert lab("data_dir=mine").code == 0
    cache = tmp_path / "mine/digits.npz"
    cache.write_bytes(flipped(cache.read_bytes()))
    config._images.cache_clear()  # what a process has read it keeps
    code, out, err = lab("data_dir=mine normal_class=1")
    assert code == cli.MISTAKE and out == "" and err.count("\n") == 1
    assert "mine/digits.npz is damaged or unreadable" in err and "delete it and run `anomaly-lab-data download" in err
    assert not (tmp_path / "runs/shared_ae_50_small/digits/pooled/n1").exists()


def test_what_killed_processes_left_is_cleaned_up_and_blocks_nothing(tmp_path: Path, data: Path) -> None:
    cfg = tiny(tmp_path / "runs", tmp_path / "data", "model.budget.epochs=1")
    (tmp_path / "data").mkdir()
    out = tmp_path / "runs/shared_ae_50_small/digits/pooled/n0"
    left = [tmp_path / "data/.digits.npz.0123abcd.part"]
    config._images.cache_clear()
    left[0].write_bytes(b"half")
    out = config.job(cfg).out
    left += [out / ".last.ckpt.0123abcd.part", out / "figures/.roc.png.0123abcd.part"]
    for path in left[1:]:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"half")
    (out / ".lock").write_bytes(b"")
    assert run(cfg) is not None
    assert not any(path.exists() for path in left)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory."), MemoryError()], ids=["GPU", "CPU"])
def test_too_little_memory_names_batch_size_and_memory(
    error: BaseException, tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (2**30, 2**33))
    cfg = tiny(tmp_path / "runs", data, "model.batch_size=48", "trainer.accelerator=cpu")
    with pytest.raises(OutOfMemory) as caught:
        run(cfg, [At(0, fail)])
    line = str(caught.value)
    assert "model.batch_size=48" in line and "8192 MB in all, 1024 MB of them free" in line and "\n" not in line
    failure = json.loads((config.job(cfg).out / "failure.json").read_text())
    assert failure["error"].startswith("OutOfMemory: out of memory with model.batch_size=48")
    assert "in fail" in failure["traceback"]


def test_one_run_out_of_memory_is_a_failure_and_the_sweep_goes_on(
    lab: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    from anomaly_lab.methods.shared_autoencoder import SharedAutoencoder

    real = SharedAutoencoder.plays

    def too_large(self: Any, batch: Any) -> Any:
        if len(batch.x) > 50:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(self, batch)

    monkeypatch.setattr(SharedAutoencoder, "plays", too_large)
    code, out, err = lab("-m model.batch_size=64,32")
    assert code == cli.FAILED and "AUROC" in out and "2 runs: 1 failed, 1 done" in out
    assert "out of memory with model.batch_size=64" in err and "Traceback" not in err


def test_pruned_checkpoints_still_score_and_only_the_optimisers_are_lost(
    tmp_path: Path,
    data: Path,
    undisturbed: DictConfig,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cfg = tiny(tmp_path / "runs", data)
    assert run(cfg) is not None
    monkeypatch.setattr(grids, "expected_runs", lambda name: [])
    assert cli.report([str(tmp_path / "runs"), "--prune", "--experiment", "another"]) == 0
    assert capsys.readouterr().out == "pruned 0 of 0 finished runs: 0.0 MB less\n", "it is no run of that experiment"
    _, interrupted = stopped(tmp_path / "others", data)
    before, kept = (config.job(cfg).out / "last.ckpt").stat().st_size, interrupted.read_bytes()
    images = config.load_images(cfg).pixels[:20]
    expected = load_run(config.job(cfg).out).score(images)

    first_of_all = tiny(tmp_path / "runs", data, "model=ede")  # it keeps none of the others as they are
    assert run(first_of_all) is not None
    damaged = config.job(first_of_all).out
    (damaged / "last.ckpt").write_bytes(b"no archive")
    assert cli.report([str(tmp_path / "runs"), "--prune"]) != 0
    assert cli.report([str(tmp_path / "others"), "--prune"]) == 0
    said = capsys.readouterr()
    first, second = said.out.splitlines()
    assert "1 not pruned: " in said.err and f"{damaged / 'last.ckpt'}" in said.err
    after = (config.job(cfg).out / "last.ckpt").stat().st_size
    assert after < before / 2
    assert first == f"pruned 1 of 2 finished runs: {(before - after) / 1e6:.1f} MB less"
    shutil.rmtree(damaged)
    assert second == "pruned 0 of 0 finished runs: 0.0 MB less"
    assert interrupted.read_bytes() == kept, "an unfinished run needs its optimisers"
    assert np.array_equal(load_run(config.job(cfg).out).score(images), expected)
    assert cli.report([str(tmp_path / "runs"), "--prune"]) == 0
    assert capsys.readouterr().out == "pruned 0 of 1 finished runs: 0.0 MB less\n"

    (config.job(cfg).out / "result.json").unlink()
    assert "optimizer_states" not in load_checkpoint(config.job(cfg).out / "last.ckpt")
    assert run(cfg) is not None and scores(cfg) == scores(undisturbed), "without optimisers it starts again"
