"""Runs as ONNX files: the same scores at any batch size, what the files say of themselves, and which methods refuse."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from test_methods import CEILINGS, MODELS, shrunk
from trained import one_abnormal

from anomaly_lab import cli, config, export, metrics, predict
from anomaly_lab.build import make_detector, make_prepare

onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra: pip install anomaly-lab[onnx]")

PAGE = Path(__file__).parent.parent / "docs/export.md"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A finished run, exported by the command."""
    folder = tmp_path_factory.mktemp("export")
    found = one_abnormal(folder)
    found.file, found.images = folder / "new" / "model.onnx", found.images[found.index]
    assert cli.export([str(found.out), "--out", str(found.file)]) == 0
    return found


def fitted(model: str) -> predict.FittedDetector:
    """A method as `load_run` gives it, of random weights and what its hooks find in noise."""
    cfg = config.compose([*shrunk(model), "size=small"])
    prepare = make_prepare(cfg)
    x = prepare(torch.from_numpy(np.random.RandomState(1).randint(0, 256, (60, 1, 8, 8)).astype(np.uint8)))
    detector = make_detector(cfg, (x.shape[1], x.shape[2], x.shape[3])).eval()
    detector.randomness.settle(torch.device("cpu"))
    generator = torch.Generator().manual_seed(1)
    for buffer in (b for name, b in detector.named_buffers() if name.endswith(("running_mean", "running_var"))):
        buffer.copy_(0.5 + torch.rand(buffer.shape, generator=generator))
    detector._images = SimpleNamespace(everything=lambda: SimpleNamespace(x=x, index=torch.arange(len(x))))  # type: ignore[assignment]
    with torch.no_grad():
        detector.before_fit(x)
        detector.after_fit(x)
    said = {
        "identity": {"model": model},
        "class_name": "0",
        "config": OmegaConf.to_container(cfg, resolve=True),
        "metrics": {"threshold": 1.0},
        "partition": {"fingerprint": "0" * 16},
        "image_shape": list(x.shape[1:]),
        "stored_shape": [1, 8, 8],
    }
    return predict.FittedDetector(detector, prepare, said, torch.device("cpu"))


def named(heading: str) -> list[str]:
    """The methods in the table of docs/export.md under a heading."""
    section = PAGE.read_text().partition(f"### {heading}\n")[2].partition("\n#")[0]
    return re.findall(r"^\| `(\w+)`", section, re.M)


def test_an_exported_file_gives_the_scores_of_the_run_at_any_batch_size(made: SimpleNamespace) -> None:
    session = onnxruntime.InferenceSession(str(made.file))
    image = predict.load_run(made.out).prepared(made.images)
    assert image.dtype == np.float32 and image.min() >= -1 and image.max() <= 1
    for count in (1, 2, len(image)):
        [score] = session.run(["score"], {"image": image[:count]})
        np.testing.assert_allclose(score, made.score[:count], rtol=1e-5, atol=1e-5)
    assert metrics.auroc(score, made.truth) == pytest.approx(made.result["metrics"]["auroc"], abs=1e-4)


def test_the_file_says_how_images_are_prepared_and_what_the_score_means(made: SimpleNamespace) -> None:
    session = onnxruntime.InferenceSession(str(made.file))
    said = {name: json.loads(value) for name, value in session.get_modelmeta().custom_metadata_map.items()}
    assert said["identity"] == made.result["identity"] and said["class"] == made.result["class_name"]
    assert said["role"] == "abnormal" and said["threshold"] == made.result["metrics"]["threshold"]
    assert said["code"] == made.result["git"] and said["fingerprint"] == made.result["partition"]["fingerprint"]
    assert said["decided_by"] == "held-out normals" and said["threshold_quantile"] == 0.95
    # As docs/export.md prepares an image without this package: 8 pixels, enlarged by 4 with bilinear interpolation.
    assert said["input"] == {
        "stored_shape": [1, 8, 8], "channels": None, "size": 32, "fit": "pad", "range": [-1, 1]
    }  # fmt: skip
    [given] = session.get_inputs()
    assert given.name == "image" and given.type == "tensor(float)" and given.shape[1:] == [1, 32, 32]
    assert isinstance(given.shape[0], str), "any number of images"


