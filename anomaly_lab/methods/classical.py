"""Classical one-class methods on pixels or their principal components, fitted on the CPU and scored as tensors.

Legend of the shape comments: B images in a batch, N training images, D features, T trees, K components, V vectors.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from anomaly_lab.detector import Detector
from anomaly_lab.errors import refuse_fewer
from anomaly_lab.methods.pca import principal_axes
from anomaly_lab.networks import ContrastNormalisation

AT_ONCE = 500
"""Rows of a matrix of distances among training images that are computed in one go."""

PAIRS = 1000
"""Training images, drawn by the run's seed, whose distances give the median of `OneClassSVM`."""

BANDWIDTHS = tuple(2 ** (k / 2) for k in range(-4, 11))
"""Of `KernelDensity`: the upper fifteen of the Deep SVDD repository's twenty bandwidths, 2^-4.5 to 2^5."""

MIXTURES = (1, 2, 4, 8)
"""Numbers of components that `GaussianMixture` chooses from."""


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """|a_i - b_j|^2 of a (B,D) and b (N,D), (B,N)."""
    return (a.square().sum(1)[:, None] + b.square().sum(1) - 2 * a @ b.T).clamp(min=0)


class Classical(Detector):
    """What these methods share: features in float64, and fitted numbers kept as tensors that any checkpoint holds.

    Args:
        contrast: normalise each image's contrast first, with which Ruff et al. (2018) ran the rows that others copy.
        pca_variance: share of the training images' variance that is kept by principal components; None for pixels.
    """

    centre: Tensor  # (CHW,)
    basis: Tensor  # (CHW,D)

    def __init__(self, image_shape: Sequence[int], *, contrast: bool, pca_variance: float | None) -> None:
        super().__init__(image_shape)
        self.normalise = ContrastNormalisation() if contrast else nn.Identity()
        if pca_variance is not None and not 0 < pca_variance <= 1:
            raise ValueError(f"pca_variance={pca_variance}: give a number above 0 and up to 1, or null for pixels")
        self.pca_variance = pca_variance

    @abstractmethod
    def fit_features(self, z: Tensor) -> Mapping[str, Tensor]:
        """What is kept of the training features z (N,D), float64: buffers by name."""

    @abstractmethod
    def score_features(self, z: Tensor) -> Tensor:
        """Anomaly scores (B,) of the features z (B,D), float64."""

    def after_fit(self, images: Tensor) -> None:
        if isinstance(self.normalise, ContrastNormalisation):
            self.normalise.fit(images)
        if self.pca_variance is not None:
            axes = principal_axes(self.normalise(images).flatten(1))
            shares = axes.variance.cumsum(0) / axes.variance.sum()
            kept = int((shares < self.pca_variance).sum()) + 1
            self.set_fitted("centre", axes.mean)
            self.set_fitted("basis", axes.direction[:, :kept].contiguous())
        for name, value in self.fit_features(self.features(images)).items():
            self.set_fitted(name, value.to(images.device))

    def features(self, x: Tensor) -> Tensor:
        """Pixels or principal components (B,D), float64."""
        flat = self.normalise(x).flatten(1).double()
        return flat if self.pca_variance is None else (flat - self.centre) @ self.basis

    def score(self, x: Tensor) -> Tensor:
        return self.score_features(self.features(x)).float()

    def draw_seed(self) -> int:
        """A seed for scikit-learn, from the run's."""
        return int(torch.randint(2**31 - 1, (), generator=self.noise, device=self.noise.device))


