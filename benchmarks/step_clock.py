"""Where the time of a training step goes: the trainer's own functions, wrapped to tell a clock what they begin.

Nothing is computed here; what is timed is `Trainer.step` as `train.py` runs it.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch

from training.dual_discriminator import Discriminator
from training.phase_pass import Pass
from training.phases import PhaseRunner
from training.training_loop import Trainer

SECTIONS = ("G forward", "G backward", "D forward", "D backward", "R1", "density", "data", "optimiser", "other")
"""`R1` and `density` are whole phases of regularisers; `optimiser` has Adam, moving average and statistics; `other` is
what D sees being prepared, losses, and draws."""
_WHOLE_PHASES = {"Dreg": "R1", "Greg": "density"}


@dataclass(frozen=True)
class _Mark:
    """A moment; the section from here on, and the weight of its time."""

    section: str
    weight: float
    wall_s: float
    cpu_s: float
    event: torch.cuda.Event | None


class StepClock:
    """Divides time among sections. Each moment belongs to one section: the innermost.

    On a GPU, events in the stream are what is timed; nothing waits for them before `times`.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.weight = 1.0
        """Share of the steps in which what is timed from now on happens."""
        self._stack = ["other"]
        self._marks: list[_Mark] = []

    def begin(self) -> None:
        """Forget all times; what follows belongs to `other`."""
        self._stack, self._marks, self.weight = ["other"], [], 1.0
        self._mark()

    @contextlib.contextmanager
    def section(self, name: str) -> Iterator[None]:
        """Time the body as a section, unless it is a part of a whole phase."""
        whole = self._stack[-1] in _WHOLE_PHASES.values() and name != "optimiser"
        self._stack.append(self._stack[-1] if whole else name)
        self._mark()
        try:
            yield
        finally:
            self._stack.pop()
            self._mark()

    def switch(self, name: str) -> None:
        """Let what follows in the innermost section belong to another one."""
        if self._stack[-1] not in _WHOLE_PHASES.values():
            self._stack[-1] = name
            self._mark()

    def _mark(self) -> None:
        event = None
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
        self._marks.append(_Mark(self._stack[-1], self.weight, time.perf_counter(), time.process_time(), event))

    def times(self) -> tuple[dict[str, float], float]:
        """Return the weighted seconds of each section since `begin`, and the weighted processor seconds of all."""
        self._mark()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        seconds, cpu_s = Counter(dict.fromkeys(SECTIONS, 0.0)), 0.0
        for mark, after in zip(self._marks, self._marks[1:]):
            elapsed_s = after.wall_s - mark.wall_s if mark.event is None else mark.event.elapsed_time(after.event) / 1e3
            seconds[mark.section] += mark.weight * elapsed_s
            cpu_s += mark.weight * (after.cpu_s - mark.cpu_s)
        return dict(seconds), cpu_s


@contextlib.contextmanager
def instrumented(clock: StepClock) -> Iterator[None]:
    """Let the functions of a training step tell the clock what they begin, while the body runs."""
    with contextlib.ExitStack() as stack:

        def wrap(owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
            original = getattr(owner, name)
            stack.enter_context(
                mock.patch.object(owner, name, lambda *args, **kwargs: wrapper(original, *args, **kwargs))
            )

        def in_section(section: str) -> Callable[..., Any]:
            def run(original: Callable, *args: Any, **kwargs: Any) -> Any:
                with clock.section(section):
                    return original(*args, **kwargs)

            return run

        def run_phase(original: Callable, trainer: Trainer, number: int, phase: Any, *rest: Any) -> None:
            clock.weight = 1 / phase.interval
            with clock.section("optimiser"):
                original(trainer, number, phase, *rest)
            clock.weight = 1.0

        def run_pass(original: Callable, runner: PhaseRunner, phase: Any, *args: Any, **kwargs: Any) -> Any:
            with clock.section(_WHOLE_PHASES.get(phase.name, "other")):
                return original(runner, phase, *args, **kwargs)

        def fake_inputs(original: Callable, one: Pass, images: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            # Runs when the discriminator's part of a backward pass is over, before the last layer of the generator.
            if images["image"].requires_grad:
                images["image"].register_hook(lambda gradient: clock.switch("G backward"))
            return original(one, images)

        wrap(Trainer, "step", in_section("optimiser"))  # what is left of it: the moving average
        wrap(Trainer, "run_phase", run_phase)
        wrap(PhaseRunner, "run", run_pass)
        wrap(Pass, "generate", in_section("G forward"))
        wrap(Pass, "fake_inputs", fake_inputs)
        wrap(Pass, "backward", in_section("D backward"))
        for name in ("features", "logits", "consistency"):
            wrap(Discriminator, name, in_section("D forward"))
        yield
