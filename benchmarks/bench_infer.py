"""Time inference stage by stage: native kernels and reuse against plain PyTorch that computes every view from scratch.

    python benchmarks/bench_infer.py --config spherehead --out spherehead.json
    python benchmarks/bench_infer.py --config debug --quick
    python benchmarks/bench_infer.py --stages image,strip --glibc-tunables

Method and meaning of the columns: benchmarks/README.md.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs as a script, too

import camera_utils
import shape_utils
from benchmarks.measure import (
    Action,
    Measurement,
    environment,
    markdown_table,
    measure,
    memory_and_kernels,
    restart_with_glibc_tunables,
    write_report,
)
from dnnlib import cli
from inference.loading import load_generator
from inference.sampling import make_head, orbit_labels, strip_labels
from inference.shapes import ShapeSettings
from torch_utils.distributed import resolve_device
from training.networks_stylegan2 import SynthesisOptions
from training.presets import GENERATOR_PRESETS
from training.representations import PLANE_FEATURES
from training.triplane import RadianceField, TriPlaneGenerator

ORBIT_FRAMES = 24
GRID_RESOLUTION = 128
PUBLISHED_CHUNK_POINTS = 1_000_000
"""Points for which the published code computes mapping and planes anew."""
LONG_S = 30.0
"""Stages that take longer run once."""
OURS, SCRATCH = "ours", "reference"
_CONST = SynthesisOptions(noise_mode="const")
_SEED = 0
_UNTIMED_RUNS = 2  # of `measure`


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """What is measured."""

    title: str
    actions: dict[str, Action]
    """By variant."""
    weight: float = 0.5
    """Rough cost, in images; for the estimate of the time left."""


class Subject:
    """A generator and everything that its stages take as input.

    Actions take `ours`, which tells the two variants apart. Ours: native kernels, memory of freed tensors kept, plane
    projections folded into the backbone, w-layers, planes and background once per head. Otherwise the reference
    renderer and plain PyTorch with its own allocator, which compute everything for every view.
    """

    def __init__(self, generator: TriPlaneGenerator) -> None:
        self.generator = generator
        self.device = device = next(generator.parameters()).device
        self.strip, self.orbit = strip_labels(generator).to(device), orbit_labels(ORBIT_FRAMES).to(device)
        self.ws = make_head(generator, _SEED).ws
        with self.variant(ours=True):
            self.field = self._make_field()
        self.backbone_image = generator.backbone.synthesis(self.ws, _CONST)
        resolution = generator.neural_rendering_resolution
        self.rays = generator.ray_sampler(*camera_utils.split_label(self.strip[:1]), resolution)
        self.features = torch.randn(1, PLANE_FEATURES, resolution, resolution, device=device)

    @contextlib.contextmanager
    def variant(self, ours: bool) -> Iterator[None]:
        """Compute in one of the two ways while the body runs."""
        self.generator.fold_projections = ours
        self.generator.renderer.choose("auto" if ours else "reference", self.device)
        with memory_and_kernels(ours):
            yield

    def map(self, ours: bool) -> torch.Tensor:
        """Latent to w-layers."""
        with self.variant(ours):
            return make_head(self.generator, _SEED).ws

    def synthesize_backbone(self, ours: bool) -> torch.Tensor:
        """W-layers to the backbone's image, without folded projections."""
        with self.variant(ours):
            return self.generator.backbone.synthesis(self.ws, _CONST)

    def make_planes(self, ours: bool) -> torch.Tensor:
        """W-layers to planes."""
        with self.variant(ours):
            return self._make_field().planes

    def _make_field(self) -> RadianceField:
        return self.generator.radiance_field(self.ws, options=_CONST)

    def synthesize_background(self, ours: bool) -> torch.Tensor:
        """W-layers to background features."""
        network, planes = self.generator.bcg_synthesis, self.field.planes
        with self.variant(ours):
            return RadianceField(self.ws, planes, self.ws, network, _CONST).background

    def project(self, ours: bool) -> torch.Tensor:
        """Backbone image to planes."""
        with self.variant(ours):
            return torch.cat([projection(self.backbone_image) for projection in self.generator.projections], dim=1)

    def render_rays(self, ours: bool) -> torch.Tensor:
        """Planes to feature image."""
        renderer, decoder, config = self.generator.renderer, self.generator.decoder, self.generator.config.rendering
        jitter = torch.Generator(self.device).manual_seed(_SEED)
        with self.variant(ours):
            return renderer(self.field.planes, decoder, *self.rays, config, generator=jitter).features

    def superresolve(self, ours: bool) -> torch.Tensor:
        """Feature image to image."""
        options = SynthesisOptions(noise_mode=self.generator.config.superresolution.noise_mode)
        with self.variant(ours):
            return self.generator.superresolution(self.features[:, :3], self.features, self.ws, options).image

    def render_views(self, labels: torch.Tensor, ours: bool) -> torch.Tensor:
        """Latent to views of one head, of which the last is returned."""
        with self.variant(ours):
            head = make_head(self.generator, _SEED)
            for view, label in enumerate(labels):
                if view > 0 and not ours:
                    head = make_head(self.generator, _SEED)
                image = head.render(label)["image"]
        return image

    def sample_grid(self, ours: bool) -> torch.Tensor:
        """Latent to densities over the whole box; planes are computed once, or for every published chunk."""
        side = self.generator.config.rendering.box_warp
        densities = []
        with self.variant(ours):
            head = make_head(self.generator, _SEED)
            chunks = shape_utils.voxel_grid_chunks(GRID_RESOLUTION, side, PUBLISHED_CHUNK_POINTS, self.device)
            for run, points in chunks:
                if run.start > 0 and not ours:
                    head = make_head(self.generator, _SEED)
                for part in points.split(ShapeSettings.chunk_points):
                    densities.append(self.generator.query_density(head.field, part.unsqueeze(0))[0])
        return torch.cat(densities)


