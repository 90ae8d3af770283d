"""The data name `synth[:IDENTITIESxVIEWS]`: synthetic heads that are made where they are not there yet."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from dataset_tools.synth import IMAGES, MASKS, SynthRequest, synthesise
from torch_utils import distributed
from training.config import require
from training.train_config import DataConfig

SYNTHETIC_NAME = "synth"
"""The name without a size."""
DEFAULT_SIZE = 2000, 4
"""Identities, and views of each, where the name gives none."""
_NAME = re.compile(SYNTHETIC_NAME + r"(?::([1-9]\d{0,6})x([1-9]\d{0,3}))?")


def names_synthetic_data(roots: Sequence[str]) -> bool:
    """Return whether one of the roots of a data set asks for synthetic heads; a folder of that name is `./synth`."""
    return any(root.split(":")[0] == SYNTHETIC_NAME for root in roots)


@dataclass(frozen=True, kw_only=True)
class SyntheticData:
    """A data set of synthetic heads with masks."""

    folder: Path
    """Where it is, or will be; its name tells resolution and size."""
    request: SynthRequest

    @classmethod
    def parse(
        cls,
        images: Sequence[str],
        others: Sequence[str],
        parent: Path,
        resolution: int,
        size: tuple[int, int] = DEFAULT_SIZE,
    ) -> SyntheticData:
        """Return the data set that options ask for.

        Args:
            images: values of `--data`, among them the name.
            others: roots of masks and parsing maps that were given, which it does not go with.
            parent: folder of its folder.
            resolution: side of the images, pixels.
            size: identities, and views of each, where the name gives none.

        Raises:
            ValueError: a name that cannot be read, or other data besides.
        """
        others = [*images[1:], *others]
        require(not others, "--data synth", "no other data, it brings its masks", others)
        match = _NAME.fullmatch(images[0])
        require(match is not None, "--data", "synth or synth:IDENTITIESxVIEWS, such as synth:2000x4", images[0])
        identities, views = (int(match[1]), int(match[2])) if match[1] else size
        folder = parent / f"synthetic-heads-{resolution}px-{identities}x{views}"
        request = SynthRequest(num_identities=identities, views_per_identity=views, resolution=resolution)
        return cls(folder=folder, request=request)

    @property
    def config(self) -> DataConfig:
        """The configuration that reads it; its files need not be there yet."""
        return DataConfig(
            images=(str(self.folder / IMAGES),),
            masks=(str(self.folder / MASKS),),
            resolution=self.request.resolution,
        )

    def make(self, progress: bool = True) -> None:
        """Make it, unless it is there.

        Collective: rank 0 makes it, and the others wait, so that all can read it afterwards.

        Args:
            progress: whether a bar shows how far it is.
        """
        if distributed.is_main():
            with distributed.long_task("making synthetic heads"):
                self._make(progress)
        distributed.barrier()

    def _make(self, progress: bool) -> None:
        with contextlib.ExitStack() as stack:
            bars: list[tqdm] = []  # none is shown where there is nothing to do

            def show(done: int, total: int) -> None:
                if not bars:
                    bar = tqdm(total=total, initial=done, desc="synthetic heads", unit="img", disable=not progress)
                    bars.append(stack.enter_context(bar))
                bars[0].update(done - bars[0].n)

            synthesise(self.folder, self.request, show, workers=os.cpu_count() or 1)