class OneClassSVM(Classical):
    """A(x) = rho - sum_i a_i exp(-g |x_i - x|^2), the support vectors x_i and a, rho from the nu-SVM's dual.

    Schoelkopf et al., "Estimating the support of a high-dimensional distribution", Neural Computation 13(7), 2001,
    equations (3), (8) and (11). *Where we differ from published tables:* g is one over the median squared distance
    between training images, and nu is fixed, so no label is seen. Ruff et al. (2018) choose g on a tenth of the test
    set, Golan & El-Yaniv (2018) nu and g by the AUROC on all of it.

    Args:
        nu: bound on the share of training images outside.
        gamma: g; None for the median heuristic.
    """

    support: Tensor  # (V,D)
    weight: Tensor  # (V,)
    offset: Tensor  # ()
    scale: Tensor  # (), g

    def __init__(
        self, image_shape: Sequence[int], *, contrast: bool, pca_variance: float | None, nu: float, gamma: float | None
    ) -> None:
        super().__init__(image_shape, contrast=contrast, pca_variance=pca_variance)
        if not 0 < nu <= 1:
            raise ValueError(f"nu={nu}: give a number above 0 and up to 1")
        if gamma is not None and gamma <= 0:
            raise ValueError(f"gamma={gamma}: give a number above 0, or null for the median heuristic")
        self.nu, self.gamma = nu, gamma

    def fit_features(self, z: Tensor) -> Mapping[str, Tensor]:
        from sklearn.svm import OneClassSVM as Estimator

        if self.gamma is None and not (median := self._median(z)):
            raise ValueError("most training images are copies of each other, so no gamma follows: give one")
        gamma = 1 / median if self.gamma is None else self.gamma
        fitted = Estimator(nu=self.nu, gamma=gamma, cache_size=1000).fit(z.cpu().numpy())
        return {
            "support": torch.from_numpy(fitted.support_vectors_),
            "weight": torch.from_numpy(fitted.dual_coef_[0].copy()),
            "offset": torch.tensor(float(fitted.intercept_[0]), dtype=torch.float64),
            "scale": torch.tensor(gamma, dtype=torch.float64),
        }

    def _median(self, z: Tensor) -> float:
        order = torch.randperm(len(z), generator=self.noise, device=self.noise.device).to(z.device)
        some = z[order[:PAIRS]]
        upper = torch.triu_indices(len(some), len(some), 1, device=z.device)
        return float(squared_distances(some, some)[upper[0], upper[1]].median())

    def score_features(self, z: Tensor) -> Tensor:
        kernel = (-self.scale * squared_distances(z, self.support)).exp()  # (B,V)
        return -(kernel @ self.weight) - self.offset


class KernelDensity(Classical):
    """A(x) = -log (1/N) sum_i N(x; x_i, h^2 I), the Parzen window (Parzen 1962) with a Gaussian kernel.

    The bandwidth h has the largest leave-one-out likelihood of the training images among `BANDWIDTHS`. Published tables
    use 5-fold cross-validated likelihood, which sees normals only, too.

    Args:
        bandwidth: h; None to choose it.
    """

    bank: Tensor  # (N,D)
    width: Tensor  # (), h

    def __init__(
        self, image_shape: Sequence[int], *, contrast: bool, pca_variance: float | None, bandwidth: float | None
    ) -> None:
        super().__init__(image_shape, contrast=contrast, pca_variance=pca_variance)
        if bandwidth is not None and bandwidth <= 0:
            raise ValueError(f"bandwidth={bandwidth}: give a number above 0, or null to choose it by likelihood")
        self.bandwidth = bandwidth

    def fit_features(self, z: Tensor) -> Mapping[str, Tensor]:
        width = self.bandwidth or max(zip(self.leave_one_out(z), BANDWIDTHS, strict=True))[1]
        return {"bank": z, "width": torch.tensor(width, dtype=torch.float64)}

    @staticmethod
    def leave_one_out(z: Tensor) -> list[float]:
        """Mean log-likelihood of each of z (N,D) under all the others, at each of the `BANDWIDTHS`."""
        count, dimensions = z.shape
        totals = [0.0] * len(BANDWIDTHS)
        for start in range(0, count, AT_ONCE):
            squares = squared_distances(z[start : start + AT_ONCE], z)
            squares[torch.arange(len(squares)), start + torch.arange(len(squares))] = math.inf
            for i, h in enumerate(BANDWIDTHS):
                totals[i] += float((-squares / (2 * h * h)).logsumexp(1).sum())
        normal = [math.log(count - 1) + dimensions * math.log(h * math.sqrt(2 * math.pi)) for h in BANDWIDTHS]
        return [total / count - constant for total, constant in zip(totals, normal, strict=True)]

    def score_features(self, z: Tensor) -> Tensor:
        exponents = -squared_distances(z, self.bank) / (2 * self.width.square())  # (B,N)
        constant = math.log(len(self.bank)) + z.shape[1] * (self.width.log() + math.log(2 * math.pi) / 2)
        return constant - exponents.logsumexp(1)


