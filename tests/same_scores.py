"""Whether two revisions compute the same: one config of every method trained for a few steps, scores.npz byte by byte.

    python tests/same_scores.py BEFORE [AFTER]      git revisions; AFTER is the working tree unless given

Both sides train the methods that both have, on the embedded digits, on one CPU thread, each in a process of its own.
Compared is every array of scores.npz that both sides write. Exit code 1 and the names of the methods if any differs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

ROOT = Path(__file__).resolve().parent.parent

PROGRAM = """
import json, sys
from pathlib import Path
from omegaconf import OmegaConf
from anomaly_lab import config
from anomaly_lab.run import run

shrink = {
    "detector.width": 4, "detector.critic_width": 8,
    "detector.encoder_widths": [4, 4, 4, 4], "detector.generator_widths": [4, 4, 4, 4],
    "detector.image_critic_widths": [4, 4, 4, 4], "detector.latent_critic_widths": [4, 4],
    "detector.gamma_every": 3, "detector.rounds": 2,
    "detector.features.architecture": "squeezenet1_0", "detector.features.weights": "random",
    "detector.features.path": "null", "detector.features.sha256": "null",
}
out, size = Path(sys.argv[1]), ["size=full"] if "\\nsize:" in (config.CONFIG_DIR / "train.yaml").read_text() else []
for method in sys.argv[2:]:
    given = [f"model={method}", *size]
    model = config.compose(given).model
    short = [f"model.{key}={value}" for key, value in shrink.items() if OmegaConf.select(model, key) is not None]
    if OmegaConf.select(model, "detector.features") is not None:
        short.append("model.pretrained=null")
    stages = model.budget.get("stages")
    epochs = "stages={%s}" % ",".join(f"{name}:2" for name in stages) if stages else "epochs=3"
    short += [f"model.budget.{epochs}", "model.budget.epoch_steps=4"] + ["model.budget.steps=null"] * (not stages)
    cfg = config.compose([*given, *short, "dataset=digits", "split=pooled", "normal_class=3", "seed=1",
        "split.contamination.rate=0.05", "trainer.accelerator=cpu", "trainer.threads=1", "trainer.progress=false",
        "logger=none", f"runs={out / method}", f"data_dir={out}"])
    print(method, run(cfg)["metrics"]["auroc"], flush=True)
"""


@contextmanager
def checkout(revision: str | None) -> Iterator[Path]:
    """The files of a revision, the working tree for None."""
    if revision is None:
        yield ROOT
        return
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder, "tree")
        subprocess.run(["git", "worktree", "add", "--quiet", "--detach", place, revision], cwd=ROOT, check=True)
        try:
            yield place
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", place], cwd=ROOT, check=True)


def methods(revision: str | None) -> set[str]:
    """The names of the methods that a revision has a full-size config of."""
    with checkout(revision) as tree:
        return {path.stem for path in (tree / "conf/model").glob("*.yaml") if not path.stem.endswith("_small")}


def scores(revision: str | None, out: Path, methods: Sequence[str]) -> dict[str, dict[str, str]]:
    """SHA-256 of the bytes of each array of scores.npz, by method."""
    with checkout(revision) as tree:
        environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, "-c", PROGRAM, out, *methods]
        subprocess.run(command, cwd=out, env=environment, check=True, stdout=sys.stderr)
    found: dict[str, dict[str, str]] = {}
    for path in sorted(out.rglob("scores.npz")):
        with np.load(path) as arrays:
            sums = {name: hashlib.sha256(arrays[name].tobytes()).hexdigest() for name in arrays.files}
        found[path.relative_to(out).parts[0]] = sums
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before")
    parser.add_argument("after", nargs="?")
    parser.add_argument("--keep", type=Path, metavar="FILE", help="read BEFORE's checksums there, or write them")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for name in ("before", "after"):
            Path(folder, name).mkdir()
        both = sorted(methods(asked.before) & methods(asked.after))
        if asked.keep and asked.keep.exists():
            before = json.loads(asked.keep.read_text())
        else:
            before = scores(asked.before, Path(folder, "before"), both)
            if asked.keep:
                asked.keep.write_text(json.dumps(before, indent=1))
        after = scores(asked.after, Path(folder, "after"), both)
    different = []
    for name in both:
        shared = before[name].keys() & after[name].keys()
        assert {"score", "val_score", "truth", "index"} <= shared
        unequal = sorted(key for key in shared if before[name][key] != after[name][key])
        different += [name] * bool(unequal)
        print(f"{name:<28}{'DIFFERENT: ' + ', '.join(unequal) if unequal else f'equal: {len(shared)} arrays'}")
    print(f"{len(both)} methods compared, {len(different)} different")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
