"""Smooth closed paths through latents."""

from __future__ import annotations

import numpy as np
import torch
from scipy.interpolate import make_interp_spline

_REPETITIONS = 5  # of the loop: what happens at the far ends does not reach the middle one, which therefore closes


class LatentLoop:
    """A cubic spline that visits w-layers `[K, L, 512]` in a loop; the path of the published videos."""

    def __init__(self, keyframes: torch.Tensor) -> None:
        self._keyframes = keyframes
        self.num_keys = num_keys = keyframes.shape[0]
        first = -num_keys * (_REPETITIONS // 2)
        positions = np.arange(first, first + num_keys * _REPETITIONS)
        values = np.tile(keyframes.double().cpu().numpy(), (_REPETITIONS, 1, 1))
        self._spline = make_interp_spline(positions, values, k=3) if num_keys > 1 else None

    def __call__(self, turn: float) -> torch.Tensor:
        """Return the w-layers `[L, 512]` after a share of the loop: keyframe 0 at 0, and again at 1."""
        if self._spline is None:
            return self._keyframes[0]
        return torch.from_numpy(self._spline(turn * self.num_keys)).to(self._keyframes)
