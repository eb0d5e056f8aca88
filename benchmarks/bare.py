"""Every method that trains by gradients as a bare PyTorch loop: what the framework has to be as fast as.

Networks, initial weights, noise and the order of images are the lab's, so the losses are too. The images are prepared
beforehand and lie in memory; a step slices its batch out of them, runs the players' passes, `zero_grad`, `backward` and
`step` of a plain `torch.optim.Adam` in the paper's order, and keeps its losses. There is no Lightning, no logging, no
preparation of images and no check for divergence in it. It runs no pass that its losses do not need and takes each
player's gradient with respect to that player alone (``backward(inputs=...)``), as someone would who writes for speed:
a loop with more passes would be easier to keep up with. `benchmarks.published` has one of those.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import Tensor, nn

from anomaly_lab import build
from anomaly_lab.data import OneClassData
from anomaly_lab.detector import Detector
from anomaly_lab.methods.adversarial_autoencoder import AdversarialAutoencoder, DenseAutoencoder
from anomaly_lab.methods.ganomaly import COLLAPSED_DISCRIMINATOR, GANomaly
from anomaly_lab.methods.piad import PIAD
from anomaly_lab.methods.shared_autoencoder import EncoderDecoderEncoder, SharedAutoencoder
from anomaly_lab.networks import init_dcgan

Step = Callable[[Tensor, Iterator[Tensor], int], list[Tensor]]
"""A batch (B,C,S,S), further ones, the epoch's number from 1 -> the losses, move by move and player by player."""

PASSES: Mapping[str, str] = {
    "shared_ae": (
        "Algorithm 1 as printed runs E1, D1, D2, D1 and three times E2 for each of the two moves: 14 passes. x1 and z1 "
        "enter no loss of the second move and are not computed there: 12. No gradient is taken for the decoder that "
        "does not move."
    ),
    "shared_ae_no_adversary": "Algorithm 1's x2' and z2' enter no loss and are not computed: 5 passes instead of 7.",
    "ede": "none to save: E1, D1, E2, once each.",
    "autoencoder": "none to save; no second encoder is built, for no loss reads it.",
    "ganomaly": (
        "The published loop runs D four times a step: on x and on x^ for L_D, and on both again for L_adv, for which "
        "the first passes have the same features. Here D runs twice. L_G's gradient is not taken for D's weights, "
        "which the published loop computes and throws away, nor L_D's for G's."
    ),
    "aae": (
        "Each move has a fresh pass, as the paper has. The pass for the critic's move is without a graph, and the "
        "decoder has none in the moves of critic and encoder."
    ),
    "autoencoder_beggel": "none to save.",
    "itsr": "as aae; rejected images are left out of the batch instead of weighed 0.",
    "piad_pixel_l1": (
        "The same passes as in the published loop. The critics' fakes are computed without a graph (theirs have one, "
        "cut off afterwards). Theirs goes backward through E and G for L_rec, scales the gradients, and goes backward "
        "through E again for the adversarial losses: here one backward serves both, with gamma_E and gamma_G in the "
        "gradients, and none is taken for the critics' weights. A resampling is fused with the convolution beside it, "
        "at half the work."
    ),
    "piad_squeezenet": "as piad_pixel_l1; the features of x are computed once a step and without a graph.",
}
"""For each method: which passes the published loop, or a naive one, has and the lab's step has not."""


def start(cfg: DictConfig, data: OneClassData, device: torch.device) -> Detector:
    """A detector in the state in which a run of ``cfg`` starts to train."""
    detector = build.make_detector(cfg, data.image_shape).to(device)
    detector.randomness.settle(device)
    detector.eval()
    with torch.no_grad():
        detector.before_fit(data.prepared("train").to(device))
    return detector.train()


