"""Batches of a run: their order, their values, and what happens when images or workers go away on the way."""

import itertools
import os
import signal
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
import torch

from tests.helpers.head_data import SIDE, HeadFiles, encoded, item_name, picture
from training.batch_plan import BatchPlan
from training.data_loader import BatchLoader
from training.dataset import HeadDataset
from training.infinite_sampler import InfiniteSampler


@pytest.fixture
def config(tmp_path):
    return HeadFiles(12).write(tmp_path, zipped=True, mirror=True, skip_bad=True)


@pytest.fixture
def dataset(config):
    return HeadDataset(config)


def plan(rank=0, world_size=1, **changes):
    sizes = {"batch_size": 8, "batch_gpu": 4, "group_size": 2, **changes}
    return BatchPlan(rank=rank, world_size=world_size, **sizes)


def take(count, *arguments, **options):
    """Return the first batches of a loader."""
    with BatchLoader(*arguments, **options) as loader:
        return list(itertools.islice(loader, count))


def flat(batches):
    return [chunk for batch in batches for chunk in batch]


def assert_same(chunks, others):
    assert len(chunks) == len(others)
    for chunk, other in zip(chunks, others):
        assert chunk.keys() == other.keys()
        for key in chunk:
            torch.testing.assert_close(chunk[key], other[key], rtol=0, atol=0)  # the same bytes, in the same order


@pytest.mark.parametrize("workers", [0, 2])
def test_chunk_holds_images_masks_parsing_and_labels_of_its_indices(dataset, workers):
    stream = InfiniteSampler(len(dataset), 5).indices(3, 24)
    batches = take(3, dataset, plan(), seed=5, start_nimg=3, workers=workers)
    for number, chunk in enumerate(flat(batches)):
        positions = [4 * number + row for row in (0, 2, 1, 3)]  # member by member of two groups
        assert chunk["index"].tolist() == stream[positions].tolist()
        for row, index in enumerate(chunk["index"].tolist()):
            item = {key: torch.as_tensor(value) for key, value in dataset[index].items()}
            exact = {"rtol": 0, "atol": 0}  # the same conversion
            torch.testing.assert_close(chunk["image"][row], item["image"].float() / 127.5 - 1, **exact)
            torch.testing.assert_close(chunk["image_mask"][row], item["mask"].float() / 255, **exact)
            torch.testing.assert_close(chunk["label"][row], item["label"], **exact)
            one_hot = torch.nn.functional.one_hot(item["parsing"][0].long(), 19).permute(2, 0, 1).float()
            torch.testing.assert_close(chunk["image_parsing"][row], one_hot, **exact)
    assert {key: tuple(value.shape) for key, value in batches[0][0].items()} == {
        **{"image": (4, 3, SIDE, SIDE), "image_mask": (4, 1, SIDE, SIDE), "image_parsing": (4, 19, SIDE, SIDE)},
        **{"label": (4, 25), "index": (4,)},
    }
    assert batches[0][0]["image"].min() >= -1 and batches[0][0]["image"].max() <= 1


def test_data_set_without_masks_gives_images_and_labels_alone(tmp_path):
    dataset = HeadDataset(HeadFiles(3).write(tmp_path, masks=(), parsing=(), parsing_classes=0))
    assert set(take(1, dataset, plan())[0][0]) == {"image", "label", "index"}


@pytest.mark.parametrize("workers", [0, 3])
def test_restart_at_any_image_goes_on_with_the_same_batches(dataset, workers):
    whole = take(6, dataset, plan(), seed=1, start_nimg=1000)
    for done in (1, 4) if workers == 0 else (2,):
        assert_same(flat(whole[done:]), flat(take(6 - done, dataset, plan(), 1, 1000 + 8 * done, workers)))


def test_restart_within_a_batch_shifts_the_stream(dataset):
    whole = torch.cat([chunk["index"] for chunk in flat(take(3, dataset, plan(group_size=1), 2, 0))])
    shifted = torch.cat([chunk["index"] for chunk in flat(take(2, dataset, plan(group_size=1), 2, 5))])
    assert shifted.tolist() == whole[5:21].tolist()


def test_two_processes_share_the_batches_of_one(dataset):
    sizes = {"batch_size": 16, "batch_gpu": 4}
    whole = take(3, dataset, plan(**sizes), 4, 8)
    shares = [take(3, dataset, plan(rank, 2, **sizes), 4, 8) for rank in (0, 1)]
    for batch, first, second in zip(whole, *shares):
        assert_same(batch, [first[0], second[0], first[1], second[1]])


