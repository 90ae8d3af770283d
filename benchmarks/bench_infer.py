"""Time inference stage by stage, with and without reusing what does not depend on the camera.

    python benchmarks/bench_infer.py --config spherehead --out spherehead.json
    python benchmarks/bench_infer.py --config debug

Method and meaning of the columns: benchmarks/README.md.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import statistics
import sys
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from datetime import date
from pathlib import Path

import click
import psutil
import torch
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import camera_utils
import shape_utils
from dnnlib import cli
from dnnlib.atomic import atomic_write
from inference.loading import load_generator
from inference.sampling import Head, Truncation, conditioning_label, orbit_labels, strip_labels
from inference.shapes import ShapeSettings, density_volume
from torch_utils.distributed import resolve_device
from training.networks_stylegan2 import SynthesisOptions
from training.presets import GENERATOR_PRESETS
from training.representations import PLANE_FEATURES
from training.triplane import RadianceField, TriPlaneGenerator

Action = Callable[[], object]
ORBIT_FRAMES = 24
GRID_RESOLUTION = 128
_PUBLISHED_CHUNK_POINTS = 1_000_000
_MEMORY_INTERVAL_S = 0.005
_CONST = SynthesisOptions(noise_mode="const")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """What is timed: once as this project does it, once from scratch (None where the two are the same)."""

    name: str
    ours: Action
    scratch: Action | None = None
    long: bool = False
    """Runs once, without a warm-up."""


@dataclasses.dataclass(kw_only=True)
class Measurement:
    """Seconds of the repetitions, and what else was seen."""

    seconds: list[float] = dataclasses.field(default_factory=list)
    gflop: float = 0.0
    """Multiplications and additions of matrix products and convolutions, in 1e9."""
    peak_mib: float = 0.0
    """CPU: resident memory above that at the start; CUDA: allocated memory."""

    @property
    def median_s(self) -> float:
        """Median of the repetitions."""
        return statistics.median(self.seconds)


class PeakMemory:
    """Watches the memory of a device while a block runs."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._process, self.peak_mib = device, psutil.Process(), 0.0

    def __enter__(self) -> PeakMemory:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            return self
        self._start = self._peak = self._process.memory_info().rss
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(_MEMORY_INTERVAL_S):
            self._peak = max(self._peak, self._process.memory_info().rss)

    def __exit__(self, *_: object) -> None:
        if self._device.type == "cuda":
            self.peak_mib = torch.cuda.max_memory_allocated(self._device) / 2**20
            return
        self._stop.set()
        self._thread.join()
        self.peak_mib = (max(self._peak, self._process.memory_info().rss) - self._start) / 2**20