class Bare:
    """The loop of one method over prepared images in memory.

    Args:
        model: name of the method, a key of `LOOPS`.
        adam: which kernels every `torch.optim.Adam` has, such as ``foreach=True``; by default the lab's.
    """

    def __init__(self, model: str, cfg: DictConfig, data: OneClassData, device: torch.device, **adam: bool) -> None:
        self.images = data.prepared("train").to(device)  # (N,C,S,S)
        self.detector = start(cfg, data, device)  # holds networks, weights and the generator of noise
        self.optimizers: dict[str, torch.optim.Adam] = {}  # by player
        self.step: Step = LOOPS[model](self.detector, functools.partial(self._adam, cfg, adam))

    def _adam(
        self, cfg: DictConfig, kernels: Mapping[str, bool], player: str, parameters: Sequence[nn.Parameter]
    ) -> torch.optim.Adam:
        given = cfg.model.optimizer.get(player, cfg.model.optimizer)
        beta1, beta2 = given.get("betas", (0.9, 0.999))
        decay = given.get("weight_decay", 0.0)
        kernels = kernels or {"fused": bool(given.get("fused"))}  # the lab's own, or it would race a slower Adam
        made = torch.optim.Adam(parameters, lr=given.lr, betas=(beta1, beta2), weight_decay=decay, **kernels)
        self.optimizers[player] = made
        return made

    def train(self, batches: Sequence[Tensor], further: Iterable[Tensor] = (), epoch: int = 1) -> list[list[Tensor]]:
        """The losses of each step, with the images at these positions."""
        more = (self.images[chosen] for chosen in further)
        return [self.step(self.images[chosen], more, epoch) for chosen in batches]


Adam = Callable[[str, Sequence[nn.Parameter]], torch.optim.Adam]
"""Makes the optimiser of a player."""


def _parameters(*networks: nn.Module) -> list[nn.Parameter]:
    return [parameter for network in networks for parameter in network.parameters()]


def _l1(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).abs().flatten(1).mean(1).mean()  # summed in the lab's order: a sign is easily tipped


def _ede(made: Detector, adam: Adam) -> Step:
    """Jia & Liu (2022), equation (1); without its latent term where there is no second encoder."""
    assert isinstance(made, EncoderDecoderEncoder)
    e1, d1, e2 = made.encoder1, made.decoder1, made.encoder2
    optimizer = adam("ede", _parameters(e1, d1, *([e2] if e2 else [])))

    def step(x: Tensor, further: Iterator[Tensor], epoch: int) -> list[Tensor]:
        z = e1(x)
        x1 = d1(z)
        loss = made.alpha * _l1(x1, x)
        if e2 is not None:
            loss = loss + made.beta * _l1(e2(x1), z)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return [loss.detach()]

    return step


def _shared_ae(made: Detector, adam: Adam) -> Step:
    """Jia & Liu (2022), Algorithm 1, equations (6) and (7), one after the other on fresh passes."""
    assert isinstance(made, SharedAutoencoder) and made.update == "alternating" and made.latent_target == "code"
    e1, e2, d1, d2, a, b = made.encoder1, made.encoder2, made.decoder1, made.decoder2, made.alpha, made.beta
    first, second = _parameters(e1, e2, d1), _parameters(e1, e2, d2)
    optimizer1, optimizer2 = adam("ede1", first), adam("ede2", second)

    def step(x: Tensor, further: Iterator[Tensor], epoch: int) -> list[Tensor]:
        r = max(1 / epoch, made.floor)
        z = e1(x)
        x1 = d1(z)
        z1 = e2(x1)
        x2_prime = d1(e2(d2(z)))
        z2_prime = e2(x2_prime)
        rec1 = a * _l1(x1, x) + b * _l1(z1, z)
        loss1 = r * rec1 - (1 - r) * (a * _l1(x2_prime, x) + b * _l1(z2_prime, z))
        optimizer1.zero_grad()
        loss1.backward(inputs=first)
        optimizer1.step()

        z = e1(x)
        x2 = d2(z)
        z2 = e2(x2)
        x2_prime = d1(z2)
        z2_prime = e2(x2_prime)
        rec2 = a * _l1(x2, x) + b * _l1(z2, z)
        loss2 = r * rec2 + (1 - r) * (a * _l1(x2_prime, x) + b * _l1(z2_prime, z))
        optimizer1.zero_grad()  # the encoders' gradients of the first move
        optimizer2.zero_grad()
        loss2.backward(inputs=second)
        optimizer2.step()
        return [loss1.detach(), loss2.detach()]

    return step


