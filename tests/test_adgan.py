"""ADGAN: the search of a code and of a copy of the generator for each image."""

from __future__ import annotations

import copy

import pytest
import torch
from games import moved, prior, settle
from test_methods import batch, detector, images
from torch import Tensor

from anomaly_lab.methods import wasserstein_gan
from anomaly_lab.methods.wasserstein_gan import ADGAN


def adgan(*overrides: str) -> ADGAN:
    made = detector("adgan", "model.detector.weight_rate=1e-2", *overrides)
    assert isinstance(made, ADGAN)
    settle(made.generator, prior(0, 50, made.latent_size))
    made.next_batch = batch  # type: ignore[method-assign]
    return made.eval()


def one_by_one(made: ADGAN, image: Tensor) -> list[Tensor]:
    """The loss at which each start ends, by two optimisers on a copy of the generator."""
    ends = []
    for start in made.start:
        generator, z = copy.deepcopy(made.generator), start[None].clone().requires_grad_()
        codes = torch.optim.Adam([z], lr=made.code_rate, betas=(0.5, 0.999))
        weights = torch.optim.Adam(generator.parameters(), lr=made.weight_rate, betas=(0.5, 0.999))
        for _ in range(made.search_steps):
            for adam in (codes, weights):
                adam.zero_grad()
                ((image - generator(z)[0]) ** 2).mean().backward()
                adam.step()
        ends.append(((image - generator(z)[0]) ** 2).mean().detach())
    return ends


def test_each_image_is_searched_with_a_generator_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    made, x = adgan(), images(3)
    before = {name: value.clone() for name, value in made.state_dict().items()}
    with torch.no_grad():  # as the loop scores
        found = made.score(x)
    ends = torch.stack([torch.stack(one_by_one(made, image)) for image in x])
    torch.testing.assert_close(found, ends.mean(1), rtol=1e-4, atol=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in made.state_dict().items())
    monkeypatch.setattr(wasserstein_gan, "COPIED", 1)  # one image at once
    torch.testing.assert_close(made.score(x), found, rtol=1e-4, atol=1e-5)
    losses, rendered = made.search(x)
    torch.testing.assert_close(losses, (x[:, None] - rendered).square().mean(dim=(2, 3, 4)), rtol=1e-4, atol=1e-5)
    best = rendered[torch.arange(3), losses.argmin(1)]
    torch.testing.assert_close(made.reconstruct(x), best, rtol=1e-4, atol=1e-5)


def test_both_searches_bring_the_image_nearer() -> None:
    made, x = adgan(), images(6)
    by_steps = []
    for made.search_steps in (0, 2, 8):
        by_steps.append(made.score(x).mean().item())
    assert by_steps == sorted(by_steps, reverse=True)
    made.search_steps = 3
    rates = made.code_rate, made.weight_rate
    errors = []
    for made.code_rate, made.weight_rate in ((0.0, 0.0), (rates[0], 0.0), (0.0, rates[1])):
        errors.append(made.score(x).mean().item())
    assert errors[1] < errors[0] and errors[2] < errors[0]


def test_the_critic_moves_twice_then_the_generator() -> None:
    assert moved(adgan().train()) == [({name}, {name}) for name in ("critic", "critic", "generator")]


@pytest.mark.parametrize("option", ["search_steps=-1", "starts=0", "critic_rounds=1.5"])
def test_a_wrong_option_is_named(option: str) -> None:
    with pytest.raises(Exception, match=f"{option}: give a whole number from"):
        detector("adgan", f"model.detector.{option}")
