"""Time training steps and their parts: fused renderer against the reference, compiled or not, memory kept or not.

    python benchmarks/bench_train_step.py --config medium --json medium.json
    python benchmarks/bench_train_step.py --config demo --variants reference,fused --quick
    python benchmarks/bench_train_step.py --config medium --variants plain,fused --glibc-tunables

Method and meaning of the columns: benchmarks/README.md.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

import click
import psutil
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs as a script, too

from benchmarks.measure import GLIBC_TUNABLES, environment, markdown_table, peak_memory, write_report
from benchmarks.operation_counts import counted, flop_counter
from benchmarks.peaks import fma_gflops
from benchmarks.step_clock import SECTIONS, StepClock, instrumented
from benchmarks.train_setups import CONFIG_NAMES, START_KIMG, Variant, images_per_step, make_config
from dnnlib import cli
from torch_utils import gradients
from torch_utils.distributed import resolve_device
from training.data_loader import BatchLoader
from training.dataset import HeadDataset
from training.run_log import RunLog
from training.training_loop import Trainer, TrainRequest

DEFAULT_VARIANTS = "reference,reference+compile,reference+free,plain,fused,fused+compile,fused+free"
_UNTIMED_STEPS = 2
_MIB = 2**20


# ---- in a process of its own: one variant ----


class Subject:
    """A trainer, its data, and a clock on it."""

    def __init__(self, config_name: str, variant: Variant, folder: Path, device: torch.device) -> None:
        self.base_mib = psutil.Process().memory_info().rss / _MIB
        config = make_config(config_name, folder, variant)
        renderer = "reference" if variant.renderer == "plain" else variant.renderer
        dataset = HeadDataset(config.data)
        request = TrainRequest(config=config, dataset=dataset, run_dir=folder, device=device, renderer=renderer)
        self.trainer = Trainer(request, RunLog(folder, is_main=False))
        self.device, self.clock = device, StepClock(device)
        # All phases are due at multiples of this; the clock weighs them by how often they are.
        self.stride = config.loop.batch_size * max(phase.interval for phase in self.trainer.phases)
        self.next_nimg = START_KIMG * 1000 // self.stride * self.stride
        plan, seed = self.trainer.plan, config.loop.seed
        self.loader = BatchLoader(self.trainer.dataset, plan, seed, 0, config.loop.workers, device)

    def step(self) -> dict[str, Any]:
        """Take a training step; return its seconds by section and its processor seconds."""
        self.trainer.progress.cur_nimg = self.next_nimg
        self.next_nimg += self.stride
        with instrumented(self.clock):
            self.clock.begin()
            with self.clock.section("data"):
                batch = next(self.loader)
            self.trainer.step(batch)
            sections, cpu_s = self.clock.times()
        return {"sections": sections, "cpu_s": cpu_s}

    def first_step(self, count: bool) -> dict[str, Any]:
        """Take the first step; return what it computed, and its operations in 1e9."""
        seen: dict[str, Any] = {"gflop": {"networks": 0.0, "renderer": 0.0}}
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._noting_gradients(seen))
            if count:
                stack.enter_context(self._counting(seen["gflop"]))
            self.step()
        seen["loss"] = self.trainer.stats.reduce()["Loss/G/loss"].mean
        return seen

    def memory(self) -> dict[str, float | None]:
        """Take a step; return the highest memory of this process during it, and the part of it since the imports."""
        with peak_memory(self.device) as memory:
            self.step()
        if self.device.type == "cpu" and memory["peak_mib"] is not None:
            memory["extra_mib"] = memory["peak_mib"] - self.base_mib  # weights and optimiser, too
        return memory

    @contextlib.contextmanager
    def _noting_gradients(self, seen: dict[str, Any]) -> Iterator[None]:
        """Note the norm of the generator's first gradient."""
        original = gradients.step_if_finite

        def noted(optimizer: torch.optim.Optimizer, finite: torch.Tensor) -> None:
            if "gradient" not in seen:
                grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
                seen["gradient"] = float(torch.stack(torch._foreach_norm(grads)).norm())
            original(optimizer, finite)

        with mock.patch.object(gradients, "step_if_finite", noted):
            yield

    @contextlib.contextmanager
    def _counting(self, gflop: dict[str, float]) -> Iterator[None]:
        """Add up the operations of the phases, each times how often it is due."""
        original = self.trainer.run_phase
        with flop_counter() as counter:

            def run_phase(number: int, phase: Any, *rest: Any) -> None:
                before = counted(counter)
                original(number, phase, *rest)
                for part, value in counted(counter).items():
                    gflop[part] += (value - before[part]) / phase.interval

            with mock.patch.object(self.trainer, "run_phase", run_phase):
                yield