def test_images_of_the_user_are_compared_too(made: SimpleNamespace, tmp_path: Path, capsys) -> None:
    from PIL import Image

    Image.fromarray(made.images[0, 0]).save(tmp_path / "one.png")
    file = tmp_path / "model.onnx"
    assert cli.export([str(made.out), "--out", str(file), "--images", str(tmp_path / "one.png")]) == 0
    assert f"{3 * export.PER_KIND + 1} images score as in the run" in capsys.readouterr().out
    assert file.is_file()


def test_a_file_that_would_score_otherwise_is_not_written(made, tmp_path, monkeypatch, capsys) -> None:
    loaded = predict.load_run(made.out)
    score = loaded.detector.score
    monkeypatch.setattr(loaded.detector, "score", lambda x: score(x) + 1e-3 * torch.rand(x.shape[0]))
    monkeypatch.setattr(predict, "load_run", lambda *_: loaded)
    assert cli.export([str(made.out), "--out", str(tmp_path / "model.onnx")]) == cli.FAILED
    err = capsys.readouterr().err
    assert "cannot be exported: its scores in ONNX Runtime are up to" in err and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_difference_as_large_as_the_scores_is_too_large_however_small(made, tmp_path, monkeypatch) -> None:
    loaded = predict.load_run(made.out)
    score = loaded.detector.score
    monkeypatch.setattr(loaded.detector, "score", lambda x: 1e-7 * score(x))  # all of them below the tolerance
    made_now = export.export(loaded, tmp_path / "model.onnx")
    assert made_now.difference < export.OF_SPREAD * made_now.spread < export.TOLERANCE
    (tmp_path / "model.onnx").unlink()
    monkeypatch.setattr(loaded.detector, "score", lambda x: 1e-7 * (score(x) + torch.rand(x.shape[0])))
    with pytest.raises(export.RunFailed, match="its scores in ONNX Runtime are up to"):
        export.export(loaded, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("score", "why"),
    [
        (lambda x: x.mean((1, 2, 3)) if x.sum() > 0 else x.std((1, 2, 3)), "its score is no ONNX graph"),
        (lambda x: torch.stack([one.mean() for one in x]), "its score is no ONNX graph"),
        (lambda x: x.mean((1, 2, 3)) / len(x), r"its score is no ONNX graph \(it fixes the number of images"),
        (lambda x: torch.from_numpy(x.numpy().mean((1, 2, 3))), "its score is no ONNX graph"),
    ],
    ids=["branches on values", "a loop over the batch", "len()", "leaves torch"],
)
def test_code_that_is_no_graph_is_refused_in_a_line(made, tmp_path, monkeypatch, capfd, score, why) -> None:
    loaded = predict.load_run(made.out)
    monkeypatch.setattr(loaded.detector, "score", score)
    with pytest.raises(export.RunFailed, match=f"cannot be exported: {why}") as said:
        export.export(loaded, tmp_path / "model.onnx")
    assert "\n" not in str(said.value) and not list(tmp_path.iterdir())
    said = capfd.readouterr()
    assert "def forward" not in said.out + said.err and "Unable to find" not in said.err, "torch's own pages"


def test_what_cannot_be_loaded_or_is_not_installed_is_said(made, tmp_path, monkeypatch, capsys) -> None:
    assert cli.export([str(tmp_path), "--out", str(tmp_path / "model.onnx")]) == cli.MISTAKE
    assert "holds no finished run" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert cli.export([str(made.out), "--out", str(tmp_path / "model.onnx")]) == cli.MISTAKE
    assert "pip install anomaly-lab[onnx]" in capsys.readouterr().err


QUICK = ("knn", "pca", "anogan")
"""A bank of images, an eigenbasis, and a search at test time; all others in ``make test-slow``."""


def some(heading: str) -> list[object]:
    return [pytest.param(m, marks=[pytest.mark.slow] * (m not in QUICK)) for m in named(heading)]


@pytest.mark.parametrize("model", some("Exported"))
def test_methods_that_the_page_names_are_exported(model: str, tmp_path: Path) -> None:
    made = export.export(fitted(model), tmp_path / "model.onnx")
    assert made.spread > 0 and (tmp_path / "model.onnx").is_file()


@pytest.mark.parametrize("model", some("Refused"))
def test_methods_that_the_page_names_are_refused(model: str, tmp_path: Path) -> None:
    with pytest.raises(export.RunFailed, match=f"^{model} cannot be exported: "):
        export.export(fitted(model), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_the_page_names_methods() -> None:
    assert set(QUICK) <= {*named("Exported"), *named("Refused")} <= {*MODELS, *CEILINGS}
    assert not set(named("Exported")) & set(named("Refused"))