class IsolationForest(Classical):
    """A(x) = 2^(-E[h(x)] / c(n)), h the depth of x in a tree grown by random cuts of n training images.

    Liu, Ting & Zhou, "Isolation forest", ICDM 2008, equations (1) and (2); a leaf that holds m images counts c(m) more
    for the tree that would have grown below it. Trees and subsamples are the paper's, and those of published tables.

    Args:
        trees: T. samples: n, images a tree is grown on.
    """

    below: Tensor  # (T,M,2) of M nodes, itself for a leaf
    feature: Tensor  # (T,M)
    threshold: Tensor  # (T,M)
    depth: Tensor  # (T,M), c(m) of a leaf included
    levels: Tensor  # (), of the deepest tree
    expected: Tensor  # (), c(n)

    def __init__(
        self, image_shape: Sequence[int], *, contrast: bool, pca_variance: float | None, trees: int, samples: int
    ) -> None:
        super().__init__(image_shape, contrast=contrast, pca_variance=pca_variance)
        if trees < 1 or samples < 2:
            raise ValueError(f"trees={trees}, samples={samples}: give at least one tree and two images for each")
        self.trees, self.samples = trees, samples

    def fit_features(self, z: Tensor) -> Mapping[str, Tensor]:
        from sklearn.ensemble import IsolationForest as Estimator

        samples = min(self.samples, len(z))
        fitted = Estimator(n_estimators=self.trees, max_samples=samples, random_state=self.draw_seed())
        grown = [tree.tree_ for tree in fitted.fit(z.cpu().numpy()).estimators_]
        nodes = max(tree.node_count for tree in grown)
        children = np.tile(np.arange(nodes)[None, :, None], (len(grown), 1, 2))
        feature = np.zeros((len(grown), nodes), np.int64)
        threshold, depth = np.zeros(feature.shape), np.zeros(feature.shape)
        for t, tree in enumerate(grown):
            for node in range(tree.node_count):  # parents come before their children
                below = [tree.children_left[node], tree.children_right[node]]
                if below[0] < 0:
                    depth[t, node] += average_path(tree.n_node_samples[node])
                else:
                    children[t, node] = below
                    feature[t, node], threshold[t, node] = tree.feature[node], tree.threshold[node]
                    depth[t, below] = depth[t, node] + 1
        return {
            "below": torch.from_numpy(children),
            "feature": torch.from_numpy(feature),
            "threshold": torch.from_numpy(threshold),
            "depth": torch.from_numpy(depth),
            "levels": torch.tensor(max(tree.max_depth for tree in grown)),
            "expected": torch.tensor(average_path(samples), dtype=torch.float64),
        }

    def score_features(self, z: Tensor) -> Tensor:
        z = z.float().double()  # trees compare single precision
        tree = torch.arange(len(self.depth), device=z.device)  # (T,)
        node = torch.zeros(len(z), len(tree), dtype=torch.long, device=z.device)  # (B,T)
        for _ in range(int(self.levels)):
            right = z.gather(1, self.feature[tree, node]) > self.threshold[tree, node]
            node = self.below[tree, node, right.long()]
        return 2 ** (-self.depth[tree, node].mean(1) / self.expected)


def average_path(count: int) -> float:
    """c(n): mean depth of an unsuccessful search in a binary tree of n nodes, 2 H(n-1) - 2 (n-1)/n."""
    if count <= 2:
        return float(count == 2)
    return 2 * (math.log(count - 1) + np.euler_gamma) - 2 * (count - 1) / count


