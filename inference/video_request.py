"""What the video scripts ask for, and how it is done."""

from __future__ import annotations

import dataclasses
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dnnlib.util import source_name
from inference.loading import load_generator
from inference.output import output_folder, prepare_outputs
from inference.sampling import ImageMode, Noise, Truncation, seed_ws
from inference.shapes import ShapeSettings
from inference.video import FrameShapes, VideoSettings, write_video
from torch_utils import distributed
from training.config import NoiseMode, require
from training.triplane import TriPlaneGenerator
from training.volumetric_rendering.renderer import RendererChoice

# What numpy and zipfile raise for damaged archives; RuntimeError is for encryption and unknown compression.
_DAMAGED_ARCHIVE = (KeyError, ValueError, EOFError, OSError, RuntimeError, zipfile.BadZipFile, zlib.error)


@dataclass(frozen=True, kw_only=True)
class VideoRequest:
    """Videos of seeds or of a saved latent."""

    network: str
    settings: VideoSettings
    seeds: tuple[int, ...] = ()
    latent: Path | None = None
    """`.npz` with w-layers `w` `[K, L, 512]`, as the projector writes it, instead of seeds."""
    interpolate: bool = True
    """One video through all seeds, instead of one for each."""
    num_keyframes: int | None = None
    """Keyframes per cell of the grid; None is all that the seeds give. With a number, seeds are repeated as needed."""
    shuffle_seed: int | None = None
    truncation: Truncation = Truncation(psi=1.0)
    pose_cond_deg: float
    sample_mult: float = 1.0
    """Factor on the numbers of samples per ray."""
    shapes: FrameShapes | None = None
    """Its folder is a name below that of the video."""
    outdir: Path | None = None
    output: Path | None = None
    """File of the video, instead of a name derived from the network."""
    renderer: RendererChoice = "auto"
    device: str = "auto"
    overwrite: bool = False

    @classmethod
    def from_options(
        cls,
        *,
        cfg: str,
        w_frames: int,
        grid: tuple[int, int],
        image_mode: ImageMode,
        fov_deg: float | None,
        nrr: int | None,
        noise_mode: NoiseMode,
        noise_seed: int,
        fps: int,
        seeds: list[int] | None,
        truncation_psi: float,
        truncation_cutoff: int,
        pose_cond: float,
        shapes: bool,
        shape_res: int,
        shape_format: str,
        shape_level: float,
        turns: float = 1.0,
        fixed_camera: bool = False,
        **same_name: Any,
    ) -> VideoRequest:
        """Build a request from the values of `dnnlib.cli_video.video_options`."""
        settings = VideoSettings(
            camera_path=cfg,
            fixed_camera=fixed_camera,
            frames_per_keyframe=w_frames,
            turns=turns,
            grid=grid,
            image_mode=image_mode,
            fov_deg=fov_deg,
            neural_rendering_resolution=nrr,
            noise=Noise(mode=noise_mode, seed=noise_seed),
            fps=fps,
        )
        # Published: a cutoff of 0 truncates nothing.
        psi = truncation_psi if truncation_cutoff > 0 else 1.0
        shape_settings = ShapeSettings(resolution=shape_res, level=shape_level)
        frame_shapes = FrameShapes(suffix=shape_format, settings=shape_settings) if shapes else None
        return cls(
            settings=settings,
            seeds=tuple(seeds or ()),
            truncation=Truncation(psi=psi, cutoff=truncation_cutoff),
            pose_cond_deg=pose_cond,
            shapes=frame_shapes,
            **same_name,
        )

    def __post_init__(self) -> None:
        require(bool(self.seeds) != (self.latent is not None), "--seeds, --latent", "one of the two", self.seeds)
        require(self.sample_mult > 0, "--sample-mult", "a positive factor", self.sample_mult)
        cells = self.settings.grid[0] * self.settings.grid[1]
        if not self.interpolate:
            require(cells == 1, "--grid", "1x1 with --interpolate false", self.settings.grid)
            require(self.latent is None, "--latent", "--seeds with --interpolate false", str(self.latent))
            require(self.output is None, "--output", "--outdir with --interpolate false", str(self.output))
        elif self.seeds and self.num_keyframes is None:
            expected = f"a multiple of {cells}, the cells of the grid"
            require(len(self.seeds) % cells == 0, "number of seeds", expected, len(self.seeds))
        if self.latent is not None:
            for name, value in (("--num-keyframes", self.num_keyframes), ("--shuffle-seed", self.shuffle_seed)):
                require(value is None, name, "nothing with --latent, which has its own keyframes", value)
        if self.output is not None:
            require(self.output.suffix == ".mp4", "--output", "a name that ends in .mp4", str(self.output))

    def videos(self) -> dict[Path, tuple[int, ...]]:
        """Return the seeds of each video by file name (none for a saved latent)."""
        folder = output_folder(self.network, self.outdir, self.pose_cond_deg)
        if not self.interpolate:
            return {folder / f"seed{seed:04d}.mp4": (seed,) for seed in self.seeds}
        if self.output is not None:
            return {self.output: self.seeds}
        name = f"{source_name(self.network)}_{self.pose_cond_deg:g}"
        name = name if self.latent is None else self.latent.stem
        return {(self.outdir or folder) / f"{name}.mp4": self.seeds}

    def keyframe_seeds(self, seeds: tuple[int, ...]) -> np.ndarray:
        """Deal seeds out to the cells of the grid: `[cells, K]`."""
        cells = self.settings.grid[0] * self.settings.grid[1] if self.interpolate else 1
        keyframes = self.num_keyframes or len(seeds) // cells
        dealt = np.resize(seeds, cells * keyframes)
        if self.shuffle_seed is not None:
            np.random.RandomState(self.shuffle_seed).shuffle(dealt)
        return dealt.reshape(cells, keyframes)

    def plan(self) -> dict[str, Any]:
        """Return what would be done, as JSON data; the number of frames is None where a file determines it."""
        frames = self.settings.frames_per_keyframe
        videos = [
            {"file": path, "seeds": seeds, "frames": frames * self.keyframe_seeds(seeds).shape[1] if seeds else None}
            for path, seeds in self.videos().items()
        ]
        return {"network": self.network, "latent": self.latent, "videos": videos, "settings": self.settings}