def _shared_ae_no_adversary(made: Detector, adam: Adam) -> Step:
    """Jia & Liu (2022), equations (1) and (2) together."""
    assert isinstance(made, SharedAutoencoder) and made.update == "none"
    e1, e2, d1, d2, a, b = made.encoder1, made.encoder2, made.decoder1, made.decoder2, made.alpha, made.beta
    optimizer = adam("both", _parameters(e1, e2, d1, d2))

    def step(x: Tensor, further: Iterator[Tensor], epoch: int) -> list[Tensor]:
        z = e1(x)
        x1, x2 = d1(z), d2(z)
        rec1 = a * _l1(x1, x) + b * _l1(e2(x1), z)
        rec2 = a * _l1(x2, x) + b * _l1(e2(x2), z)
        loss = rec1 + rec2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return [loss.detach()]

    return step


def _ganomaly(made: Detector, adam: Adam) -> Step:
    """Akcay et al. (2018): both losses from one pass, both gradients before either network moves."""
    assert isinstance(made, GANomaly)
    encoder, decoder, encoder2, d = made.encoder, made.decoder, made.second_encoder, made.discriminator
    of_g, of_d = _parameters(encoder, decoder, encoder2), _parameters(d)
    optimizer_g, optimizer_d = adam("generator", of_g), adam("discriminator", of_d)

    def step(x: Tensor, further: Iterator[Tensor], epoch: int) -> list[Tensor]:
        z = encoder(x)
        fake = decoder(z)
        z_fake = encoder2(fake)
        real_logit, real_features = d(x)
        fake_logit, fake_features = d(fake)
        adv, con, enc = F.mse_loss(fake_features, real_features), F.l1_loss(fake, x), F.mse_loss(z_fake, z)
        loss_g = made.w_adv * adv + made.w_con * con + made.w_enc * enc
        ones, zeros = torch.ones_like(real_logit), torch.zeros_like(fake_logit)
        bce = F.binary_cross_entropy_with_logits
        loss_d = (bce(real_logit, ones) + bce(fake_logit, zeros)) / 2
        optimizer_g.zero_grad()
        optimizer_d.zero_grad()
        loss_g.backward(retain_graph=True, inputs=of_g)
        loss_d.backward(inputs=of_d)
        optimizer_g.step()
        optimizer_d.step()
        if loss_d.item() < COLLAPSED_DISCRIMINATOR:
            d.apply(functools.partial(init_dcgan, generator=made.noise))
        return [loss_g.detach(), loss_d.detach()]

    return step


