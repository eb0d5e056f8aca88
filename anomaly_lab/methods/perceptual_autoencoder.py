"""The deep perceptual autoencoder: PIAD's networks and perceptual loss without an adversary (Shvetsova et al. 2021).

Legend of the shape comments: B images, C channels, S = image size, d = latent size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from anomaly_lab.detector import Batch
from anomaly_lab.methods.piad import PerceptualDetector, ResidualEncoder, ResidualGenerator, levels
from anomaly_lab.networks import PerceptualFeatures


class PerceptualAutoencoder(PerceptualDetector):
    """An autoencoder trained, and judged, by the relative perceptual L1 alone.

    Shvetsova, Bakker, Fedulova, Schulz, Dylov, "Anomaly detection in medical imaging with deep perceptual
    autoencoders", IEEE Access 2021 (arXiv 2006.13265); ADDPA in the tables of Jia & Liu 2022. With f, E and G as in
    `PerceptualDetector`, loss and anomaly score are

        L_rec(x) = mean|f(x) - f(G(E(x)))| / mean|f(x)|

    *Where we differ from the authors' code* (github.com/ninatu/anomaly_detection, 6fa35f3): in the features'
    normalisation, see `PerceptualDetector`; and in the networks, PIAD's: for CIFAR-10 theirs have a second residual
    block at each resolution, about twice the parameters. Their hyper-parameters and their epoch are validated on one
    class of true anomalies; here training ends at the last step, and no anomaly is seen. Their progressive growing,
    from 8 to 64 pixels on medical images, is not here: at 32 pixels their configurations have none.

    Args:
        encoder_widths, generator_widths: channels from one resolution to the next, see PIAD's networks; smaller images
            than 32 pixels use those nearest to the image. latent_size: d.
        features: makes f. None: f is the image itself, normalised likewise.
    """

    def __init__(
        self,
        image_shape: Sequence[int],
        *,
        encoder_widths: Sequence[int],
        generator_widths: Sequence[int],
        latent_size: int,
        features: Callable[[], PerceptualFeatures] | None,
    ) -> None:
        super().__init__(image_shape)
        channels, size, _ = image_shape
        down = levels("encoder_widths", encoder_widths, size)
        up = levels("generator_widths", generator_widths, size)
        self.encoder = ResidualEncoder(channels, encoder_widths[:down], latent_size)
        self.generator = ResidualGenerator(channels, generator_widths[-up:], latent_size)
        for network in (self.encoder, self.generator):
            network.to(memory_format=torch.channels_last)  # twice as fast on a CPU
        self.use_features(image_shape, features)

    def players(self) -> Mapping[str, Sequence[nn.Module]]:
        return {"autoencoder": [self.encoder, self.generator]}

    def plays(self, batch: Batch) -> Iterator[Mapping[str, Tensor]]:
        yield {"autoencoder": self.relative_l1(batch.x, self.reconstruct(batch.x)).mean()}
