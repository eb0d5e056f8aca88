"""GANomaly's training loop in the order of work of its authors' code (samet-akcay/ganomaly@106a59e, lib/model.py).

What their loop does in a step, it does here: the batch is copied into an input buffer; G runs on it; D runs on the
images and on the detached reconstructions; D runs on both again for the feature matching loss; L_G goes backward with
its graph kept, into D's weights too, and G moves; D's gradients are zeroed, L_D goes backward, D moves; the loss of D
is read, for the restart of a collapsed D. Batches come from a `torch.utils.data.DataLoader` that shuffles a data set.

The networks, their widths and their initial weights are the lab's; D ends in a sigmoid, under the binary cross-entropy
of probabilities. Not counted: their decoding, resizing and normalising of every image (the data set holds prepared
tensors), their progress bar, plots and scoring.

Not literal: their ReLUs work in place, here the lab's networks decide that for both loops; and a `DataLoader` is made
for each timed epoch, where theirs is made once. The commit is that of the file whose loop this is; sizes and protocol
are cited from 78da4ea elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from anomaly_lab.data import OneClassData
from anomaly_lab.methods.ganomaly import COLLAPSED_DISCRIMINATOR, GANomaly
from anomaly_lab.networks import init_dcgan
from benchmarks.bare import start


class Published:
    """The published loop over one method's networks."""

    def __init__(self, cfg: DictConfig, data: OneClassData, device: torch.device) -> None:
        made = start(cfg, data, device)
        assert isinstance(made, GANomaly)
        self.images = data.prepared("train")
        self.batch_size = int(cfg.model.batch_size)
        self.weights = made.w_adv, made.w_con, made.w_enc
        self.encoder, self.decoder, self.encoder2 = made.encoder, made.decoder, made.second_encoder
        self.netd = made.discriminator
        lr, betas = cfg.model.optimizer.lr, tuple(cfg.model.optimizer.betas)
        generator = [p for network in (self.encoder, self.decoder, self.encoder2) for p in network.parameters()]
        self.optimizer_g = torch.optim.Adam(generator, lr=lr, betas=betas)
        self.optimizer_d = torch.optim.Adam(self.netd.parameters(), lr=lr, betas=betas)
        self.l1, self.bce = nn.L1Loss(), nn.BCELoss()
        self.input = torch.empty((self.batch_size, *self.images.shape[1:]), device=device)
        self.real_label = torch.ones(self.batch_size, device=device)
        self.fake_label = torch.zeros(self.batch_size, device=device)

    def loader(self, chosen: Tensor) -> DataLoader[Any]:
        """Shuffled batches of the images at these positions."""
        dataset = TensorDataset(self.images[chosen], torch.zeros(len(chosen), dtype=torch.long))
        return DataLoader(dataset, batch_size=self.batch_size, shuffle=True, drop_last=True)

    def train(self, batches: Iterable[Any]) -> list[list[Tensor]]:
        """One epoch; L_G and L_D of each step."""
        return [self._optimise(images) for images, _ in batches]

    def _discriminate(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logit, features = self.netd(x)
        return logit.sigmoid(), features

    def _optimise(self, images: Tensor) -> list[Tensor]:
        with torch.no_grad():
            self.input.copy_(images)
        # Forward: the generator, then the discriminator on both.
        latent_i = self.encoder(self.input)
        fake = self.decoder(latent_i)
        latent_o = self.encoder2(fake)
        pred_real, _ = self._discriminate(self.input)
        pred_fake, _ = self._discriminate(fake.detach())

        # The generator's move, with two further passes of the discriminator.
        self.optimizer_g.zero_grad()
        w_adv, w_con, w_enc = self.weights
        err_adv = _l2(self._discriminate(self.input)[1], self._discriminate(fake)[1])
        err_g = w_adv * err_adv + w_con * self.l1(fake, self.input) + w_enc * _l2(latent_o, latent_i)
        err_g.backward(retain_graph=True)
        self.optimizer_g.step()

        # The discriminator's move, from the passes before.
        self.optimizer_d.zero_grad()
        err_d = 0.5 * (self.bce(pred_real, self.real_label) + self.bce(pred_fake, self.fake_label))
        err_d.backward()
        self.optimizer_d.step()
        if err_d.item() < COLLAPSED_DISCRIMINATOR:
            self.netd.apply(init_dcgan)
        return [err_g.detach(), err_d.detach()]


def _l2(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).pow(2).mean()
