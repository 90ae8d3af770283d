"""Time the small ops of inference on a CPU against plain PyTorch, in one process, in turns.

    python benchmarks/bench_ops.py
    python benchmarks/bench_ops.py --ops upsample_bias --threads 1 --out ops.json

Method and meaning of the columns: benchmarks/README.md.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs as a script, too

from benchmarks.measure import Action, Measurement, environment, markdown_table, measure
from benchmarks.peaks import memory_gbytes_per_s
from dnnlib import cli
from dnnlib.atomic import atomic_write
from torch_utils import native
from torch_utils.memory import keep_freed_memory
from torch_utils.ops.bias_act import bias_act
from torch_utils.ops.modulated_conv2d import modulated_conv2d, modulated_to_image
from torch_utils.ops.upfirdn2d import setup_filter, upsample2d
from torch_utils.ops.upsample_bias import upsample_bias

OURS, PLAIN = "ours", "PyTorch"
_CPU = torch.device("cpu")
_FIR = setup_filter((1, 3, 3, 1))
_LONG_S = 30.0
# A chain of tensors of 128 channels at 512 x 512, in a process of its own, because its allocator is the difference.
_CHAIN = """
import time, torch
from torch_utils.memory import keep_freed_memory
torch.set_num_threads({threads})
{keep}
def chain():
    x = torch.ones(1, 128, 512, 512)
    return ((x + 1) * 2).relu()
chain()
for _ in range({repeats}):
    start_s, start_cpu_s = time.perf_counter(), time.process_time()
    chain()
    print(time.perf_counter() - start_s, time.process_time() - start_cpu_s)
