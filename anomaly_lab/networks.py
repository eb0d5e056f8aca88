"""Networks that two or more methods use, and pretrained ones.

Legend of the shape comments: B images, C channels, S = image size in pixels, d = size of the latent code,
K channels and s×s positions of pretrained features.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Generator, Tensor, nn

from anomaly_lab.errors import shortened
from anomaly_lab.files import refuse_bomb


def _halvings(size: int) -> int:
    if size < 8 or size & (size - 1):
        raise ValueError(
            f"these networks halve the image down to 4×4: give model.input.size 8, 16, 32, ..., not {size}"
        )
    return int(math.log2(size)) - 2


def init_dcgan(module: nn.Module, generator: Generator | None = None) -> None:
    """N(0, 0.02) for convolutions, N(1, 0.02) for batch norm's scale, 0 for its shift (Radford et al. 2016)."""
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        nn.init.normal_(module.weight, 0.0, 0.02, generator)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02, generator)
        nn.init.zeros_(module.bias)


def _extra(width: int, layers: int, activation: nn.Module) -> list[nn.Module]:
    return [
        module
        for _ in range(layers)
        for module in (nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), activation)
    ]


def layer_norm(channels: int) -> nn.Module:
    """Normalises each image by its own mean and variance over channels and positions (Ba et al. 2016)."""
    return nn.GroupNorm(1, channels)


class DCGANEncoder(nn.Sequential):
    """Strided 4×4 convolutions down to 4×4 pixels, then one to a code; batch norm on all but the first and the last.

    Args:
        channels: C of the image. size: S, a power of two from 8. width: channels after the first convolution, doubled
        by each further one. latent_size: d. tanh: bound the code to (-1, 1), else it is linear.
        extra_layers: 3×3 convolutions with batch norm behind the first convolution (GANomaly's ``extralayers``).
        norm: what normalises so many channels; `layer_norm` in critics whose gradient is penalised image by image.
    """

    def __init__(
        self,
        channels: int,
        size: int,
        width: int,
        latent_size: int,
        *,
        tanh: bool,
        extra_layers: int = 0,
        norm: Callable[[int], nn.Module] = nn.BatchNorm2d,
    ) -> None:
        layers: list[nn.Module] = [nn.Conv2d(channels, width, 4, 2, 1, bias=False), nn.LeakyReLU(0.2)]
        layers += _extra(width, extra_layers, nn.LeakyReLU(0.2))
        for _ in range(_halvings(size) - 1):
            layers += [nn.Conv2d(width, 2 * width, 4, 2, 1, bias=False), norm(2 * width), nn.LeakyReLU(0.2)]
            width *= 2
        layers += [nn.Conv2d(width, latent_size, 4, 1, 0, bias=False), nn.Flatten()]
        super().__init__(*layers, *([nn.Tanh()] if tanh else []))
        self.apply(init_dcgan)

    def forward(self, x: Tensor) -> Tensor:
        """(B,C,S,S) -> (B,d)"""
        return super().forward(x)


