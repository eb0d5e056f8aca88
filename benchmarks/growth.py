"""Time and memory of a whole run against the number of images, their size, and the runs of one process.

Each point is a run of the lab in a process of its own, from import to written figures, so that its peak of resident
memory (``peak_mb``, the kernel's VmHWM) is its own. Counted in ``seconds``: training alone, of one epoch, as the
run records it. The peak includes torch itself, which a first row without any run shows; on a GPU ``device_mb`` is the
peak of tensors there.

``runs``: sixty runs with different seeds in one process; ``resident_mb`` is what it holds after so many of them.
``cifar10``: GANomaly at full width on the real CIFAR-10, and the method and protocol that look at the most images at
once (a dense autoencoder, whose threshold needs all training images, on nine of the ten classes).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

SMALL = ["model=ganomaly", "size=small", "model.budget.epochs=1", "model.budget.epoch_steps=1"]
IMAGES = (500, 2000, 10_000, 50_000)
SIZES = (8, 16, 32, 64, 128)
RUNS = (1, 2, 5, 10, 20, 30, 40, 50, 60)
TEST = 400  # test images of the synthetic sets
CIFAR10 = {
    "ganomaly, one class normal": ["model=ganomaly", "size=full", "split=official", "normal_class=0"],
    "aae, nine classes normal": ["model=aae", "size=full", "split=one_abnormal", "abnormal_class=0"],
}


def measure(device: str, quick: bool, what: str | None = None) -> dict[str, Any]:
    """Rows told apart by ``what``: images, size, runs, cifar10, and import, the process without a run.

    ``runs`` can be measured alone.
    """
    device = "cuda" if device == "gpu" else device
    if what is not None:
        if what != "runs":
            raise ValueError(f"growth.{what} is not measured alone, growth.runs is")
        with tempfile.TemporaryDirectory() as name:
            return {"rows": _several(Path(name), device, quick)}
    rows: list[dict[str, Any]] = [{"what": "import", "peak_mb": _process(device, [])["peak_mb"]}]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for images in IMAGES[:2] if quick else IMAGES:
            rows.append({"what": "images", **_synthetic(folder, device, images, 28)})
        for size in SIZES[:3] if quick else SIZES:
            rows.append({"what": "size", **_synthetic(folder, device, 500, size)})
        rows += _several(folder, device, quick)
        real = os.environ.get("ANOMALY_LAB_DATA")
        note = ""
        if real and (Path(real) / "cifar10.npz").is_file():
            for title, options in CIFAR10.items():
                where = [f"data_dir={real}", f"runs={folder / 'real'}", "dataset=cifar10", "model.budget.epochs=1"]
                found = _process(device, [[*where, *options, "trainer.progress=false"]])
                rows.append({"what": "cifar10", "run": title, **{k: v for k, v in found.items() if k != "resident_mb"}})
        else:
            note = " CIFAR-10 was not measured: ANOMALY_LAB_DATA names no folder with cifar10.npz."
    return {"rows": rows, "note": "Every point is a process of its own; memory is its peak, torch included." + note}


def _several(folder: Path, device: str, quick: bool) -> list[dict[str, Any]]:
    counts = RUNS[:2] if quick else RUNS
    found = _process(device, [[*_options(folder, 100, 28), f"seed={seed}"] for seed in range(counts[-1])])
    held, peak = found["resident_mb"], found["peak_mb"]
    return [{"what": "runs", "runs": n, "resident_mb": held[n - 1], "peak_mb": peak} for n in counts]


def _synthetic(folder: Path, device: str, images: int, size: int) -> dict[str, Any]:
    found = _process(device, [_options(folder, images, size)])
    del found["resident_mb"]
    return {"size": 32 if size == 28 else size, **found}


def _options(folder: Path, images: int, size: int) -> list[str]:
    """A small GANomaly on random images; 28 pixels become 32 as MNIST's do."""
    path = folder / f"{images}_{size}.npz"
    if not path.exists():
        import numpy as np

        random = np.random.default_rng(0)
        count = images + TEST
        np.savez(
            path,
            images=random.integers(0, 256, (count, 1, size, size), dtype=np.uint8),
            labels=np.where(np.arange(count) >= images + TEST // 2, 1, 0),
            is_test=np.arange(count) >= images,
            class_names=np.array(["normal", "anomalous"]),
        )
    where = [f"runs={folder / 'runs'}", f"data_dir={folder}", "dataset=npz", f"dataset.name=random_{images}_{size}"]
    where += [f"dataset.path={path}", "trainer.progress=false"]
    return [*SMALL, *where, "split=official", f"model.input.size={32 if size == 28 else size}"]


def _process(device: str, jobs: list[list[str]]) -> dict[str, Any]:
    """Make runs in a new process: what the last one recorded, and the memory it took."""
    given = json.dumps([[*job, "logger=none", f"trainer.accelerator={device}"] for job in jobs])
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        code = subprocess.call([sys.executable, "-m", "benchmarks.growth", given], stdout=out, stderr=errors)
        out.seek(0)
        errors.seek(0)
        if code:
            raise RuntimeError(f"a run for benchmarks.growth failed:\n{errors.read()[-2000:]}")
        found: dict[str, Any] = json.loads(out.read().splitlines()[-1])
    return found


def _runs(jobs: list[list[str]]) -> dict[str, Any]:
    """In the new process: make the runs, and look at what it holds after each."""
    from anomaly_lab import config
    from anomaly_lab.measure import peak_memory
    from anomaly_lab.run import run

    resident, result = [], None
    for job in jobs:
        result = run(config.compose(job))
        assert result is not None, "somebody else makes this run"
        with open("/proc/self/statm") as file:
            resident.append(int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20)
    held: dict[str, Any] = {"resident_mb": resident, "peak_mb": peak_memory()}
    if result is None:
        return held
    seconds, images = result["seconds"]["fit"], result["partition"]["train"]
    own = {"images": images, "seconds": seconds, "images_per_second": result["images_per_second"]}
    on_gpu = {} if result["device"] == "cpu" else {"device_mb": result["peak_memory_mb"]}
    return own | on_gpu | held


if __name__ == "__main__":
    print(json.dumps(_runs(json.loads(sys.argv[1]))))
