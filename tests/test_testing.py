"""The contract's checks can fail: methods with one planted fault each, and the line that names it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from anomaly_lab import cli, config, testing
from anomaly_lab.detector import Batch, Detector

YAML = """# A method with a planted fault.
detector: {_target_: test_testing.Sound}
optimizer: {_target_: torch.optim.Adam, _partial_: true, lr: 1.0e-3}
budget: {stages: {first: 1, second: 2}}
input: {size: 8}
"""


class Sound(Detector):
    """Nothing wrong: noise of its own, stages, a centre that only fitting finds, a rule of its own."""

    STAGES = ("first", "second")

    def __init__(self, image_shape: Sequence[int]) -> None:
        super().__init__(image_shape)
        size = image_shape[0] * image_shape[1] * image_shape[2]
        self.net, self.back = nn.Linear(size, 4), nn.Linear(4, size)

    def players(self) -> Mapping[str, Sequence[nn.Module]]:
        return {"encoder": [self.net], "decoder": [self.back]}

    def rebuilt(self, x: Tensor) -> Tensor:
        return self.back(self.net(x.flatten(1))).view_as(x)

    def plays(self, batch: Batch) -> Iterator[Mapping[str, Tensor]]:
        noise = torch.randn(batch.x.shape, generator=self.noise)
        loss = (self.rebuilt(batch.x + 0.1 * noise) - batch.x).square().mean()
        yield {"encoder": loss, "decoder": loss} if self.stage == "first" else {"decoder": loss}

    def after_fit(self, images: Tensor) -> None:
        self.set_fitted("centre", images.mean(0))

    def score(self, x: Tensor) -> Tensor:
        return (self.rebuilt(x) - self.get_buffer("centre")).square().flatten(1).mean(1)

    def decide(self, x: Tensor) -> Tensor:
        return self.score(x) > 0.5


class DrawsWeightsItself(Sound):
    def __init__(self, image_shape: Sequence[int]) -> None:
        super().__init__(image_shape)
        self.net.weight.data.copy_(torch.from_numpy(np.random.rand(*self.net.weight.shape)))


class SeedsItself(Sound):
    def __init__(self, image_shape: Sequence[int]) -> None:
        torch.manual_seed(0)
        super().__init__(image_shape)


class Unowned(Sound):
    def __init__(self, image_shape: Sequence[int]) -> None:
        super().__init__(image_shape)
        self.forgotten = nn.Linear(4, 4)


class InAList(Sound):
    def __init__(self, image_shape: Sequence[int]) -> None:
        super().__init__(image_shape)
        self.networks = [nn.Linear(4, 4)]

    def players(self) -> Mapping[str, Sequence[nn.Module]]:
        return {**super().players(), "hidden": self.networks}


class ManyLosses(Sound):
    def plays(self, batch: Batch) -> Iterator[Mapping[str, Tensor]]:
        yield {"encoder": self.rebuilt(batch.x).flatten(1).mean(1)}


class Stranger(Sound):
    def plays(self, batch: Batch) -> Iterator[Mapping[str, Tensor]]:
        yield {"generator": self.rebuilt(batch.x).mean()}


class Detached(Sound):
    def plays(self, batch: Batch) -> Iterator[Mapping[str, Tensor]]:
        yield {"encoder": self.rebuilt(batch.x).mean().detach()}


class NotANumber(Sound):
    def plays(self, batch: Batch) -> Iterator[Mapping[str, Tensor]]:
        yield {"encoder": self.rebuilt(batch.x).mean() * torch.nan}


class OwnBackward(Sound):
    def plays(self, batch: Batch) -> Iterator[Mapping[str, Tensor]]:
        yield {"encoder": self.rebuilt(batch.x).square().mean()}
        self.rebuilt(batch.x).square().mean().backward()


class OwnStep(Sound):
    """Its optimiser moves everything, not its player alone."""

    def plays(self, batch: Batch) -> Iterator[Mapping[str, Tensor]]:
        optimizer: Any = self._players["encoder"].optimizer
        hook = getattr(optimizer, "optimizer", optimizer).register_step_post_hook(
            lambda *_: self.back.weight.data.mul_(0.9)
        )
        yield {"encoder": self.rebuilt(batch.x).square().mean()}
        hook.remove()


class Silent(Sound):
    def plays(self, batch: Batch) -> Iterator[Mapping[str, Tensor]]:
        yield from ()


class Raises(Sound):
    def plays(self, batch: Batch) -> Iterator[Mapping[str, Tensor]]:
        yield {"encoder": self.net(batch.x).mean()}


class OfItsBatch(Sound):
    def score(self, x: Tensor) -> Tensor:
        return super().score(x - x.mean(0))


class OneValue(Sound):
    def score(self, x: Tensor) -> Tensor:
        return super().score(x) * 0 + 1


class Infinite(Sound):
    def score(self, x: Tensor) -> Tensor:
        score = super().score(x)
        return 1 / (score - score[0])


class Column(Sound):
    def score(self, x: Tensor) -> Tensor:
        return super().score(x)[:, None]


class InPlace(Sound):
    def score(self, x: Tensor) -> Tensor:
        return super().score(x.clamp_(max=0.5))


class RandomScore(Sound):
    def score(self, x: Tensor) -> Tensor:
        return super().score(x + 0.01 * torch.randn_like(x))


class Counts(Sound):
    def __init__(self, image_shape: Sequence[int]) -> None:
        super().__init__(image_shape)
        self.register_buffer("scored_images", torch.zeros(()))

    def score(self, x: Tensor) -> Tensor:
        self.get_buffer("scored_images").add_(len(x))
        return super().score(x)


class SearchesByBackward(Sound):
    def score(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            z = x.clone().requires_grad_()
            super().score(z).sum().backward()
        assert z.grad is not None
        return z.grad.flatten(1).norm(dim=1)


class Signed(Sound):
    def anomaly_map(self, x: Tensor) -> Tensor:
        return x.mean(1)


class WordsForDecisions(Sound):
    def decide(self, x: Tensor) -> Tensor:
        return self.score(x)


class PlainAttribute(Sound):
    def after_fit(self, images: Tensor) -> None:
        self.centre = images.mean(0)

    def score(self, x: Tensor) -> Tensor:
        return (self.rebuilt(x) - self.centre).square().flatten(1).mean(1)


class ForgetsItsFactor(Sound):
    factor = 1.0

    def after_fit(self, images: Tensor) -> None:
        super().after_fit(images)
        self.factor = float(images.std())

    def score(self, x: Tensor) -> Tensor:
        return super().score(x) * self.factor


class NotPlain(Sound):
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["anomaly_lab"]["mine"] = Path("here")


class NumpyNoise(Sound):
    def plays(self, batch: Batch) -> Iterator[Mapping[str, Tensor]]:
        noise = torch.from_numpy(np.random.randn(*batch.x.shape)).float()
        yield {"encoder": (self.rebuilt(batch.x + noise) - batch.x).square().mean()}


class GlobalNoise(Sound):
    def before_epoch(self, epoch: int) -> None:
        self.target = torch.randn(4)

    def plays(self, batch: Batch) -> Iterator[Mapping[str, Tensor]]:
        yield {"encoder": (self.net(batch.x.flatten(1)) - self.target).square().mean()}


class CountsByItself(Sound):
    steps = 0

    def plays(self, batch: Batch) -> Iterator[Mapping[str, Tensor]]:
        self.steps += 1
        yield {"encoder": self.rebuilt(batch.x).square().mean() / self.steps}


class StageOfItsOwn(Sound):
    """Finds something when a stage begins, and loses it when it is resumed inside of that stage."""

    scale = 1.0

    def before_stage(self, stage: str) -> None:
        self.scale = 2.0 if stage == "second" else 1.0

    def plays(self, batch: Batch) -> Iterator[Mapping[str, Tensor]]:
        yield {"encoder": self.scale * self.rebuilt(batch.x).square().mean()}


class GreyOnly(Sound):
    def rebuilt(self, x: Tensor) -> Tensor:
        return super().rebuilt(x.reshape(len(x), 1, *x.shape[2:]))


class SaysGreyOnly(Sound):
    def __init__(self, image_shape: Sequence[int]) -> None:
        super().__init__(image_shape)
        if tuple(image_shape) != (1, 8, 8):
            raise ValueError("this method takes grey images of 8 pixels: set model.input.channels=1 model.input.size=8")


@pytest.fixture(autouse=True)
def _configs(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "conf/model").mkdir(parents=True)
    (tmp_path / "conf/model/planted.yaml").write_text(YAML)
    monkeypatch.setenv(config.EXTRA_CONFIGS, str(tmp_path / "conf"))
    monkeypatch.setenv("ANOMALY_LAB_DATA", str(data))


def first_faults(method: type[Detector]) -> list[str]:
    """The faults of the first check that finds any."""
    words = ["model=planted", f"model.detector._target_=test_testing.{method.__name__}"]
    return next((faults for _, faults in testing.examine(words) if faults), [])


@pytest.mark.parametrize("method", [Sound, SaysGreyOnly], ids=lambda method: method.__name__)
def test_a_sound_method_has_no_fault(method: type[Detector]) -> None:
    testing.check("planted", f"model.detector._target_=test_testing.{method.__name__}")


@pytest.mark.parametrize(
    ("method", "line"),
    [
        (DrawsWeightsItself, "the same seed gives other initial values of net.weight: draw them from torch's"),
        (SeedsItself, "every seed gives the same initial weights: seed no generator"),
        (Unowned, "forgotten.weight, forgotten.bias belongs to no player, so it never learns: give its network"),
        (InAList, "the player hidden has parameters that are not the detector's"),
        (ManyLosses, "plays() yields (32,) as the loss of encoder: yield a scalar"),
        (Stranger, "plays() yields a loss for generator, which is no player: players() names encoder, decoder"),
        (Detached, "the loss of encoder has no gradient: it was detached"),
        (NotANumber, "the loss of encoder is nan in the first step of the stage first"),
        (OwnBackward, "plays() leaves a gradient on net.weight, net.bias, back.weight and 1 more: call no backward()"),
        (OwnStep, "back.weight moved with encoder, whose it is not"),
        (Silent, "players() names players, but plays() yields no loss"),
        (Raises, "training failed: RuntimeError: mat1 and mat2"),
        (Raises, "(test_testing.py:"),
        (OfItsBatch, "when it is scored alone: no mean, norm or statistic over the batch"),
        (OneValue, "score() is 1 for every image, so it tells nothing apart"),
        (Infinite, "score() is not finite for 1 of 24 images"),
        (Column, "score() returns torch.float32 (24, 1) for 24 images"),
        (InPlace, "score() changes the images that it is given"),
        (RandomScore, "scoring the same images again gives other scores"),
        (Counts, "score() changes scored_images"),
        (SearchesByBackward, "score() leaves a gradient on net.weight"),
        (Signed, "anomaly_map() has values that are negative"),
        (WordsForDecisions, "decide() returns torch.float32 (24,): return bool"),
        (PlainAttribute, "a detector from its checkpoint cannot score (AttributeError"),
        (ForgetsItsFactor, "a detector from its checkpoint gives other scores"),
        (NotPlain, "a checkpoint holds something else than tensors and plain values"),
        (NumpyNoise, "trained again from the same seed, net.weight differs: draw noise from self.noise"),
        (GlobalNoise, "trained again from the same seed, net.weight differs"),
        (CountsByItself, "resumed after epoch 1, net.weight differs after epoch 2 of the stage second"),
        (StageOfItsOwn, "resumed after epoch 2, net.weight differs after epoch 3 of the stage second"),
        (GreyOnly, "model.input.channels=3: training failed: RuntimeError"),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_a_planted_fault_is_named(method: type[Detector], line: str) -> None:
    faults = first_faults(method)
    assert any(line in fault for fault in faults), faults
    assert not any("\n" in fault for fault in faults), "one line each"


def test_the_command_says_what_is_held_and_what_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    target = "model.detector._target_=test_testing."
    assert cli.check(["model=planted", f"{target}Unowned"]) == cli.FAILED
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "ok     the same weights from the same seed"
    assert said[1] == "FAULT  every parameter belongs to a player"
    assert said[2].strip().startswith("forgotten.weight, forgotten.bias belongs to no player")
    assert sum(line.startswith(("ok ", "FAULT ")) for line in said) == len(testing.CHECKS), (
        "the others are held to, too"
    )


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["seed=1"], "name a method: model=NAME"),
        (["model=nobody"], "there is no model=nobody: choose among"),
        (["model=planted", "model.lr=1"], "model.lr"),
    ],
)
def test_a_wrong_command_gets_one_line(words: list[str], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.check(words) == cli.MISTAKE
    assert line in capsys.readouterr().err


def test_all_faults_of_a_method_are_in_the_error() -> None:
    with pytest.raises(testing.Broken, match="belongs to no player") as broken:
        testing.check("planted", "model.detector._target_=test_testing.Unowned")
    assert broken.value.faults and str(broken.value) == "\n".join(broken.value.faults)