def make_videos(request: VideoRequest) -> Iterator[Path]:
    """Make the videos of a request, this process's share under torchrun; yields each file when it is complete."""
    videos = distributed.shard(list(request.videos().items()))
    shapes = [_frame_shapes(request, path) for path, _ in videos]
    outputs = [path for path, _ in videos]
    for each in filter(None, shapes):
        outputs += [each.trajectory, *each.folder.glob("*_shape.*")]
    prepare_outputs(outputs, request.overwrite)
    if not videos:
        return
    generator = load_generator(request.network, distributed.resolve_device(request.device), request.renderer)
    rendering = generator.rendering_kwargs
    for key in ("depth_resolution", "depth_resolution_importance"):
        rendering[key] = int(rendering[key] * request.sample_mult)
    for (path, seeds), frame_shapes in zip(videos, shapes):
        keyframes = _keyframes(generator, request, seeds)
        write_video(path, generator, keyframes, request.settings, frame_shapes)
        yield path


def _keyframes(generator: TriPlaneGenerator, request: VideoRequest, seeds: tuple[int, ...]) -> torch.Tensor:
    """W-layers `[cells, K, L, 512]` of one video."""
    if request.latent is not None:
        cells = request.settings.grid[0] * request.settings.grid[1]
        ws = load_latent(request.latent, generator)
        require(ws.shape[0] % cells == 0, f"{request.latent}: w", f"a multiple of {cells} latents", ws.shape[0])
        return ws.unflatten(0, (cells, -1))
    dealt = request.keyframe_seeds(seeds)
    ws = seed_ws(generator, dealt.flatten().tolist(), request.truncation, request.pose_cond_deg)
    return ws.unflatten(0, dealt.shape)


def load_latent(path: Path, generator: TriPlaneGenerator) -> torch.Tensor:
    """Read w-layers `[K, L, 512]` that fit a generator from the array `w` of an `.npz` file.

    Raises:
        ValueError: the file is damaged, has no such array, or it is not finite or of another shape.
        OSError: the file cannot be opened.
    """
    w = _read_array(path, "w")
    expected = (generator.backbone.num_ws, generator.w_dim)
    fits = w.ndim == 3 and len(w) >= 1 and w.shape[1:] == expected
    require(fits, f"{path}: w", f"shape [K, {expected[0]}, {expected[1]}] for this network", w.shape)
    require(bool(np.isfinite(w).all()), f"{path}: w", "finite numbers", "NaN or infinity")
    return torch.from_numpy(w).to(next(generator.parameters()).device)


def _read_array(path: Path, name: str) -> np.ndarray:
    """Read an array of real numbers from an .npz file, as float32, without unpickling anything."""
    with open(path, "rb") as file:
        require(zipfile.is_zipfile(file), str(path), f"an .npz file with an array {name!r}", "another kind of file")
        file.seek(0)
        try:
            with np.load(file, allow_pickle=False) as arrays:
                array = arrays[name]
        except _DAMAGED_ARCHIVE as error:
            raise ValueError(f"{path}: expected an .npz file with an array {name!r}: {error}") from error
    require(array.dtype.kind in "fiu", f"{path}: {name}", "an array of real numbers", str(array.dtype))
    with np.errstate(over="ignore"):  # to infinity, which the caller refuses
        return array.astype(np.float32)


def _frame_shapes(request: VideoRequest, path: Path) -> FrameShapes | None:
    if request.shapes is None:
        return None
    return dataclasses.replace(request.shapes, folder=path.with_name(f"{path.stem}_shapes"))
