"""Where the time of a step of an inversion goes: functions and gradients, wrapped to tell a clock what begins.

Nothing is computed here; what is timed is `Stepper.step` as `projector.py` runs it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch

from benchmarks.step_clock import StepClock
from inference.inversion_loss import ImageLoss
from training.superresolution import Superresolution
from training.triplane import RadianceField, TriPlaneGenerator
from training.volumetric_rendering.renderer import ImportanceRenderer

_PARTS = ("planes", "background", "rays", "superresolution", "distance")
SECTIONS = (*_PARTS, *(f"{part}, backward" for part in reversed(_PARTS)), "optimiser", "other")
"""Each part forward, then backward in the order in which autograd takes them."""


@contextlib.contextmanager
def instrumented(clock: StepClock) -> Iterator[None]:
    """Let the functions of a step tell the clock what they begin, while the body runs.

    A hook on the result of a part runs when its gradient is complete, which is when the backward pass of the part
    begins.
    """
    with contextlib.ExitStack() as stack:

        def wrap(owner: Any, name: str, part: str, result: Callable[[Any], torch.Tensor | None]) -> None:
            original = getattr(owner, name)
            function = original.fget if isinstance(original, property) else original

            def timed(*args: Any, **kwargs: Any) -> Any:
                with clock.section(part):
                    value = function(*args, **kwargs)
                tensor = result(value)
                if tensor is not None and tensor.requires_grad:
                    tensor.register_hook(lambda gradient: clock.switch(f"{part}, backward"))
                return value

            replacement = property(timed) if isinstance(original, property) else timed
            stack.enter_context(mock.patch.object(owner, name, replacement))

        wrap(TriPlaneGenerator, "radiance_field", "planes", lambda field: field.planes)
        wrap(RadianceField, "background", "background", lambda background: background)
        wrap(ImportanceRenderer, "forward", "rays", lambda rendered: rendered.features)
        wrap(Superresolution, "forward", "superresolution", lambda result: result[0])
        wrap(ImageLoss, "__call__", "distance", lambda terms: None)
        wrap(torch.Tensor, "backward", "distance, backward", lambda nothing: None)
        wrap(torch.optim.Adam, "step", "optimiser", lambda nothing: None)
        yield
