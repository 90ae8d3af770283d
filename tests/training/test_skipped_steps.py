"""Counting skipped optimiser steps, and ending training after too many."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from training.skipped_steps import PhaseRecord, SkippedSteps, TrainingDivergedError, describe_skip, diagnose

APPLIED, SKIPPED = torch.tensor(1.0), torch.tensor(0.0)


def record(network: str = "G", nimg: int = 0) -> PhaseRecord:
    return PhaseRecord(f"{network}main", network, nimg, (3, 4))


def test_skipped_steps_are_counted_and_returned_once():
    steps = SkippedSteps(torch.device("cpu"), limit=5, total=7)
    assert steps.add(record(nimg=0), APPLIED) == []
    assert steps.add(record(nimg=8), SKIPPED) == [record(nimg=8)]
    assert steps.flush() == [] and steps.total == 8


def test_require_progress_raises_after_the_limit_in_a_row_of_one_network():
    steps = SkippedSteps(torch.device("cpu"), limit=3)
    for flag in (SKIPPED, SKIPPED, APPLIED, SKIPPED, SKIPPED):
        steps.add(record("G"), flag)
        steps.add(record("D"), SKIPPED if flag is APPLIED else APPLIED)  # never in a row
    steps.require_progress(str)
    steps.add(record("G"), SKIPPED)
    with pytest.raises(TrainingDivergedError, match=r"the gradients of G were not finite in 3 steps in a row. because"):
        steps.require_progress(lambda: "because")


def test_describe_skip_names_phase_place_and_images():
    text = describe_skip(PhaseRecord("Dmain", "D", 12_400, tuple(range(7))), lambda index: f"img{index}.png")
    assert text == (
        "Dmain: step skipped at 12.4 kimg, gradients were not finite; "
        "images: img0.png, img1.png, img2.png, img3.png, img4.png and 2 more"
    )


def test_diagnose_names_what_is_large_and_what_is_not_finite():
    network = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    with torch.no_grad():
        network[1].weight[0, 0] = -5e6
        network[0].bias[0] = math.nan
    network[1].bias.grad = torch.full((2,), math.inf)
    text = diagnose({"D": network})
    assert "D: parameters not finite in 0.bias" in text and "D: gradients not finite in 1.bias" in text
    network[0].bias.data.zero_()
    assert "D: largest parameter 1.weight at 5e+06" in diagnose({"D": network})
