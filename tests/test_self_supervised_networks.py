"""Rotation prediction, latent-space autoregression, gated PixelCNN, Puzzle-AE, AnoNAGN, and neighbours among pretrained
features: their equations with plain torch, and what each network may not see.
"""

from __future__ import annotations

import io
import itertools
import math

import numpy as np
import pytest
import torch
from gradients import assert_alike
from PIL import Image
from test_methods import batch, detector, images
from torch import Tensor
from torch.nn import functional as F

from anomaly_lab.batches import Batch, PlainLoader
from anomaly_lab.methods.anonagn import NonAdversarialDecoderEncoder
from anomaly_lab.methods.lsa import LSA, Estimator, Residual
from anomaly_lab.methods.pixelcnn import GatedPixelCNN
from anomaly_lab.methods.pretrained_neighbours import PatchCore, PretrainedNeighbours, farthest_first
from anomaly_lab.methods.puzzle_autoencoder import PuzzleAutoencoder, joined, tiles
from anomaly_lab.methods.rotation_prediction import RotationPrediction, translated

# Rotation prediction ------------------------------------------------------------------------------------------------


def rotnet(*overrides: str) -> RotationPrediction:
    made = detector("rotnet", *overrides)
    assert isinstance(made, RotationPrediction)
    return made


def test_a_translation_reflects_the_border() -> None:
    x = torch.arange(5.0).repeat(5, 1)[None, None]  # columns 0 to 4
    right, back, stay = (translated(x, torch.tensor([[step], [0]]), 2)[0, 0, 0].tolist() for step in (2, 1, 0))
    assert (right, back, stay) == ([2, 1, 0, 1, 2], [2, 3, 4, 3, 2], [0, 1, 2, 3, 4])
    down = translated(x.transpose(2, 3), torch.tensor([[0], [2]]), 2)[0, 0, :, 0]
    assert down.tolist() == [2, 1, 0, 1, 2]


def test_rotation_prediction_asks_for_what_was_done_in_all_rotations() -> None:
    made, x = rotnet(), images()
    state = made.noise.get_state()
    (losses,) = made.plays(batch())
    made.noise.set_state(state)
    steps = torch.randint(3, (2, 8), generator=made.noise)
    moved = torch.cat([translated(x[i : i + 1], steps[:, i : i + 1], 8) for i in range(8)])
    views = torch.cat([torch.stack([torch.rot90(one, turn, (1, 2)) for one in moved]) for turn in range(4)])
    logits = made.classifier(views)
    parts = (logits[:, :4].log_softmax(1), logits[:, 4:7].log_softmax(1), logits[:, 7:].log_softmax(1))
    loss = torch.zeros(())
    for view, (turn, i) in enumerate(itertools.product(range(4), range(8))):
        loss = loss - (parts[0][view, turn] + parts[1][view, steps[0, i]] + parts[2][view, steps[1, i]]) / (3 * 32)
    torch.testing.assert_close(losses["classifier"], loss)
    assert len(set(steps[0].tolist())) > 1, "one translation for all would pass"


@pytest.mark.parametrize("shift", [0, 8])
def test_its_score_is_the_missing_confidence_in_what_was_done(shift: int) -> None:
    made, x = rotnet(f"model.detector.shift={shift}").eval(), images(2)
    expected = torch.zeros(2)
    places = list(itertools.product(range(3 if shift else 1), repeat=2))
    for (step_x, step_y), turn in itertools.product(places, range(4)):
        view = torch.rot90(translated(x, torch.tensor([[step_x] * 2, [step_y] * 2]), shift), turn, (2, 3))
        logits = made.classifier(view)
        p = logits[:, :4].softmax(1)[:, turn]
        if shift:
            p = p + logits[:, 4:7].softmax(1)[:, step_x] + logits[:, 7:].softmax(1)[:, step_y]
        expected -= p.detach() / (4 * len(places))
    with torch.no_grad():
        torch.testing.assert_close(made.score(x), expected)
        assert made.terms(x).keys() == ({"rotation", "translation_x", "translation_y"} if shift else {"rotation"})


# Latent-space autoregression ----------------------------------------------------------------------------------------


