"""Where images and measurements come from."""

import equireg  # noqa: F401  its guard must run before lightning is imported
from datamodules.base import ImageDataModule
from datamodules.faces import Faces
from datamodules.ffhq import FFHQ
from datamodules.fields import FieldDataModule
from datamodules.helmholtz import Helmholtz
from datamodules.image_folder import ImageFolder
from datamodules.imagenet import ImageNet
from datamodules.navier_stokes import NavierStokes
from datamodules.pack import pack
from datamodules.packed import Packed
from datamodules.picture_folder import PictureFolder

__all__ = [
    "FFHQ",
    "Faces",
    "FieldDataModule",
    "Helmholtz",
    "ImageDataModule",
    "ImageFolder",
    "ImageNet",
    "NavierStokes",
    "Packed",
    "PictureFolder",
    "pack",
]