class DCGANDecoder(nn.Sequential):
    """The encoder's mirror: transposed 4×4 convolutions with batch norm from a code to an image in (-1, 1).

    Args:
        activation: the hidden layers' non-linearity: ``nn.ReLU()`` in DCGAN and GANomaly, leaky in shared autoencoders.
        extra_layers: 3×3 convolutions with batch norm before the last transposed convolution.
    """

    def __init__(
        self, channels: int, size: int, width: int, latent_size: int, activation: nn.Module, extra_layers: int = 0
    ) -> None:
        halvings = _halvings(size)
        wide = width * 2 ** (halvings - 1)
        layers: list[nn.Module] = [nn.Unflatten(1, (latent_size, 1, 1))]
        layers += [nn.ConvTranspose2d(latent_size, wide, 4, 1, 0, bias=False), nn.BatchNorm2d(wide), activation]
        for _ in range(halvings - 1):
            layers += [nn.ConvTranspose2d(wide, wide // 2, 4, 2, 1, bias=False), nn.BatchNorm2d(wide // 2), activation]
            wide //= 2
        layers += _extra(wide, extra_layers, activation)
        super().__init__(*layers, nn.ConvTranspose2d(wide, channels, 4, 2, 1, bias=False), nn.Tanh())
        self.apply(init_dcgan)

    def forward(self, z: Tensor) -> Tensor:
        """(B,d) -> (B,C,S,S)"""
        return super().forward(z)


class DCGANDiscriminator(nn.Module):
    """The encoder's form with one output: a logit, real against fake, and the features it is made from.

    Args: as in `DCGANEncoder`.
    """

    def __init__(
        self,
        channels: int,
        size: int,
        width: int,
        *,
        extra_layers: int = 0,
        norm: Callable[[int], nn.Module] = nn.BatchNorm2d,
    ) -> None:
        super().__init__()
        encoder = DCGANEncoder(channels, size, width, 1, tanh=False, extra_layers=extra_layers, norm=norm)
        *features, logit, flatten = encoder
        self.features = nn.Sequential(*features)
        self.logit = nn.Sequential(logit, flatten)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B,C,S,S) -> logits (B,), features (B,width S/8,4,4)"""
        features = self.features(x)
        return self.logit(features).squeeze(1), features


class LatentCritic(nn.Sequential):
    """A multilayer perceptron from a code to one number: (B,d) -> (B,1)."""

    def __init__(self, latent_size: int, widths: Sequence[int]) -> None:
        layers: list[nn.Module] = []
        for inputs, outputs in itertools.pairwise([latent_size, *widths]):
            layers += [nn.Linear(inputs, outputs), nn.LeakyReLU(0.2)]
        super().__init__(*layers, nn.Linear(widths[-1], 1))
        for layer in (layer for layer in self if isinstance(layer, nn.Linear)):
            nn.init.xavier_uniform_(layer.weight, nn.init.calculate_gain("leaky_relu", 0.2))
        nn.init.xavier_uniform_(layer.weight)  # the last layer: no leaky ReLU follows


class MovingAverage(nn.Module):
    """A copy of a network to score with: its weights are the exponential moving average of the network's.

    Its weights are buffers: in every checkpoint, and no player's. Its own buffers (batch norm's statistics) are the
    network's at the last `follow`.

    Args:
        decay: share of the average that a step keeps, in [0, 1).
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        super().__init__()
        if not 0 <= decay < 1:
            raise ValueError(f"decay={decay}: a moving average keeps a share of itself from 0 to below 1")
        self.network, self.decay = copy.deepcopy(network), decay
        freeze(self.network, persistent=True)

    @torch.no_grad()
    def follow(self, network: nn.Module) -> None:
        """Move the average towards the present weights of ``network``."""
        weights, others = dict(network.named_parameters()), dict(network.named_buffers())
        for name, mine in self.network.named_buffers():
            if name in weights:
                mine.lerp_(weights[name], 1 - self.decay)
            else:
                mine.copy_(others[name])

    def forward(self, *inputs: Tensor) -> Any:
        return self.network(*inputs)


# Pretrained features ------------------------------------------------------------------------------------------------


class ContrastNormalisation(nn.Module):
    """Each image freed of its mean and divided by its mean absolute deviation; then [low, high] becomes [0, 1].

    Ruff et al. 2018, before Deep SVDD and before the classical methods beside it. ``low`` and ``high`` are the extremes
    of the normalised training images, of all channels together (`fit`).
    """

    low: Tensor
    high: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("low", torch.zeros(()))
        self.register_buffer("high", torch.ones(()))

    def fit(self, images: Tensor) -> None:
        """images: (N,C,S,S)"""
        extremes = [torch.stack(_standard(x)[0].aminmax()) for x in images.split(1000)]
        self.low.copy_(torch.stack(extremes)[:, 0].min())
        self.high.copy_(torch.stack(extremes)[:, 1].max())

    def forward(self, x: Tensor) -> Tensor:
        """(B,C,S,S) -> (B,C,S,S); within [0, 1] for training images."""
        return (_standard(x)[0] - self.low) / (self.high - self.low)

    def undo(self, y: Tensor, x: Tensor) -> Tensor:
        """``y`` as it would have looked before, with the mean and the contrast of ``x``: (B,C,S,S)."""
        _, mean, scale = _standard(x)
        return (y * (self.high - self.low) + self.low) * scale + mean