"""


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).contiguous(memory_format=torch.channels_last)


def upsample_actions(channels: int, size: int) -> dict[str, Action]:
    """Enlarge an image of `size` x `size` and add a bias."""
    x, bias = _random(1, channels, size, size), torch.ones(channels)
    return {
        OURS: lambda: upsample_bias(x, _FIR, bias),
        PLAIN: lambda: upsample2d(x, _FIR).add_(bias[:, None, None]),
    }


def to_image_actions(in_channels: int, out_channels: int, size: int, clamp: float | None) -> dict[str, Action]:
    """Turn features into image channels and add them to the image of half the size."""
    x, image = _random(1, in_channels, size, size), _random(1, out_channels, size // 2, size // 2)
    weight, styles, bias = (
        _random(out_channels, in_channels, 1, 1),
        torch.ones(1, in_channels),
        torch.ones(out_channels),
    )

    def plain() -> torch.Tensor:
        rgb = bias_act(modulated_conv2d(x, weight, styles, demodulate=False), bias, clamp=clamp, inplace=True)
        return rgb.add_(upsample2d(image, _FIR))

    return {
        OURS: lambda: modulated_to_image(x, weight, styles, bias, image=image, fir=_FIR, up=2, clamp=clamp),
        PLAIN: plain,
    }


OPS: dict[str, dict[str, Callable[[], dict[str, Action]]]] = {
    "upsample_bias": {
        "192 channels, 128 to 256": lambda: upsample_actions(192, 128),
        "3 channels, 256 to 512": lambda: upsample_actions(3, 256),
    },
    "modulated_to_image": {
        "128 to 192 channels at 256": lambda: to_image_actions(128, 192, 256, None),
        "128 to 3 channels at 512": lambda: to_image_actions(128, 3, 512, 256.0),
    },
}
MEMORY = "keep_freed_memory"


def measure_chain(repeats: int) -> dict[str, Measurement]:
    """Time the chain of tensors with and without kept memory."""
    measurements = {}
    for variant, keep in ((OURS, "assert keep_freed_memory()"), (PLAIN, "")):
        script = _CHAIN.format(threads=torch.get_num_threads(), repeats=repeats, keep=keep)
        command = [sys.executable, "-c", script]
        root = Path(__file__).resolve().parent.parent
        run = subprocess.run(command, cwd=root, check=True, stdout=subprocess.PIPE, text=True)
        wall, cpu = zip(*(map(float, line.split()) for line in run.stdout.splitlines()))
        measurements[variant] = Measurement(
            seconds=list(wall), cpu_seconds=list(cpu), gflop=0, gbyte=7 * 2**27 / 1e9, peak_mib=None, extra_mib=None
        )
    return measurements


def row_of(op: str, case: str, measurements: dict[str, Measurement], difference: float, peak: float) -> list[str]:
    """Return the cells of a table row."""
    ours, plain = measurements[OURS], measurements[PLAIN]
    ratios = [b / a for a, b in zip(ours.seconds, plain.seconds, strict=True)]
    gbyte_per_s = ours.gbyte / min(ours.seconds)
    times = [f"{min(m.seconds) * 1e3:.2f} / {statistics.median(m.seconds) * 1e3:.2f}" for m in (ours, plain)]
    return [
        *(op, case, str(len(ours.seconds)), *times),
        f"{min(plain.seconds) / min(ours.seconds):.2f}",
        f"{min(ratios):.2f} ... {max(ratios):.2f}",
        f"{min(plain.cpu_seconds) / min(ours.cpu_seconds):.2f}",
        *(f"{gbyte_per_s:.1f}", f"{100 * gbyte_per_s / peak:.0f} %", f"{difference:.0e}"),
    ]


HEADS = (
    "op; case; runs; ours ms min / median; PyTorch ms min / median; ratio; spread; CPU ratio; GB/s; of peak; difference"
)


@click.command(help=__doc__.split("\n\n")[0])
@cli.option("--ops", metavar="NAME,...", help="Some of the ops; all if not given.")
@cli.option("--repeats", type=cli.POSITIVE_INT, default=15, help="Timed runs of each variant.")
@cli.option("--threads", type=cli.POSITIVE_INT, help="CPU threads; PyTorch's choice if not given.")
@cli.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Also write everything to this JSON file.")
@cli.cli_errors()
@torch.no_grad()
def benchmark(ops: str | None, repeats: int, threads: int | None, out: Path | None) -> None:
    """Compare, print a table, and save what was measured."""
    if native.load() is None:
        raise click.ClickException(f"there is nothing to compare: {native.reason()}")
    chosen = [*OPS, MEMORY] if ops is None else [name.strip() for name in ops.split(",")]
    unknown = [name for name in chosen if name not in (*OPS, MEMORY)]
    if unknown:
        raise click.BadParameter(f"--ops: expected some of {','.join(OPS)},{MEMORY}; came {unknown[0]!r}")
    if threads is not None:
        torch.set_num_threads(threads)
    keep_freed_memory()  # for both variants of the other ops: what they do themselves is compared
    peak, rows, results = memory_gbytes_per_s(_CPU), [HEADS.split("; ")], {}

    def add(op: str, case: str, measurements: dict[str, Measurement], difference: float) -> None:
        rows.append(row_of(op, case, measurements, difference, peak))
        variants: dict[str, Any] = {variant: measurement.to_json() for variant, measurement in measurements.items()}
        results[f"{op}, {case}"] = {"variants": variants, "difference": difference}

    for op in chosen:
        for case, actions in OPS.get(op, {}).items():
            add(op, case, *measure(actions(), repeats, _CPU, _LONG_S, report=lambda: None))
        if op == MEMORY:
            add(op, "four tensors of 128 MiB", measure_chain(repeats), 0.0)
    machine = environment(_CPU) | {"copy_gbyte_per_s": peak}
    click.echo(f"{json.dumps(machine)}\n\n{markdown_table(rows)}")
    if out is not None:
        with atomic_write(out, "w") as file:
            json.dump({"environment": machine, "results": results}, file, indent=2, allow_nan=False)


if __name__ == "__main__":
    benchmark()