def make_stages(subject: Subject) -> dict[str, Stage]:
    """Return the stages that the generator has, by the names that `--stages` takes."""

    def both(action: Callable[..., torch.Tensor], *args: Any) -> dict[str, Action]:
        return {OURS: partial(action, *args, ours=True), SCRATCH: partial(action, *args, ours=False)}

    generator, strip, orbit = subject.generator, subject.strip, subject.orbit
    stages = {
        "mapping": Stage(title="mapping", actions=both(subject.map)),
        "backbone": Stage(title="backbone", actions=both(subject.synthesize_backbone)),
        "projection": Stage(title="plane projection", actions=both(subject.project)),
        "planes": Stage(title="backbone + projection", actions=both(subject.make_planes)),
        "background": Stage(title="background", actions=both(subject.synthesize_background)),
        "renderer": Stage(title="volume renderer", actions=both(subject.render_rays)),
        "superresolution": Stage(title="super-resolution", actions=both(subject.superresolve)),
        "image": Stage(title="whole image", actions=both(subject.render_views, strip[:1]), weight=1),
        "strip": Stage(title=f"{len(strip)}-view strip", actions=both(subject.render_views, strip), weight=len(strip)),
        "orbit": Stage(title=f"{len(orbit)}-frame orbit", actions=both(subject.render_views, orbit), weight=len(orbit)),
        "grid": Stage(title=f"{GRID_RESOLUTION}^3 density grid", actions=both(subject.sample_grid), weight=2),
    }
    absent = [] if generator.projections else ["projection", "planes"]
    absent += [] if generator.bcg_synthesis is not None else ["background"]
    return {name: stage for name, stage in stages.items() if name not in absent}


def run_stages(stages: dict[str, Stage], repeats: int, device: torch.device, title: str) -> dict[str, Any]:
    """Measure stages one after the other; returns the `results` of the JSON file."""
    results = {}
    # The first measurement loads libraries, which else would count as memory of the first stage.
    measure({OURS: lambda: torch.ones(1, device=device)}, 1, device, LONG_S, report=lambda: None)
    total = sum(stage.weight * len(stage.actions) * (_UNTIMED_RUNS + repeats) for stage in stages.values())
    with tqdm(total=total, desc=title, bar_format="{l_bar}{bar}| {elapsed}<{remaining}{postfix}") as bar:
        done = 0.0
        for name, stage in stages.items():
            bar.set_postfix_str(name)
            done += stage.weight * len(stage.actions) * (_UNTIMED_RUNS + repeats)
            measurements, difference = measure(
                stage.actions, repeats, device, LONG_S, report=partial(bar.update, stage.weight)
            )
            bar.total += bar.n - done  # long stages have fewer runs
            done = bar.n
            results[name] = _result(stage, measurements, difference)
    return results


