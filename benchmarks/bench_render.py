"""Time the fused volume renderer against the reference: rays, rays with gradients, and a density grid.

    python benchmarks/bench_render.py
    python benchmarks/bench_render.py --threads 1 --cases forward --out render.json
    python benchmarks/bench_render.py --device cuda --cases forward,gradients --batch 1,4,8 --side 64,128 --compile

Method and meaning of the columns: benchmarks/README.md.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import click
import torch
import torch.nn.functional as F
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs as a script, too

import camera_utils
import shape_utils
from benchmarks.measure import Action, Measurement, environment, markdown_table, measure
from benchmarks.peaks import fma_gflops, memory_gbytes_per_s
from dnnlib import cli
from dnnlib.atomic import atomic_write
from inference.sampling import orbit_labels
from torch_utils import native
from torch_utils.distributed import resolve_device
from torch_utils.ops.volume_render import prepare_planes, query_field, volume_render
from training.config import DecoderConfig
from training.presets import generator_preset
from training.representations import PLANE_FEATURES, make_representation
from training.volumetric_rendering.decoder import OSGDecoder
from training.volumetric_rendering.ray_sampler import sample_rays
from training.volumetric_rendering.reference import RenderDraws, inside_crop, query_field_ref, render_rays_ref

FUSED, REFERENCE, COMPILED = "fused", "reference", "compiled"
GRID_RESOLUTION = 128
GRID_CHUNK_POINTS = 2**18
LONG_S = 60.0
_SMOOTH_RESOLUTION = 32  # planes are interpolated from it: ray gradients jump where a ray crosses a texel edge
_DENSITY_GAIN = 6  # about half of the rays then hit something
_TAPS = {"dual_spherical": 24, "tri_plane": 12, "tri_grid": 24}
_HIDDEN = 64


class Subject:
    """Planes, decoder and rays at the full size of a preset."""

    def __init__(self, preset: str, batch: int, side: int, device: torch.device) -> None:
        self.config = generator_preset(preset)
        self.rendering = self.config.rendering
        self.batch, self.side = batch, side
        self.representation = make_representation(self.config.representation, self.config.plane_depth)
        generator = torch.Generator().manual_seed(0)
        coarse = torch.randn(
            batch,
            self.representation.plane_channels,
            *[_SMOOTH_RESOLUTION] * 2,
            generator=generator,
        )
        image = F.interpolate(coarse, size=[self.config.plane_resolution] * 2, mode="bilinear").to(device)
        self.planes = prepare_planes(self.representation, self.representation.unpack(image))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.decoder = OSGDecoder(PLANE_FEATURES, PLANE_FEATURES, DecoderConfig(activation="none"))
        self.decoder.net[2].weight.data[0] *= _DENSITY_GAIN
        self.decoder = self.decoder.to(device)
        origins, directions = sample_rays(*camera_utils.split_label(orbit_labels(8)[:batch].to(device)), side)
        self.rays = origins.contiguous(), directions
        self.draws = RenderDraws.draw(directions, self.rendering, torch.Generator(device).manual_seed(0))

    def forward(self, render: Callable) -> torch.Tensor:
        """Render without gradients."""
        with torch.no_grad():
            return self._render(render, self.planes, *self.rays).features

    def gradients(self, render: Callable) -> torch.Tensor:
        """Render, and return the gradients of the planes; those of decoder and rays are computed, too."""
        leaves = [x.detach().requires_grad_() for x in (self.planes, *self.rays)]
        out = self._render(render, *leaves)
        total = out.features.square().sum() + out.depth.sum()
        return torch.autograd.grad(total, [*leaves, *self.decoder.parameters()])[0]

    def _render(self, render: Callable, planes: torch.Tensor, *rays: torch.Tensor):
        return render(self.representation, planes, self.decoder, *rays, self.rendering, self.draws)

    def grid(self, query: Callable) -> torch.Tensor:
        """Evaluate the density of the whole box."""
        densities = []
        device = self.planes.device
        with torch.no_grad():
            for _, points in shape_utils.voxel_grid_chunks(
                GRID_RESOLUTION, self.rendering.box_warp, GRID_CHUNK_POINTS, device
            ):
                batch = points.expand(self.batch, -1, -1)
                sigma, _ = query(self.representation, self.planes, self.decoder, batch, self.rendering)
                densities.append(sigma)
        return torch.cat(densities, dim=1)

    # ---- what it costs at least ----

    @property
    def num_ray_points(self) -> int:
        """Samples that are not cropped, estimated from evenly spaced ones."""
        rendering = self.rendering
        fractions = torch.linspace(0, 1, rendering.depth_resolution, device=self.planes.device)
        near, far = (2.25, 3.3) if rendering.auto_range else (rendering.ray_start, rendering.ray_end)
        depths = near + (far - near) * fractions
        origins, directions = self.rays
        points = origins.unsqueeze(2) + depths[:, None] * directions.unsqueeze(2)
        share = 1.0 if rendering.crop_margin is None else inside_crop(points, rendering).float().mean().item()
        samples = rendering.depth_resolution + rendering.depth_resolution_importance
        return int(share * samples * self.batch * self.side**2)

    def gflop(self, case: str) -> float:
        """Multiplications and additions of look-ups and decoder in 1e9, without elementwise functions."""
        look_up = 2 * _TAPS[self.config.representation] * PLANE_FEATURES
        hidden, density = 2 * PLANE_FEATURES * _HIDDEN, 2 * _HIDDEN
        forward = look_up + hidden + density
        if case == "grid":
            return 1e-9 * self.batch * GRID_RESOLUTION**3 * forward
        forward += 2 * _HIDDEN  # compositing
        if case == "gradients":
            # Forward; forward again; two products of the hidden layer; texels once for planes and once for positions.
            forward = 2 * forward + 2 * hidden + 2 * look_up + 3 * density
        return 1e-9 * self.num_ray_points * forward

    def gbyte(self, case: str) -> float:
        """Bytes that texels have when each is fetched once per use, in 1e9; caches serve most of them."""
        uses = {"forward": 1, "gradients": 5, "grid": 1}[case]  # backward: forward, positions, read and write of sums
        points = self.batch * GRID_RESOLUTION**3 if case == "grid" else self.num_ray_points
        return 1e-9 * uses * points * _TAPS[self.config.representation] * PLANE_FEATURES * 4


def make_actions(subject: Subject, case: str, compiled: bool) -> dict[str, Action]:
    """Return what to compare in a case."""
    if case == "grid":
        density_only = partial(query_field, need_colors=False)
        return {FUSED: partial(subject.grid, density_only), REFERENCE: partial(subject.grid, query_field_ref)}
    run = subject.forward if case == "forward" else subject.gradients
    actions = {FUSED: partial(run, volume_render), REFERENCE: partial(run, render_rays_ref)}
    if compiled:
        actions[COMPILED] = partial(run, torch.compile(render_rays_ref))
    return actions


@dataclasses.dataclass(frozen=True, kw_only=True)
class Peaks:
    """What the machine can do with the threads at hand."""

    gflop_per_s: float | None
    gbyte_per_s: float


HEADS = (
    "case, batch, rays, threads, variant, runs, s, min ... max, ratio, CPU s, CPU ratio, GFLOP/s, of peak, texel GB/s,"
    " extra MiB"
).split(", ")


def rows_of(
    case: str, subject: Subject, measurements: dict[str, Measurement], peaks: Peaks, threads: int
) -> list[list[str]]:
    """Return table rows of one comparison."""
    found = {name: measurement.to_json() for name, measurement in measurements.items()}
    rows = []
    for name, m in found.items():
        speed = subject.gflop(case) / m["median_s"]
        of_peak = "-" if peaks.gflop_per_s is None else f"{speed / peaks.gflop_per_s:.0%}"
        first = [case, str(subject.batch), f"{subject.side}^2", str(threads)] if name == FUSED else [""] * 4
        if case == "grid" and name == FUSED:
            first[2] = "-"
        ratios = [f"{m[key] / found[FUSED][key]:.1f}" for key in ("median_s", "median_cpu_s")]
        memory = "-" if m["extra_mib"] is None else f"{m['extra_mib']:.0f}"
        rows.append(
            [
                *[*first, name, str(len(m["seconds"])), f"{m['median_s']:.3f}"],
                *[f"{m['min_s']:.3f} ... {m['max_s']:.3f}", ratios[0], f"{m['median_cpu_s']:.3f}", ratios[1]],
                *[f"{speed:.0f}", of_peak, f"{subject.gbyte(case) / m['median_s']:.0f}", memory],
            ]
        )
    return rows


def run_case(
    case: str, subject: Subject, repeats: int, compiled: bool, device: torch.device
) -> tuple[dict[str, Measurement], float]:
    """Measure one case; returns the measurements and the largest relative difference of the results."""
    actions = make_actions(subject, case, compiled)
    runs = len(actions) * (2 + repeats)
    with tqdm(total=runs, desc=f"{case} {subject.batch} x {subject.side}^2", leave=False) as bar:
        return measure(actions, repeats, device, LONG_S, report=bar.update)


def _numbers(context: click.Context, parameter: click.Parameter, value: str) -> list[int]:
    try:
        numbers = [int(text) for text in value.split(",")]
    except ValueError:
        numbers = [0]
    if min(numbers) < 1:
        raise click.BadParameter(f"expected positive numbers such as 1,4; came {value!r}")
    return numbers


@click.command()
@cli.option("--config", default="spherehead", help="Preset with the sizes of planes and rays.")
@cli.option("--cases", default="forward,gradients,grid", help="Some of forward, gradients, grid.")
@cli.option("--batch", default="1,4", callback=_numbers, help="Scenes at a time.")
@cli.option("--side", default="64", callback=_numbers, help="Rays along the side of an image.")
@cli.option("--threads", default="1,2", callback=_numbers, help="CPU threads, one after the other.")
@cli.option("--repeats", type=cli.POSITIVE_INT, default=5, help="Timed runs of each.")
@cli.option("--compile", "compiled", is_flag=True, help="Also the reference under torch.compile.")
@cli.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Also write everything to this JSON file.")
@cli.device_option()
@cli.cli_errors()
def benchmark(
    config: str,
    cases: str,
    batch: list[int],
    side: list[int],
    threads: list[int],
    repeats: int,
    compiled: bool,
    out: Path | None,
    device: str,
) -> None:
    """Time fused op and reference in turns, and print a table."""
    resolved = resolve_device(device)
    chosen = [name.strip() for name in cases.split(",")]
    unknown = set(chosen) - {"forward", "gradients", "grid"}
    if unknown:
        raise click.BadParameter(f"--cases: expected some of forward,gradients,grid; came {sorted(unknown)[0]!r}")
    if native.load() is None:
        raise click.ClickException(f"there is nothing to compare: {native.reason()}")
    rows, results, worst = [HEADS], [], 0.0
    machine: dict[str, Any] = environment(resolved) | {"load_before": os.getloadavg()[0], "peaks": {}}
    for num_threads in threads if resolved.type == "cpu" else [torch.get_num_threads()]:
        torch.set_num_threads(num_threads)
        peaks = Peaks(gflop_per_s=None, gbyte_per_s=memory_gbytes_per_s(resolved))
        if resolved.type == "cpu":
            peaks = dataclasses.replace(peaks, gflop_per_s=fma_gflops(num_threads))
        machine["peaks"][num_threads] = dataclasses.asdict(peaks)
        for case, scenes, rays in product(chosen, batch, side):
            if case == "grid" and (scenes, rays) != (batch[0], side[0]):
                continue  # it has neither rays nor anything that a batch changes
            subject = Subject(config, scenes, rays, resolved)
            measurements, difference = run_case(case, subject, repeats, compiled, resolved)
            worst = max(worst, difference)
            rows += rows_of(case, subject, measurements, peaks, num_threads)
            found = {name: measurement.to_json() for name, measurement in measurements.items()}
            results.append({"case": case, "batch": scenes, "side": rays, "threads": num_threads, "variants": found})
    machine["load_after"] = os.getloadavg()[0]
    click.echo(f"{json.dumps(machine)}\n\n{markdown_table(rows)}\n\nThe variants differ by at most {worst:.1e}.")
    if out is not None:
        with atomic_write(out, "w") as file:
            json.dump({"environment": machine, "results": results}, file, indent=2, allow_nan=False)


if __name__ == "__main__":
    benchmark()