class Subject:
    """A generator and everything that its stages take as input."""

    def __init__(self, generator: TriPlaneGenerator) -> None:
        self.generator = generator
        self.device = device = next(generator.parameters()).device
        self.z = torch.randn(1, generator.z_dim, generator=torch.Generator().manual_seed(0)).to(device)
        self.label = conditioning_label(generator).to(device)
        self.ws = self.map()
        self.strip, self.orbit = strip_labels(generator).to(device), orbit_labels(ORBIT_FRAMES).to(device)
        self.resolution = generator.neural_rendering_resolution
        self.rays = generator.ray_sampler(*camera_utils.split_label(self.strip[:1]), self.resolution)
        self.field = self.make_field()
        self.backbone_image = generator.backbone.synthesis(self.ws, _CONST)
        self.features = torch.randn(1, PLANE_FEATURES, self.resolution, self.resolution, device=device)

    def map(self) -> torch.Tensor:
        """Latent to w-layers."""
        return self.generator.mapping(self.z, self.label, Truncation().psi, Truncation().cutoff)

    def make_field(self) -> RadianceField:
        """W-layers to planes."""
        return self.generator.radiance_field(self.ws, options=_CONST)

    def project(self) -> list[torch.Tensor]:
        """Plane projections, apart from the backbone."""
        return [projection(self.backbone_image) for projection in self.generator.projections]

    def render_rays(self) -> object:
        """Volume renderer alone."""
        rendering = self.generator.config.rendering
        return self.generator.renderer(self.field.planes, self.generator.decoder, *self.rays, rendering)

    def superresolve(self) -> object:
        """Super-resolution alone."""
        return self.generator.superresolution(self.features[:, :3], self.features, self.ws, _CONST)

    def views_reused(self, labels: torch.Tensor) -> None:
        """Views of one head, as the scripts render them."""
        head = Head(self.generator, self.map())
        for view in labels:
            head.render(view)

    def views_from_scratch(self, labels: torch.Tensor) -> None:
        """Views of one head, each with a mapping, planes and background of its own."""
        for view in labels:
            self.views_reused(view[None])

    def grid_reused(self) -> None:
        """Density grid, as the scripts sample it: planes once, the removed border left out."""
        density_volume(Head(self.generator, self.map()), ShapeSettings(resolution=GRID_RESOLUTION))

    def grid_from_scratch(self) -> None:
        """Density grid with mapping and planes for every chunk, as published."""
        side = self.generator.config.rendering.box_warp
        for _, points in shape_utils.voxel_grid_chunks(GRID_RESOLUTION, side, _PUBLISHED_CHUNK_POINTS, self.device):
            field = self.generator.radiance_field(self.map(), options=_CONST)
            for part in points.split(ShapeSettings.chunk_points):
                self.generator.query(field, part.unsqueeze(0))


def make_stages(subject: Subject) -> list[Stage]:
    """Return the stages, from the mapping network to a density grid."""
    generator = subject.generator
    strip, orbit = subject.strip, subject.orbit
    stages = [
        Stage(name="mapping", ours=subject.map),
        Stage(name="backbone", ours=lambda: generator.backbone.synthesis(subject.ws, _CONST)),
        Stage(
            name="background",
            ours=lambda: generator.bcg_synthesis(subject.ws[:, : generator.bcg_synthesis.num_ws], _CONST),
        ),
        Stage(name="volume renderer", ours=subject.render_rays),
        Stage(name="super-resolution", ours=subject.superresolve),
        Stage(
            name="whole image",
            ours=lambda: subject.views_reused(strip[:1]),
            scratch=lambda: subject.views_from_scratch(strip[:1]),
        ),
        Stage(
            name=f"{len(strip)}-view strip",
            ours=lambda: subject.views_reused(strip),
            scratch=lambda: subject.views_from_scratch(strip),
        ),
        Stage(
            name=f"{ORBIT_FRAMES}-frame orbit",
            ours=lambda: subject.views_reused(orbit),
            scratch=lambda: subject.views_from_scratch(orbit),
            long=True,
        ),
        Stage(name=f"{GRID_RESOLUTION}^3 grid", ours=subject.grid_reused, scratch=subject.grid_from_scratch),
    ]
    if generator.bcg_synthesis is None:
        stages = [stage for stage in stages if stage.name != "background"]
    if generator.projections:
        stages.insert(2, Stage(name="projection", ours=subject.project))
        stages.insert(3, Stage(name="planes", ours=subject.make_field, scratch=subject.make_field))
    return stages


def measure(stage: Stage, generator: TriPlaneGenerator, repeats: int, device: torch.device) -> dict[str, Measurement]:
    """Run the variants of a stage in turn: ours, scratch, ours, ..."""
    variants = {"ours": stage.ours} | ({} if stage.scratch is None else {"scratch": stage.scratch})
    results = {name: Measurement() for name in variants}
    rounds = 1 if stage.long else repeats
    for round_number in range(rounds if stage.long else rounds + 1):
        for name, action in variants.items():
            generator.fold_projections = name == "ours"
            counting = round_number == 0  # the warm-up counts operations, unless there is none
            with PeakMemory(device) as memory, FlopCounterMode(display=False) if counting else nullcontext() as flops:
                start_s = time.perf_counter()
                action()
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                elapsed_s = time.perf_counter() - start_s
            result = results[name]
            result.peak_mib = max(result.peak_mib, memory.peak_mib)
            if counting:
                result.gflop = flops.get_total_flops() / 1e9
            if not counting or stage.long:
                result.seconds.append(elapsed_s)
    generator.fold_projections = True
    return results