class LocalOutlierFactor(Classical):
    """A(x) = mean over the k nearest o of lrd(o) / lrd(x): how much thinner x lies than its neighbours do.

    Breunig et al., "LOF: identifying density-based local outliers", SIGMOD 2000, definitions 5 to 7: with d_k(o) the
    distance of the training image o to its k-th neighbour, 1 / lrd(x) = mean of max(d_k(o), |x - o|).

    Args:
        neighbours: k.
    """

    bank: Tensor  # (N,D)
    reach: Tensor  # (N,), d_k
    density: Tensor  # (N,), lrd

    def __init__(
        self, image_shape: Sequence[int], *, contrast: bool, pca_variance: float | None, neighbours: int
    ) -> None:
        super().__init__(image_shape, contrast=contrast, pca_variance=pca_variance)
        refuse_fewer(1, neighbours=neighbours)
        self.neighbours = neighbours

    def fit_features(self, z: Tensor) -> Mapping[str, Tensor]:
        if len(z) <= self.neighbours:
            raise ValueError(f"neighbours={self.neighbours}: there are only {len(z)} training images")
        found = []
        for start in range(0, len(z), AT_ONCE):
            squares = squared_distances(z[start : start + AT_ONCE], z)
            squares[torch.arange(len(squares)), start + torch.arange(len(squares))] = math.inf  # not its own neighbour
            found.append(squares.topk(self.neighbours, largest=False))
        distance = torch.cat([part.values for part in found]).sqrt()
        nearest = torch.cat([part.indices for part in found])
        reach = distance[:, -1]
        return {"bank": z, "reach": reach, "density": self._density(distance, reach[nearest])}

    @staticmethod
    def _density(distance: Tensor, reach: Tensor) -> Tensor:
        return 1 / (torch.maximum(distance, reach).mean(1) + 1e-10)  # scikit-learn's guard against copies

    def score_features(self, z: Tensor) -> Tensor:
        found = squared_distances(z, self.bank).topk(self.neighbours, largest=False)
        density = self._density(found.values.sqrt(), self.reach[found.indices])
        return self.density[found.indices].mean(1) / density


class GaussianMixture(Classical):
    """A(x) = -log sum_k w_k N(x; m_k, S_k), fitted by expectation maximisation (Dempster, Laird & Rubin 1977).

    The number of components has the smallest Bayesian information criterion (Schwarz 1978) among `MIXTURES`.

    Args:
        components: K; None to choose it.
        ridge: added to the diagonal of every S_k.
    """

    log_weight: Tensor  # (K,)
    mean: Tensor  # (K,D)
    whitening: Tensor  # (K,D,D), whose product with its transpose is the inverse of S_k

    def __init__(
        self,
        image_shape: Sequence[int],
        *,
        contrast: bool,
        pca_variance: float | None,
        components: int | None,
        ridge: float,
    ) -> None:
        super().__init__(image_shape, contrast=contrast, pca_variance=pca_variance)
        if components is not None:
            refuse_fewer(1, components=components)
        self.components, self.ridge = components, ridge

    def fit_features(self, z: Tensor) -> Mapping[str, Tensor]:
        from sklearn.mixture import GaussianMixture as Estimator

        x, seed = z.cpu().numpy(), self.draw_seed()
        numbers = [self.components] if self.components else [k for k in MIXTURES if k <= len(x)]
        fits = [Estimator(k, reg_covar=self.ridge, random_state=seed).fit(x) for k in numbers]
        fitted = min(fits, key=lambda fit: fit.bic(x))
        return {
            "log_weight": torch.from_numpy(np.log(fitted.weights_)),
            "mean": torch.from_numpy(fitted.means_),
            "whitening": torch.from_numpy(fitted.precisions_cholesky_),
        }

    def score_features(self, z: Tensor) -> Tensor:
        white = torch.einsum("kbd,kde->kbe", z - self.mean[:, None], self.whitening)  # (K,B,D)
        volume = self.whitening.diagonal(dim1=1, dim2=2).log().sum(1)  # (K,)
        exponents = volume[:, None] - (white.square().sum(2) + z.shape[1] * math.log(2 * math.pi)) / 2  # (K,B)
        return -(self.log_weight[:, None] + exponents).logsumexp(0)
