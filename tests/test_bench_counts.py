"""What the benchmarks count, against numbers worked out by hand and the papers' literal loops; what they measure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from anomaly_lab import config
from anomaly_lab.methods.ganomaly import GANomaly
from anomaly_lab.methods.shared_autoencoder import SharedAutoencoder
from benchmarks import counts, growth, machine
from benchmarks.counts import Cost, cost
from benchmarks.machine import Convolution
from benchmarks.scoring import Scorer

FLOAT = 4  # bytes


def test_a_convolution_costs_two_operations_for_each_weight_at_each_position() -> None:
    x, weight = torch.randn(2, 3, 8, 8), torch.randn(5, 3, 4, 4)
    with torch.no_grad():
        found = cost(lambda: F.conv2d(x, weight, None, 2, 1))  # (2,5,4,4)
    assert found == Cost(
        flop=2 * (5 * 3 * 4 * 4) * (2 * 4 * 4),
        bytes=FLOAT * (2 * 3 * 8 * 8 + 5 * 3 * 4 * 4 + 2 * 5 * 4 * 4),
    )
    assert Convolution(batch=2, channels=3, size=8, out=5, kernel=4, stride=2).flop == found.flop


def test_a_step_of_a_linear_network_by_hand() -> None:
    layer, x = nn.Linear(7, 3), torch.randn(5, 7)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, foreach=False)

    def step() -> None:
        layer(x).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    weight, bias, out = 7 * 3, 3, 5 * 3
    forward = 5 * 7 + weight + bias + out
    total = out + 1  # sum reads all of it; its gradient, one number seen often, is made with it
    gradients = (1 + 1) + (5 * 7 + 1 + weight) + (1 + bias)  # ones_like; x and the expanded gradient; the bias' sum
    moves = 3 * (weight + bias)  # w += -lr g: w and g are read, w is written
    # The input needs no gradient, so that the backward pass has one product and not two.
    assert cost(step) == Cost(flop=2 * 2 * 5 * weight, bytes=FLOAT * (forward + total + gradients + moves))


def test_what_is_seen_differently_or_not_written_is_not_moved() -> None:
    x = torch.randn(4, 6)
    with torch.no_grad():
        copied = cost(lambda: x.t().reshape(24)[3:].view(3, 7).expand(9, 3, 7))
        assert copied.bytes == 2 * x.nbytes, "reshape copies, the others do not"
        assert cost(lambda: torch.empty(100)).bytes == 0
        assert cost(lambda: x.mul_(2.0)).bytes == 2 * x.nbytes, "read and written"
        assert cost(lambda: torch.add(x, x, out=torch.empty(4, 6))).bytes == 3 * x.nbytes
        assert cost(lambda: x[:1].expand(50, 6).sum()).bytes == (6 + 1) * FLOAT, "one row, seen 50 times"
        assert cost(lambda: torch._foreach_mul_([x, x], 2.0)).bytes == 4 * x.nbytes


def test_operations_are_those_of_torchs_counter() -> None:
    detector, batch = counts.make("ganomaly", "cpu", "model.detector.width=4", "model.batch_size=2")
    moving = counts.players(detector)
    with FlopCounterMode(display=False) as torchs:
        counts.step(detector, batch, moving)
    assert cost(lambda: counts.step(detector, batch, moving)).flop == torchs.get_total_flops() > 0


def per_image(model: str) -> tuple[Any, Tensor, float]:
    """A detector of the published size, images, and the MFLOP an image of the lab's training step."""
    detector, batch = counts.make(model, "cpu", "model.batch_size=2")
    moving = counts.players(detector)
    return detector, batch.x, cost(lambda: counts.step(detector, batch, moving)).flop / 2e6


def test_ganomalys_published_loop_costs_072_gflop_an_image_with_two_for_a_multiply_add() -> None:
    detector, x, lab = per_image("ganomaly")
    assert isinstance(detector, GANomaly)

    def published() -> None:
        z = detector.encoder(x)
        fake = detector.decoder(z)
        z_fake = detector.second_encoder(fake)
        real_logit, fake_logit = detector.discriminator(x)[0], detector.discriminator(fake.detach())[0]
        adv = F.mse_loss(detector.discriminator(fake)[1], detector.discriminator(x)[1])
        (adv + 50 * F.l1_loss(fake, x) + F.mse_loss(z_fake, z)).backward()
        (F.softplus(-real_logit).mean() + F.softplus(fake_logit).mean()).backward()

    assert cost(published).flop / 2e6 == pytest.approx(720, rel=0.02)
    assert lab == pytest.approx(551, rel=0.01), "two passes of D and its gradients in the generator's play are saved"