def table(results: dict[str, dict[str, Measurement]]) -> str:
    """Return the results as a Markdown table."""
    lines = [
        "| stage | ours, s | from scratch, s | ratio | GFLOP | GFLOP/s | peak MiB, ours / scratch |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, variants in results.items():
        ours, scratch = variants["ours"], variants.get("scratch")
        ratio = f"{scratch.median_s / ours.median_s:.2f}" if scratch else ""
        peaks = f"{ours.peak_mib:.0f}" + (f" / {scratch.peak_mib:.0f}" if scratch else "")
        cells = [
            name,
            _spread(ours),
            _spread(scratch),
            ratio,
            f"{ours.gflop:.1f}",
            f"{ours.gflop / ours.median_s:.0f}",
            peaks,
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _spread(measurement: Measurement | None) -> str:
    if measurement is None:
        return ""
    text = f"{measurement.median_s:.3g}"
    if len(measurement.seconds) == 1:
        return text + " (once)"
    return text + f" ({min(measurement.seconds):.3g} to {max(measurement.seconds):.3g})"


def machine(device: torch.device) -> dict[str, object]:
    """Say what the numbers were measured on."""
    processor = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
    return {
        "device": processor,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "load_before": os.getloadavg()[0],
        "date": date.today().isoformat(),
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    names = (
        [line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line]
        if info.exists()
        else []
    )
    return f"{names[0] if names else platform.processor()}, {psutil.cpu_count()} logical cores"


@click.command()
@cli.option(
    "--config", type=click.Choice(list(GENERATOR_PRESETS)), default="spherehead", help="Preset to build, untrained."
)
@cli.option("--repeats", type=cli.POSITIVE_INT, default=3, help="Timed repetitions, after a warm-up.")
@cli.option("--stages", multiple=True, help="Stages to run, by name; may be repeated.  [default: all]")
@cli.option("--nrr", type=cli.POSITIVE_INT, help="Neural rendering resolution; the preset's own if not given.")
@cli.option("--threads", type=cli.POSITIVE_INT, help="CPU threads; PyTorch's choice if not given.")
@cli.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Also write the results to this JSON file.")
@cli.device_option()
@cli.cli_errors()
@torch.no_grad()
def benchmark(
    config: str,
    repeats: int,
    stages: tuple[str, ...],
    nrr: int | None,
    threads: int | None,
    out: Path | None,
    device: str,
) -> None:
    """Time the stages of inference and print a table."""
    if threads is not None:
        torch.set_num_threads(threads)
    resolved = resolve_device(device)
    environment = machine(resolved)
    generator = load_generator(f"init:{config}", resolved)
    generator.neural_rendering_resolution = nrr or generator.neural_rendering_resolution
    available = {stage.name: stage for stage in make_stages(Subject(generator))}
    unknown = [name for name in stages if name not in available]
    if unknown:
        raise click.BadParameter(f"expected stages among {', '.join(available)}; came {unknown[0]!r}")
    results = {
        name: measure(available[name], generator, repeats, resolved)
        for name in tqdm(stages or list(available), desc=config, unit="stage")
    }
    click.echo(f"{config}, {json.dumps(environment)}\n\n{table(results)}")
    if out is not None:
        rows = {name: {key: dataclasses.asdict(value) for key, value in row.items()} for name, row in results.items()}
        with atomic_write(out, "w") as file:
            json.dump({"config": config, "environment": environment, "results": rows}, file, indent=2)


if __name__ == "__main__":
    benchmark()
