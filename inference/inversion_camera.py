"""Refinement of a camera: rotation, translation and focal length as small unknowns."""

from __future__ import annotations

import math

import torch

import camera_utils
from inference.inversion_settings import CameraSettings

_NUM_UNKNOWNS = 7


class CameraRefinement:
    """A camera near a given one.

    With the given pose (R, t) and intrinsics, and E = exp([w]_x) for a rotation vector w:
    R' = E R, t' = E t + R' d, f' = f exp(s). E turns the camera around the centre of the head, as a wrong head pose
    does, d shifts it along its own axes, and s zooms. The three (7 numbers) are `unknowns`, times their units.
    """

    def __init__(self, label: torch.Tensor, settings: CameraSettings) -> None:
        """Start from a camera `[1, 25]`."""
        self.settings = settings
        self._label = label.detach()
        rotation_rad = math.radians(settings.rotation_deg)
        units = [rotation_rad] * 3 + [settings.translation] * 3 + [settings.log_focal]
        self._units = torch.tensor(units, dtype=torch.float64, device=label.device)
        self.unknowns = torch.zeros(_NUM_UNKNOWNS, device=label.device, requires_grad=True)

    def label(self) -> torch.Tensor:
        """Return the refined camera `[1, 25]`, differentiable with respect to `unknowns`."""
        cam2world, intrinsics = camera_utils.split_label(self._label.double())
        rotation_vector, shift, log_focal = (self.unknowns.double() * self._units).split([3, 3, 1])
        turn = torch.linalg.matrix_exp(_cross_matrix(rotation_vector))
        rotation = turn @ cam2world[:, :3, :3]
        position = cam2world[:, :3, 3] @ turn.T + rotation @ shift  # [1, 3]
        pose = torch.cat([torch.cat([rotation, position[:, :, None]], dim=2), cam2world[:, 3:]], dim=1)
        factor = torch.ones_like(intrinsics)
        factor[:, [0, 1], [0, 1]] = log_focal.exp()
        return camera_utils.camera_label(pose, intrinsics * factor).to(self._label.dtype)

    def penalty(self) -> torch.Tensor:
        """Return the sum of squared unknowns, a scalar."""
        return self.unknowns.square().sum()


def _cross_matrix(vector: torch.Tensor) -> torch.Tensor:
    """Return the matrix `[3, 3]` of the cross product with a vector `[3]`."""
    x, y, z = vector
    zero = torch.zeros_like(x)
    return torch.stack([zero, -z, y, z, zero, -x, -y, x, zero]).reshape(3, 3)
