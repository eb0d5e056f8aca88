"""Preprocessing, batches and their order."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from anomaly_lab.batches import Batch
from anomaly_lab.data import AT_ONCE, STEPS_SECONDS, EpochImages, Loader, OneClassData, Prepare, scored_at_once
from anomaly_lab.images import Images
from anomaly_lab.splits import Pooled

CPU = torch.device("cpu")


def pixels(height: int, width: int, channels: int = 1) -> torch.Tensor:
    return torch.randint(0, 256, (3, channels, height, width), generator=torch.Generator().manual_seed(0)).byte()


def test_28_pixels_become_32_by_a_black_border_of_2() -> None:
    given = pixels(28, 28)
    x = Prepare()(given)
    assert x.shape == (3, 1, 32, 32) and x.dtype == torch.float32
    torch.testing.assert_close(x[:, :, 2:30, 2:30], given.float() / 127.5 - 1)
    border = torch.ones(32, 32, dtype=torch.bool)
    border[2:30, 2:30] = False
    assert (x[..., border] == -1).all()


def test_8_pixels_become_32_by_a_factor_of_4_and_nothing_is_padded() -> None:
    x = Prepare()(torch.full((1, 1, 8, 8), 255).byte())
    assert x.shape == (1, 1, 32, 32) and (x == 1).all()


@pytest.mark.parametrize(("height", "width"), [(64, 64), (40, 20), (100, 33), (5, 9), (32, 32)])
@pytest.mark.parametrize("fit", ["pad", "resize"])
def test_every_shape_fits_and_stays_in_range(height: int, width: int, fit: str) -> None:
    x = Prepare(fit=fit)(pixels(height, width, 3))  # type: ignore[arg-type]
    assert x.shape == (3, 3, 32, 32) and x.min() >= -1 and x.max() <= 1 + 1e-6


def test_colour_range_and_back() -> None:
    colour = pixels(32, 32, 3)
    grey = Prepare(channels=1, value_range=(0, 1))(colour)
    expected = (colour.float() * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1) / 255
    torch.testing.assert_close(grey[:, 0], expected)
    tripled = Prepare(channels=3)(colour[:, :1])
    assert tripled.shape == (3, 3, 32, 32) and torch.equal(tripled[:, 0], tripled[:, 2])
    prepare = Prepare(value_range=(-1, 1))
    torch.testing.assert_close(prepare.displayable(prepare(colour)), colour.float() / 255)
    assert Prepare(channels=3).shape(np.zeros((1, 1, 28, 28))) == (3, 32, 32)


def loader(count: int, batch_size: int) -> Loader:
    index = torch.arange(count) * 10
    return Loader(pixels(8, 8)[torch.zeros(count).long()], index, Prepare(), batch_size, CPU)


@pytest.mark.parametrize(("count", "expected"), [(10, [4, 4, 2]), (3, [3]), (8, [4, 4])])
def test_lengths_of_batches(count: int, expected: list[int]) -> None:
    made = loader(count, 4)
    assert [len(batch.x) for batch in made] == expected and len(made) == len(expected)
    assert torch.cat([batch.index for batch in made]).tolist() == [10 * i for i in range(count)]


@pytest.mark.parametrize(("count", "expected"), [(10, [4, 4]), (3, [3]), (8, [4, 4])])
def test_in_training_an_incomplete_batch_is_left_out_unless_it_is_the_only_one(count: int, expected: list[int]) -> None:
    made = EpochImages(loader(count, 100), 4, seed=0, epoch_steps=1)
    assert [len(positions) for positions in made.order] == expected
    assert len(set(torch.cat(made.order).tolist())) == sum(expected)


def images(count: int) -> Images:
    generator = np.random.default_rng(0)
    return Images.canonical(
        generator.integers(0, 256, (2 * count, 1, 8, 8), dtype=np.uint8),
        np.repeat([0, 1], count),
        np.zeros(2 * count, bool),
        ("zero", "one"),
        name="synthetic",
    )


def epoch(data: OneClassData) -> list[Batch]:
    images = data.train_dataloader()
    return [images.batch(positions) for item in images for positions in images.steps(item)]


def orders(data: OneClassData) -> list[int]:
    return torch.cat([batch.index for batch in epoch(data)]).tolist()


def test_an_order_depends_on_seed_and_epoch_alone() -> None:
    made = {
        seed: OneClassData(images(100), Pooled(seed=0), "zero", Prepare(), batch_size=8, seed=seed) for seed in (0, 1)
    }
    assert orders(made[0]) == orders(made[0]) != orders(made[1])
    assert len(orders(made[0])) == 72  # 80 normals, 8 held out, whole batches only
    assert set(orders(made[0])) <= set(made[0].partition.train.tolist())


def test_small_sets_are_passed_several_times_an_epoch_each_image_equally_often() -> None:
    data = OneClassData(images(20), Pooled(), "zero", Prepare(), batch_size=8, epoch_steps=11)
    assert len(data.partition.train) == 11
    counts = np.unique(orders(data), return_counts=True)[1]
    assert data.steps == 11 and counts.sum() == 88 and (counts == 8).all()


def test_further_batches_never_end_and_are_not_those_of_the_training_order() -> None:
    data = OneClassData(images(30), Pooled(), "zero", Prepare(), batch_size=8)
    made = data.train_dataloader()
    further = list(itertools.islice(made.further(), 7))
    assert all(torch.equal(one, other) for one, other in zip(further, made.further(), strict=False))
    assert data.steps == len(made.order) == 2, "seven batches are more than an epoch has"
    assert [positions.tolist() for positions in further[:2]] != [positions.tolist() for positions in made.order]
    assert set(torch.cat(further).tolist()) <= set(range(len(data.partition.train)))


@pytest.mark.parametrize("seconds", [None, STEPS_SECONDS / 4, STEPS_SECONDS / 11, 1e-9])
def test_the_items_of_an_epoch_hold_every_step_of_it_in_order(seconds: float | None) -> None:
    made = OneClassData(images(20), Pooled(), "zero", Prepare(), batch_size=8, epoch_steps=11).train_dataloader()
    items = iter(made)
    first = next(items)  # before the epoch begins, as Lightning does
    made.begin(2, None, seconds)
    found = [list(item.positions) for item in itertools.chain([first], items)]
    at_once = max(int(STEPS_SECONDS / seconds), 1) if seconds else 1
    assert len(found) == -(-11 // at_once) and all(len(steps) == at_once for steps in found[:-1])
    for one, other in zip(itertools.chain(*found), made.order, strict=True):
        assert torch.equal(one, other)


def test_training_batches_do_not_say_what_their_images_truly_are() -> None:
    data = OneClassData(images(30), Pooled(), "zero", Prepare(), batch_size=8)
    assert all(batch.truth is None for batch in epoch(data))
    assert data.train_dataloader().everything().truth is None


def test_held_out_normals_come_before_the_test_images() -> None:
    data = OneClassData(images(30), Pooled(), "zero", Prepare(), batch_size=8)
    val, test = data.test_dataloader()
    assert torch.cat([batch.index for batch in val]).tolist() == data.partition.val.tolist()
    index, truth = (torch.cat(list(part)) for part in zip(*[batch[1:3] for batch in test], strict=True))
    assert index.tolist() != data.partition.test.tolist(), "mixed, for neighbours of a data set share their label"
    known = dict(zip(data.partition.test.tolist(), data.partition.test_truth.tolist(), strict=True))
    assert [known.pop(i) for i in index.tolist()] == truth.tolist() and not known
    assert len(data.val_dataloader()) == 1, "in training the test images are not looked at"
    assert data.prepared("test", [1, 0]).shape == (2, 1, 32, 32)


@pytest.mark.parametrize("size", [32, 20])
def test_a_whole_set_is_prepared_in_parts_to_the_same_bits(size: int) -> None:
    data = OneClassData(images(1600), Pooled(), "zero", Prepare(size=size), batch_size=8)
    stored = torch.from_numpy(data.images.pixels[data.partition.train])
    assert len(stored) > AT_ONCE and len(stored) % AT_ONCE, "more than one part, and a rest"
    assert torch.equal(data.prepared("train"), data.prepare(stored))
    assert torch.equal(data.train_dataloader().everything().x, data.prepare(stored))


def test_images_are_scored_in_the_batches_of_the_device_or_the_users() -> None:
    for given, expected in ((None, scored_at_once(CPU)), (7, 7)):
        data = OneClassData(images(400), Pooled(), "zero", Prepare(), batch_size=8, score_batch_size=given)
        _, test = data.test_dataloader()
        assert len(next(iter(test)).x) == expected
