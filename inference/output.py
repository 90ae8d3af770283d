"""Names and formats of what the scripts write."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Protocol

import imageio
import numpy as np
from PIL import Image

from dnnlib.atomic import atomic_path, atomic_write
from dnnlib.util import source_name
from inference.loading import is_untrained
from training.config import require

VIDEO_FPS = 60


def output_folder(network: str, outdir: Path | None, pose_cond_deg: float) -> Path:
    """Return the published folder of a network's samples.

    That is `<outdir>/<network name>_<pose_cond>`, or without `outdir` `samples_<network name>` beside the network (in
    the working directory for a URL or a preset).
    """
    name = source_name(network)
    if outdir is not None:
        return outdir / f"{name}_{pose_cond_deg:g}"
    is_path = "://" not in network and not is_untrained(network)
    parent = Path(network).parent if is_path else Path()
    return parent / f"samples_{name}"


def refuse_overwriting(paths: Iterable[Path], overwrite: bool) -> None:
    """Raise a `FileExistsError` if a file is there that would be replaced without permission."""
    existing = [] if overwrite else [path for path in paths if path.exists()]
    if existing:
        more = f" (and {len(existing) - 1} more)" if len(existing) > 1 else ""
        raise FileExistsError(f"{existing[0]}{more} is there already; give --overwrite to replace it")


def save_png(path: Path, image: np.ndarray) -> None:
    """Write an image uint8 `[H, W, 3]`, completely or not at all."""
    with atomic_write(path) as file:
        Image.fromarray(image).save(file, format="png")


class FrameWriter(Protocol):
    """Takes the frames of a video one after the other."""

    def append_data(self, frame: np.ndarray) -> None:
        """Add a frame uint8 `[H, W, 3]`."""


@contextmanager
def open_video(path: Path, fps: int = VIDEO_FPS, quality_crf: int = 18) -> Iterator[FrameWriter]:
    """Open an H.264 video for writing frame by frame; it appears under `path` when the block ends without an error.

    Args:
        path: ends in `.mp4`.
        fps: frames per second.
        quality_crf: constant rate factor of x264; smaller is better, 18 is visually lossless.
    """
    require(path.suffix == ".mp4", "video", "a name that ends in .mp4", str(path))
    # bitexact: no time and no version of FFmpeg in the file, so that the same frames make the same bytes.
    parameters = ["-crf", str(quality_crf), "-fflags", "+bitexact", "-flags:v", "+bitexact", "-threads", "2"]
    with atomic_path(path) as temporary:
        writer = imageio.get_writer(
            temporary,
            format="FFMPEG",
            fps=fps,
            codec="libx264",
            quality=None,
            macro_block_size=1,
            ffmpeg_log_level="error",
            output_params=parameters,
        )
        with closing(writer):  # as a context manager, it would leave the encoder running after an error
            yield _EvenFrames(writer)


class _EvenFrames:
    """Repeat the last row or column of frames with odd sides, which the usual 4:2:0 colour format cannot hold."""

    def __init__(self, writer: FrameWriter) -> None:
        self._writer = writer

    def append_data(self, frame: np.ndarray) -> None:
        height, width = frame.shape[:2]
        if height % 2 or width % 2:
            frame = np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        self._writer.append_data(frame)
