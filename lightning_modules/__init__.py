"""Posterior samplers and the modules that train what they need."""

import equireg  # noqa: F401  its guard must run before lightning is imported
from lightning_modules.analyze_mpe import MPEAnalysis
from lightning_modules.base import PosteriorSampler
from lightning_modules.baselines import LinearMMSE, MeasurementBaseline
from lightning_modules.daps import DAPS
from lightning_modules.ddrm import DDRM
from lightning_modules.diffpir import DiffPIR
from lightning_modules.diffusion_pde import DiffusionPDE
from lightning_modules.dps import DPS
from lightning_modules.field_baselines import FieldLinearMMSE
from lightning_modules.field_pigdm import FieldPiGDM
from lightning_modules.field_sampler import FieldSampler
from lightning_modules.fundps import FunDPS
from lightning_modules.latent_daps import LatentDAPS
from lightning_modules.mcg import MCG
from lightning_modules.mpgd import MPGD, MPGDAE
from lightning_modules.psld import PSLD
from lightning_modules.resample import ReSample
from lightning_modules.sitcom import SITCOM
from lightning_modules.train_autoencoder import AutoencoderTraining
from lightning_modules.train_decoder import DecoderTraining
from lightning_modules.train_fno import FNOModule
from lightning_modules.train_function_prior import FunctionPriorTraining
from lightning_modules.train_latent_prior import LatentPriorTraining
from lightning_modules.train_prior import DiffusionPriorTraining

__all__ = [
    "DAPS",
    "DDRM",
    "DPS",
    "MCG",
    "MPGD",
    "MPGDAE",
    "PSLD",
    "SITCOM",
    "AutoencoderTraining",
    "DecoderTraining",
    "DiffPIR",
    "DiffusionPDE",
    "DiffusionPriorTraining",
    "FNOModule",
    "FieldLinearMMSE",
    "FieldPiGDM",
    "FieldSampler",
    "FunDPS",
    "FunctionPriorTraining",
    "LatentDAPS",
    "LatentPriorTraining",
    "LinearMMSE",
    "MPEAnalysis",
    "MeasurementBaseline",
    "PosteriorSampler",
    "ReSample",
]
