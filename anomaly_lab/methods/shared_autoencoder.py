"""Shared autoencoders: two encoder-decoder-encoders with common encoders and rival decoders (Jia & Liu 2022).

Legend of the shape comments: B images, C channels, S = image size, d = latent size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Literal

from torch import Tensor, nn

from anomaly_lab.detector import Batch, Detector
from anomaly_lab.networks import DCGANDecoder, DCGANEncoder

Update = Literal["alternating", "decoder", "simultaneous", "none"]
LatentTarget = Literal["code", "code_detached", "reencoded"]
Score = Literal["primed", "usad"]


def l1(a: Tensor, b: Tensor) -> Tensor:
    """Mean absolute difference of each pair: (B,...) and (B,...) -> (B,)."""
    return (a - b).abs().flatten(1).mean(1)


def _networks(image_shape: Sequence[int], width: int, latent_size: int) -> tuple[DCGANEncoder, DCGANDecoder]:
    channels, size, _ = image_shape
    encoder = DCGANEncoder(channels, size, width, latent_size, tanh=True)
    return encoder, DCGANDecoder(channels, size, width, latent_size, nn.LeakyReLU(0.2))


class EncoderDecoderEncoder(Detector):
    """One encoder-decoder-encoder, or without the second encoder a plain autoencoder.

    These are the first two rows of the ablation in Jia & Liu (2022), Table 5, with the networks of
    `SharedAutoencoder`: the loss is equation (1) and the score its per-image value with weights omega and 1 - omega,

        z = E1(x)    x1 = D1(z)    z1 = E2(x1)    L = alpha |x - x1| + beta |z - z1|

    Args:
        width: channels after the first convolution.
        latent_size: d.
        alpha, beta: weights of the image and the latent term of the loss. beta = 0 builds no second encoder.
        omega: weight of the image term in the score, in [0, 1]; must be 1 without a second encoder.
    """

    def __init__(
        self, image_shape: Sequence[int], *, width: int, latent_size: int, alpha: float, beta: float, omega: float
    ) -> None:
        super().__init__(image_shape)
        if not 0 <= omega <= 1:
            raise ValueError(f"omega={omega}: choose a weight from 0 to 1")
        if beta == 0 and omega != 1:
            raise ValueError("beta=0 trains no second encoder, so there is no latent term to score: set omega=1")
        self.alpha, self.beta, self.omega = alpha, beta, omega
        self.encoder1, self.decoder1 = _networks(image_shape, width, latent_size)
        self.encoder2 = _networks(image_shape, width, latent_size)[0] if beta else None

    def players(self) -> Mapping[str, Sequence[nn.Module]]:
        return {"ede": [network for network in (self.encoder1, self.decoder1, self.encoder2) if network]}

    def _errors(self, x: Tensor) -> tuple[Tensor, Tensor | float]:
        z = self.encoder1(x)  # (B,d)
        x1 = self.decoder1(z)  # (B,C,S,S)
        latent = l1(z, self.encoder2(x1)) if self.encoder2 is not None else 0.0
        return l1(x, x1), latent  # (B,), (B,)

    def plays(self, batch: Batch) -> Iterator[Mapping[str, Tensor]]:
        image, latent = self._errors(batch.x)
        yield {"ede": (self.alpha * image + self.beta * latent).mean()}

    def terms(self, x: Tensor) -> Mapping[str, Tensor]:
        image, latent = self._errors(x)
        return {"image": image, "latent": latent} if isinstance(latent, Tensor) else {"image": image}

    def combine(self, terms: Mapping[str, Tensor]) -> Tensor:
        return self.omega * terms["image"] + (1 - self.omega) * terms.get("latent", 0.0)

    def reconstruct(self, x: Tensor) -> Tensor:
        return self.decoder1(self.encoder1(x))


class Pass:
    """Algorithm 1's forward pass of x (B,C,S,S) in the paper's notation; what no loss asks for is never computed."""

    def __init__(self, e1: nn.Module, e2: nn.Module, d1: nn.Module, d2: nn.Module, x: Tensor) -> None:
        self._e1, self._e2, self._d1, self._d2, self.x = e1, e2, d1, d2, x

    @cached_property
    def z(self) -> Tensor:
        return self._e1(self.x)  # (B,d)

    @cached_property
    def x1(self) -> Tensor:
        return self._d1(self.z)  # (B,C,S,S)

    @cached_property
    def z1(self) -> Tensor:
        return self._e2(self.x1)

    @cached_property
    def x2(self) -> Tensor:
        return self._d2(self.z)

    @cached_property
    def z2(self) -> Tensor:
        return self._e2(self.x2)

    @cached_property
    def x2p(self) -> Tensor:  # x2': the other decoder decodes the re-encoded code
        return self._d1(self.z2)

    @cached_property
    def z2p(self) -> Tensor:  # z2'
        return self._e2(self.x2p)


class SharedAutoencoder(Detector):
    """Two EDEs with shared encoders: EDE1 = (E1, D1, E2) raises the error of x2' = D1(E2(D2(E1(x)))), EDE2 lowers it.

    Jia & Liu, "Anomaly detection in images with shared autoencoders", Front. Neurorobotics 16:1046867, 2022. With n
    the number of the epoch, counted from 1, |.| the mean absolute difference and

        L1_rec = a |x - x1| + b |z - z1|     (1)      L2_rec = a |x - x2| + b |z - z2|      (2)
        Adv    = a |x - x2'| + b |z - z2'|   (3)      EDE1 plays -Adv (4), EDE2 plays +Adv  (5)

    the networks minimise

        L_EDE1 = r L1_rec - (1 - r) Adv,     r = max(1/n, floor)                            (6)
        L_EDE2 = r L2_rec + (1 - r) Adv                                                     (7)

    and the anomaly score is Algorithm 2's A(x) = omega |x - x2'| + (1 - omega) |z - z2'|.

    No official code exists; what the paper leaves open is config. *Where we differ:* it prints no floor. Where z2 ~ z,
    x2' ~ x1, so D1's image error has the total weight r - (1 - r) = 2r - 1: as printed that is 2/n - 1, negative from
    the third epoch on, and D1 is paid for the *worst* reconstruction. ``rec_weight_floor`` above 0.5 keeps D1(z) a
    reconstruction; 0 is the paper as printed. With alpha 10 or 50 and ``update=alternating`` it does not protect
    x2' = D1(z2) (experiments/shared_ae_development). Norms are means, not sums, so alpha and beta are what they seem.

    Args:
        width: channels after the first convolution (not given in the paper).
        latent_size: d (not given).
        alpha, beta: a and b above (not given).
        omega: weight of the image term in the score, in [0, 1] (not given).
        rec_weight_floor: floor of r, in [0, 1].
        update: who moves on which loss.
            ``alternating``: the USAD order: {E1,E2,D1} on (6), a fresh pass, {E1,E2,D2} on (7).
            ``decoder``: GAN-like: D1 alone on (6), a fresh pass, {E1,E2,D2} on (7) + r L1_rec.
            ``simultaneous``: from one pass, D1 on (6), D2 on (7), the encoders on their sum, where Adv cancels.
            ``none``: everything on L1_rec + L2_rec: the ablation without the adversarial phase.
        latent_target: what Adv compares z2' with: ``code`` z; ``code_detached`` z without its gradient;
            ``reencoded`` z2, as the paper's abstract words it.
        score: ``primed``, Algorithm 2; ``usad``: omega |x - x2| + (1 - omega) |x - x2'|, USAD's score in our letters.
    """

    def __init__(
        self,
        image_shape: Sequence[int],
        *,
        width: int,
        latent_size: int,
        alpha: float,
        beta: float,
        omega: float,
        rec_weight_floor: float,
        update: Update,
        latent_target: LatentTarget,
        score: Score,
    ) -> None:
        super().__init__(image_shape)
        for name, number in (("omega", omega), ("rec_weight_floor", rec_weight_floor)):
            if not 0 <= number <= 1:
                raise ValueError(f"{name}={number}: choose a number from 0 to 1")
        self.alpha, self.beta, self.omega = alpha, beta, omega
        self.floor, self.update = rec_weight_floor, update
        self.latent_target, self.score_rule = latent_target, score
        self.encoder1, self.decoder1 = _networks(image_shape, width, latent_size)
        self.encoder2, self.decoder2 = _networks(image_shape, width, latent_size)

    def players(self) -> Mapping[str, Sequence[nn.Module]]:
        e1, e2, d1, d2 = self.encoder1, self.encoder2, self.decoder1, self.decoder2
        rules: dict[str, dict[str, list[nn.Module]]] = {
            "alternating": {"ede1": [e1, e2, d1], "ede2": [e1, e2, d2]},
            "decoder": {"decoder1": [d1], "ede2": [e1, e2, d2]},
            "simultaneous": {"decoder1": [d1], "decoder2": [d2], "encoders": [e1, e2]},
            "none": {"both": [e1, e2, d1, d2]},
        }
        return rules[self.update]

    def passes(self, x: Tensor) -> Pass:
        return Pass(self.encoder1, self.encoder2, self.decoder1, self.decoder2, x)

    def loss_rec1(self, p: Pass) -> Tensor:
        """Equation (1), a scalar."""
        return self.alpha * l1(p.x, p.x1).mean() + self.beta * l1(p.z, p.z1).mean()

    def loss_rec2(self, p: Pass) -> Tensor:
        """Equation (2), a scalar."""
        return self.alpha * l1(p.x, p.x2).mean() + self.beta * l1(p.z, p.z2).mean()

    def loss_adv(self, p: Pass) -> Tensor:
        """Equation (3), a scalar."""
        target = p.z2 if self.latent_target == "reencoded" else p.z
        target = target.detach() if self.latent_target == "code_detached" else target
        return self.alpha * l1(p.x, p.x2p).mean() + self.beta * l1(target, p.z2p).mean()

    def loss_ede1(self, p: Pass) -> Tensor:
        """Equation (6), a scalar."""
        r = self.rec_weight()
        return r * self.loss_rec1(p) - (1 - r) * self.loss_adv(p)

    def loss_ede2(self, p: Pass) -> Tensor:
        """Equation (7), a scalar."""
        r = self.rec_weight()
        return r * self.loss_rec2(p) + (1 - r) * self.loss_adv(p)

    def rec_weight(self) -> Tensor:
        """r = max(1/n, floor), the weight of the reconstruction in the current epoch n, a scalar."""
        return (1 / self.epoch).clamp(min=self.floor)

    def plays(self, batch: Batch) -> Iterator[Mapping[str, Tensor]]:
        x = batch.x
        if self.update == "alternating":
            yield {"ede1": self.loss_ede1(self.passes(x))}
            yield {"ede2": self.loss_ede2(self.passes(x))}
        elif self.update == "decoder":
            yield {"decoder1": self.loss_ede1(self.passes(x))}
            p = self.passes(x)
            yield {"ede2": self.loss_ede2(p) + self.rec_weight() * self.loss_rec1(p)}
        elif self.update == "simultaneous":
            p = self.passes(x)
            one, two = self.loss_ede1(p), self.loss_ede2(p)
            yield {"decoder1": one, "decoder2": two, "encoders": one + two}
        else:
            p = self.passes(x)
            yield {"both": self.loss_rec1(p) + self.loss_rec2(p)}

    def terms(self, x: Tensor) -> Mapping[str, Tensor]:
        """``image`` |x - x2'|, ``latent`` |z - z2'|, and ``image2`` |x - x2|, which only USAD's rule weighs."""
        p = self.passes(x)
        return {"image": l1(x, p.x2p), "latent": l1(p.z, p.z2p), "image2": l1(x, p.x2)}

    def combine(self, terms: Mapping[str, Tensor]) -> Tensor:
        if self.score_rule == "usad":
            return self.omega * terms["image2"] + (1 - self.omega) * terms["image"]
        return self.omega * terms["image"] + (1 - self.omega) * terms["latent"]

    def reconstruct(self, x: Tensor) -> Tensor:
        return self.passes(x).x2p
