"""What the machine can do at most: arithmetic and memory, to set beside what was achieved."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import torch

FMA_SOURCE = Path(__file__).with_name("fma_peak.cpp")
_COPY_BYTES = 2**28


def fma_gflops(threads: int) -> float | None:
    """Return the GFLOP/s of fused multiply-adds of `threads` processes at a time; None without a compiler."""
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        program = str(Path(folder) / "fma_peak")
        command = [compiler, "-O2", "-std=c++20", "-march=native", str(FMA_SOURCE), "-o", program]
        if subprocess.run(command, capture_output=True).returncode != 0:
            return None
        processes = [subprocess.Popen([program], stdout=subprocess.PIPE, text=True) for _ in range(threads)]
        return sum(float(process.communicate()[0]) for process in processes)


def memory_gbytes_per_s(device: torch.device, repeats: int = 5) -> float:
    """Return the GB/s, read and written, of copying 256 MiB."""
    source = torch.ones(_COPY_BYTES // 4, device=device)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(repeats):
        start_s = time.perf_counter()
        target.copy_(source)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start_s)
    return 2 * _COPY_BYTES / min(seconds) / 1e9