def test_shared_autoencoders_printed_loop_costs_133_gflop_an_image_with_two_for_a_multiply_add() -> None:
    detector, x, lab = per_image("shared_ae")
    assert isinstance(detector, SharedAutoencoder)

    def printed() -> None:
        for loss in (detector.loss_ede1, detector.loss_ede2):
            p = detector.passes(x)
            _ = p.z1, p.z2p, p.z2  # all of the forward pass, before either loss
            loss(p).backward()

    assert cost(printed).flop / 2e6 == pytest.approx(1330, rel=0.02)
    assert lab == pytest.approx(1186, rel=0.01), "what a loss does not ask for is neither computed nor differentiated"


@pytest.mark.slow
def test_published_models_are_at_full_size_and_need_no_file() -> None:
    assert {"ganomaly", "shared_ae", "piad", "aae", "itsr"} <= set(counts.published())
    assert not any(config.reduced(counts.compose(model)) for model in counts.published())
    assert counts.compose("piad_squeezenet").model.detector.features.weights == "random"


def test_a_gradient_penalty_and_its_second_backward_pass_are_counted() -> None:
    tiny = [f"model.detector.{name}_widths=[4,4,4,4]" for name in ("encoder", "generator", "image_critic")]
    detector, batch = counts.make("piad_pixel_l1", "cpu", *tiny, "model.batch_size=2")
    x = batch.x

    def critic() -> None:
        detector.image_critic(x).sum().backward()  # type: ignore[operator, union-attr]

    def penalised() -> None:
        detector.loss_critic(detector.image_critic, x, x.flip(0)).backward()  # type: ignore[operator]

    assert cost(penalised).flop > 4 * cost(critic).flop, "three passes, one of which is differentiated twice"


def test_scoring_is_the_labs_own_test_pass(tmp_path: Path) -> None:
    scorer = Scorer("ganomaly", "cpu", images=20, batch=8, folder=tmp_path)
    one = scorer()
    assert scorer.batch == 8 and one.images == 20 + len(scorer.data.partition.val) and 0 < one.loop < one.call
    with torch.no_grad():
        expected = scorer.detector.eval().score(scorer.data.prepared("test"))
    found = torch.from_numpy(scorer.detector.scored.test.score)
    found = found[scorer.detector.scored.test.places(scorer.data.partition.test)]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert scorer.mflop() == pytest.approx(104.7, rel=0.01), "three networks of 35 MFLOP"


@pytest.mark.slow
@pytest.mark.drawn
def test_growth_measures_whole_runs_and_what_they_leave_behind(tmp_path: Path) -> None:
    jobs = [
        [*growth._options(tmp_path, 60, 8), f"seed={seed}", "logger=none", "trainer.accelerator=cpu"] for seed in (0, 1)
    ]
    found = growth._runs(jobs)
    assert found["images"] == 54 and found["seconds"] > 0 and all(held > 0 for held in found["resident_mb"])
    assert len(list(tmp_path.rglob("result.json"))) == len(found["resident_mb"]) == 2


def test_the_peak_is_the_fastest_of_all_convolutions(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = [Convolution(2, 4, 8, out, 3, 1) for out in (4, 8)]
    monkeypatch.setattr(machine, "OURS", tiny)
    monkeypatch.setattr(machine, "LARGER", [])
    monkeypatch.setattr(machine, "MATRIX", {"cpu": 16})
    monkeypatch.setattr(machine, "STREAM", {"cpu": 1000})
    found = machine.measure("cpu", quick=True)["rows"]
    assert [row["what"] for row in found] == ["convolution"] * 4 + ["matrix product", "copy", "triad"]
    assert all(row.get("gflops", row.get("gb_per_s")) > 0 for row in found)
    monkeypatch.setattr(
        machine, "_convolutions", lambda *_, **__: [(1e9, tiny[0], "contiguous"), (2e9, tiny[1], "channels_last")]
    )
    machine.peak.cache_clear()
    assert machine.peak("cpu").flop == tiny[1].flop and machine.peak("cpu").gflops() > 0
    machine.peak.cache_clear()
