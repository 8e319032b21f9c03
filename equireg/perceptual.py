"""LPIPS, FID and KID: distances between features of networks that were trained on photographs.

They need the extra ``perceptual`` and weights that no package ships; both are looked for before a run begins.
"""

import hashlib
import warnings
from collections.abc import Collection, Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance
from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

from equireg.pictures import to_uint8

LPIPSNet = Literal["vgg", "alex", "squeeze"]
DistributionMetric = Literal["fid", "kid"]


class Backbone(NamedTuple):
    """Weights that torchmetrics loads from torch.hub's folder; their name ends with the start of their SHA-256."""

    file: str
    url: str


TORCHVISION = "https://download.pytorch.org/models/"
TORCH_FIDELITY = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
INCEPTION = "weights-inception-2015-12-05-6726825d.pth"
BACKBONES = {
    "vgg": Backbone("vgg16-397923af.pth", TORCHVISION + "vgg16-397923af.pth"),
    "alex": Backbone("alexnet-owt-7be5be79.pth", TORCHVISION + "alexnet-owt-7be5be79.pth"),
    "squeeze": Backbone("squeezenet1_1-b8a52dc0.pth", TORCHVISION + "squeezenet1_1-b8a52dc0.pth"),
    "inception": Backbone(INCEPTION, TORCH_FIDELITY + INCEPTION),
}


class LPIPS:
    """Learned perceptual image patch similarity, equal to the package lpips 0.1.4 (Zhang et al., CVPR 2018).

    Args:
        net: the network whose features are compared; the tables of diffusion samplers use ``vgg``.
    """

    def __init__(self, net: LPIPSNet = "vgg") -> None:
        self.network = LearnedPerceptualImagePatchSimilarity(net_type=net).net

    def to(self, device: torch.device) -> "LPIPS":
        self.network.to(device)
        return self

    @torch.no_grad()
    def __call__(self, x_hat: Tensor, x: Tensor) -> Tensor:
        """The distance (B,) of images (B, 1 or 3, H, W) in [-1, 1], clipped; grey ones are repeated to RGB."""
        return self.network(*(as_rgb(image.float().clamp(-1, 1)) for image in (x_hat, x))).flatten()


class DistributionDistance:
    """FID and KID between restorations and the images they restore (Heusel et al., 2017; Binkowski et al., 2018).

    Below about 2000 images FID is biased upwards and comparable only at the same number of images; KID is not biased.

    Args:
        metrics: ``fid``, ``kid`` or both.
        network: maps 8-bit RGB images (N, 3, H, W) to features (N, F); when left out, the Inception network of 2015
            that pytorch-fid and torch-fidelity use, behind an antialiased bilinear resize to 299 x 299.
    """

    def __init__(self, metrics: Collection[DistributionMetric], network: nn.Module | None = None) -> None:
        self.metrics = metrics
        self.network = inception() if network is None else network

    @torch.no_grad()
    def __call__(self, batches: Iterable[tuple[Tensor, Tensor]], device: torch.device) -> dict[str, float]:
        """Each metric over batches of (restorations, truths), images (B, 1 or 3, H, W) in [-1, 1].

        Raises:
            ValueError: if there are fewer than two images.
        """
        self.network.to(device)
        fake, real = [], []
        for x_hat, x in batches:
            fake.append(self.network(as_rgb(to_uint8(x_hat)).to(device)).double().cpu())
            real.append(self.network(as_rgb(to_uint8(x)).to(device)).double().cpu())
        self.network.cpu()
        n = sum(len(features) for features in real)
        if n < 2:
            raise ValueError(f"{' and '.join(self.metrics)} need at least 2 images, got {n}")
        features = {"fake": torch.cat(fake), "real": torch.cat(real)}
        return {metric: _distance(metric, features, n) for metric in self.metrics}


def inception() -> nn.Module:
    """The network of FID and KID, with its 2048 pooled features."""
    return FrechetInceptionDistance(feature=2048, antialias=True).inception


def as_rgb(images: Tensor) -> Tensor:
    """Grey images (B, 1, H, W) repeated to three channels, others as they are."""
    return images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images


def check_installed(metric: str) -> None:
    """Raises ModuleNotFoundError when the package that the metric needs is missing."""
    package = "torchvision" if metric == "lpips" else "torch_fidelity"
    if find_spec(package) is None:
        raise ModuleNotFoundError(f'metric {metric!r} needs {package}: pip install "equireg[perceptual]"')


def check_backbone(metric: str, backbone: str) -> None:
    """Looks for the weights a metric would otherwise download at run time.

    Raises:
        FileNotFoundError: if they are missing; the message says which file, from where and to where.
        ValueError: if the file is damaged; torch.hub itself would take any file of this name.
    """
    name, url = BACKBONES[backbone]
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    if not (folder / name).is_file():
        raise FileNotFoundError(
            f"metric {metric!r} needs {name}, which is not in {folder}: copy it there from {url}, "
            "or set allow_download=true, or drop the metric"
        )
    with open(folder / name, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if not digest.startswith(Path(name).stem.rsplit("-", 1)[1]):
        raise ValueError(f"{folder / name} is damaged (SHA-256 {digest[:8]}...): copy it again from {url}")


def _distance(metric: DistributionMetric, features: dict[str, Tensor], n: int) -> float:
    given = nn.Identity()  # the features are computed already, once for both metrics
    given.num_features = features["real"].shape[1]
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.filterwarnings("ignore", message=".*save all extracted features in buffer")
        torch.manual_seed(0)  # KID draws subsets
        if metric == "fid":
            distance = FrechetInceptionDistance(feature=given)
        else:
            distance = KernelInceptionDistance(feature=given, subset_size=min(50, n))
        distance.update(features["real"], real=True)
        distance.update(features["fake"], real=False)
        value = distance.compute()
    return float(value if metric == "fid" else value[0])
