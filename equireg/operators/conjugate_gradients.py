"""Conjugate gradients, one independent system per image."""

from collections.abc import Callable

import torch
from torch import Tensor


def conjugate_gradients(
    apply: Callable[[Tensor], Tensor],
    b: Tensor,
    tolerance: float = 1e-5,
    max_iterations: int = 1000,
) -> tuple[Tensor, Tensor]:
    """Solves apply(x) = b for every image on its own (Hestenes and Stiefel, 1952), starting from zero.

    An image whose residual is small enough is left alone while the others continue, so its solution does not depend on
    the batch it is in.

    Args:
        apply: a symmetric positive (semi-)definite linear map of images that keeps images apart.
        b: right-hand sides (B, C, H, W).
        tolerance: residual norm at which an image is done, relative to the norm of its b.
        max_iterations: evaluations of ``apply`` at most.

    Returns:
        The solutions, and which of them (B,) reached the tolerance.
    """
    x = torch.zeros_like(b)
    residual = direction = b
    squared = _dot(b, b)
    goal = tolerance**2 * squared
    for _ in range(max_iterations):
        active = squared > goal
        if not active.any():
            break
        image = apply(direction)
        step = torch.where(active, squared, 0) / torch.where(active, _dot(direction, image), 1)
        x = x + step * direction
        residual = residual - step * image
        previous, squared = squared, _dot(residual, residual)
        direction = residual + squared / torch.where(active, previous, 1) * direction
    return x, (squared <= goal).flatten()


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum((1, 2, 3), keepdim=True)
