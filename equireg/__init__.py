"""EquiReg: equivariance-regularised diffusion for inverse problems; the mathematics, without Lightning."""

from equireg.torchvision_guard import declare_missing_torchvision_operators

declare_missing_torchvision_operators()
