"""The training loop: train() -> Trainer.step() -> Trainer.run_phase(), and what happens between ticks.

A run may begin with a warm-up of reconstruction; then schedules and lazy regularisation count from its end.

Nothing depends on when, or by how many processes, something is computed: the images of a batch, latents, labels and
all noise are functions of (seed, cur_nimg, phase, chunk), so that a run that is resumed from a training state goes on
bit for bit where it stopped.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from torch_utils import distributed, gradients, rng
from torch_utils.ema import ema_beta, update_ema
from torch_utils.memory import keep_freed_memory
from torch_utils.preemption import SignalWatch
from torch_utils.training_stats import Collector
from training import training_state
from training.ada import AdaptiveStrength
from training.augment import make_augment_pipe
from training.batch_plan import BatchPlan
from training.data_loader import BatchLoader
from training.dataset import HeadDataset
from training.image_grids import make_grid, save_fakes, save_reals
from training.network_setup import build_networks, set_backends
from training.phases import (
    WARMUP,
    Chunk,
    Phase,
    PhaseResult,
    PhaseRunner,
    due_phases,
    make_phases,
    optimizer_settings,
    update_w_avg,
)
from training.reconstruction import Reconstruction, Views
from training.run_log import RunLog
from training.schedules import ScheduleValues, schedule_values
from training.skipped_steps import PhaseRecord, SkippedSteps, describe_skip, diagnose
from training.snapshots import provenance_of, save_networks, snapshot_path
from training.tick_clock import TickClock
from training.train_config import TrainConfig
from training.triplane import TriPlaneGenerator
from training.vico import LabelPool, draw_mismatched
from training.view_pairs import ViewPairs
from training.volumetric_rendering.renderer import RendererChoice

_INIT_STREAM, _STEP_STREAM = 0, 1  # of the seed: initial weights; training steps
_D_MAIN = ("Dmain", "Dboth")
_REAL_INPUTS = ("image", "image_mask", "image_parsing")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainRequest:
    """A run: what to train, where, and from where it goes on."""

    config: TrainConfig
    dataset: HeadDataset
    """Of `config.data`."""
    run_dir: Path
    device: torch.device
    renderer: RendererChoice = "auto"
    state: Path | None = None
    """Training state to go on from; None starts."""
    start: Mapping[str, nn.Module | None] = dataclasses.field(default_factory=dict)
    """Networks to start from (fine-tuning)."""
    evaluate: Callable[[TriPlaneGenerator, Path], Mapping[str, float]] | None = None
    """Computes metrics of the moving average after every snapshot, whose path it gets too; on all ranks together."""


@dataclasses.dataclass
class Progress:
    """Where a run is; all of it follows from the configuration and the images seen."""

    cur_nimg: int
    """Images of the data set that were shown, those of the warm-up among them."""
    tick_start_nimg: int
    cur_tick: int = 0
    skipped_steps: int = 0
    """Optimiser steps left out for non-finite gradients."""


def train(request: TrainRequest, log: RunLog) -> bool:
    """Train until `total_kimg`, or until a signal asks to stop.

    Returns:
        Whether training is complete; False after SIGTERM, SIGUSR1 or SIGINT, when the state has been saved.

    Raises:
        ValueError: data, configuration or state cannot be used.
        TrainingDivergedError: too many steps in a row had non-finite gradients.
    """
    with SignalWatch() as signals:
        trainer = Trainer(request, log)
        return trainer.run(signals)


class Trainer:
    """State of a run, and what a step, a tick and the end do with it."""

    def __init__(self, request: TrainRequest, log: RunLog) -> None:
        self.config, self.run_dir, self.device, self.log = request.config, request.run_dir, request.device, log
        self.evaluate = request.evaluate
        config, loop = self.config, self.config.loop
        set_backends(config.precision)
        if self.device.type == "cpu":
            keep_freed_memory()
        self.plan = BatchPlan(
            batch_size=loop.batch_size,
            batch_gpu=loop.batch_gpu,
            group_size=min(config.discriminator.mbstd_group_size or loop.batch_gpu, loop.batch_gpu),
            rank=distributed.rank(),
            world_size=distributed.world_size(),
        )
        self.dataset = request.dataset
        for line in self.dataset.describe():
            log.line(line)
        self.labels = torch.from_numpy(self.dataset.labels).to(self.device)

        rng.seed_all(loop.seed, _INIT_STREAM)
        (self.G, self.D, self.G_ema), lines = build_networks(config, self.device, request.renderer, request.start)
        for line in lines:
            log.line(line)
        for network in (self.G, self.D, self.G_ema):
            distributed.broadcast_module(network)
        pipe = make_augment_pipe(config.augment)
        self.augment = None if pipe is None else pipe.to(self.device)
        self.ada = None
        if config.augment.mode == "ada":
            self.ada = AdaptiveStrength(config.augment, loop.batch_size).to(self.device)

        self.phases = make_phases(config)
        self.runner = PhaseRunner(self.G, self.D, config, self.augment)
        self.optimizers = {
            name: torch.optim.Adam(network.parameters(), fused=True, **optimizer_settings(config, name))
            for name, network in (("G", self.G), ("D", self.D))
        }
        self.reconstruction = self._make_reconstruction(request.state)
        self.label_pool = LabelPool(self.labels, self.device)
        self.stats = Collector(self.device)
        self.progress = Progress(cur_nimg=loop.start_nimg, tick_start_nimg=loop.start_nimg)
        self.elapsed_s = 0.0
        if request.state is not None:
            self._load_state(request.state)
        self.skipped = SkippedSteps(self.device, loop.max_skipped_steps, self.progress.skipped_steps)
        self.grid = make_grid(self.dataset.resolution, self.device, self.dataset.labels)

    def _make_reconstruction(self, state: Path | None) -> Reconstruction | None:
        """Return what the warm-up trains, if it is not over."""
        config = self.config
        nimg = config.loop.start_nimg if state is None else training_state.state_nimg(state)
        if not config.has_encoder(nimg):
            return None
        self.view_pairs = ViewPairs(self.dataset, config.warmup.other_view_share, config.loop.seed)
        self.log.line(f"warm-up to {config.warmup_end_nimg / 1000:g} kimg: {self.view_pairs.describe()}")
        rng.seed_all(config.loop.seed, _INIT_STREAM, 1)
        reconstruction = Reconstruction(self.G, config, self.dataset.has_masks)
        distributed.broadcast_module(reconstruction.encoder)
        return reconstruction

    # ---- one step ----

    def step(self, batch: Sequence[Mapping[str, torch.Tensor]]) -> None:
        """Train on one global batch, of which this process has `batch`: a dict of tensors for each of its chunks."""
        config, nimg = self.config, self.progress.cur_nimg
        values = schedule_values(config.loss, config.schedule_nimg(nimg))
        for number, phase in due_phases(self.phases, config, nimg):
            self.run_phase(number, phase, batch, values)
        loop = config.loop
        update_ema(self.G_ema, self.G, ema_beta(loop.batch_size, nimg, loop.ema_kimg, loop.ema_rampup))
        for network in (self.G, self.G_ema):
            network.neural_rendering_resolution = values.neural_rendering_resolution
        if self.ada is not None and nimg >= config.warmup_end_nimg:
            self.ada.after_iteration((nimg - config.warmup_end_nimg) // loop.batch_size, self.augment)
        self.progress.cur_nimg += loop.batch_size
        if not config.has_encoder(self.progress.cur_nimg):
            self.reconstruction = None

    def run_phase(
        self, number: int, phase: Phase, batch: Sequence[Mapping[str, torch.Tensor]], values: ScheduleValues
    ) -> None:
        """Accumulate the gradients of one phase over the chunks, average them over processes, and step."""
        nimg = self.progress.cur_nimg
        network, optimizer = getattr(self, phase.network), self.optimizers[phase.network]
        parameters = dict(network.named_parameters())
        if phase.name == WARMUP:
            parameters, optimizer = self.reconstruction.named_parameters(), self.reconstruction.optimizer
        optimizer.zero_grad(set_to_none=True)
        w_means = []
        for chunk_number, data in zip(self.plan.chunks, batch, strict=True):
            rng.seed_all(self.config.loop.seed, _STEP_STREAM, nimg, number, chunk_number)
            result = self._run_chunk(phase, data, values, 1 / len(batch))
            for name, value in result.stats.items():
                self.stats.add(name, value)
            for name, (value, mask) in result.weighted_stats.items():
                self.stats.add(name, value, mask)
            if result.w_mean is not None:
                w_means.append(result.w_mean)
            if self.ada is not None and phase.name in _D_MAIN:
                self.ada.add(result.real_signs)
        network.requires_grad_(False)
        finite = gradients.average_gradients(parameters)
        gradients.step_if_finite(optimizer, finite)
        if w_means:
            update_w_avg(self.G, distributed.all_reduce_mean(torch.stack(w_means).mean(dim=0)))
        indices = tuple(int(index) for data in batch for index in data["index"])
        self._report_skips(self.skipped.add(PhaseRecord(phase.name, phase.network, nimg, indices), finite))

    def _run_chunk(
        self, phase: Phase, data: Mapping[str, torch.Tensor], values: ScheduleValues, weight: float
    ) -> PhaseResult:
        """Add the gradients of a phase on a chunk, after the seed has been set."""
        if phase.name != WARMUP:
            return self.runner.run(phase, self._chunk(phase, data), values, weight)
        source, target = (
            Views({name: data[prefix + name] for name in _REAL_INPUTS if name in data}, data[prefix + "label"])
            for prefix in ("", "target_")
        )
        return self.reconstruction.run(source, target, values, self.plan.num_groups, weight)

    def _partners(self, nimg: int, indices: np.ndarray) -> np.ndarray | None:
        """Return other views of the items of a batch, where reconstruction is due."""
        if all(phase.name != WARMUP for _, phase in due_phases(self.phases, self.config, nimg)):
            return None
        return self.view_pairs.partners(nimg, indices)

    def _chunk(self, phase: Phase, data: Mapping[str, torch.Tensor]) -> Chunk:
        """Draw latents and cameras for a chunk of images, after the seed has been set."""
        size = len(data["label"])
        z = torch.randn(size, self.G.z_dim, device=self.device)
        label = self.labels[torch.randint(len(self.labels), (size,), device=self.device)]
        mismatched = {}
        if phase.name in _D_MAIN:
            mismatched = draw_mismatched(self.label_pool, self.config.vico, data["label"], label)
        return Chunk(
            real={name: data[name] for name in _REAL_INPUTS if name in data},
            real_label=data["label"],
            z=z,
            label=label,
            num_groups=self.plan.num_groups,
            **mismatched,
        )

    def _report_skips(self, records: Sequence[PhaseRecord]) -> None:
        """Say which steps were left out; end training where there were too many in a row."""
        for record in records:
            self.log.line(describe_skip(record, self.dataset.name))
        self.progress.skipped_steps = self.skipped.total
        encoder = {} if self.reconstruction is None else {"encoder": self.reconstruction.encoder}
        self.skipped.require_progress(lambda: diagnose({"G": self.G, "D": self.D, **encoder}))

    # ---- the run ----

    def run(self, signals: SignalWatch) -> bool:
        """Train to the end or until a signal; see `train`."""
        loop, progress = self.config.loop, self.progress
        end_nimg = int(loop.total_kimg * 1000)
        if progress.cur_tick > 0 and progress.cur_nimg >= end_nimg:
            self.log.line(f"complete: {progress.cur_nimg / 1000:g} of {loop.total_kimg:g} kimg")
            return True
        if progress.cur_tick == 0:
            self._save_reals()
        loader = BatchLoader(
            *(self.dataset, self.plan, loop.seed, progress.cur_nimg, loop.workers, self.device), partners=self._partners
        )
        with contextlib.closing(loader):
            self.clock = TickClock(progress.cur_nimg, end_nimg, self.device, self.elapsed_s)
            for batch in loader:
                self.step(batch)
                done = progress.cur_nimg >= end_nimg
                if self._is_tick(done):
                    self.end_tick(done, loader)
                if done:
                    self.log.line(f"complete: {progress.cur_nimg / 1000:g} kimg in {self.run_dir}")
                    return True
                if signals.any_rank_requested():
                    self.log.line(f"stopping after {signals.reason}; --resume auto goes on from here")
                    self._save_state()
                    return False
        raise AssertionError("the loader is endless")

    def _is_tick(self, done: bool) -> bool:
        progress = self.progress
        due = progress.tick_start_nimg + 1000 * self.config.loop.tick_kimg
        return done or progress.cur_tick == 0 or progress.cur_nimg >= due

    def end_tick(self, done: bool, loader: BatchLoader) -> None:
        """Report the tick, and write what is due: pictures, a snapshot, a state."""
        loop, progress = self.config.loop, self.progress
        self._report_skips(self.skipped.flush())
        stats = self.stats.reduce()
        timing = self.clock.tick(progress.cur_nimg)
        self.log.tick(stats, {**self._scalars(loader), **timing}, progress.cur_nimg)

        def due(every: int | None) -> bool:
            return every is not None and (progress.cur_tick % every == 0 or done)

        if due(loop.image_ticks):
            self._save_images()
        snapshot = due(loop.snapshot_ticks) or done
        if snapshot:
            self._save_snapshot()
        evaluate = snapshot and self.evaluate is not None
        # Metrics take their time: a run that is killed meanwhile is not to lose more than them.
        save_state = due(loop.state_ticks) or done or evaluate
        progress.cur_tick += 1
        progress.tick_start_nimg = progress.cur_nimg
        if save_state:
            self._save_state()
        if evaluate:
            self.log.metrics(
                self.evaluate(self.G_ema, snapshot_path(self.run_dir, progress.cur_nimg)), progress.cur_nimg
            )
        self.clock.end_maintenance()

    def _scalars(self, loader: BatchLoader) -> dict[str, float]:
        """Return the numbers of a tick that are not means over samples."""
        progress = self.progress
        schedule = dataclasses.asdict(schedule_values(self.config.loss, self.config.schedule_nimg(progress.cur_nimg)))
        return {
            "Progress/tick": progress.cur_tick,
            "Progress/kimg": progress.cur_nimg / 1000,
            "Progress/skipped_steps": progress.skipped_steps,
            "Progress/replaced_images": loader.num_replaced,
            "Progress/augment": 0.0 if self.augment is None else float(self.augment.p),
            **{f"Progress/{name}": value for name, value in schedule.items() if value is not None},
        }

    # ---- files ----

    def _save_reals(self) -> None:
        if distributed.is_main() and self.config.loop.image_ticks is not None:
            save_reals(self.run_dir, self.dataset, self.grid)

    def _save_images(self) -> None:
        if distributed.is_main():
            for name, path in save_fakes(self.run_dir, self.G_ema, self.progress.cur_nimg, self.grid).items():
                self.log.images(name, path, self.progress.cur_nimg)

    def _save_snapshot(self) -> None:
        """Write G, D and G_ema with their configuration; density noise, a training schedule, stays out."""
        if distributed.is_main():
            networks = {"G": self.G, "D": self.D, "G_ema": self.G_ema}
            path = snapshot_path(self.run_dir, self.progress.cur_nimg)
            save_networks(path, networks, provenance_of(self.config, self.progress.cur_nimg))

    def _state_objects(self, progress: dict[str, Any]) -> dict[str, Any]:
        """Return everything that a state holds, by name."""
        objects = {"G": self.G, "D": self.D, "G_ema": self.G_ema, "stats": self.stats, "progress": progress}
        objects |= {f"optimizer_{name}": optimizer for name, optimizer in self.optimizers.items()}
        optional = {"augment": self.augment, "ada": self.ada}
        if self.reconstruction is not None:
            optional |= {"E": self.reconstruction.encoder, "optimizer_warmup": self.reconstruction.optimizer}
        return objects | {name: thing for name, thing in optional.items() if thing is not None}

    def _save_state(self) -> None:
        """Write the training state, after a look that all processes hold the same networks."""
        self._report_skips(self.skipped.flush())
        encoder = [] if self.reconstruction is None else [self.reconstruction.encoder]
        for network in (self.G, self.D, self.G_ema, *encoder):
            distributed.check_same_across_ranks(network)
        self.stats.gather_to_main()
        if self.ada is not None:
            self.ada.gather_to_main()
        if not distributed.is_main():
            return
        objects = self._state_objects(dataclasses.asdict(self.progress))
        header = {"data": self.dataset.fingerprint, "elapsed_s": self.clock.elapsed_s}
        with distributed.long_task("saving the training state"):
            training_state.save_state(self.run_dir, self.progress.cur_nimg, objects, header)
            training_state.prune_states(self.run_dir, self.config.loop.keep_states)

    def _load_state(self, path: Path) -> None:
        """Go on from a state.

        Raises:
            ValueError: it belongs to another configuration or to other data.
        """
        progress: dict[str, Any] = {}
        header = training_state.load_state(path, self._state_objects(progress))
        if header["data"] != self.dataset.fingerprint:
            raise ValueError(
                f"{path}: expected the data set that this run began with, came one with other names, order or labels; "
                "a new run with --resume-from takes over the weights alone"
            )
        if self.ada is not None and not distributed.is_main():
            self.ada.signs.zero_()
        self.progress = Progress(**progress)
        self.elapsed_s = header["elapsed_s"]
        self.log.line(f"going on at {self.progress.cur_nimg / 1000:g} kimg from {path}")
