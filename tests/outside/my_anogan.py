"""AnoGAN (Schlegl et al. 2017): a GAN of normal images; an image is anomalous that its generator cannot make."""

from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anomaly_lab.detector import Batch, Detector
from anomaly_lab.networks import DCGANDecoder, DCGANDiscriminator


class AnoGAN(Detector):
    def __init__(
        self, image_shape: Sequence[int], *, width: int, latent_size: int, steps: int, rate: float, w_features: float
    ) -> None:
        super().__init__(image_shape)
        channels, size, _ = image_shape
        self.generator = DCGANDecoder(channels, size, width, latent_size, nn.ReLU())
        self.discriminator = DCGANDiscriminator(channels, size, width)
        self.steps, self.rate, self.w_features = steps, rate, w_features
        self.register_buffer("start", torch.randn(latent_size))  # of every search

    def players(self) -> Mapping[str, Sequence[nn.Module]]:
        return {"discriminator": [self.discriminator], "generator": [self.generator]}

    def plays(self, batch: Batch) -> Iterator[Mapping[str, Tensor]]:
        z = torch.randn(len(batch.x), len(self.get_buffer("start")), generator=self.noise, device=self.device)
        fake = self.generator(z)
        real_logit, fake_logit = self.discriminator(batch.x)[0], self.discriminator(fake)[0]
        yield {"discriminator": F.softplus(-real_logit).mean() + F.softplus(fake_logit).mean()}
        yield {"generator": F.softplus(-self.discriminator(self.generator(z))[0]).mean()}

    def score(self, x: Tensor) -> Tensor:
        features = self.discriminator(x)[1]
        z = self.get_buffer("start").repeat(len(x), 1).requires_grad_()
        search = torch.optim.Adam([z], lr=self.rate)
        for _ in range(self.steps):
            with torch.enable_grad():
                made = self.generator(z)
                residual = (x - made).abs().flatten(1).sum(1)
                matching = (features - self.discriminator(made)[1]).abs().flatten(1).sum(1)
                losses = (1 - self.w_features) * residual + self.w_features * matching
                (z.grad,) = torch.autograd.grad(losses.sum(), [z])
            search.step()
        return losses.detach()
