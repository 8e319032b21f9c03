"""Measurement operators: what is measured of an image, and with which noise."""

from equireg.operators.base import LinearOperator, Operator
from equireg.operators.blur import Blur, GaussianDeblur, MotionDeblur
from equireg.operators.circular import CircularBlur
from equireg.operators.conjugate_gradients import conjugate_gradients
from equireg.operators.hdr import HighDynamicRange
from equireg.operators.inpainting import BoxInpainting, Inpainting, RandomInpainting
from equireg.operators.motion_kernel import motion_kernel
from equireg.operators.nonlinear_deblur import NonlinearDeblur
from equireg.operators.phase_retrieval import PhaseRetrieval
from equireg.operators.sensors import Sensors
from equireg.operators.separable import SeparableOperator
from equireg.operators.super_resolution import SuperResolution
from equireg.operators.svd import KroneckerSVD, MaskSVD, OperatorSVD

__all__ = [
    "Blur",
    "BoxInpainting",
    "CircularBlur",
    "GaussianDeblur",
    "HighDynamicRange",
    "Inpainting",
    "KroneckerSVD",
    "LinearOperator",
    "MaskSVD",
    "MotionDeblur",
    "NonlinearDeblur",
    "Operator",
    "OperatorSVD",
    "PhaseRetrieval",
    "RandomInpainting",
    "Sensors",
    "SeparableOperator",
    "SuperResolution",
    "conjugate_gradients",
    "motion_kernel",
]
