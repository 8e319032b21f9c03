"""Diffusion priors."""

from equireg.priors.ddim import DDIMStep, ddim_step, ddim_steps
from equireg.priors.edm import EDMPrior
from equireg.priors.gaussian import GaussianPrior
from equireg.priors.latent import LatentPrior
from equireg.priors.networks import UNet
from equireg.priors.schedule import (
    SigmaStep,
    Step,
    TimeMap,
    VPSchedule,
    VPStep,
    make_betas,
    power_sigmas,
    sigma_steps,
    space_timesteps,
    time_of_sigma,
)
from equireg.priors.text import TextPrior
from equireg.priors.vp import Denoised, VPPrior

__all__ = [
    "DDIMStep",
    "Denoised",
    "EDMPrior",
    "GaussianPrior",
    "LatentPrior",
    "SigmaStep",
    "Step",
    "TextPrior",
    "TimeMap",
    "UNet",
    "VPPrior",
    "VPSchedule",
    "VPStep",
    "ddim_step",
    "ddim_steps",
    "make_betas",
    "power_sigmas",
    "sigma_steps",
    "space_timesteps",
    "time_of_sigma",
]
