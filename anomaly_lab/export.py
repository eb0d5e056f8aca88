"""A finished run as an ONNX file, whose scores are held to the run's before it is written (docs/export.md).

Legend of the shape comments: B images, C channels, S×S pixels as the network sees them.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from anomaly_lab import __version__
from anomaly_lab.errors import RunFailed, shortened
from anomaly_lab.files import write_atomically

if TYPE_CHECKING:
    from anomaly_lab.predict import FittedDetector

TOLERANCE = 1e-5
"""How far an exported score may be from the run's: absolute, or relative where the score is larger than 1."""

OF_SPREAD = 0.02
"""And how far at most, as a share of the scores' standard deviation: some methods' scores are all smaller than 1e-5."""

PREPARATION = ("channels", "size", "fit", "range")
"""Keys of ``model.input`` that say how stored pixels become the file's input."""

REASONS = {
    "Constraints violated": "it fixes the number of images",
    "data-dependent": "its code branches or counts on values",
}
"""What torch.export says over many lines of code that is no graph."""

PER_KIND = 16
"""Images of each kind that both are held to: `like_test_images`."""


class Exported(NamedTuple):
    """How near an exported file comes to its run."""

    images: int
    difference: float  # the largest between two scores of one image
    spread: float  # standard deviation of the scores