def _dense(made: Detector, adam: Adam) -> Step:
    """Beggel et al. (2019), the plain autoencoder."""
    assert isinstance(made, DenseAutoencoder)
    encoder, decoder = made.encoder, made.decoder
    optimizer = adam("autoencoder", _parameters(encoder, decoder))

    def step(x: Tensor, further: Iterator[Tensor], epoch: int) -> list[Tensor]:
        loss = F.mse_loss(decoder(encoder(x)), x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return [loss.detach()]

    return step


def _aae(made: Detector, adam: Adam) -> Step:
    """Makhzani et al. (2015): reconstruction, critic, encoder, each on a fresh pass. ITSR's first stage is the same."""
    assert isinstance(made, AdversarialAutoencoder)
    encoder, decoder, critic = made.encoder, made.decoder, made.critic
    autoencoder, own = _parameters(encoder, decoder), _parameters(encoder)
    optimizer_a, optimizer_c = adam("autoencoder", autoencoder), adam("critic", _parameters(critic))
    optimizer_e = adam("encoder", own)

    def step(x: Tensor, further: Iterator[Tensor], epoch: int) -> list[Tensor]:
        loss_a = F.mse_loss(decoder(encoder(x)), x)
        optimizer_a.zero_grad()
        loss_a.backward()
        optimizer_a.step()

        prior = torch.randn(len(x), made.latent_size, generator=made.noise, device=x.device, dtype=x.dtype)
        with torch.no_grad():
            code = encoder(x)
        loss_c = F.softplus(-critic(prior)).mean() + F.softplus(critic(code)).mean()
        optimizer_c.zero_grad()
        loss_c.backward()
        optimizer_c.step()

        loss_e = F.softplus(-critic(encoder(x))).mean()
        optimizer_e.zero_grad()
        loss_e.backward(inputs=own)
        optimizer_e.step()
        return [loss_a.detach(), loss_c.detach(), loss_e.detach()]

    return step


def _piad(made: Detector, adam: Adam) -> Step:
    """Tuluptceva et al. (2019): the critics' moves on fresh batches, then encoder and generator in one."""
    assert isinstance(made, PIAD)
    e, g, dx, dz = made.encoder, made.generator, made.image_critic, made.latent_critic
    optimizer_x, optimizer_z = adam("image_critic", _parameters(dx)), adam("latent_critic", _parameters(dz))
    both = _parameters(e, g)
    optimizer = adam("encoder_generator", both)
    weights_e, weights_g = ([p for n, p in net.named_parameters() if n.endswith("weight")] for net in (e, g))
    gammas = [1.0, 1.0]
    done = 0

    def normal(x: Tensor) -> Tensor:
        return torch.randn(len(x), made.latent_size, generator=made.noise, device=x.device, dtype=x.dtype)

    def features(x: Tensor) -> Tensor:
        return ((x if made.features is None else made.features(x)) - made.feature_mean) / made.feature_std

    def critic_loss(critic: nn.Module, real: Tensor, fake: Tensor) -> Tensor:
        share = torch.rand(len(real), generator=made.noise, device=real.device, dtype=real.dtype)
        share = share.view(-1, *[1] * (real.ndim - 1))
        on_real, on_fake = critic(real), critic(fake)
        mixed = (share * real + (1 - share) * fake).requires_grad_()
        (slope,) = torch.autograd.grad(critic(mixed).sum(), mixed, create_graph=True)
        penalty = (slope.flatten(1).norm(dim=1) - 1).square().mean()
        drift = on_real.square().mean() + on_fake.square().mean()
        return on_fake.mean() - on_real.mean() + made.penalty * penalty + made.drift * drift

    def terms(x: Tensor, z: Tensor, factor: float) -> tuple[Tensor, Tensor, Tensor]:
        code = e(x)
        with torch.no_grad():
            target = features(x)
            size = target.abs().flatten(1).mean(1).clamp(min=1e-3)
        scaled = code.detach() + factor * (code - code.detach())
        rec = ((target - features(g(scaled))).abs().flatten(1).mean(1) / size).mean()
        return rec, -dz(code).mean(), -dx(g(z)).mean()

    def step(x: Tensor, further: Iterator[Tensor], epoch: int) -> list[Tensor]:
        nonlocal done
        losses = []
        for _ in range(made.critic_rounds):
            other = next(further)
            z = normal(other)
            with torch.no_grad():
                fake_x, fake_z = g(z), e(other)
            loss_x, loss_z = critic_loss(dx, other, fake_x), critic_loss(dz, z, fake_z)
            optimizer_x.zero_grad()
            optimizer_z.zero_grad()
            loss_x.backward()
            loss_z.backward()
            optimizer_x.step()
            optimizer_z.step()
            losses += [loss_x.detach(), loss_z.detach()]

        z = normal(x)
        done += 1
        if done % made.gamma_every == 0:
            rec, adversarial_z, adversarial_x = terms(x, z, 1.0)
            own = torch.autograd.grad(rec, weights_e + weights_g, retain_graph=True)
            others = torch.autograd.grad(adversarial_z + adversarial_x, weights_e + weights_g)
            made.balance_encoder.update(own[: len(weights_e)], others[: len(weights_e)])
            made.balance_generator.update(own[len(weights_e) :], others[len(weights_e) :])
            gammas[:] = made.balance_encoder.gamma.item(), made.balance_generator.gamma.item()
        gamma_e, gamma_g = gammas
        rec, adversarial_z, adversarial_x = terms(x, z, gamma_e / gamma_g)
        loss = rec + adversarial_z + adversarial_x
        optimizer.zero_grad()
        (gamma_g * rec + adversarial_z + adversarial_x).backward(inputs=both)
        optimizer.step()
        return [*losses, loss.detach()]

    return step


LOOPS: Mapping[str, Callable[[Detector, Adam], Step]] = {
    "shared_ae": _shared_ae,
    "shared_ae_no_adversary": _shared_ae_no_adversary,
    "ede": _ede,
    "autoencoder": _ede,
    "ganomaly": _ganomaly,
    "aae": _aae,
    "autoencoder_beggel": _dense,
    "itsr": _aae,
    "piad_pixel_l1": _piad,
    "piad_squeezenet": _piad,
}
"""The methods that have a loop here: all that train by gradients, but for config variants of the same step."""
