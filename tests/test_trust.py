"""A run folder is data: whatever it names, nothing but its detector is made of it."""

from __future__ import annotations

import json
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from anomaly_lab import cli, config, load_run
from anomaly_lab.run import run

TINY = ["model.budget.epochs=1", "model.budget.epoch_steps=1", "model.detector.width=4", "trainer.progress=false"]

MINE = """
from pathlib import Path
from torch import load, nn
from anomaly_lab.methods.shared_autoencoder import SharedAutoencoder

Path("imported").touch()

class Mine(SharedAutoencoder):
    def __init__(self, image_shape, activation=None, **given):
        super().__init__(image_shape, **given)
"""


class Touches:
    """Unpickled, it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self.marker,)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    cfg = config.compose([*TINY, f"runs={tmp_path_factory.mktemp('trust')}", f"data_dir={data}"])
    assert run(cfg) is not None
    return config.job(cfg).out


Named = Callable[..., Path]


@pytest.fixture
def named(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Named:
    """A copy of the run whose configuration has something else under ``model``; the working folder is its neighbour."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "pickle").write_bytes(pickle.dumps(Touches(tmp_path / "marker")))
    np.save(tmp_path / "pickle.npy", np.array([Touches(tmp_path / "marker")], dtype=object), allow_pickle=True)
    (tmp_path / "secret").write_text("secret")
    folder = tmp_path / "run"

    def edited(key: str, value: Any) -> Path:
        shutil.copytree(made, folder)
        result = json.loads((folder / "result.json").read_text())
        *path, last = key.split(".")
        section = result["config"]["model"]
        for name in path:
            section = section[name]
        section[last] = value
        (folder / "result.json").write_text(json.dumps(result))
        return folder

    yield edited
    sys.modules.pop("mine", None)


EXPLOITS = {
    "torch.load": {"_target_": "torch.load", "f": "pickle", "weights_only": False},
    "numpy.load": {"_target_": "numpy.load", "file": "pickle.npy", "allow_pickle": True},
    "pandas.read_pickle": {"_target_": "pandas.read_pickle", "filepath_or_buffer": "pickle"},
    "open": {"_target_": "io.open", "file": "marker", "mode": "w"},
    "shutil.copyfile": {"_target_": "shutil.copyfile", "src": "secret", "dst": "marker"},
    "a module of the current folder": {"_target_": "mine.Mine"},
    "torch.load by way of a module of ours": {"_target_": "anomaly_lab.build.torch.load", "f": "pickle"},
    "what a module of ours imports": {"_target_": "anomaly_lab.predict.Path", "_args_": ["x"]},
    "a function of ours": {"_target_": "anomaly_lab.files.write_atomically", "path": "marker"},
    "an interpolation": {"_target_": "${oc.env:HOME}"},
    "no text": {"_target_": ["torch.load"]},
    "nothing": {"_target_": ""},
    "a list": {"_target_": "anomaly_lab.networks.Encoder", "_args_": [{"_target_": "io.open", "file": "marker"}]},
}


@pytest.mark.parametrize("exploit", EXPLOITS.values(), ids=EXPLOITS)
@pytest.mark.parametrize("key", ["detector", "detector.features", "input.features"])
def test_what_a_run_folder_names_is_refused_before_anything_is_imported_or_called(
    named: Named, exploit: dict[str, Any], key: str, tmp_path: Path
) -> None:
    folder = named(key, exploit)
    before = set(sys.modules)
    with pytest.raises(
        ValueError, match=rf"result.json names model\.{key}\S*=.*not called|cannot be imported"
    ) as caught:
        load_run(folder)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "marker").exists() and not (tmp_path / "imported").exists()
    assert not {name for name in set(sys.modules) - before if not name.startswith("anomaly_lab")}


def test_the_command_says_it_in_one_line_and_scores_nothing(named: Named, capsys, tmp_path: Path) -> None:
    Image.new("L", (8, 8)).save(tmp_path / "x.png")
    folder = named("detector", EXPLOITS["torch.load"])
    assert cli.score([str(folder), "x.png"]) == cli.MISTAKE
    [line] = capsys.readouterr().err.splitlines()
    assert "model.detector='torch.load'" in line and "--trust MODULE" in line
    assert not (tmp_path / "marker").exists() and not (tmp_path / "scores.csv").exists()


@pytest.mark.parametrize("key", ["optimizer", "scheduler"])
def test_loading_makes_no_optimiser(named: Named, key: str, tmp_path: Path) -> None:
    load_run(named(key, EXPLOITS["open"]))
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("detector", [None, [], "torch.load", {"width": 4}, 4])
def test_a_configuration_without_a_detector_is_one_line(named: Named, detector: Any) -> None:
    with pytest.raises(ValueError, match=r"model\.detector names no class"):
        load_run(named("detector", detector))


def test_a_detector_that_cannot_be_made_is_one_line(named: Named) -> None:
    with pytest.raises(ValueError, match="its detector cannot be made"):
        load_run(named("detector.width", "wide"))


def test_a_method_of_ones_own_is_loaded_from_the_module_that_is_trusted(named: Named, tmp_path: Path) -> None:
    folder = named("detector._target_", "mine.Mine")
    with pytest.raises(ValueError, match="not called"):
        load_run(folder)
    assert not (tmp_path / "imported").exists()
    assert type(load_run(folder, trust=["mine"]).detector).__name__ == "Mine"
    with pytest.raises(ValueError, match="not called"):
        load_run(folder, trust=["min"])


@pytest.mark.parametrize("target", ["mine.load", "torch.nn.ReLU", "io.open", "mine.nowhere"])
def test_trust_goes_to_what_a_module_defines_not_to_what_it_imports(named: Named, target: str, made: Path) -> None:
    own = json.loads((made / "result.json").read_text())["config"]["model"]["detector"]
    mine = own | {"_target_": "mine.Mine", "activation": {"_target_": target, "_partial_": True}}
    folder = named("detector", mine)
    with pytest.raises(ValueError, match=r"model\.detector\.activation='"):
        load_run(folder, trust=["mine"])
    if target == "torch.nn.ReLU":
        load_run(folder, trust=["mine", "torch.nn"])