def export(fitted: FittedDetector, out: Path, images: NDArray[np.uint8] | None = None) -> Exported:
    """Write ``out``: float32 ``image`` (B,C,S,S) in, prepared as ``metadata_props["input"]`` says, ``score`` (B,) out.

    B is free. Fixed features that come before the method are part of the file. All else that is needed to use it is in
    `metadata`. ONNX Runtime runs the graph on images like those of the test set, at once and one alone, before anything
    is written.

    Args:
        images: further ones to compare on, as `FittedDetector.score` takes them.

    Raises:
        RunFailed: the method cannot be exported, for it searches at test time, or its code or one of its operators has
            no counterpart; or the file would score otherwise than the run. One line.
        ValueError: a package is missing.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  torch.onnx needs it
    except ImportError as error:
        raise ValueError(f"export needs an extra ({error.name} is missing): pip install anomaly-lab[onnx]") from error

    name = fitted.result["identity"]["model"]
    pixels = [like_test_images(fitted.stored_shape), *([] if images is None else [images])]
    image, expected = (np.concatenate([of(some) for some in pixels]) for of in (fitted.prepared, fitted.score))
    content = _graph(fitted, image, name)
    try:
        onnxruntime.set_default_logger_severity(4)  # what it would print is in the exception
        session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
        found, alone = (session.run(["score"], {"image": some})[0] for some in (image, image[:1]))
    except Exception as error:  # its exceptions have no common class
        raise RunFailed(f"{name} cannot be exported: ONNX Runtime cannot run it ({shortened(error)})") from error
    differences = np.abs(np.concatenate([found - expected, alone - expected[:1]]).astype(np.float64))
    allowed = TOLERANCE * np.maximum(1, np.abs(np.concatenate([expected, expected[:1]])))
    spread = float(expected.std(dtype=np.float64))
    allowed = np.minimum(allowed, OF_SPREAD * spread)
    if found.shape != expected.shape or not (differences <= allowed).all():
        raise RunFailed(
            f"{name} cannot be exported: its scores in ONNX Runtime are up to {differences.max():.2g} away from the "
            f"run's, whose standard deviation is {spread:.2g}"
        )
    write_atomically(out, lambda file: file.write(content))
    return Exported(len(expected), float(differences.max()), spread)


def metadata(result: dict[str, Any]) -> dict[str, str]:
    """What the file says of itself: JSON values by name."""
    config = result["config"]
    given = config["model"]["input"]
    said: dict[str, Any] = {
        "schema": 1,
        "identity": result["identity"],
        "class": result["class_name"],
        "role": result.get("role") or "normal",
        # Stored pixels, 0 to 255, in this shape; brought to size S as docs/export.md says; 0 and 255 become the range.
        "input": {"stored_shape": result["stored_shape"], **{key: given[key] for key in PREPARATION}},
        "score": "raw; higher is more anomalous",
        "threshold": result["metrics"]["threshold"],
        "threshold_quantile": config["trainer"]["threshold_quantile"],
        "decided_by": result.get("decided_by"),
        "code": result.get("git"),
        "versions": result.get("versions"),
        "exported_by": f"anomaly-lab {__version__}",
        "fingerprint": result["partition"]["fingerprint"],
    }
    return {name: json.dumps(value, sort_keys=True) for name, value in said.items()}


def like_test_images(shape: tuple[int, int, int]) -> NDArray[np.uint8]:
    """uint8 (3 `PER_KIND`,C,H,W), always the same: noise, smooth noise, and bright boxes on black.

    A run's folder holds no images, and its data set may be elsewhere.
    """
    from PIL import Image

    drawn, (channels, height, width) = np.random.RandomState(0), shape
    images = drawn.randint(0, 256, (3 * PER_KIND, *shape)).astype(np.uint8)
    for image in images[PER_KIND : 2 * PER_KIND]:
        for channel in image:
            coarse = Image.fromarray(drawn.randint(0, 256, (4, 4)).astype(np.uint8))
            channel[:] = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))
    images[2 * PER_KIND :] = 0
    for image in images[2 * PER_KIND :]:
        top, left = drawn.randint(0, height), drawn.randint(0, width)
        bright = drawn.randint(1, 256, (channels, 1, 1))
        image[:, top : top + 1 + height // 2, left : left + 1 + width // 3] = bright
    return images


def _graph(fitted: FittedDetector, image: NDArray[np.float32], name: str) -> bytes:
    """The serialised model."""
    import torch
    from torch import Tensor, nn

    class Scorer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.detector, self.features = fitted.detector, fitted.prepare.features

        def forward(self, image: Tensor) -> Tensor:
            return fitted.detector.score(fitted.prepare.seen(image)).float()

    scorer, example = Scorer().eval(), torch.from_numpy(image[:3])
    try:
        with torch.inference_mode():
            scorer(example)
    except RuntimeError as error:  # an inference tensor takes no part in a search by gradients
        raise RunFailed(f"{name} cannot be exported: its score follows gradients at test time") from error
    for logger in ("torch.onnx", "torch.fx.experimental.symbolic_shapes", "onnxscript", "onnx_ir"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    try:
        # torch prints the graph of what it refuses.
        quiet = contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO())
        with torch.no_grad(), warnings.catch_warnings(), quiet[0], quiet[1]:
            warnings.simplefilter("ignore")
            traced = torch.export.export(scorer, (example,), dynamic_shapes={"image": {0: torch.export.Dim("B")}})
            program = torch.onnx.export(
                traced.run_decompositions(_decompositions()),
                input_names=["image"],
                output_names=["score"],
                verbose=False,
            )
        assert program is not None
        program.model.metadata_props.update(metadata(fitted.result))
        content: bytes = program.model_proto.SerializeToString()
    except Exception as error:  # of torch.export, of the translation, or of protobuf (2 GB)
        text = f"{error} {error.__cause__}"
        known = (words for sign, words in REASONS.items() if sign in text)
        reason = next(known, shortened(error.__cause__ or error))
        raise RunFailed(f"{name} cannot be exported: its score is no ONNX graph ({reason})") from error
    return content


def _decompositions() -> Any:
    """What becomes of torch's operators, with those that have no translation to ONNX in terms of others."""
    import torch
    from torch import Tensor

    def searchsorted(row: Tensor, values: Tensor, *, right: bool = False, **ignored: Any) -> Tensor:
        below = row <= values[..., None] if right else row < values[..., None]
        return below.sum(-1)

    table = torch.export.default_decompositions()
    table[torch.ops.aten.searchsorted.Tensor] = searchsorted
    return table
