"""The published checkpoints of FunDPS and DiffusionPDE as priors of this library."""

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from equireg.checkpoints.edm_pickle import read_edm_pickle
from equireg.pde.equations import PDE, SIGMA_DATA
from equireg.priors.edm import EDMPrior
from equireg.priors.edm_networks import SongUNO
from equireg.weights import RANDOM, load_state

DIFFUSION_PDE_SCALE: dict[PDE, tuple[float, float]] = {"helmholtz": (2.15, 0.028), "navier_stokes": (1.6, 1.6)}
"""Physical units of (a, u) per unit of DiffusionPDE's networks (Huang et al., scripts/generate_*.py)."""

ARCHITECTURES = ("SongUNO", "SongUNet")


def convert_edm_pickle(source: str | Path, output: str | Path, pde: PDE) -> EDMPrior:
    """Writes the network of an official checkpoint as a file that ``EDMPrior`` reads, in full precision.

    Args:
        source: a .pkl of FunDPS or of DiffusionPDE.
        output: the .safetensors file to write.
        pde: the equation it was trained on, which the file does not tell.

    Raises:
        FileNotFoundError: if there is no such checkpoint.
        ValueError: if it is refused, or its network is another one.
    """
    checkpoint = read_edm_pickle(source)
    try:
        prior = prior_of(checkpoint.state, checkpoint.init_kwargs, checkpoint.attributes, pde)
    except ValueError as error:
        raise ValueError(f"checkpoint={str(source)!r}: {error}") from error
    prior.description["provenance"] = {
        "source": Path(source).name,
        "sha256": sha256(source),
        "tensors": len(checkpoint.state),
    }
    prior.save(output, half=False)
    return prior


def prior_of(state: dict[str, Tensor], init_kwargs: dict[str, Any], attributes: dict[str, Any], pde: PDE) -> EDMPrior:
    """The prior of an official preconditioned network.

    FunDPS's operator network (SongUNO) was trained with exponential noise on fields of standard deviation 0.5,
    DiffusionPDE's (SongUNet) with white noise on fields divided by ``DIFFUSION_PDE_SCALE``.

    Args:
        state: its tensors by their official names.
        init_kwargs: arguments of its constructor.
        attributes: its numbers; sigma_data, sigma_min and sigma_max are used.
        pde: the equation.

    Raises:
        ValueError: if the network is another one.
    """
    arguments = dict(init_kwargs)
    architecture = arguments.pop("model_type", "SongUNet")
    if architecture not in ARCHITECTURES:
        raise ValueError(f"model_type={architecture!r} is not supported; allowed: {', '.join(ARCHITECTURES)}")
    known = {name: attributes[name] for name in ("sigma_data", "sigma_min", "sigma_max") if name in attributes}
    known |= {name: arguments.pop(name) for name in ("sigma_data", "sigma_min", "sigma_max") if name in arguments}
    for name in ("img_resolution", "img_channels"):
        if name not in arguments and name not in attributes:
            raise ValueError(f"it does not tell its {name}")
        arguments.setdefault(name, attributes.get(name))
    if architecture == "SongUNO":
        scaling = {"noise": "exponential"}
    else:
        std = [SIGMA_DATA * scale for scale in DIFFUSION_PDE_SCALE[pde]]
        scaling = {"noise": "white", "mean": [0.0, 0.0], "std": std}
    prior = EDMPrior(RANDOM, pde, architecture, arguments, **scaling, **known)
    state = {name.removeprefix("model."): value for name, value in state.items()}
    if isinstance(prior.network, SongUNO):
        prior.network.adopt_ranks(state)
    filters = {name: torch.full((1, 1, 2, 2), 0.25) for name in prior.network.state_dict() if "resample_filter" in name}
    load_state(prior.network, filters | state, "checkpoint")
    return prior


def sha256(path: str | Path) -> str:
    """Of a file, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
