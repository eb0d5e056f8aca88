"""Autoencoders for contaminated training sets: plain, adversarial, and with refinement of the set (Beggel et al. 2019).

Legend of the shape comments: B images in a batch, N in the training set, P = C S S pixels of an image, d = latent size.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anomaly_lab.detector import Batch, Detector
from anomaly_lab.errors import refuse_fewer

QUANTILE = 0.9
"""The paper's thresholds: this quantile of the training errors, and of the training codes' unlikeliness."""


def _dense(sizes: Sequence[int], *, batch_norm: bool = False) -> nn.Sequential:
    """Linear layers, ReLU between them, batch norm before each ReLU on request; the last one stays linear."""
    layers: list[nn.Module] = []
    for position, (a, b) in enumerate(itertools.pairwise(sizes)):
        layers.append(nn.Linear(a, b))
        if position < len(sizes) - 2:
            layers += [nn.BatchNorm1d(b), nn.ReLU()] if batch_norm else [nn.ReLU()]
    return nn.Sequential(*layers)


def squared_error(x: Tensor, y: Tensor) -> Tensor:
    """Mean squared difference of each pair: (B,...) and (B,...) -> (B,)."""
    return (x - y).square().flatten(1).mean(1)


def training_rank(value: Tensor, ordered: Tensor) -> Tensor:
    """How far up in the training values each value lies: 0 at their minimum, 1 at their maximum, continued outside.

    Between two training values the rank is interpolated, so that ``rank > q`` is ``value > ordered.quantile(q)``;
    outside it continues with the slope of the whole range, so that values beyond all training values still differ.
    value (B,), ordered (N,) rising -> (B,)
    """
    last = len(ordered) - 1
    right = torch.searchsorted(ordered, value.contiguous()).clamp(1, last)
    low, high = ordered[right - 1], ordered[right]
    inside = (right - 1 + (value - low) / (high - low).clamp(min=torch.finfo(value.dtype).tiny)) / last
    span = (ordered[-1] - ordered[0]).clamp(min=torch.finfo(value.dtype).tiny)
    above = 1 + (value - ordered[-1]) / span
    below = (value - ordered[0]) / span
    return torch.where(value > ordered[-1], above, torch.where(value < ordered[0], below, inside.clamp(0, 1)))


class DenseAutoencoder(Detector):
    """The paper's baseline: a dense autoencoder, scored by its squared error.

    Beggel, Pfeiffer & Bischl, "Robust anomaly detection in images using adversarial autoencoders", ECML-PKDD 2019
    (arXiv 1901.06355), from a published summary; no code was found. Two hidden layers of ``width`` ReLU units on
    either side of a linear code, sigmoid output, images in [0, 1]:

        L_rec(x) = |x - g(f(x))|^2 / P

    An image is called anomalous when its error exceeds the 0.9 quantile of the training errors.

    Args:
        width: units of a hidden layer.
        latent_size: d.
        batch_norm: batch norm behind the encoder's hidden layers. Not on the code, unlike the summary: it would fix the
            mean and variance that the adversary has to teach.
    """

    def __init__(self, image_shape: Sequence[int], *, width: int, latent_size: int, batch_norm: bool = False) -> None:
        super().__init__(image_shape)
        pixels = math.prod(image_shape)
        self.encoder = nn.Sequential(nn.Flatten(), *_dense([pixels, width, width, latent_size], batch_norm=batch_norm))
        self.decoder = nn.Sequential(
            *_dense([latent_size, width, width, pixels]), nn.Sigmoid(), nn.Unflatten(1, self.image_shape)
        )

    def players(self) -> Mapping[str, Sequence[nn.Module]]:
        return {"autoencoder": [self.encoder, self.decoder]}

    def plays(self, batch: Batch) -> Iterator[Mapping[str, Tensor]]:
        yield {"autoencoder": squared_error(batch.x, self.reconstruct(batch.x)).mean()}

    @property
    def scored_after_fit(self) -> bool:
        return False  # only the decision needs the training errors

    def after_fit(self, images: Tensor) -> None:
        errors = torch.cat([squared_error(x, self.reconstruct(x)) for x in images.split(1000)])
        self.set_fitted("training_errors", errors.sort().values)

    def score(self, x: Tensor) -> Tensor:
        return squared_error(x, self.reconstruct(x))

    def decide(self, x: Tensor) -> Tensor | None:
        if not hasattr(self, "training_errors"):
            return None
        return self.score(x) > self.get_buffer("training_errors").quantile(QUANTILE)

    def reconstruct(self, x: Tensor) -> Tensor:
        return self.decoder(self.encoder(x))


class AdversarialAutoencoder(DenseAutoencoder):
    """A dense autoencoder whose codes an adversary teaches to follow p(z) = N(0, I), so that unlikely codes are odd.

    Makhzani et al. 2015 as used by Beggel et al. 2019 (see `DenseAutoencoder`). In every step, each on a fresh pass:

        1. encoder f and decoder g move on the reconstruction  L_rec
        2. the critic D moves on                               -log D(z) - log(1 - D(f(x))),   z from p
        3. the encoder moves on                                -log D(f(x))

    An image is anomalous when its error exceeds the 0.9 quantile of the training errors *or* the likelihood of its
    code p(f(x)) falls below the 0.1 quantile of the training likelihoods. The anomaly score, ours, is the larger of
    the two ranks among the training images (`training_rank`): thresholded at 0.9 it is that very rule.

    Args:
        critic_width: units of the two hidden layers of the critic.
    """

    def __init__(self, image_shape: Sequence[int], *, width: int, latent_size: int, critic_width: int) -> None:
        super().__init__(image_shape, width=width, latent_size=latent_size, batch_norm=True)
        self.latent_size = latent_size
        self.critic = _dense([latent_size, critic_width, critic_width, 1])

    def players(self) -> Mapping[str, Sequence[nn.Module]]:
        return {"autoencoder": [self.encoder, self.decoder], "critic": [self.critic], "encoder": [self.encoder]}

    def plays(self, batch: Batch) -> Iterator[Mapping[str, Tensor]]:
        x, w = batch.x, self.weights(batch)  # (B,C,S,S), (B,)
        yield {"autoencoder": (w * squared_error(x, self.reconstruct(x))).mean()}
        prior = torch.randn(len(x), self.latent_size, generator=self.noise, device=x.device, dtype=x.dtype)
        # No gradient goes to the encoder from the critic's play, so its pass needs no graph.
        with torch.no_grad():
            code = self.encoder(x)  # (B,d)
        yield {"critic": F.softplus(-self.critic(prior)).mean() + self._weighted(w, F.softplus(self.critic(code)))}
        yield {"encoder": self._weighted(w, F.softplus(-self.critic(self.encoder(x))))}

    def weights(self, batch: Batch) -> Tensor:
        """The weight of each image in all losses, (B,)."""
        return torch.ones(len(batch.x), device=batch.x.device, dtype=batch.x.dtype)

    def _weighted(self, w: Tensor, term: Tensor) -> Tensor:
        return (w * term.squeeze(1)).mean()

    @property
    def scored_after_fit(self) -> bool:
        return True

    def after_fit(self, images: Tensor) -> None:
        super().after_fit(images)
        unlikely = torch.cat([self.unlikeliness(x) for x in images.split(1000)])
        self.set_fitted("training_unlikeliness", unlikely.sort().values)

    def unlikeliness(self, x: Tensor) -> Tensor:
        """-log p(f(x)) without its constant, |f(x)|^2 / 2: (B,C,S,S) -> (B,)."""
        return self.encoder(x).square().sum(1) / 2

    def score(self, x: Tensor) -> Tensor:
        error = training_rank(squared_error(x, self.reconstruct(x)), self.get_buffer("training_errors"))
        return torch.maximum(error, training_rank(self.unlikeliness(x), self.get_buffer("training_unlikeliness")))

    def decide(self, x: Tensor) -> Tensor:
        error, unlikely = squared_error(x, self.reconstruct(x)), self.unlikeliness(x)
        return (error > self.get_buffer("training_errors").quantile(QUANTILE)) | (
            unlikely > self.get_buffer("training_unlikeliness").quantile(QUANTILE)
        )


class IterativeTrainingSetRefinement(AdversarialAutoencoder):
    """An adversarial autoencoder that looks for the anomalies in its own training set and learns to get them wrong.

    Beggel et al. 2019, "ITSR" (see `DenseAutoencoder`), in three stages, ``model.budget.stages``:

        pretrain   all images with weight 1
        detect     in ``rounds`` equal rounds: a one-class SVM (RBF, nu) on the codes of the images still in use; its
                   outliers join the candidates, which are left out of training from then on
        retrain    of the candidates, those whose error is above the ``retrain_quantile`` of all candidates' errors
                   come back with the weight ``w_anomaly`` < 0; the others stay out

    The weights w_i multiply L_rec and both adversarial terms of image i; w_i = 0 means left out of the batch, for a
    sample of weight 0 would still enter batch norm's statistics. The run records the sets after each round, and the
    final one (`rejected_images`). The decision's thresholds are quantiles over all training images, rejected ones too:
    those that a round of the SVM rejects are mostly rare normals, and without them every rare normal is an alarm.
    If each round rejected the share nu of what is left, ten rounds of 2 % would reject 18 % (1 - 0.98^10), however many
    of the images are anomalies. Measured are 20 to 23 %, as the encoder trains on between the rounds.

    *Where the material is silent:* whether the SVM sees the rejected images again (``svm_sees``; by default not,
    experiments/itsr_readings has both); the value of ``w_anomaly``; and what bounds a negatively weighted adversarial
    term, which has no minimum: here it counts no further than ``adversarial_cap``.

    Args:
        rounds: rounds of detection; the epochs of the stage ``detect`` must be a multiple.
        nu: of the one-class SVM, the share of outliers in each round, in (0, 1).
        svm_sees: the images on whose codes each round's SVM is fitted: those ``"in_use"``, or ``"all"``, the rejected
            ones as well.
        retrain_quantile: of the candidates' errors, in [0, 1].
        w_anomaly: weight of the likeliest anomalies, at most 0; with 0 they stay out as the others do.
        adversarial_cap: largest value of an adversarial term with negative weight.
    """

    STAGES = ("pretrain", "detect", "retrain")

    rejected_in: Tensor  # int64 (N,): the round in which a training image was rejected, 0 for those in use
    repelled: Tensor  # bool (N,): those that come back with a negative weight
    repelled_index: Tensor  # int64 (R,): their places in the data set

    def __init__(
        self,
        image_shape: Sequence[int],
        *,
        width: int,
        latent_size: int,
        critic_width: int,
        rounds: int,
        nu: float,
        retrain_quantile: float,
        w_anomaly: float,
        adversarial_cap: float,
        svm_sees: str = "in_use",
    ) -> None:
        super().__init__(image_shape, width=width, latent_size=latent_size, critic_width=critic_width)
        refuse_fewer(1, rounds=rounds)
        if not 0 < nu < 1:
            raise ValueError(f"nu={nu}: choose a share between 0 and 1")
        if svm_sees not in ("in_use", "all"):
            raise ValueError(f"svm_sees={svm_sees}: choose in_use or all")
        if not 0 <= retrain_quantile <= 1:
            raise ValueError(f"retrain_quantile={retrain_quantile}: choose a number from 0 to 1")
        if w_anomaly > 0:
            raise ValueError(f"w_anomaly={w_anomaly}: a weight above 0 would teach anomalies; choose 0 or less")
        if adversarial_cap <= 0:
            raise ValueError(f"adversarial_cap={adversarial_cap}: give a number above 0")
        self.rounds, self.nu, self.retrain_quantile = rounds, nu, retrain_quantile
        self.w_anomaly, self.adversarial_cap, self.svm_sees = w_anomaly, adversarial_cap, svm_sees
        self.register_buffer("repelled_index", torch.empty(0, dtype=torch.long))

    def plan(self, stages: Mapping[str, int]) -> None:
        super().plan(stages)
        if stages["pretrain"] < 1 or stages["detect"] < self.rounds or stages["detect"] % self.rounds:
            raise ValueError(
                f"model.budget.stages needs pretrain of at least 1 and detect in whole epochs for each of the "
                f"{self.rounds} rounds, not {stages['pretrain']} and {stages['detect']}"
            )

    def weights(self, batch: Batch) -> Tensor:
        # Not torch.isin: on a GPU it sorts and synchronises.
        repelled = (batch.index[:, None] == self.repelled_index).any(1)  # (B,)
        return super().weights(batch).masked_fill(repelled, self.w_anomaly)

    def _weighted(self, w: Tensor, term: Tensor) -> Tensor:
        capped = term.squeeze(1)
        return (w * torch.where(w < 0, capped.clamp(max=self.adversarial_cap), capped)).mean()

    def before_epoch(self, epoch: int) -> None:
        if self.stage == "detect":
            finished, begun = divmod(self.stages.epoch - 1, self.stages.epochs["detect"] // self.rounds)
            if begun == 0:
                self._reject(finished + 1)

    def before_stage(self, stage: str) -> None:
        if stage == "retrain" and self.w_anomaly:
            self._repel()

    def _reject(self, number: int) -> None:
        from sklearn.svm import OneClassSVM  # seconds, with SciPy: not for AE and AAE

        training = self.training_images.everything()
        if number == 1:
            self.set_fitted("rejected_in", torch.zeros(len(training.x), dtype=torch.long, device=self.device))
            self.set_fitted("repelled", torch.zeros(len(training.x), dtype=torch.bool, device=self.device))
        in_use = self.rejected_in == 0  # (N,)
        seen = (torch.ones_like(in_use) if self.svm_sees == "all" else in_use).nonzero().squeeze(1)  # (M,)
        codes = torch.cat([self.encoder(x) for x in training.x[seen].split(1000)])  # (M,d)
        outlier = OneClassSVM(kernel="rbf", gamma="scale", nu=self.nu).fit_predict(codes.double().cpu().numpy()) < 0
        found = seen[torch.from_numpy(outlier).to(self.device)]
        self.rejected_in[found[in_use[found]]] = number

    def _repel(self) -> None:
        candidates = (self.rejected_in > 0).nonzero().squeeze(1)
        if not len(candidates):
            return
        training = self.training_images.everything()
        x = training.x[candidates]
        errors = torch.cat([squared_error(some, self.reconstruct(some)) for some in x.split(1000)])
        chosen = candidates[errors > errors.quantile(self.retrain_quantile)]
        self.repelled[chosen] = True
        self.set_fitted("repelled_index", training.index[chosen])

    def train_indices(self, epoch: int) -> Tensor | None:
        if not hasattr(self, "rejected_in"):
            return None  # nothing is rejected yet
        return ((self.rejected_in == 0) | self.repelled).nonzero().squeeze(1)

    def rejected_images(self) -> Mapping[str, Tensor]:
        if not hasattr(self, "rejected_in"):
            return {}
        rejected = {
            f"round {number}": ((self.rejected_in > 0) & (self.rejected_in <= number)).nonzero().squeeze(1)
            for number in range(1, self.rounds + 1)
        }
        return rejected | {"repelled": self.repelled.nonzero().squeeze(1)}