def test_number_of_processes_does_not_change_which_images_a_batch_has(dataset):
    sizes = {"batch_size": 12, "batch_gpu": 2}
    sets = []
    for world_size in (1, 2, 3):
        shares = [take(2, dataset, plan(rank, world_size, **sizes), 4, 8) for rank in range(world_size)]
        sets.append(
            [sorted(i for share in shares for chunk in share[t] for i in chunk["index"].tolist()) for t in (0, 1)]
        )
    assert sets[0] == sets[1] == sets[2]


# Partners -------------------------------------------------------------------------------------------------------------


def next_but_one(nimg, indices):
    """Return the item two further on for odd items, and none for others."""
    return np.where(indices % 2 == 1, (indices + 2) % 24, indices)


def test_partners_are_read_beside_the_images_of_a_batch(dataset):
    plain = flat(take(2, dataset, plan(), 5))
    paired = flat(take(2, dataset, plan(), 5, partners=next_but_one))
    assert_same(plain, [{key: chunk[key] for key in plain[0]} for chunk in paired])
    for chunk in paired:
        expected = next_but_one(0, chunk["index"].numpy())
        for row, partner in enumerate(expected.tolist()):
            item = dataset[partner]
            np.testing.assert_array_equal(chunk["target_label"][row], item["label"])
            mask = torch.from_numpy(item["mask"]).float() / 255
            torch.testing.assert_close(chunk["target_image_mask"][row], mask, rtol=0, atol=0)
            red = chunk["target_image"][row, 0, 0, 0].add(1).mul(127.5).round()
            assert red == item["image"][0, 0, 0]


def test_partners_are_asked_for_by_position_and_may_be_left_out(dataset):
    asked = []

    def none(nimg, indices):
        asked.append((nimg, len(indices)))

    assert_same(flat(take(2, dataset, plan(), 5, 16, partners=none)), flat(take(2, dataset, plan(), 5, 16)))
    assert asked[:2] == [(16, 8), (24, 8)]


def test_partner_that_becomes_unreadable_is_the_image_itself(config):
    dataset = HeadDataset(config)
    spoil(config, 3)
    spoilt = next(item for item in range(len(dataset)) if dataset.locate(item) == (3, False))
    chunks = flat(take(2, dataset, plan(), 0, 0, partners=lambda nimg, indices: np.full_like(indices, spoilt)))
    for chunk in chunks:
        assert torch.equal(chunk["target_image"], chunk["image"]) and torch.equal(chunk["target_label"], chunk["label"])


# Images that go away --------------------------------------------------------------------------------------------------


def spoil(config, number, data=None):
    """Damage an image in the zip file, where an open file sees it."""
    path = config.images[0]
    with open(path, "r+b") as file:
        content = file.read()
        start = content.index(item_name(number).encode())
        file.seek(content.index(b"IDAT", start) + 8)
        file.write(b"\xff\xff" if data is None else data)


@pytest.mark.parametrize("workers", [0, 2])
def test_image_that_becomes_unreadable_is_replaced_and_counted(config, workers):
    dataset = HeadDataset(config)
    expected = take(6, dataset, plan(), 0, 0)
    spoil(config, 4)  # item 1: the front images are 3 to 8
    with BatchLoader(dataset, plan(), 0, 0, workers) as loader:
        batches = list(itertools.islice(loader, 6))
        spoilt = {1: 2, 13: 14}
        changed = 0
        for chunk, before in zip(flat(batches), flat(expected)):
            wanted = [spoilt.get(index, index) for index in before["index"].tolist()]
            changed += sum(index in spoilt for index in before["index"].tolist())
            assert chunk["index"].tolist() == wanted
            assert chunk["label"].tolist() == dataset.labels[wanted].tolist()
            reds = [int(dataset[index]["image"][0, 0, 0]) for index in wanted]
            assert ((chunk["image"][:, 0, 0, 0] + 1) * 127.5).round().int().tolist() == reds
        assert loader.num_replaced == changed > 0
        assert set(loader.replaced) <= {dataset.name(1), dataset.name(13)} and loader.replaced
        assert all("damaged: size or checksum" in reason for reason in loader.replaced.values())


@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_image_is_an_error_without_skipping(tmp_path, workers):
    config = HeadFiles(12).write(tmp_path, zipped=True)
    dataset = HeadDataset(config)
    spoil(config, 4)
    with pytest.raises(ValueError, match=r"img00000004.png: damaged: .* \(data.skip_bad would replace it\)"):
        take(6, dataset, plan(), 0, 0, workers)


