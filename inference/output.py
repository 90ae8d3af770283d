"""Names and formats of what the scripts write."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Protocol

import imageio
import imageio_ffmpeg
import numpy as np

from dnnlib.atomic import atomic_path
from dnnlib.sources import local_path
from dnnlib.util import source_name
from torch_utils.pictures import save_png as save_png
from training.config import require

VIDEO_FPS = 60


def output_folder(network: str, outdir: Path | None, pose_cond_deg: float) -> Path:
    """Return the published folder of a network's samples.

    That is `<outdir>/<network name>_<pose_cond>`, or without `outdir` `samples_<network name>` beside the network (in
    the working directory for a URL, a preset or the bundled network).
    """
    name = source_name(network)
    if outdir is not None:
        return outdir / f"{name}_{pose_cond_deg:g}"
    path = local_path(network)
    parent = Path() if path is None else path.parent
    return parent / f"samples_{name}"


def prepare_outputs(paths: Iterable[Path], overwrite: bool) -> None:
    """Make the folders of files that are to be written, before anything is computed.

    Raises:
        FileExistsError: a file is there that would be replaced without permission.
        OSError: a folder cannot be made or written to.
    """
    paths = list(paths)
    existing = [] if overwrite else [path for path in paths if path.exists()]
    if existing:
        more = f" (and {len(existing) - 1} more)" if len(existing) > 1 else ""
        raise FileExistsError(f"{existing[0]}{more} is there already; give --overwrite to replace it")
    for folder in {path.parent for path in paths}:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(f"{folder}: expected a folder to write to, but it is read-only")


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
        frames = _EvenFrames(writer)
        with closing(writer):  # as a context manager, it would leave the encoder running after an error
            yield frames
        _require_complete(temporary, path, frames.count)


def _require_complete(video: Path, shown: Path, num_frames: int) -> None:
    """Raise an `OSError` unless a video has all its frames; imageio does not report that its encoder failed."""
    try:
        encoded, _ = imageio_ffmpeg.count_frames_and_secs(str(video))
    except (RuntimeError, OSError):
        encoded = 0
    if encoded != num_frames:
        raise OSError(
            f"{shown}: expected {num_frames} encoded frames, got {encoded}; is the disk full, or ffmpeg broken?"
        )


class _EvenFrames:
    """Repeat the last row or column of frames with odd sides, which the usual 4:2:0 colour format cannot hold."""

    def __init__(self, writer: FrameWriter) -> None:
        self._writer, self.count = writer, 0

    def append_data(self, frame: np.ndarray) -> None:
        self.count += 1
        height, width = frame.shape[:2]
        if height % 2 or width % 2:
            frame = np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        self._writer.append_data(frame)
