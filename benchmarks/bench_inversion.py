"""Time the steps of an inversion: ours against the plain way, with a table of where our time goes.

    python benchmarks/bench_inversion.py --json inversion.json
    python benchmarks/bench_inversion.py --config debug --quick
    python benchmarks/bench_inversion.py --stages tuning --glibc-tunables

Method and meaning of the columns: benchmarks/README.md.
"""

from __future__ import annotations

import copy
import json
import os
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs as a script, too

from benchmarks.inversion_clock import SECTIONS, instrumented
from benchmarks.measure import (
    environment,
    markdown_table,
    measure,
    memory_and_kernels,
    restart_with_glibc_tunables,
    write_report,
)
from benchmarks.operation_counts import counted, flop_counter
from benchmarks.peaks import fma_gflops
from benchmarks.step_clock import StepClock
from dnnlib import cli
from inference.inversion import InversionSettings, PivotalTuning, Projection, ProjectionSettings
from inference.inversion_generator import with_ray_start
from inference.inversion_stepper import Stepper
from inference.loading import load_generator
from inference.photos import Photo
from inference.sampling import make_head, orbit_labels
from torch_utils.distributed import resolve_device
from torch_utils.rng import derive_seed
from training.perceptual import PerceptualDistance, load_perceptual_distance
from training.presets import GENERATOR_PRESETS
from training.triplane import TriPlaneGenerator

STAGES = ("projection", "tuning")
OURS, PLAIN = "ours", "plain"
LONG_S = 120.0
"""Stages with a step that takes longer are measured once."""
PUBLISHED_COPY_STEPS = 10
"""Steps of pivotal tuning between two copies of the network that the published code keeps."""
_PHOTO_SEED = 1
_UNTIMED_STEPS = 2  # of `measure`
# Without noise on w both ways do the same; it costs nothing.
_SETTINGS = InversionSettings(projection=ProjectionSettings(w_noise=0.0))


class PlainStage:
    """A stage as the published projector does it, in plain PyTorch.

    Every step computes everything between latent and image with plain layers and the reference renderer. In stage 2 the
    whole network is copied, in training mode; each of its parameters requires a gradient; and every tenth step leaves a
    copy of the network behind. Features of the photo are computed once, as in the published code.
    """

    def __init__(
        self, stage: str, generator: TriPlaneGenerator, photo: Photo, distance: PerceptualDistance, ws: torch.Tensor
    ) -> None:
        self.is_tuning = stage == "tuning"
        self._photo, self._distance = photo, distance
        self._random = torch.Generator(device=ws.device)
        self.network = copy.deepcopy(generator)
        self.network.fold_projections = False
        self.network.config = with_ray_start(generator.config, None)
        self.network.renderer.choose("reference", ws.device)
        if self.is_tuning:
            self.network.train().requires_grad_(True)
        self._ws = ws.clone().requires_grad_(not self.is_tuning)
        self._mean_w = ws.clone()
        chosen = _SETTINGS.tuning if self.is_tuning else _SETTINGS.projection
        self._mse_weight, self._perceptual_weight = chosen.mse_weight, chosen.perceptual_weight
        unknowns = list(self.network.parameters()) if self.is_tuning else [self._ws]
        self._optimizer = torch.optim.Adam(unknowns, lr=chosen.learning_rate)
        self._copies: list[TriPlaneGenerator] = []
        self._num_steps = 0
        with torch.no_grad():
            self._features = distance.features(photo.image)

    def step(self, seed: int) -> torch.Tensor:
        """Do a step with a seed of the jitter along rays; return its loss."""
        self._random.manual_seed(seed)
        rendered = self.network.synthesis(self._ws, self._photo.label, noise_mode="const", generator=self._random)
        image = rendered["image"]
        loss = self._mse_weight * (image - self._photo.image).square().mean()
        loss = loss + self._perceptual_weight * self._distance.distance(image, self._features).mean()
        if not self.is_tuning:
            loss = loss + _SETTINGS.projection.w_norm_weight * (self._ws - self._mean_w).square().mean()
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self._optimizer.step()
        if self.is_tuning and self._num_steps % PUBLISHED_COPY_STEPS == 0:
            self._copies.append(copy.deepcopy(self.network).cpu())
        self._num_steps += 1
        return loss.detach()