def serve(connection: Connection, config_name: str, variant: Variant, folder: str, device: str, threads: int) -> None:
    """Prepare a variant and take steps when asked, until None is asked for; errors are sent as a line."""
    try:
        torch.set_num_threads(threads)
        start_s = time.perf_counter()
        subject = Subject(config_name, variant, Path(folder), torch.device(device))
        first = subject.first_step(count=not variant.compile)
        connection.send({"prepare_s": time.perf_counter() - start_s, **first, **subject.memory()})
        while connection.recv() is not None:
            connection.send(subject.step())
    except Exception as error:
        line = next(iter(str(error).splitlines()), "")
        connection.send({"error": f"{type(error).__name__}: {line}"})


# ---- in the main process: all variants in turns ----


class Worker:
    """A process that trains one variant."""

    def __init__(self, config_name: str, variant: Variant, folder: Path, device: torch.device, threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        arguments = (theirs, config_name, variant, str(folder), str(device), threads)
        self._process = context.Process(target=serve, args=arguments, daemon=True)
        with mock.patch.dict(os.environ, variant_environment(variant)):
            self._process.start()
        theirs.close()
        self.prepared = self._receive()

    def step(self) -> dict[str, Any]:
        """Let it take a step."""
        self._connection.send("step")
        return self._receive()

    def close(self) -> None:
        """End the process."""
        with contextlib.suppress(OSError):
            self._connection.send(None)
        self._process.join(10)
        self._process.kill()

    def _receive(self) -> dict[str, Any]:
        try:
            return self._connection.recv()
        except EOFError:
            self._process.join()
            return {"error": f"the process ended with code {self._process.exitcode}"}


def variant_environment(variant: Variant) -> dict[str, str]:
    """Return the environment variables that a process of a variant is started with."""
    values = {"SPHEREHEAD_KEEP_MEMORY": "1" if variant.memory == "keep" else "0"}
    values["GLIBC_TUNABLES"] = GLIBC_TUNABLES if variant.memory == "glibc" else ""
    if variant.renderer == "plain":
        values["SPHEREHEAD_NATIVE"] = "0"
    return values


def run_variants(
    config_name: str, variants: dict[str, Variant], repeats: int, device: torch.device, threads: int
) -> dict[str, dict[str, Any]]:
    """Measure variants in turns; returns the `results` of the JSON file."""
    results: dict[str, dict[str, Any]] = {}
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        bar = stack.enter_context(tqdm(total=len(variants) * (1 + repeats), desc=config_name))
        workers = {}
        for name, variant in variants.items():
            bar.set_postfix_str(name)
            workers[name] = worker = Worker(config_name, variant, folder, device, threads)
            stack.callback(worker.close)
            results[name] = {**worker.prepared, "steps": []}
            bar.update()
        for _ in range(repeats):
            for name, worker in workers.items():
                bar.set_postfix_str(name)
                if "error" not in results[name]:
                    step = worker.step()
                    results[name] |= {"error": step["error"]} if "error" in step else {}
                    results[name]["steps"] += [] if "error" in step else [step]
                bar.update()
    return results


def summarise(results: dict[str, dict[str, Any]], batch_size: int, gflops: float | None) -> None:
    """Add to results what follows from the steps; ratios are to the first variant that worked."""
    worked = {name: result for name, result in results.items() if "error" not in result}
    base = next(iter(worked.values()), None)
    work = choose_work(worked)
    for result in worked.values():
        per_kimg = 1000 / batch_size
        seconds = [per_kimg * sum(step["sections"].values()) for step in result["steps"]]
        cpu_s = [per_kimg * step["cpu_s"] for step in result["steps"]]
        result["s_per_kimg"], result["cpu_s_per_kimg"] = seconds, cpu_s
        result["median_s_per_kimg"] = statistics.median(seconds)
        result["median_cpu_s_per_kimg"] = statistics.median(cpu_s)
        result["sections_s_per_kimg"] = {
            name: per_kimg * statistics.median(step["sections"][name] for step in result["steps"]) for name in SECTIONS
        }
        pairs = [before / own for before, own in zip(base["s_per_kimg"], seconds)]
        result["ratio"] = base["median_s_per_kimg"] / result["median_s_per_kimg"]
        result["ratio_spread"] = [min(pairs), max(pairs)]
        result["cpu_ratio"] = base["median_cpu_s_per_kimg"] / result["median_cpu_s_per_kimg"]
        known = result["peak_mib"] is not None and base["peak_mib"] is not None
        result["peak_ratio"] = result["peak_mib"] / base["peak_mib"] if known else None
        result["difference"] = max(abs(result[key] / base[key] - 1) for key in ("loss", "gradient"))
        result["bound_s_per_kimg"] = None if gflops is None else per_kimg * sum(work.values()) / gflops


def choose_work(worked: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Return the operations of a step in 1e9: counted with the fused renderer where it ran, which has a formula."""
    counts = [result["gflop"] for result in worked.values() if result["gflop"]["networks"] > 0]
    with_renderer = [count for count in counts if count["renderer"] > 0]
    return next(iter([*with_renderer, *counts]), {"networks": 0.0, "renderer": 0.0})


def results_table(results: dict[str, dict[str, Any]]) -> str:
    """Return the results as a Markdown table, in seconds per thousand images."""
    heads = ["variant", "runs", "start s", "s/kimg", "ratio", "spread", "CPU s", "CPU ratio", *SECTIONS]
    rows = [[*heads, "peak MiB", "extra MiB", "of peak", "bound", "of bound"]]
    for name, result in results.items():
        if "error" in result:
            rows.append([name, "0", "", result["error"], *[""] * (len(rows[0]) - 4)])
            continue
        seconds, bound = result["median_s_per_kimg"], result["bound_s_per_kimg"]
        low, high = result["ratio_spread"]
        first = [name, str(len(result["steps"])), f"{result['prepare_s']:.0f}", f"{seconds:.0f}"]
        first += [f"{result['ratio']:.2f}", f"{low:.2f} ... {high:.2f}"]
        cpu = [f"{result['median_cpu_s_per_kimg']:.0f}", f"{result['cpu_ratio']:.2f}"]
        sections = [f"{value:.1f}" for value in result["sections_s_per_kimg"].values()]
        memory = ["-" if result[key] is None else f"{result[key]:.0f}" for key in ("peak_mib", "extra_mib")]
        memory.append("-" if result["peak_ratio"] is None else f"{result['peak_ratio']:.2f}")
        work = ["-", "-"] if bound is None else [f"{bound:.0f}", f"{bound / seconds:.0%}"]
        rows.append([*first, *cpu, *sections, *memory, *work])
    return markdown_table(rows)


def parse_variants(text: str, glibc: bool) -> dict[str, Variant]:
    """Return the variants of a comma-separated list by name; with `glibc`, what frees memory raises its thresholds."""
    variants = {}
    for name in (part.strip() for part in text.split(",")):
        variant = Variant.parse(name)
        if glibc and variant.memory == "free":
            variant, name = dataclasses.replace(variant, memory="glibc"), name.replace("+free", "") + "+glibc"
        variants[name] = variant
    return variants


@click.command()
@cli.option("--config", type=click.Choice(CONFIG_NAMES), default="demo", help="What to train.")
@cli.option(
    "--variants",
    default=DEFAULT_VARIANTS,
    metavar="NAME,...",
    help="renderer[+compile][+free|+glibc], the renderer being fused, reference or plain (no native kernels at all). "
    "Ratios are to the first.",
)
@cli.option("--threads", type=cli.POSITIVE_INT, help="CPU threads; PyTorch's choice if not given.")
@cli.option("--repeats", type=cli.POSITIVE_INT, default=3, help="Timed steps of each variant.")
@cli.option("--quick", is_flag=True, help="One timed step each.")
@cli.option("--glibc-tunables", is_flag=True, help="Let glibc keep memory where we do not: a stronger plain PyTorch.")
@cli.option("--json", "--out", "out", type=click.Path(dir_okay=False, path_type=Path), help="Also write this file.")
@cli.device_option()
@cli.cli_errors()
def benchmark(
    config: str,
    variants: str,
    threads: int | None,
    repeats: int,
    quick: bool,
    glibc_tunables: bool,
    out: Path | None,
    device: str,
) -> None:
    """Time training steps in several ways, and print a table."""
    chosen, resolved = parse_variants(variants, glibc_tunables), resolve_device(device)
    threads = threads or torch.get_num_threads()
    settings = {"config": config, "batch_size": images_per_step(config), "repeats": 1 if quick else repeats}
    machine = environment(resolved) | {"threads": threads, "load_before": os.getloadavg()[0]}
    machine["peak_gflop_per_s"] = fma_gflops(threads) if resolved.type == "cpu" else None
    results = run_variants(config, chosen, settings["repeats"], resolved, threads)
    machine["load_after"] = os.getloadavg()[0]
    summarise(results, settings["batch_size"], machine["peak_gflop_per_s"])
    click.echo(f"{json.dumps(settings | machine)}\n\n{results_table(results)}\n")
    worked = {name: result for name, result in results.items() if "error" not in result}
    if worked:
        work = choose_work(worked)
        worst = max(result["difference"] for result in worked.values())
        click.echo(f"A step has {work['networks']:.1f} GFLOP in networks and {work['renderer']:.1f} in the renderer.")
        click.echo(f"Loss and gradient norm of the first step differ by at most {worst:.1e}.")
    if out is not None:
        write_report(out, settings, machine, results)


if __name__ == "__main__":
    benchmark()