def test_the_estimator_sees_earlier_entries_alone() -> None:
    torch.manual_seed(0)
    estimator, z = Estimator(6, 3, 10).double(), torch.rand(1, 6, dtype=torch.double)
    seen = torch.autograd.functional.jacobian(lambda code: estimator(code)[0].sum(1), z)[:, 0]  # (6,6)
    assert torch.equal(seen != 0, torch.ones(6, 6).tril(-1).bool())


def test_lsa_losses_and_score_are_the_papers_equations() -> None:
    made, x = detector("lsa"), images()
    assert isinstance(made, LSA)
    made.nll_weight = 0.5
    with torch.no_grad():
        made.encoder[-2].weight.mul_(5)  # untrained, all codes lie in the same bins
    for norm in (n for n in made.modules() if isinstance(n, torch.nn.BatchNorm1d | torch.nn.BatchNorm2d)):
        norm.momentum = 1.0  # as after training: else the blocks' outputs are nearly constant in eval mode
    (losses,) = made.plays(batch())

    def terms(x: Tensor) -> tuple[Tensor, Tensor]:
        z = made.encoder(x)
        probability = made.estimator(z).softmax(2)  # (B,d,Q)
        bins = (z * 100).floor().long().clamp(max=99)
        nll = -sum(probability[:, i].gather(1, bins[:, i : i + 1]).log() for i in range(64)).squeeze(1)  # type: ignore[union-attr]
        return ((x - made.decoder(z)) ** 2).flatten(1).sum(1), nll

    error, nll = terms(x)
    torch.testing.assert_close(losses["lsa"], error.mean() + 0.5 * nll.mean())
    # The density reaches the encoder, through what the estimator sees and not through the bins.
    weights = list(made.encoder.parameters())
    gradients = [torch.autograd.grad(one.mean(), weights) for one in (made.terms(x)["nll"], nll)]
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-7)
    assert max(gradient.abs().max() for gradient in gradients[1]) > 1e-4
    with torch.no_grad():
        made.terms(images(30, seed=2))
        made.eval().after_fit(images(30, seed=2))
        scaled = [
            (found - fitted.min()) / (fitted.max() - fitted.min())
            for found, fitted in zip(terms(x), terms(images(30, seed=2)), strict=True)
        ]
        torch.testing.assert_close(made.score(x), scaled[0] + scaled[1], rtol=1e-4, atol=1e-4)


def test_lsa_has_residual_blocks_and_of_colour_a_stem() -> None:
    block = Residual(4, 6, "halve").double()
    x = torch.rand(2, 4, 8, 8, dtype=torch.double)
    first, norm_1, _, second, norm_2 = block.main
    main = norm_2(second(F.leaky_relu(norm_1(first(x)), 0.01)))
    scaled, norm = block.shortcut
    beside = norm(F.conv2d(x[:, :, ::2, ::2], scaled.weight))
    torch.testing.assert_close(block(x), F.leaky_relu(main + beside, 0.01))
    kept = Residual(4, 4, "keep").double()
    torch.testing.assert_close(kept(x), F.leaky_relu(kept.main(x) + x, 0.01))
    doubled = Residual(4, 6, "double").double()
    assert doubled(x).shape == (2, 6, 16, 16)
    assert doubled.main[0].kernel_size == (5, 5)

    def blocks(network: torch.nn.Module) -> list[tuple[int, int]]:
        return [(b.main[0].in_channels, b.main[0].out_channels) for b in network.modules() if isinstance(b, Residual)]

    widths = "model.detector.widths=[64,128,256]"
    grey = detector("lsa", "model.detector.widths=[32,64]", "model.input.size=28", shape=(1, 28, 28))
    assert (blocks(grey.encoder), blocks(grey.decoder)) == ([(1, 32), (32, 64)], [(64, 32), (32, 16)])
    colour = detector("lsa_cifar10", widths, shape=(3, 32, 32))
    assert type(colour.encoder[1]) is torch.nn.LeakyReLU and colour.encoder[0].bias is None
    assert blocks(colour.encoder) == [(32, 32), (32, 64), (64, 128), (128, 256)]
    assert blocks(colour.decoder) == [(256, 128), (128, 64), (64, 32), (32, 32)]


# PixelCNN -----------------------------------------------------------------------------------------------------------


def pixelcnn(*overrides: str, shape: tuple[int, int, int] = (1, 8, 8)) -> GatedPixelCNN:
    made = detector("pixelcnn", "model.detector.levels=5", *overrides, shape=shape)
    assert isinstance(made, GatedPixelCNN)
    return made


