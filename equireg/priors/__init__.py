"""Diffusion priors."""

from equireg.priors.networks import UNet
from equireg.priors.schedule import Step, VPSchedule, VPStep, make_betas, space_timesteps
from equireg.priors.vp import Denoised, VPPrior

__all__ = ["Denoised", "Step", "UNet", "VPPrior", "VPSchedule", "VPStep", "make_betas", "space_timesteps"]
