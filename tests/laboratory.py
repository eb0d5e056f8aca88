"""The commands in processes of their own, with runs that wait for each other or for the test."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from conftest import Said

from anomaly_lab import config, record

ROOT = Path(__file__).parent.parent

BARE = ["trainer.progress=false", "trainer.figures=false"]
SMALL = ["model.budget.epoch_steps=1", "model.detector.width=4", *BARE]

PROBE = '''
import json, os, time
from pathlib import Path
import torch
from anomaly_lab.detector import Detector

class Probe(Detector):
    """Writes down what its process sees, and waits until so many have done the same: they run side by side."""

    def before_fit(self, images):
        here, wanted = Path(os.environ["ANOMALY_LAB_PROBES"]), int(os.environ["ANOMALY_LAB_PROBES_AT_ONCE"])
        seen = {"gpu": os.environ.get("CUDA_VISIBLE_DEVICES"), "threads": torch.get_num_threads()}
        mine = here / f"{os.getpid()}-{seen['gpu']}.part"
        mine.write_text(json.dumps(seen))
        mine.rename(mine.with_suffix(".json"))
        end = time.monotonic() + 1200
        while len(list(here.glob("*.json"))) < wanted and not (here / "go on").exists():
            assert time.monotonic() < end, "the others did not come"
            time.sleep(0.1)

    def score(self, x):
        return x.mean((1, 2, 3))
'''

PROBE_YAML = """
detector: {_target_: probe.Probe}
optimizer: {}
scheduler: null
clip: null
budget: {epochs: 1, steps: null, epoch_steps: 1}
batch_size: 64
input: {size: 8, fit: pad, range: [0, 1], channels: null}
"""

GATED = '''
import os, time
from pathlib import Path
from anomaly_lab.methods.shared_autoencoder import SharedAutoencoder

class Gated(SharedAutoencoder):
    """Waits before the step whose number, counted from 0 by its own process, stands in the file of the gate."""

    taken = 0

    def plays(self, batch):
        gate = Path(os.environ["GATE"])
        while gate.exists() and self.taken >= int(gate.read_text()):
            gate.with_suffix(f".waits.{os.getpid()}").touch()
            time.sleep(0.05)
        self.taken += 1
        with open(gate.with_suffix(".steps"), "a") as steps:
            print(os.getpid(), file=steps)
        return super().plays(batch)
'''
GATED_MODEL = ["model.detector._target_=gated.Gated", "model.batch_size=96", *SMALL]
"""One step an epoch, on the digits."""


DEADLY = '''
import os, signal
from anomaly_lab.detector import Detector

class Deadly(Detector):
    """Makes a run, raises, or takes its whole process along, as the kernel does where memory is out."""

    def __init__(self, image_shape, *, mood):
        super().__init__(image_shape)
        self.mood = mood

    def before_fit(self, images):
        if self.mood == "raises":
            raise RuntimeError("a fault")
        if self.mood == "dies":
            os.kill(os.getpid(), signal.SIGKILL)

    def score(self, x):
        return x.mean((1, 2, 3))
'''


class Lab(NamedTuple):
    """``anomaly-lab`` and its sisters in a folder of their own."""

    folder: Path
    environment: Mapping[str, str]

    def __call__(self, *words: str, command: str = "train", code: Path = ROOT) -> Said:
        program = (
            f"import sys; sys.argv[0] = 'anomaly-lab'; from anomaly_lab.cli import {command}; sys.exit({command}())"
        )
        done = subprocess.run(
            [sys.executable, "-c", program, *words],
            cwd=self.folder,
            env={**self.environment, "PYTHONPATH": os.pathsep.join([str(code), str(self.folder)])},
            capture_output=True,
            text=True,
        )
        return Said(done.returncode, done.stdout, done.stderr)

    def status(self) -> dict[str, tuple[str, str]]:
        """State and details by the folder of the class, as ``anomaly-lab-report --status`` prints them."""
        lines = self("runs", "--status", command="report").out.splitlines()[:-1]
        rows = [line.split(maxsplit=2) for line in lines]
        return {path.split("/")[3]: (state, "".join(rest)) for state, path, *rest in rows}

    def result(self, name: str = "n0") -> dict[str, Any]:
        [path] = self.folder.glob(f"runs/*/*/*/{name}/*/result.json")
        found: dict[str, Any] = json.loads(path.read_text())
        return found

    # Runs that wait for each other

    def with_probe(self, at_once: int) -> Lab:
        """The same with ``model=probe``, of which so many wait for each other."""
        (self.folder / "conf" / "model").mkdir(parents=True)
        (self.folder / "conf" / "model" / "probe.yaml").write_text(PROBE_YAML)
        (self.folder / "probe.py").write_text(PROBE)
        (self.folder / "probes").mkdir()
        own = {"ANOMALY_LAB_PROBES": str(self.folder / "probes"), "ANOMALY_LAB_PROBES_AT_ONCE": str(at_once)}
        return self._replace(environment={**self.environment, config.EXTRA_CONFIGS: str(self.folder / "conf"), **own})

    def probes(self) -> list[dict[str, Any]]:
        return [json.loads(path.read_text()) for path in (self.folder / "probes").glob("*.json")]

    def let_probes_go(self) -> None:
        """However many of them wait."""
        (self.folder / "probes" / "go on").touch()

    def with_deadly(self) -> Lab:
        """The same with ``model=deadly``, which ends as its ``model.detector.mood`` says."""
        (self.folder / "conf" / "model").mkdir(parents=True)
        yaml = PROBE_YAML.replace("probe.Probe", "deadly.Deadly, mood: fine")
        (self.folder / "conf" / "model" / "deadly.yaml").write_text(yaml)
        (self.folder / "deadly.py").write_text(DEADLY)
        return self._replace(environment={**self.environment, config.EXTRA_CONFIGS: str(self.folder / "conf")})

    # Runs that wait for the test

    def with_gate(self, steps: int) -> Lab:
        """The same with ``GATED_MODEL``, which waits after so many steps."""
        (self.folder / "gated.py").write_text(GATED)
        self.close_gate(steps)
        return self._replace(environment={**self.environment, "GATE": str(self.folder / "gate")})

    def close_gate(self, steps: int) -> None:
        """Let processes that start from now on wait after so many steps."""
        for process in self.waiting():
            (self.folder / f"gate.waits.{process}").unlink()
        (self.folder / "gate.part").write_text(str(steps))
        (self.folder / "gate.part").rename(self.folder / "gate")

    def open_gate(self) -> None:
        (self.folder / "gate").unlink()

    def waiting(self) -> list[int]:
        """The processes that have reached the gate."""
        return [int(path.suffix[1:]) for path in self.folder.glob("gate.waits.*")]

    def waits(self) -> bool:
        """Whether a run has reached the gate."""
        return bool(self.waiting())

    def steps(self) -> Counter[int]:
        """How many steps each process has taken, by its number."""
        path = self.folder / "gate.steps"
        return Counter(map(int, path.read_text().split()) if path.exists() else ())


def environment(data: Path, of: Mapping[str, str] = os.environ) -> dict[str, str]:
    hidden = ("CUDA_VISIBLE_DEVICES", config.EXTRA_CONFIGS, record.SUBMITTED)
    return {name: value for name, value in of.items() if name not in hidden} | {"ANOMALY_LAB_DATA": str(data)}


def unlimited(data: Path) -> dict[str, str]:
    """An environment that says nothing about threads."""
    return {name: value for name, value in environment(data).items() if not name.endswith("_NUM_THREADS")}


def until(condition: Callable[[], object], what: Callable[[], object] = str, seconds: float = 1500) -> None:
    """Wait for ``condition``; an error with ``what()`` where it does not come true in time."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, what()
        time.sleep(0.1)
