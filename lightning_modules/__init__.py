"""Posterior samplers and the modules that train what they need."""

import equireg  # noqa: F401  its guard must run before lightning is imported
from lightning_modules.base import PosteriorSampler
from lightning_modules.baselines import LinearMMSE, MeasurementBaseline
from lightning_modules.dps import DPS
from lightning_modules.train_autoencoder import AutoencoderTraining
from lightning_modules.train_prior import DiffusionPriorTraining

__all__ = [
    "DPS",
    "AutoencoderTraining",
    "DiffusionPriorTraining",
    "LinearMMSE",
    "MeasurementBaseline",
    "PosteriorSampler",
]