def _result(stage: Stage, measurements: dict[str, Measurement], difference: float) -> dict[str, Any]:
    variants = {variant: measurement.to_json() for variant, measurement in measurements.items()}
    return {
        "title": stage.title,
        "variants": variants,
        "ratio": variants[SCRATCH]["median_s"] / variants[OURS]["median_s"],
        "cpu_ratio": variants[SCRATCH]["median_cpu_s"] / variants[OURS]["median_cpu_s"],
        "difference": difference,
    }


def results_table(results: dict[str, Any]) -> str:
    """Return the results as a Markdown table."""
    heads = "stage, variant, runs, s, min ... max, ratio, CPU s, CPU ratio, GFLOP, GFLOP/s, peak MiB, extra MiB"
    rows = [heads.split(", ")]
    for result in results.values():
        # Native kernels cannot be counted from outside: both variants do the work of the plain one, each in its way.
        gflop = result["variants"][SCRATCH]["gflop"]
        for variant, m in result["variants"].items():
            ratios = [f"{result[key]:.2f}" if variant == OURS else "" for key in ("ratio", "cpu_ratio")]
            first = [result["title"] if variant == OURS else "", variant, str(len(m["seconds"]))]
            times = [f"{m['median_s']:.3f}", f"{m['min_s']:.3f} ... {m['max_s']:.3f}", f"{m['median_cpu_s']:.3f}"]
            work = [f"{gflop:.1f}" if variant == SCRATCH else "", f"{gflop / m['median_s']:.0f}"]
            memory = ["-" if m[key] is None else f"{m[key]:.0f}" for key in ("peak_mib", "extra_mib")]
            rows.append([*first, *times[:2], ratios[0], times[2], ratios[1], *work, *memory])
    return markdown_table(rows)


def choose_stages(stages: dict[str, Stage], names: str | None) -> dict[str, Stage]:
    """Return the stages of a comma-separated list, all for None."""
    chosen = list(stages) if names is None else [name.strip() for name in names.split(",")]
    unknown = [name for name in chosen if name not in stages]
    if unknown:
        raise click.BadParameter(f"--stages: expected some of {','.join(stages)}; came {unknown[0]!r}")
    return {name: stages[name] for name in chosen}


@click.command()
@cli.option(
    "--config", type=click.Choice(list(GENERATOR_PRESETS)), default="spherehead", help="Preset to build, untrained."
)
@cli.option("--repeats", type=cli.POSITIVE_INT, default=3, help="Timed runs of each stage and variant.")
@cli.option("--quick", is_flag=True, help="One timed run each.")
@cli.option("--stages", metavar="NAME,...", help="Some stages, such as planes,strip; all if not given.")
@cli.option("--nrr", type=cli.POSITIVE_INT, help="Neural rendering resolution; the preset's own if not given.")
@cli.option("--threads", type=cli.POSITIVE_INT, help="CPU threads; PyTorch's choice if not given.")
@cli.option("--glibc-tunables", is_flag=True, help="Let glibc keep large blocks, too: a stronger plain PyTorch.")
@cli.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Also write everything to this JSON file.")
@cli.device_option()
@cli.cli_errors()
@torch.no_grad()
def benchmark(
    config: str,
    repeats: int,
    quick: bool,
    stages: str | None,
    nrr: int | None,
    threads: int | None,
    glibc_tunables: bool,
    out: Path | None,
    device: str,
) -> None:
    """Time the stages of inference, ours and plain, and print a table."""
    if glibc_tunables:
        restart_with_glibc_tunables()
    if threads is not None:
        torch.set_num_threads(threads)
    resolved = resolve_device(device)
    generator = load_generator(f"init:{config}", resolved)
    generator.neural_rendering_resolution = nrr or generator.neural_rendering_resolution
    chosen = choose_stages(make_stages(Subject(generator)), stages)
    settings = {"config": config, "nrr": generator.neural_rendering_resolution, "repeats": 1 if quick else repeats}
    machine = environment(resolved) | {"load_before": os.getloadavg()[0]}
    machine["glibc_tunables"] = os.environ.get("GLIBC_TUNABLES", "")
    results = run_stages(chosen, settings["repeats"], resolved, config)
    machine["load_after"] = os.getloadavg()[0]
    click.echo(f"{json.dumps(settings | machine)}\n\n{results_table(results)}\n")
    worst = max((result["difference"] or 0 for result in results.values()), default=0)
    click.echo(f"The two variants differ by at most {worst:.1e}.")
    if out is not None:
        write_report(out, settings, machine, results)


if __name__ == "__main__":
    benchmark()