class Subject:
    """One stage in both ways, on the same photo and from the same latent.

    The photo is another head that the network makes. Learning rates stay at those of the first step.
    """

    def __init__(self, stage: str, generator: TriPlaneGenerator, distance: PerceptualDistance) -> None:
        device = next(generator.parameters()).device
        label = orbit_labels(8)[1:2].to(device)
        image = make_head(generator, _PHOTO_SEED).render(label)["image"].clamp(-1, 1)
        photo = Photo(name="head", image=image, label=label, mask=None)
        self.ours: Stepper = Projection(generator, photo, distance, _SETTINGS)
        ws = self.ours.ws.clone()
        if stage == "tuning":
            self.ours = PivotalTuning(generator, photo, distance, _SETTINGS, ws, label)
        self._plain = PlainStage(stage, generator, photo, distance, ws)
        self._stage, self._num_plain_steps = stage, 0

    @property
    def network_mib(self) -> float:
        """Size of the network, which is that of a copy."""
        tensors = self._plain.network.state_dict().values()
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors) / 2**20

    def step_ours(self) -> torch.Tensor:
        """Take a step in our way; return its loss."""
        with memory_and_kernels(ours=True):
            return torch.tensor(self.ours.step()["loss"])

    def step_plain(self) -> torch.Tensor:
        """Take a step in the plain way, with the random numbers of ours; return its loss."""
        jitter = derive_seed(_SETTINGS.seed, STAGES.index(self._stage) + 1, self._num_plain_steps, 0)
        self._num_plain_steps += 1
        with memory_and_kernels(ours=False):
            return self._plain.step(jitter)


def where_time_goes(step: Callable[[], Any], repeats: int, device: torch.device) -> dict[str, float]:
    """Return the seconds of each part of a step, medians of some steps."""
    clock, steps = StepClock(device), []
    for _ in range(repeats):
        with instrumented(clock):
            clock.begin()
            step()
            steps.append(clock.times()[0])
    return {name: statistics.median(step.get(name, 0.0) for step in steps) for name in SECTIONS}


def run_stage(
    stage: str,
    generator: TriPlaneGenerator,
    distance: PerceptualDistance,
    repeats: int,
    gflops: float | None,
    report: Callable[[], Any],
) -> dict[str, Any]:
    """Measure one stage; returns an entry of the `results` of the JSON file."""
    device = next(generator.parameters()).device
    subject = Subject(stage, generator, distance)
    actions = {OURS: subject.step_ours, PLAIN: subject.step_plain}
    measurements, difference = measure(actions, repeats, device, LONG_S, report)
    variants = {name: measurement.to_json() for name, measurement in measurements.items()}
    ours, plain = variants[OURS], variants[PLAIN]
    pairs = [before / own for before, own in zip(plain["seconds"], ours["seconds"])]
    sections = where_time_goes(subject.step_ours, repeats, device)
    with flop_counter() as counter:
        subject.step_ours()
    work = counted(counter)
    return {
        "variants": variants,
        "ratio": plain["median_s"] / ours["median_s"],
        "ratio_spread": [min(pairs), max(pairs)],
        "cpu_ratio": plain["median_cpu_s"] / ours["median_cpu_s"],
        "first_loss_difference": difference,
        "sections_s": sections,
        "gflop": work,
        "bound_s": None if gflops is None else sum(work.values()) / gflops,
        "network_mib": subject.network_mib,
    }