def _standard(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The image without its mean and scale, and both, (B,1,1,1)."""
    mean = x.mean((1, 2, 3), keepdim=True)
    centred = x - mean
    scale = centred.abs().mean((1, 2, 3), keepdim=True).clamp(min=1e-6)  # of an image of one grey: 0
    return centred / scale, mean, scale


def freeze(module: nn.Module, *, persistent: bool = False) -> None:
    """Turn every parameter of a pretrained network into a buffer of the same name, in place.

    So it follows ``.to()``, belongs to no player and is never trained. Its output stays differentiable with respect to
    its input.

    Args:
        persistent: whether checkpoints hold it, with all the network's buffers.
    """
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            delattr(part, name)
            part.register_buffer(name, parameter.detach(), persistent=persistent)
        for name, buffer in list(part.named_buffers(recurse=False)):
            delattr(part, name)
            part.register_buffer(name, buffer, persistent=persistent)


class _Cut(NamedTuple):
    """The part of a torchvision network that is used."""

    network: str  # torchvision's name
    layers: int | str  # how many of its ``.features``, or the name of the last
    channels: int  # K
    smallest: int  # image size that leaves one position, a power of two


# VGG19 up to relu4_2 is PIAD's choice: stride 8, the second convolution at that stride, the tenth in all. SqueezeNet
# is cut at the corresponding place: stride 8, the second fire module at that stride, eleven convolutions deep. Images
# of 32 pixels leave 4×4 and 3×3 positions; one pooling further, SqueezeNet would leave a single one. VGG19 up to
# relu3_2 is the choice of the deep perceptual autoencoder (ADDPA) for such images.
_CUTS = {
    "vgg19": _Cut("vgg19", 23, 512, 8),
    "vgg19_relu3_2": _Cut("vgg19", 14, 256, 4),
    "squeezenet1_0": _Cut("squeezenet1_0", 9, 384, 16),
}

Weights = Literal["torchvision", "file", "random"]


class PerceptualFeatures(nn.Module):
    """The first layers of a network trained on ImageNet, frozen (`freeze`).

    Grey images are repeated to three channels; [-1, 1] is mapped to ImageNet's mean and standard deviation.

    Args:
        architecture: ``vgg19`` up to relu4_2, ``vgg19_relu3_2``, ``squeezenet1_0`` up to fire6; or NETWORK.LAYER, any
            layer of a torchvision network that leaves channels and positions, such as ``resnet18.layer3``.
        weights: ``torchvision``: its published ones, from ``TORCH_HOME`` or fetched to there. ``file``: a state dict of
            the architecture at ``path``, with or without the classifier. ``random``: drawn from torch's global
            generator (He et al. 2015), the baseline without pretraining.
        path, sha256: of the ``file``; at least the first 8 hexadecimal digits of its checksum.
        statistics: ``path`` and ``sha256`` of channel statistics written by ``anomaly-lab-features``, or nulls.

    Attributes:
        channels: K. checksum: SHA-256 of the weights that are used.

    Raises:
        ValueError: unknown names; a file that is missing, or another one than the checksum says; no network.
    """

    shift: Tensor
    scale: Tensor

    def __init__(
        self,
        architecture: str,
        *,
        weights: Weights,
        path: str | None = None,
        sha256: str | None = None,
        statistics: Mapping[str, str | None] | None = None,
    ) -> None:
        super().__init__()
        if weights not in get_args(Weights):
            raise ValueError(f"{_OPTION}.weights={weights}: choose one of {', '.join(get_args(Weights))}")
        if weights != "file" and (path is not None or sha256 is not None):
            raise ValueError(
                f"{_OPTION}.path and .sha256 name a file, which weights={weights} does not read: "
                f"set {_OPTION}.weights=file, or both to null"
            )
        self.cut, self.layers = _cut(architecture, drawn=weights == "random")
        self.architecture, self.weights, self.channels = architecture, weights, self.cut.channels
        self._statistics = dict(statistics or {})
        if weights == "random":
            _init_he(self.layers)
        else:
            own = weights == "file"
            file = _verified(path, sha256, _OPTION) if own else _torchvision_file(architecture, published_url(self.cut))
            _load_features(self.layers, file, "features." if isinstance(self.cut.layers, int) else "")
        freeze(self.layers.to(memory_format=torch.channels_last))  # faster on a CPU
        digest = hashlib.sha256()
        for _, buffer in sorted(self.layers.named_buffers()):
            digest.update(buffer.numpy().tobytes())
        self.checksum = digest.hexdigest()
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])  # ImageNet's, of [0, 1]
        self.register_buffer("shift", (2 * mean - 1).view(3, 1, 1), persistent=False)
        self.register_buffer("scale", (2 * std).view(3, 1, 1), persistent=False)

    @property
    def smallest(self) -> int:
        """The smallest image size, in pixels, that leaves at least one position."""
        return self.cut.smallest

    def refuse(self, image_shape: Sequence[int]) -> None:
        """Raise ValueError if images (C,S,S) have other channels or are too small."""
        channels, size, _ = image_shape
        if channels not in (1, 3):
            raise ValueError(f"pretrained features see 1 or 3 channels, not {channels}: set model.input.channels=3")
        if size < self.smallest:
            raise ValueError(
                f"{self.architecture} needs images of {self.smallest} pixels or more: "
                f"set model.input.size={self.smallest}"
            )

    @property
    def source(self) -> dict[str, str]:
        """Identifies the features: equal sources give equal numbers."""
        return {
            "architecture": self.architecture,
            "layer": f"features[:{layers}]" if isinstance(layers := self.cut.layers, int) else layers,
            "checksum": self.checksum,
        }

    def forward(self, x: Tensor) -> Tensor:
        """(B,1,S,S) or (B,3,S,S) in [-1, 1] -> (B,K,s,s), s = S / 8 or a little less for the networks with a name."""
        features: Tensor = self.layers((x.expand(-1, 3, -1, -1) - self.shift) / self.scale)
        return features

    def given_statistics(self) -> tuple[Tensor, Tensor] | None:
        """Channel mean and standard deviation (K,) from the file that ``statistics`` names; None where it names none.

        Raises:
            ValueError: the file is missing, another one than the checksum says, or of other features.
        """
        path, sha256 = self._statistics.get("path"), self._statistics.get("sha256")
        if path is None and sha256 is None:
            return None
        file = _verified(path, sha256, f"{_OPTION}.statistics")
        try:
            with np.load(file, allow_pickle=False) as arrays:
                mean, std = (torch.from_numpy(arrays[name]).float() for name in ("mean", "std"))
                source = json.loads(str(arrays["provenance"]))["features"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file} holds no channel statistics: write them with anomaly-lab-features") from error
        other = [f"{k} {str(source.get(k))[:16]}" for k, v in self.source.items() if source.get(k) != v]
        if other:
            raise ValueError(
                f"{file} belongs to other features ({', '.join(other)}): write it anew with anomaly-lab-features and "
                "the options of this model"
            )
        return mean, std


_OPTION = "model.detector.features"


def channel_statistics(batches: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel over images and positions: (B,K,s,s), ... -> (K,), (K,).

    Summed in float64, so the images may be many; returned in the type of the batches.
    """
    total, squares, count = torch.zeros(()), torch.zeros(()), 0
    values = None
    for values in batches:
        wide = values.double()
        total = total.to(wide) + wide.sum((0, 2, 3))
        squares = squares.to(wide) + wide.square().sum((0, 2, 3))
        count += wide[:, 0].numel()
    if values is None:
        raise ValueError("channel statistics need at least one image")
    mean = total / count
    return mean.to(values), (squares / count - mean.square()).clamp(min=0).sqrt().to(values)


def save_statistics(file: IO[bytes], features: PerceptualFeatures, mean: Tensor, std: Tensor, **origin: Any) -> None:
    """Write channel statistics (K,) for `PerceptualFeatures.given_statistics`, with what they are of.

    origin: further provenance of the images, plain values.
    """
    provenance = json.dumps({"features": features.source | {"weights": features.weights}, **origin})
    np.savez(file, mean=mean.cpu().numpy(), std=std.cpu().numpy(), provenance=np.array(provenance))


class _Layer(nn.Module):
    """A torchvision network up to a layer that has a name: (B,3,S,S) -> (B,K,s,s)."""

    def __init__(self, network: nn.Module, layer: str) -> None:
        super().__init__()
        from torchvision.models.feature_extraction import create_feature_extractor

        self.network = create_feature_extractor(network, {layer: "features"})
        self.train()

    def train(self, mode: bool = True) -> _Layer:
        """Never in training mode, whatever the detector is: batch norm has ImageNet's statistics."""
        return super().train(False)

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.network(x)["features"]
        return features


def _cut(architecture: str, *, drawn: bool) -> tuple[_Cut, nn.Module]:
    """Where a network ends, and its layers up to there, without weights; ``drawn``: with torchvision's initial ones.

    Raises:
        ValueError: no such network or layer, or none that leaves channels and positions.
    """
    from torchvision import models  # a second: not for methods without pretrained features

    if cut := _CUTS.get(architecture):
        with torch.device("meta"):  # no memory for the classifier, the larger part
            layers = getattr(models, cut.network)().features[: cut.layers]
        return cut, layers.to_empty(device="cpu")
    network, _, layer = architecture.partition(".")
    if not layer or network not in models.list_models(module=models):
        raise ValueError(
            f"{_OPTION}.architecture={architecture}: choose one of {', '.join(_CUTS)}, or a layer of a torchvision "
            "network, such as resnet18.layer3"
        )
    try:
        with torch.device("cpu" if drawn else "meta"):  # as above
            found = _Layer(models.get_model(network, weights=None), layer)
    except ValueError as error:
        raise ValueError(
            f"{_OPTION}.architecture={architecture}: {network} has no layer {layer}, or none that can be traced; "
            "torchvision.models.feature_extraction.get_graph_node_names names them"
        ) from error
    for size in (2**power for power in range(2, 10)):
        try:
            shape = found(torch.zeros(1, 3, size, size, device="cpu" if drawn else "meta")).shape
        except (RuntimeError, AssertionError):  # too small for this network, or for one of a fixed size not that size
            continue
        if len(shape) == 4 and shape[2] == shape[3] > 0:
            return _Cut(network, layer, shape[1], size), found if drawn else found.to_empty(device="cpu")
    raise ValueError(
        f"{_OPTION}.architecture={architecture}: that layer leaves no channels and positions of a square image "
        "of up to 512 pixels: choose a convolution, or a block of them"
    )


def _init_he(network: nn.Module) -> None:
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def published_url(cut: _Cut) -> str:
    """Where torchvision publishes the weights of a network."""
    from torchvision import models

    url: str = models.get_model_weights(cut.network)["IMAGENET1K_V1"].url
    return url


def _torchvision_file(architecture: str, url: str) -> Path:
    """torchvision's weights where torch.hub keeps them, fetched if they are not there. Its names end in checksums."""
    name = url.rpartition("/")[2]
    file = Path(torch.hub.get_dir()) / "checkpoints" / name
    prefix = name.rpartition("-")[2].partition(".")[0]
    if not file.is_file():
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(file), hash_prefix=prefix, progress=False)
        except (OSError, RuntimeError) as error:  # no network, no such folder; another file than its name says
            raise ValueError(
                f"the ImageNet weights of {architecture} are not here and cannot be fetched ({error}): where there is "
                f"a network get {url}, put it to {file} (hub/checkpoints in the folder that TORCH_HOME names), or give "
                f"{_OPTION}.weights=file with {_OPTION}.path and {_OPTION}.sha256"
            ) from error
    return _verified(file, prefix, _OPTION)


