"""Videos of heads: a camera path, a loop through latents, or both."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import camera_utils
from dnnlib.atomic import atomic_write
from inference.interpolation import LatentLoop
from inference.output import VIDEO_FPS, open_video
from inference.sampling import (
    DEFAULT_FOV_DEG,
    Head,
    ImageMode,
    Noise,
    camera_pivot,
    camera_radius,
    labels_from_poses,
    shows_all_sides,
    to_uint8,
)
from inference.shapes import ShapeSettings, save_shape
from training.config import require
from training.triplane import TriPlaneGenerator

CAMERA_PATHS = ("FFHQ", "Cats", "Head", "AFHQ", "Shapenet")
FRONT_VERTICAL = np.pi / 2 - 0.05
_EG3D_YAW_RANGE_RAD = 0.35
_SHAPENET_FOV_DEG = camera_utils.fov_from_focal(1.7074)


@dataclass(frozen=True, kw_only=True)
class VideoSettings:
    """How a video looks, apart from whom it shows."""

    camera_path: str = "FFHQ"
    """'Head': once around. Others: an ellipse in front of the face, about a pivot of the data set."""
    fixed_camera: bool = False
    """Replace the way around of 'Head' by a camera in front."""
    frames_per_keyframe: int = 240
    turns: float = 1.0
    """Share of the loop through the latents that the video covers."""
    grid: tuple[int, int] = (1, 1)
    """Columns and rows."""
    image_mode: ImageMode = "image"
    fov_deg: float | None = None
    """Diagonal field of view; None is that of the data set that the camera path is for."""
    neural_rendering_resolution: int | None = None
    """None is the generator's own."""
    noise: Noise = Noise()
    fps: int = VIDEO_FPS

    def __post_init__(self) -> None:
        require(self.camera_path in CAMERA_PATHS, "camera path", f"one of {', '.join(CAMERA_PATHS)}", self.camera_path)
        require(self.frames_per_keyframe >= 1, "frames per keyframe", "at least 1", self.frames_per_keyframe)


@dataclass(frozen=True, kw_only=True)
class FrameShapes:
    """Shapes that accompany a video: of its first cell, one for each frame in which it changes."""

    folder: Path = Path()
    suffix: str = "ply"
    settings: ShapeSettings = ShapeSettings()

    @property
    def trajectory(self) -> Path:
        """File of the camera poses `[F, 4, 4]`, which is written last."""
        return self.folder / "trajectory.npy"


def path_labels(generator: TriPlaneGenerator, num_frames: int, settings: VideoSettings) -> torch.Tensor:
    """Return the camera labels `[num_frames, 25]` of a video."""
    if settings.camera_path == "Head" and settings.fixed_camera:
        pose = camera_utils.look_at_pose(
            0.0, camera_utils.pitch_from_vertical(FRONT_VERTICAL), camera_radius(generator)
        )
        poses = pose.expand(num_frames, -1, -1)
    elif settings.camera_path == "Head":
        poses = camera_utils.orbit_path(num_frames, radius=camera_radius(generator))
    elif shows_all_sides(generator):
        target = camera_pivot(generator) if settings.camera_path == "FFHQ" else (0.0, 0.0, 0.0)
        poses = camera_utils.oscillating_path(num_frames, radius=camera_radius(generator), target=target)
    else:
        poses = camera_utils.oscillating_path(
            num_frames,
            radius=camera_radius(generator),
            target=camera_pivot(generator),
            yaw_range_rad=_EG3D_YAW_RANGE_RAD,
        )
    default_fov_deg = _SHAPENET_FOV_DEG if settings.camera_path == "Shapenet" else DEFAULT_FOV_DEG
    return labels_from_poses(poses, settings.fov_deg or default_fov_deg)


def render_frames(
    generator: TriPlaneGenerator, keyframes: torch.Tensor, settings: VideoSettings
) -> Iterator[tuple[np.ndarray, list[Head]]]:
    """Render a video frame by frame.

    Args:
        generator: from `load_generator`.
        keyframes: `[cells, K, L, 512]`, the cells row by row.
        settings: of the video.

    Yields:
        a frame uint8 `[H, W, 3]`, and the heads in it, row by row.
    """
    num_cells, num_keyframes = keyframes.shape[:2]
    columns, rows = settings.grid
    require(num_cells == columns * rows, "keyframes", f"{columns * rows} cells for the grid", num_cells)
    num_frames = num_keyframes * settings.frames_per_keyframe
    labels = path_labels(generator, num_frames, settings)
    loops = [LatentLoop(cell) for cell in keyframes]
    heads: list[Head] = []
    for frame in range(num_frames):
        if num_keyframes > 1 or not heads:  # a head that does not change keeps its planes
            turn = settings.turns * frame / num_frames
            heads = [Head(generator, loop(turn), settings.noise) for loop in loops]
        cells = [
            to_uint8(head.render(labels[frame], frame, settings.neural_rendering_resolution), settings.image_mode)[0]
            for head in heads
        ]
        row_images = [np.concatenate(cells[row * columns : (row + 1) * columns], axis=1) for row in range(rows)]
        yield np.concatenate(row_images, axis=0), heads


def write_video(
    path: Path,
    generator: TriPlaneGenerator,
    keyframes: torch.Tensor,
    settings: VideoSettings,
    shapes: FrameShapes | None = None,
    progress: bool = True,
) -> None:
    """Render a video to a file; see `render_frames`.

    Args:
        path: ends in `.mp4`; appears when the video is complete.
        generator: from `load_generator`.
        keyframes: `[cells, K, L, 512]`.
        settings: of the video.
        shapes: what to write beside the video; None is nothing.
        progress: show a bar.
    """
    num_frames = keyframes.shape[1] * settings.frames_per_keyframe
    last_head, shape_settings = None, shapes.settings if shapes else None
    with open_video(path, settings.fps) as video:
        frames = render_frames(generator, keyframes, settings)
        for number, (frame, heads) in enumerate(
            tqdm(frames, total=num_frames, desc=path.name, unit="frame", disable=not progress)
        ):
            video.append_data(frame)
            if shapes is not None and heads[0] is not last_head:
                last_head = heads[0]
                shape_file = shapes.folder / f"{number:04d}_shape.{shapes.suffix}"
                level = save_shape(shape_file, last_head, shape_settings)
                if level is not None:
                    shape_settings = dataclasses.replace(shape_settings, level=level)  # for all that follow
    if shapes is not None:
        poses, _ = camera_utils.split_label(path_labels(generator, num_frames, settings))
        with atomic_write(shapes.trajectory) as file:
            np.save(file, poses.numpy())