def results_table(results: dict[str, Any]) -> str:
    """Return the results as a Markdown table."""
    heads = "stage, variant, runs, s/step, min ... max, ratio, spread, CPU s, CPU ratio, peak MiB, extra MiB, bound s"
    rows = [heads.split(", ")]
    for stage, result in results.items():
        low, high = result["ratio_spread"]
        for name, m in result["variants"].items():
            is_ours = name == OURS
            first = [stage if is_ours else "", name, str(len(m["seconds"]))]
            times = [f"{m['median_s']:.3f}", f"{m['min_s']:.3f} ... {m['max_s']:.3f}"]
            ratio = [f"{result['ratio']:.2f}", f"{low:.2f} ... {high:.2f}"] if is_ours else ["", ""]
            cpu = [f"{m['median_cpu_s']:.3f}", f"{result['cpu_ratio']:.2f}" if is_ours else ""]
            memory = ["-" if m[key] is None else f"{m[key]:.0f}" for key in ("peak_mib", "extra_mib")]
            bound = f"{result['bound_s']:.3f}" if is_ours and result["bound_s"] is not None else ""
            rows.append([*first, *times, *ratio, *cpu, *memory, bound])
    return markdown_table(rows)


def sections_table(results: dict[str, Any]) -> str:
    """Return where the time of our steps goes, as a Markdown table of seconds."""
    rows = [["part", *results]]
    for name in SECTIONS:
        rows.append([name, *(f"{result['sections_s'][name]:.3f}" for result in results.values())])
    return markdown_table(rows)


@click.command()
@cli.option(
    "--config", type=click.Choice(list(GENERATOR_PRESETS)), default="spherehead", help="Preset to build, untrained."
)
@cli.option("--stages", type=click.Choice(STAGES), multiple=True, default=STAGES, help="What to time.")
@cli.option("--vgg", help="TorchScript file of the perceptual distance; without it the one that needs none.")
@cli.option("--repeats", type=cli.POSITIVE_INT, default=3, help="Timed steps of each stage and variant.")
@cli.option("--quick", is_flag=True, help="One timed step each.")
@cli.option("--threads", type=cli.POSITIVE_INT, help="CPU threads; PyTorch's choice if not given.")
@cli.option("--glibc-tunables", is_flag=True, help="Let glibc keep large blocks, too: a stronger plain PyTorch.")
@cli.option("--json", "--out", "out", type=click.Path(dir_okay=False, path_type=Path), help="Also write this file.")
@cli.device_option()
@cli.cli_errors()
def benchmark(
    config: str,
    stages: tuple[str, ...],
    vgg: str | None,
    repeats: int,
    quick: bool,
    threads: int | None,
    glibc_tunables: bool,
    out: Path | None,
    device: str,
) -> None:
    """Time the steps of both stages of an inversion, ours and plain, and print tables."""
    if glibc_tunables:
        restart_with_glibc_tunables()
    if threads is not None:
        torch.set_num_threads(threads)
    resolved, repeats = resolve_device(device), 1 if quick else repeats
    generator = load_generator(f"init:{config}", resolved)
    distance = load_perceptual_distance(vgg, resolved)
    gflops = fma_gflops(torch.get_num_threads()) if resolved.type == "cpu" else None
    settings = {"config": config, "distance": distance.name, "repeats": repeats}
    machine = environment(resolved) | {"load_before": os.getloadavg()[0], "peak_gflop_per_s": gflops}
    machine["glibc_tunables"] = os.environ.get("GLIBC_TUNABLES", "")
    results = {}
    with tqdm(total=2 * len(stages) * (_UNTIMED_STEPS + repeats), desc=config, unit="step") as bar:
        for stage in stages:
            bar.set_postfix_str(stage)
            results[stage] = run_stage(stage, generator, distance, repeats, gflops, partial(bar.update, 1))
    machine["load_after"] = os.getloadavg()[0]
    click.echo(f"{json.dumps(settings | machine)}\n\n{results_table(results)}\n\n{sections_table(results)}\n")
    worst = max(result["first_loss_difference"] for result in results.values())
    click.echo(f"The losses of the first steps differ by at most {worst:.1e}.")
    if "tuning" in results:
        mib = results["tuning"]["network_mib"]
        click.echo(f"The plain way keeps another {mib:.0f} MiB for every {PUBLISHED_COPY_STEPS} steps of tuning.")
    if out is not None:
        write_report(out, settings, machine, results)


if __name__ == "__main__":
    benchmark()