def _verified(path: str | Path | None, sha256: str | None, option: str) -> Path:
    """The file at ``path``, if its checksum begins with ``sha256``."""
    if path is None:
        raise ValueError(f"{option}.path is missing: give the file, or take {option}.sha256 away")
    file = Path(path).expanduser()
    if not file.is_file():
        raise ValueError(f"{option}.path={path} is not there: put the file there, or give its place with {option}.path")
    with open(file, "rb") as opened:
        found = hashlib.file_digest(opened, "sha256").hexdigest()
    if not isinstance(sha256, str) or not re.fullmatch("[0-9a-f]{8,64}", sha256):
        raise ValueError(
            f"{option}.sha256={sha256}: give at least the first 8 hexadecimal digits of the checksum of {file} (it "
            f"begins with {found[:12]}), in quotes if they are a number"
        )
    if not found.startswith(sha256):
        raise ValueError(f"{file} has the checksum {found[:12]}..., not {sha256[:12]}...: it is another file")
    return file


def _load_features(layers: nn.Module, file: Path, prefix: str) -> None:
    """Give layers the weights in a file, where their names begin with ``prefix``."""
    layers = layers.network if isinstance(layers, _Layer) else layers
    try:
        refuse_bomb(file, most=1)
        state = torch.load(file, map_location="cpu", weights_only=True)
        layers.load_state_dict({name: state[f"{prefix}{name}"] for name in layers.state_dict()})
    # torch raises RuntimeError, UnpicklingError, EOFError, KeyError or TypeError, depending on the file.
    except Exception as error:
        raise ValueError(
            f"{file} is no state dict of that architecture ({type(error).__name__}: {shortened(error)}): give "
            f"torchvision's own names, {next(prefix + name for name in layers.state_dict())} and so on"
        ) from error
