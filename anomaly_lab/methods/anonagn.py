"""A decoder with one learned code for each training image, and an encoder that learns the way back (after AnoNAGN).

Legend of the shape comments: B images in a batch, N in the training set, C channels, S = image size, d = latent size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anomaly_lab.detector import Batch, Detector
from anomaly_lab.networks import DCGANDecoder, DCGANEncoder


class NonAdversarialDecoderEncoder(Detector):
    """AnoNAGN as far as its abstract tells it: a reconstruction, not a re-implementation.

    Chen et al., "Anomaly detection by one class latent regularized networks", arXiv 2002.00522, of which abstract and
    figures are known here, and no code. Known: a generator without an adversary, whose codes are learned with it; an
    encoder that learns the reverse map; latent and image reconstruction; at the test the order is reversed, encode and
    decode. In every step, with z_i the code of training image x_i in the unit ball,

        1. decoder G and codes move on   |x - G(z)|_1
        2. encoder E moves on            |z - E(G(z))|_2^2 + |x - G(E(x))|_1,    G and z as step 1 left them

    and the score is the sum of its two terms:

        image   |x - G(E(x))|_1          latent   |E(x) - E(G(E(x)))|_2^2

    Norms are means over elements, and what E finds is projected to the unit ball, too: G begins with batch norm, so
    that without a bound the length of E(x) is free, and the latent term measures it.

    *Guessed:* step 1 and the projection of codes to the unit ball after each of their moves, from the nearest public
    family (GLO: Bojanowski et al., ICML 2018), and that of E's; L1 for images and squared L2 for codes; all weights 1;
    DCGAN's networks; the rates.

    Args:
        width: channels after the first convolution. latent_size: d.
        code_rate: learning rate of the codes, which descend the gradient of the batch's summed loss.
    """

    codes: Tensor  # (N,d)
    place: Tensor  # int64: position among the training images of each data-set index

    def __init__(self, image_shape: Sequence[int], *, width: int, latent_size: int, code_rate: float) -> None:
        super().__init__(image_shape)
        channels, size, _ = image_shape
        self.latent_size, self.code_rate = latent_size, code_rate
        self.encoder = DCGANEncoder(channels, size, width, latent_size, tanh=False)
        self.decoder = DCGANDecoder(channels, size, width, latent_size, nn.ReLU())

    def players(self) -> Mapping[str, Sequence[nn.Module]]:
        return {"decoder": [self.decoder], "encoder": [self.encoder]}

    def before_fit(self, images: Tensor) -> None:
        index = self.training_images.everything().index
        if (index < 0).any():
            raise ValueError("this method has a code for each training image: train it on OneClassData")
        drawn = torch.randn(len(images), self.latent_size, generator=self.noise, device=images.device)
        self.set_fitted("codes", in_unit_ball(drawn))
        place = torch.full((int(index.max()) + 1,), -1, device=images.device)
        place[index] = torch.arange(len(index), device=images.device)
        self.set_fitted("place", place)

    def encode(self, x: Tensor) -> Tensor:
        """Codes where the decoder's are, in the unit ball: (B,C,S,S) -> (B,d)."""
        return in_unit_ball(self.encoder(x))

    def plays(self, batch: Batch) -> Iterator[Mapping[str, Tensor]]:
        x, place = batch.x, self.place[batch.index]
        z = self.codes[place].to(x.dtype).requires_grad_()  # (B,d)
        error = (x - self.decoder(z)).abs().flatten(1).mean(1)  # (B,)
        (gradient,) = torch.autograd.grad(error.sum(), z, retain_graph=True)
        yield {"decoder": error.mean()}
        z = in_unit_ball(z.detach() - self.code_rate * gradient)
        self.codes[place] = z.to(self.codes.dtype)
        with torch.no_grad():
            made = self.decoder(z)
        latent = F.mse_loss(self.encode(made), z)
        image = F.l1_loss(self.decoder(self.encode(x)), x)
        yield {"encoder": latent + image}
        self.record("loss_latent", latent)
        self.record("loss_image", image)

    def terms(self, x: Tensor) -> Mapping[str, Tensor]:
        z = self.encode(x)
        rebuilt = self.decoder(z)
        return {
            "image": (x - rebuilt).abs().flatten(1).mean(1),
            "latent": (z - self.encode(rebuilt)).square().mean(1),
        }

    def combine(self, terms: Mapping[str, Tensor]) -> Tensor:
        return terms["image"] + terms["latent"]

    def reconstruct(self, x: Tensor) -> Tensor:
        return self.decoder(self.encode(x))


def in_unit_ball(z: Tensor) -> Tensor:
    """Codes longer than 1 at length 1: (B,d) -> (B,d)."""
    return z / z.norm(dim=1, keepdim=True).clamp(min=1)
