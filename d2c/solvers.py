"""From noise at t = 1 to data at t = 0: solvers of a velocity field, of REPA's SDE, and of the 1,000-step process.

States are float64 [N, C, H, W]. A ``Field`` gives the model's prediction for a state and the times float64 [N] of its
images. Nothing here mixes images, so that none depends on those it is solved beside.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from d2c.errors import D2CError
from d2c.transport import STEPS, alpha_bars, spread

Field = Callable[[Tensor, Tensor], Tensor]

# Dormand and Prince (1980), table 2: the stages, and the fifth-order solution less the fourth-order one. The last
# stage is evaluated at the solution, so it is the first of the next step.
_NODES = (1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)
_STAGES = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
_ERROR = (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)
# Step control as Hairer, Norsett and Wanner (Solving ODEs I, II.4) advise it.
_SAFETY, _SHRINK, _GROW = 0.9, 0.2, 10.0
_SMALLEST = 1e-7
"""A step below this makes no progress that a float32 model could tell."""


def euler(velocity: Field, z: Tensor, grid: Sequence[float]) -> Tensor:
    """Euler's method over the times of ``grid``, from 1 down to 0."""
    for now, after in pairwise(grid):
        z = z + (after - now) * velocity(z, _times(z, now))
    return z


def heun(velocity: Field, z: Tensor, grid: Sequence[float]) -> Tensor:
    """Heun's second-order method over the times of ``grid``, from 1 down to 0; two evaluations in every step."""
    for now, after in pairwise(grid):
        slope = velocity(z, _times(z, now))
        ahead = z + (after - now) * slope
        z = z + (after - now) * (slope + velocity(ahead, _times(z, after))) / 2
    return z


def euler_maruyama(velocity: Field, z: Tensor, grid: Sequence[float], draw: Callable[[], Tensor]) -> Tensor:
    """REPA's reverse SDE with diffusion ``w_t = 2 t``; ``draw`` gives a step's noise, and the last step has none.

    The drift is ``v - (w_t / 2) score`` with ``score = -(z + (1 - t) v) / t`` on the linear path (SiT, equation 9),
    in which t cancels.
    """
    for now, after in pairwise(grid):
        drift = (2 - now) * velocity(z, _times(z, now)) + z
        z = z + (after - now) * drift
        if after > 0:
            z = z + (2 * now * (now - after)) ** 0.5 * draw()
    return z


def dopri5(velocity: Field, z: Tensor, atol: float, rtol: float) -> Tensor:
    """Dormand and Prince's fifth-order method; every image has times and steps of its own, chosen by its own error.

    An image's error is the root mean square of its values' errors, each over ``atol + rtol |value|``.

    Raises:
        D2CError: the steps of an image became too small: the field jumps, or is not finite.
    """
    t = _times(z, 1.0)
    first = velocity(z, t)
    step = _first_step(velocity, z, t, first, atol, rtol)
    rejected = torch.zeros_like(t, dtype=torch.bool)
    while (t > 0).any():
        if ((step < _SMALLEST) & (t > 0)).any():
            raise D2CError(
                "dopri5 cannot hold its tolerance",
                found=f"steps below {_SMALLEST} at t = {t[(step < _SMALLEST) & (t > 0)][0].item():.4f}",
                hint="sample with heun; if that gives no images either, the model has diverged",
            )
        step = torch.minimum(step, t)
        slopes, ahead = [first], z
        for node, weights in zip(_NODES, _STAGES, strict=True):
            ahead = z - spread(step, z) * _weighted(weights, slopes)
            slopes.append(velocity(ahead, t - node * step))
        size = atol + rtol * torch.maximum(z.abs(), ahead.abs())
        error = _norm(spread(step, z) * _weighted(_ERROR, slopes) / size)
        accepted = error < 1
        t = torch.where(accepted, t - step, t)
        z = torch.where(spread(accepted, z), ahead, z)
        first = torch.where(spread(accepted, z), slopes[-1], first)
        factor = (_SAFETY * error**-0.2).nan_to_num(_SHRINK).clamp(_SHRINK, _GROW)
        # Right after a step that was too long, none is tried that is longer.
        step = step * torch.where(rejected, factor.clamp(max=1), factor)
        rejected = ~accepted
    return z


def diffusion(eps: Field, z: Tensor, count: int, draw: Callable[[], Tensor] | None = None) -> Tensor:
    """``count`` of the 1,000 steps: with ``draw`` ancestral (DDPM, its lower bound of the variance), without it DDIM.

    Song et al. (DDIM), equation 12 with eta = 1 or 0; the last step lands on the data.
    """
    kept = alpha_bars(z.device)
    visited = diffusion_steps(count)
    for step, following in zip(visited, [*visited[1:], None], strict=True):
        now = kept[step]
        after = kept.new_ones(()) if following is None else kept[following]
        noise = eps(z, _times(z, diffusion_time(step)))
        x0 = (z - (1 - now).sqrt() * noise) / now.sqrt()
        variance = (1 - after) / (1 - now) * (1 - now / after) if draw else torch.zeros_like(after)
        z = after.sqrt() * x0 + (1 - after - variance).sqrt() * noise
        if draw and following is not None:
            z = z + variance.sqrt() * draw()
    return z


def diffusion_steps(count: int) -> list[int]:
    """The ``count`` integer steps that are visited, from 999 down in equal strides ("trailing" spacing)."""
    return [round(STEPS - index * STEPS / count) - 1 for index in range(count)]


def diffusion_time(step: int) -> float:
    """An integer step as a time in 0..1: the middle of the times that training maps to it."""
    return (step + 0.5) / STEPS


def _times(z: Tensor, t: float) -> Tensor:
    return torch.full((len(z),), t, dtype=torch.float64, device=z.device)


def _weighted(weights: Sequence[float], slopes: Sequence[Tensor]) -> Tensor:
    total = weights[0] * slopes[0]
    for weight, slope in zip(weights[1:], slopes[1:], strict=True):
        total = total + weight * slope
    return total


def _norm(values: Tensor) -> Tensor:
    """Root mean square of each image [N]."""
    return values.square().flatten(1).mean(1).sqrt()


def _first_step(velocity: Field, z: Tensor, t: Tensor, slope: Tensor, atol: float, rtol: float) -> Tensor:
    """A first step size for each image from the field's size and curvature (Hairer, Norsett and Wanner, II.4)."""
    size = atol + rtol * z.abs()
    rise = _norm(slope / size)
    trial = (0.01 * _norm(z / size) / rise).nan_to_num(1e-6, 1e-6).clamp(1e-6, 1.0)
    bent = _norm((velocity(z - spread(trial, z) * slope, t - trial) - slope) / size) / trial
    wanted = (0.01 / torch.maximum(rise, bent)) ** 0.2
    # A field that is not finite gives a step of 0, and with that an error.
    return torch.minimum(100 * trial, wanted).nan_to_num(0.0).clamp(max=1.0)
