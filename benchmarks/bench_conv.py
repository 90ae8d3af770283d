"""Time 3x3 convolutions of large images: the kernel against PyTorch's (oneDNN), in one process, in turns.

    python benchmarks/bench_conv.py
    python benchmarks/bench_conv.py --threads 1 --cases "256->256 256" --out conv.json

Method and meaning of the columns: benchmarks/README.md.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs as a script, too

from benchmarks.measure import environment, markdown_table
from benchmarks.peaks import fma_gflops
from dnnlib.atomic import atomic_write
from torch_utils import native
from torch_utils.ops.bias_act import bias_act
from torch_utils.ops.conv2d_native import cached_bytes, clear_cache, modulated_conv3x3
from torch_utils.ops.modulated_conv2d import modulated_conv2d
from torch_utils.ops.upfirdn2d import setup_filter

_TILE = 4
_CLAMP = 256.0
_MIB = 2**20


@dataclass(frozen=True)
class Case:
    """A layer of `inputs` to `outputs` channels for images of `size` x `size`."""

    inputs: int
    outputs: int
    size: int
    up: int = 1

    @property
    def name(self) -> str:
        """Return a name such as `256->128 256 up`."""
        return f"{self.inputs}->{self.outputs} {self.size}{' up' if self.up == 2 else ''}"

    @property
    def direct_gflop(self) -> float:
        """Count the plain method: for `up`, four images of 9 / 4 taps, without the filter."""
        return 2e-9 * 9 * self.inputs * self.outputs * self.size**2

    @property
    def winograd_gflop(self) -> float:
        """Count the matrix products of the kernel."""
        products, halo = (36, 0) if self.up == 1 else (81, 1)
        tiles = -(-(self.size + halo) // _TILE)
        return 2e-9 * products * self.inputs * self.outputs * tiles**2


CASES = (
    Case(256, 256, 256),
    Case(128, 128, 512),
    Case(512, 512, 64),
    Case(128, 128, 256),
    Case(256, 256, 128),
    Case(32, 32, 512),
    Case(256, 128, 256, up=2),
    Case(512, 256, 64, up=2),
    Case(512, 512, 32, up=2),
)


def actions_of(case: Case) -> dict[str, dict[str, Callable[[], torch.Tensor]]]:
    """Return what to compare: the convolution alone, and the layer with modulation, noise, bias and activation."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    x = random(1, case.inputs, case.size, case.size).contiguous(memory_format=torch.channels_last)
    weight, styles, bias = random(case.outputs, case.inputs, 3, 3), random(1, case.inputs) + 1, random(case.outputs)
    noise = random(case.up * case.size, case.up * case.size)
    fir = setup_filter((1, 3, 3, 1)) if case.up == 2 else None
    channels_last = weight.contiguous(memory_format=torch.channels_last)
    tail = {"activation": "lrelu", "clamp": _CLAMP}

    def reference_layer() -> torch.Tensor:
        y = modulated_conv2d(x, weight, styles, noise=noise, fir=fir, up=case.up)
        return bias_act(y, bias, **tail, inplace=True)

    def our_layer() -> torch.Tensor:
        return modulated_conv3x3(x, weight, styles, up=case.up, fir=fir, noise=noise, bias=bias, **tail)

    comparisons = {"layer": {"ours": our_layer, "PyTorch": reference_layer}}
    if case.up == 1:
        comparisons["conv"] = {
            "ours": lambda: modulated_conv3x3(x, weight, None),
            "PyTorch": lambda: F.conv2d(x, channels_last, padding=1),
        }
    return comparisons


def compare(actions: dict[str, Callable[[], torch.Tensor]], budget_s: float) -> dict[str, Any]:
    """Run actions in turns for `budget_s` seconds, at least three times, after one untimed run of each."""
    results = [action() for action in actions.values()]
    error = ((results[0] - results[1]).abs().max() / results[1].abs().max()).item()
    del results
    wall: dict[str, list[float]] = {name: [] for name in actions}
    cpu: dict[str, list[float]] = {name: [] for name in actions}
    end = time.perf_counter() + budget_s
    while time.perf_counter() < end or len(wall["ours"]) < 3:
        for name, action in actions.items():
            start, start_cpu = time.perf_counter(), time.process_time()
            action()
            wall[name].append(time.perf_counter() - start)
            cpu[name].append(time.process_time() - start_cpu)
    return {"wall_s": wall, "cpu_s": cpu, "difference": error}


def row_of(case: Case, what: str, result: dict[str, Any], peak_gflops: float | None) -> list[str]:
    """Return the cells of a table row."""
    ours, theirs = (result["wall_s"][name] for name in ("ours", "PyTorch"))
    ratios = sorted(b / a for a, b in zip(ours, theirs, strict=True))
    cpu_ratio = min(result["cpu_s"]["PyTorch"]) / min(result["cpu_s"]["ours"])
    actual = case.winograd_gflop / min(ours)
    return [
        case.name,
        what,
        f"{len(ours)}",
        *(f"{min(times) * 1e3:.1f} / {statistics.median(times) * 1e3:.1f}" for times in (ours, theirs)),
        f"{min(theirs) / min(ours):.2f}",
        f"{ratios[0]:.2f} ... {ratios[-1]:.2f}",
        f"{cpu_ratio:.2f}",
        f"{case.direct_gflop / min(ours):.0f}",
        f"{actual:.0f}",
        "-" if peak_gflops is None else f"{100 * actual / peak_gflops:.0f} %",
        f"{result['difference']:.0e}",
        f"{result['packed_mib']:.1f}",
    ]


HEADS = (
    "channels, size; what; runs; ours ms min / median; PyTorch ms min / median; ratio; spread; CPU ratio;"
    " direct GFLOP/s; GFLOP/s; of peak; difference; weights MiB"
).split("; ")


@click.command(help=__doc__.split("\n\n")[0])
@click.option("--cases", help="Comma-separated names of cases; all by default.")
@click.option("--threads", type=click.IntRange(1), help="Threads; PyTorch's default otherwise.")
@click.option("--seconds", type=click.FloatRange(0), default=3.0, show_default=True, help="Time for each row.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="JSON file with every run.")
def main(cases: str | None, threads: int | None, seconds: float, out: Path | None) -> None:
    """Compare, print a table, and save what was measured."""
    if native.load() is None:
        raise click.ClickException(f"there is nothing to compare: {native.reason()}")
    if threads is not None:
        torch.set_num_threads(threads)
    names = {case.name: case for case in CASES}
    chosen = list(names) if cases is None else [name.strip() for name in cases.split(",")]
    unknown = [name for name in chosen if name not in names]
    if unknown:
        raise click.BadParameter(
            f"expected names out of {', '.join(names)}; got {', '.join(unknown)}", param_hint="cases"
        )
    peak_gflops = fma_gflops(torch.get_num_threads())
    rows, results = [HEADS], {}
    with torch.no_grad():
        for name in chosen:
            for what, actions in actions_of(names[name]).items():
                result = results[f"{name} {what}"] = compare(actions, seconds)
                result["packed_mib"] = cached_bytes() / _MIB
                rows.append(row_of(names[name], what, result, peak_gflops))
                click.echo(" | ".join(rows[-1]), err=True)
            clear_cache()
    click.echo(markdown_table(rows))
    if out is not None:
        report = {"environment": environment(torch.device("cpu")), "fma_gflops": peak_gflops, "results": results}
        with atomic_write(out, "w") as file:
            json.dump(report, file, indent=1)


if __name__ == "__main__":
    main()
