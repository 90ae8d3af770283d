"""Draw docs/figures/synthetic_heads.png, the picture of synthetic data in docs/training.md.

PYTHONPATH=. python docs/figures/draw_synthetic_heads.py
"""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image

from camera_utils import camera_label, intrinsics_from_focal, look_at_pose
from training.synthetic_heads import render_heads, sample_identity

SIDE = 96  # pixels
IDENTITIES = (2, 6, 9, 13, 22, 31)
YAWS_DEG = (0, 45, 90, 135, 180, -135, -90, -45)


def main() -> None:
    """Render a row for each identity, a column for each view."""
    poses = look_at_pose(torch.tensor(YAWS_DEG).deg2rad(), 0.1)
    labels = camera_label(poses, intrinsics_from_focal(4.2647))
    rows = []
    for index in IDENTITIES:
        images = render_heads([sample_identity(0, index)] * len(labels), labels, SIDE)
        rows.append(torch.cat(images.rgb.permute(0, 2, 3, 1).unbind(), dim=1))
    Image.fromarray(torch.cat(rows).numpy()).save(Path(__file__).parent / "synthetic_heads.png", optimize=True)


if __name__ == "__main__":
    main()