def test_a_pixel_is_predicted_from_those_before_it_and_from_all_of_them() -> None:
    made = pixelcnn(shape=(2, 6, 6))
    level = torch.randint(5, (1, 2, 6, 6), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = made.predicted(level, torch.zeros(()))
        for row, column in [(0, 0), (2, 3), (5, 5)]:
            changed = level.clone()
            changed[0, 0, row, column] = (changed[0, 0, row, column] + 2) % 5
            differs = (made.predicted(changed, torch.zeros(())) != before).any(1)[0].any(0)  # (6,6)
            later = torch.zeros(36, dtype=torch.bool)
            later[row * 6 + column + 1 :] = True
            assert not (differs.flatten() & ~later).any(), "it sees itself or what comes after"
            assert differs.flatten()[row * 6 + column + 1 : row * 6 + column + 3].all() or (row, column) == (5, 5)


def test_pixelcnn_counts_bits_and_takes_away_those_of_a_png() -> None:
    made = pixelcnn("model.detector.complexity_weight=0.5")
    x = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    level = (x * 5).floor().long()
    probability = made.predicted(level, x).softmax(1)  # (B,Q,1,8,8)
    bits = torch.zeros(3)
    for place in itertools.product(range(3), range(8), range(8)):
        b, i, j = place
        bits[b] -= math.log2(probability[b, level[b, 0, i, j], 0, i, j].item())
    terms = made.terms(x)
    torch.testing.assert_close(terms["bits"], bits, rtol=1e-4, atol=1e-3)
    (losses,) = made.plays(Batch(x, torch.arange(3)))
    torch.testing.assert_close(losses["pixelcnn"], bits.mean() / 64, rtol=1e-4, atol=1e-4)
    sizes = []
    for image in level[:, 0].numpy():
        file = io.BytesIO()
        Image.fromarray((image * 255 // 4).astype(np.uint8)).save(file, "PNG", optimize=True)
        sizes.append(len(file.getvalue()) * 8)
    assert terms["png_bits"].tolist() == sizes
    torch.testing.assert_close(made.score(x), terms["bits"] - 0.5 * terms["png_bits"])
    torch.testing.assert_close(terms["corrected"], pixelcnn("model.detector.complexity_weight=1").combine(terms))
    flat = made.terms(torch.full((1, 1, 8, 8), 0.3))
    assert flat["png_bits"].item() < min(sizes), "a flat image is no cheaper"


# Pretrained features ------------------------------------------------------------------------------------------------


def test_pretrained_neighbours_are_the_nearest_in_mean_features() -> None:
    made, x = detector("pretrained_knn").eval(), images(3)
    assert isinstance(made, PretrainedNeighbours)
    with torch.no_grad():
        bank = torch.stack([made.features(one[None])[0].flatten(1).mean(1) for one in images(30, seed=2)])
        for image, score in zip(x, made.score(x), strict=True):
            distance = ((made.features(image[None])[0].flatten(1).mean(1) - bank) ** 2).sum(1)
            torch.testing.assert_close(score, distance.sort().values[:2].mean(), rtol=1e-3, atol=1e-4)


def test_patches_are_kept_farthest_first() -> None:
    points = torch.tensor([[0.0], [1.0], [10.0], [4.0], [9.5]])
    assert farthest_first(points, 4).tolist() == [0, 2, 3, 1]


def test_patchcore_keeps_a_share_of_the_patches_by_distances_in_a_random_projection() -> None:
    made, normal = (
        detector("patchcore", "model.detector.share=0.1", "model.detector.projected=2").eval(),
        images(8, seed=2),
    )
    assert isinstance(made, PatchCore)
    with torch.no_grad():
        state = made.noise.get_state()
        made.after_fit(normal)
        made.noise.set_state(state)
        patches = torch.cat([made.patches(one[None])[0] for one in normal])
        places = patches @ torch.randn(patches.shape[1], 2, generator=made.noise)
    kept = [0]
    while len(kept) < round(0.1 * len(patches)):
        kept.append(int(torch.stack([(places - places[one]).norm(dim=1) for one in kept]).amin(0).argmax()))
    torch.testing.assert_close(made.get_buffer("bank"), patches[kept])


def test_patchcore_is_the_oddest_patch_weighted_by_its_neighbours() -> None:
    made, x = detector("patchcore", "model.detector.share=0.2", "model.detector.k=3").eval(), images(4)
    assert isinstance(made, PatchCore)
    bank = made.get_buffer("bank")
    with torch.no_grad():
        maps = made.anomaly_map(x)
        scores = made.score(x)
        for image, score, heat in zip(x, scores, maps, strict=True):
            features = made.features(image[None])
            padded = F.pad(features, (1, 1, 1, 1))
            counted = F.pad(torch.ones_like(features), (1, 1, 1, 1))
            around = [(i, j) for i in range(3) for j in range(3)]
            s = features.shape[-1]
            total = sum(padded[..., i : i + s, j : j + s] for i, j in around)
            patches = (total / sum(counted[..., i : i + s, j : j + s] for i, j in around))[0].flatten(1).T
            distance = torch.stack([(patch - bank).norm(dim=1) for patch in patches])
            nearest = distance.min(1)
            odd = nearest.values.argmax()
            star = bank[nearest.indices[odd]]
            neighbours = bank[(bank - star).norm(dim=1).sort().indices[:3]]
            scale = bank.shape[1] ** 0.5
            share = (nearest.values[odd] / scale).exp() / ((patches[odd] - neighbours).norm(dim=1) / scale).exp().sum()
            torch.testing.assert_close(score, (1 - share) * nearest.values[odd], rtol=1e-3, atol=1e-4)
            assert heat.shape == (32, 32)


# Puzzle-AE ----------------------------------------------------------------------------------------------------------


def puzzle(*overrides: str) -> PuzzleAutoencoder:
    made = detector("puzzle_ae", "size=small", *overrides)
    assert isinstance(made, PuzzleAutoencoder)
    return made


def test_tiles_are_quarters_and_fit_together_again() -> None:
    x = images(2, (3, 8, 8))
    assert torch.equal(tiles(x)[:, 1], x[:, :, :4, 4:]) and torch.equal(tiles(x)[:, 2], x[:, :, 4:, :4])
    assert torch.equal(joined(tiles(x)), x)


def test_a_puzzle_is_another_order_with_a_tile_emptied_at_times() -> None:
    made, x = puzzle("model.detector.blank=0.25"), images(200, (1, 8, 8))
    emptied = moved = 0
    for parts, whole in zip(tiles(made.puzzle(x)), tiles(x), strict=True):
        equal = torch.tensor([[torch.equal(a, b) for b in whole] for a in parts])
        gone = sum(bool((part == 0).all()) for part in parts)
        assert gone <= 1 and int(equal.sum()) == 4 - gone, "every tile is there once, but for an emptied one"
        emptied, moved = emptied + gone, moved + int(not equal.diagonal().all())
    assert emptied / 200 == pytest.approx(0.25, abs=0.1) and moved > 180


def test_an_attack_raises_the_error_within_its_reach() -> None:
    made, x = puzzle(), (images(16) + 1) / 2
    attacked = made.attacked(x, x)
    assert (attacked - x).abs().max() <= 0.1 + 1e-6 and attacked.min() >= 0 and attacked.max() <= 1
    assert F.mse_loss(made.unet(attacked), x) > F.mse_loss(made.unet(x), x)


def test_an_attack_is_one_step_from_noise_along_the_gradient_of_the_error_against_the_image() -> None:
    made, x = puzzle(), (images(4) + 1) / 2
    with torch.no_grad():
        for parameter in made.unet.parameters():
            parameter.mul_(1.5)  # untrained, it answers all puzzles alike
    given = joined(tiles(x)[:, [3, 1, 0, 2]])
    state = made.noise.get_state()
    attacked = made.attacked(given, x)
    made.noise.set_state(state)
    d = (0.1 * (2 * torch.rand(x.shape, generator=made.noise) - 1)).requires_grad_()
    (gradient,) = torch.autograd.grad(((made.unet(given + d) - x) ** 2).mean(), d)
    expected = (given + (d + 0.2 * gradient.sign()).clamp(-0.1, 0.1)).clamp(0, 1)
    torch.testing.assert_close(attacked, expected.detach())


def test_the_unet_moves_first_and_the_critic_sees_what_it_rebuilt_before() -> None:
    made, x = puzzle().double(), (images().double() + 1) / 2
    state = made.noise.get_state()
    plays = made.plays(Batch(x, torch.arange(8)))
    first = next(plays)
    made.noise.set_state(state)
    rebuilt = made.unet(made.attacked(made.puzzle(x), x))
    gap = ((made.critic.features(x) - made.critic.features(rebuilt)) ** 2).mean()
    assert list(first) == ["unet"]
    assert_alike(first["unet"], ((x - rebuilt) ** 2).mean() + 0.02 * gap, made.unet)
    with torch.no_grad():
        for parameter in made.unet.parameters():
            parameter.zero_()
    second = next(plays)
    real, fake = (torch.sigmoid(made.critic(image)[0]) for image in (x, rebuilt.detach()))
    assert list(second) == ["critic"]
    assert_alike(second["critic"], -real.log().mean() - (1 - fake).log().mean(), made.critic)


def test_its_score_is_the_error_of_each_order_in_units_of_normal_images() -> None:
    made, x = puzzle("model.detector.orders=23").eval(), images(3)
    assert made.chosen == list(range(1, 24))
    assert puzzle("model.detector.orders=6").chosen == [1, 4, 8, 12, 16, 20]
    with torch.no_grad():
        expected = torch.zeros(3)
        for order in list(itertools.permutations(range(4)))[1:]:
            errors = [
                torch.stack(
                    [(made.unet(joined(tiles(one[None])[:, list(order)])) - one).square().mean() for one in some]
                )
                for some in (x, images(30, seed=2))
            ]
            expected += errors[0] / errors[1].mean() / 23
        torch.testing.assert_close(made.score(x), expected, rtol=1e-4, atol=1e-5)


# AnoNAGN, reconstructed ---------------------------------------------------------------------------------------------


class Placed(PlainLoader):
    """Images whose places in the data set go down: 29, 28, ..."""

    def everything(self) -> Batch:
        x = super().everything().x
        return Batch(x, torch.arange(len(x) - 1, -1, -1))


def test_codes_move_with_the_decoder_before_the_encoder_learns_the_way_back() -> None:
    made, x = detector("anonagn_reconstruction", "model.detector.code_rate=5").double(), images(30).double()
    assert isinstance(made, NonAdversarialDecoderEncoder)
    made._images = Placed([x], made.device, leaving_out=False)
    made.before_fit(x)
    assert made.codes.shape == (30, 100) and made.codes.norm(dim=1).max() <= 1 + 1e-6
    with torch.no_grad():
        for parameter in made.encoder.parameters():
            parameter.mul_(2)  # codes longer than 1
    places = torch.tensor([3, 7, 20, 21])
    codes = made.codes.clone()
    plays = made.plays(Batch(x[places], 29 - places))
    first = next(plays)
    z = codes[places].double().requires_grad_()
    error = (x[places] - made.decoder(z)).abs()
    (gradient,) = torch.autograd.grad(error.flatten(1).mean(1).sum(), z, retain_graph=True)
    assert_alike(first["decoder"], error.mean(), made.decoder)
    with torch.no_grad():
        for parameter in made.decoder.parameters():
            parameter.mul_(1.5)  # the decoder moves
    second = next(plays)
    expected = torch.stack([code / max(1.0, code.norm().item()) for code in z.detach() - 5 * gradient])
    torch.testing.assert_close(made.codes[places], expected.float())
    rest = torch.ones(30, dtype=torch.bool).index_fill(0, places, False)
    assert torch.equal(made.codes[rest], codes[rest])

    def encode(x: Tensor) -> Tensor:
        return torch.stack([code / code.norm() if code.norm() > 1 else code for code in made.encoder(x)])

    latent = ((expected - encode(made.decoder(expected))) ** 2).mean()
    image = (x[places] - made.decoder(encode(x[places]))).abs().mean()
    assert_alike(second["encoder"], latent + image, made.encoder)
    made.eval()
    assert made.encoder(x).norm(dim=1).max() > 1, "the projection would not be seen"
    rebuilt = made.decoder(encode(x))
    score = (x - rebuilt).abs().mean((1, 2, 3)) + ((encode(x) - encode(rebuilt)) ** 2).mean(1)
    torch.testing.assert_close(made.score(x), score)