def test_deleted_file_is_replaced(tmp_path):
    dataset = HeadDataset(HeadFiles(4, [0, 1, 2, 3]).write(tmp_path, skip_bad=True))
    (tmp_path / "masks" / item_name(2)).unlink()
    with BatchLoader(dataset, plan()) as loader:
        indices = torch.cat([chunk["index"] for chunk in flat(itertools.islice(loader, 3))])
    assert 2 not in indices.tolist()
    assert "masks" in loader.replaced[dataset.name(2)] and "the file is gone" in loader.replaced[dataset.name(2)]


def test_storage_that_is_gone_altogether_is_an_error(tmp_path):
    config = HeadFiles(4, [0, 1, 2, 3]).write(tmp_path, skip_bad=True)
    dataset = HeadDataset(config)
    for number in range(4):
        (tmp_path / "images" / item_name(number)).unlink()
    with pytest.raises(ValueError, match="expected images that can be read, came none in 100 tries; the last: .*gone"):
        take(1, dataset, plan())


def test_image_that_changes_its_size_is_replaced(tmp_path):
    dataset = HeadDataset(HeadFiles(4, [0, 1, 2, 3]).write(tmp_path, skip_bad=True))
    (tmp_path / "images" / item_name(2)).write_bytes(encoded(picture(2, 16)))
    with BatchLoader(dataset, plan()) as loader:
        list(itertools.islice(loader, 3))
    assert "came 16 x 16" in loader.replaced[dataset.name(2)]


# Processes ------------------------------------------------------------------------------------------------------------


def test_killed_worker_is_replaced_and_the_batches_stay_the_same(dataset):
    expected = take(30, dataset, plan(), 6, 0)
    before = {process.pid for process in psutil.Process().children()}
    with BatchLoader(dataset, plan(), 6, 0, workers=2) as loader:
        batches = [next(loader)]
        for child in psutil.Process().children():
            if child.pid not in before:
                child.kill()
        batches += itertools.islice(loader, 29)
        assert loader.num_worker_deaths == 2
    assert_same(flat(expected), flat(batches))
    assert {process.pid for process in psutil.Process().children()} == before


def test_terminated_process_leaves_neither_messages_nor_workers(tmp_path, config):
    code = """
import itertools, os, signal, sys, time
import psutil
from tests.training.test_data_loader import plan
from training.data_loader import BatchLoader
from training.dataset import HeadDataset
from training.train_config import DataConfig
loader = BatchLoader(HeadDataset(DataConfig(**eval(sys.argv[1]))), plan(), workers=2)
next(loader)
signal.signal(signal.SIGUSR1, lambda *_: None)
os.killpg(0, signal.SIGUSR1)
list(itertools.islice(loader, 5))  # workers are still there, for the last steps before the state is saved
assert loader.num_worker_deaths == 0
print(*[child.pid for child in psutil.Process().children()], flush=True)
os.killpg(0, signal.SIGTERM)
"""
    result = subprocess.run(
        [sys.executable, "-c", code, repr(vars(config))],
        **{"capture_output": True, "text": True, "start_new_session": True},
        env={**os.environ, "PYTHONPATH": os.pathsep.join(["", *sys.path])},
    )
    assert (result.returncode, result.stderr) == (-signal.SIGTERM, "")
    pids = [int(pid) for pid in result.stdout.split()]
    assert len(pids) == 2
    deadline = time.monotonic() + 10
    while any(psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie" for pid in pids):
        assert time.monotonic() < deadline, "workers outlived their parent"
        time.sleep(0.05)


@pytest.mark.gpu
def test_batches_on_a_gpu_equal_those_on_the_cpu(dataset):
    expected = flat(take(4, dataset, plan(), 1, 0))
    chunks = flat(take(4, dataset, plan(), 1, 0, workers=2, device="cuda"))
    for chunk, other in zip(chunks, expected):
        assert chunk["image"].is_cuda and not chunk["index"].is_cuda
        for key in other:  # float32 division may round its last bit otherwise there
            torch.testing.assert_close(chunk[key].cpu(), other[key], rtol=1e-6, atol=1e-6)


def test_impossible_arguments_are_refused(dataset):
    with pytest.raises(ValueError, match="start_nimg: expected 0 or more, got -1"):
        BatchLoader(dataset, plan(), start_nimg=-1)
    with pytest.raises(ValueError, match="workers: expected 0 or more, got -1"):
        BatchLoader(dataset, plan(), workers=-1)


def test_reading_draws_no_random_numbers(dataset):
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    take(2, dataset, plan(), workers=1)
    assert torch.equal(before[0], torch.get_rng_state()) and before[1] == np.random.get_state()[1].tolist()
