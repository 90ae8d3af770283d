"""Statistics that metrics ask for: every image once, whoever asks, on however many ranks."""

import dataclasses
import json
import os
import sys
import time

import numpy as np
import pytest
import torch

from metrics import stats_pipeline
from metrics.evaluation import frontal_label
from metrics.image_streams import ahead, generated_images, real_images, to_bytes
from metrics.requests import BACK, FRONT, ImageSet, StatsRequest
from metrics.stats_cache import data_key
from metrics.stats_pipeline import collect_stats
from tests.helpers.head_data import HeadFiles, encoded, item_name, picture
from tests.helpers.ranks import Launch
from tests.helpers.stand_ins import NoiseGenerator, RayTracedGenerator
from tests.helpers.threads import one_thread  # noqa: F401
from tests.helpers.tiny import tiny_network
from tests.helpers.tiny_evaluations import MeanColors, tiny_evaluation
from torch_utils import distributed
from training.dataset import HeadDataset


def ask(images, **extent):
    return StatsRequest(images=images, detector="colours", **extent)


def test_real_images_are_the_right_ones_each_read_once(tmp_path):
    evaluation = tiny_evaluation(tmp_path, count=16)
    whole, part, front = evaluation.real(), evaluation.real(5), evaluation.real(yaw=FRONT)
    found = collect_stats(evaluation, [ask(images, capture=100) for images in (whole, part, front)])
    assert evaluation.load_detector("colours").num_images == 16
    for images in (whole, part, front):
        red = found[ask(images, capture=100)].rows()[:, 0]  # which tells the number of the image
        assert red.tolist() == [evaluation.dataset.locate(item)[0] for item in evaluation.items(images)]


def test_real_images_are_read_in_batches_of_their_own_size(tmp_path):
    found = []
    for batch_size in (1, 5):
        evaluation = tiny_evaluation(tmp_path / str(batch_size), count=70, batch_size=batch_size)
        batches = list(real_images(evaluation, np.arange(70)))
        assert [len(batch.indices) for batch in batches] == [64, 6]
        found.append(torch.cat([batch.images for batch in batches]))
    assert found[0].equal(found[1])


def test_requests_that_differ_in_extent_share_one_object(tmp_path):
    evaluation = tiny_evaluation(tmp_path)
    requests = [
        ask(evaluation.real(), moments=True),
        ask(evaluation.real(), capture=3),
        ask(evaluation.real(), capture=5),
    ]
    found = collect_stats(evaluation, requests)
    assert found[requests[0]] is found[requests[1]] is found[requests[2]]
    assert len(found[requests[0]].rows()) == 5 and found[requests[0]].mean_cov()[0].shape == (5,)
    assert evaluation.load_detector("colours").num_images == 12


def test_generated_sets_of_the_same_cameras_are_rendered_once(tmp_path):
    evaluation = tiny_evaluation(tmp_path, RayTracedGenerator(8))
    short, long = (ask(evaluation.generated(num), capture=100) for num in (3, 7))
    found = collect_stats(evaluation, [short, long])
    assert evaluation.load_detector("colours").num_images == 7
    np.testing.assert_array_equal(found[short].rows(), found[long].rows()[:3])
    assert found[short].num_items == 3


def test_generated_image_does_not_depend_on_where_its_set_ends(tmp_path):
    G = tiny_network("dual_spherical", img_resolution=128)
    evaluation = tiny_evaluation(tmp_path, G, count=4, side=128, batch_size=3)
    few, many = (list(generated_images(evaluation, evaluation.generated(num))) for num in (2, 4))
    assert [batch.indices.tolist() for batch in few + many] == [[0, 1], [0, 1, 2], [3]]
    assert few[0].images.equal(many[0].images[:2])


def test_generated_images_with_equal_cameras_are_those_of_the_published_call(tmp_path):
    G = tiny_network("dual_spherical", img_resolution=128)
    evaluation = tiny_evaluation(tmp_path, G, count=4, side=128, batch_size=2)
    (batch,) = generated_images(evaluation, evaluation.generated(2))
    _, label = evaluation.cameras(evaluation.generated(2))
    noise = evaluation.noise_generator(0, 0)
    with torch.no_grad():
        expected = G(evaluation.latents(np.arange(2)), torch.from_numpy(label), noise_mode="random", generator=noise)
    assert batch.images.equal(to_bytes(expected["image"])) and batch.indices.tolist() == [0, 1]


def test_generated_images_of_mode_back_take_the_frontal_condition_and_no_offset(tmp_path, monkeypatch):
    G = tiny_network("dual_spherical", img_resolution=128)
    evaluation = tiny_evaluation(tmp_path, G, count=4, side=128, mode="back")
    told = []
    mapping = G.mapping
    monkeypatch.setattr(G, "mapping", lambda z, c, **rest: told.append(c) or mapping(z, c, **rest))
    monkeypatch.setattr(G, "apply_delta_c", lambda *_, **__: pytest.fail("expected no camera offset"))
    list(generated_images(evaluation, evaluation.generated(2)))
    torch.testing.assert_close(told[0], frontal_label().expand(4, -1), rtol=0, atol=0)  # copied; a whole batch


def test_to_bytes_is_the_published_conversion():
    shown = to_bytes(torch.tensor([-1.1, -1.0, 0.0, 0.9999, 1.0, 2.0]))
    assert shown.tolist() == [0, 0, 128, 255, 255, 255] and shown.dtype == torch.uint8


def test_generated_nan_names_the_sample(tmp_path):
    class Broken(RayTracedGenerator):
        def render(self, field, c, neural_rendering_resolution=None):
            out = super().render(field, c, neural_rendering_resolution)
            out["image"][1, 0, 0, 0] = float("nan")
            return out

    evaluation = tiny_evaluation(tmp_path, Broken(8))
    with pytest.raises(ValueError, match="network: expected finite pixel values, .* sample 1 of seed 0"):
        collect_stats(evaluation, [ask(evaluation.generated(4), capture=1)])


def test_rendering_ahead_changes_no_number(tmp_path):
    rows = []
    for ahead_ in (False, True):
        evaluation = tiny_evaluation(tmp_path / str(ahead_), NoiseGenerator(8), render_ahead=ahead_)
        request = ask(evaluation.generated(11), capture=11)
        rows.append(collect_stats(evaluation, [request])[request].rows())
    np.testing.assert_array_equal(*rows)


def test_ahead_raises_what_the_thread_raised_and_ends_with_its_reader():
    def broken():
        yield 1
        raise ValueError("from the thread")

    numbers = ahead(((n, None) for n in broken()), torch.device("cpu"))
    assert next(numbers)[0] == 1
    with pytest.raises(ValueError, match="from the thread"):
        next(numbers)

    seen = []

    def endless():
        while True:
            seen.append(len(seen))
            yield seen

    reader = ahead(endless(), torch.device("cpu"))
    next(reader)
    reader.close()
    after = len(seen)
    time.sleep(0.05)
    assert len(seen) == after <= 4


# ---- cache ----


def test_cached_statistics_of_real_images_are_taken_where_nothing_has_changed(tmp_path):
    requests = None
    counts, rows = [], []
    for seed in (0, 0, 1):
        evaluation = tiny_evaluation(tmp_path / "data", cache_dir=tmp_path / "cache", seed=seed)
        requests = [ask(evaluation.real(), moments=True), ask(evaluation.real(yaw=BACK), capture=4)]
        found = collect_stats(evaluation, requests)
        counts.append(evaluation.load_detector("colours").num_images)
        rows.append(found[requests[1]].rows())
        assert found[requests[0]].num_items == 12
    assert counts == [12, 0, 6]  # another seed chooses other rows, of the images from behind alone
    np.testing.assert_array_equal(rows[0], rows[1])


def test_cache_of_another_detector_or_damaged_is_not_taken(tmp_path):
    def count(detector=None):
        evaluation = tiny_evaluation(
            tmp_path / "data", cache_dir=tmp_path / "cache", detectors={"colours": detector or MeanColors()}
        )
        collect_stats(evaluation, [ask(evaluation.real(), moments=True)])
        return evaluation.load_detector("colours").num_images

    other = MeanColors()
    other.key = "other"
    assert [count(), count(), count(other)] == [12, 0, 12]
    for file in (tmp_path / "cache" / "statistics").iterdir():
        file.write_bytes(file.read_bytes()[:100])
    assert [count(), count()] == [12, 0]


@pytest.mark.parametrize("zipped", [False, True])
def test_data_key_tells_contents_cameras_and_flips_but_not_places(tmp_path, zipped):
    def key(folder, spoil=None, **config):
        files = HeadFiles(6)
        if spoil:
            spoil(files)
        data = files.write(tmp_path / folder, zipped, **config)
        if not zipped:
            for root, _, names in os.walk(tmp_path / folder):
                for name in names:
                    os.utime(os.path.join(root, name), ns=(0, 0))
        return data_key(HeadDataset(data))

    first = key("a")
    assert first == key("b")
    assert first != key("c", mirror=True)
    assert first != key("d", lambda files: files.images.update({item_name(2): encoded(picture(99), compress_level=0)}))
    assert first != key("e", lambda files: files.labels.update({item_name(2): files.labels[item_name(1)]}))


def test_data_key_of_a_folder_changes_with_the_time_of_a_file(tmp_path):
    data = HeadFiles(6).write(tmp_path)
    first = data_key(HeadDataset(data))
    os.utime(os.path.join(data.images[0], item_name(3)), ns=(1, 1))
    assert data_key(HeadDataset(data)) != first


# ---- ranks ----


def write_statistics(folder):
    """Write what this rank gets of all; the images are read from a folder of its own."""
    rank, ranks = distributed.rank(), distributed.world_size()
    evaluation = tiny_evaluation(folder / f"data{rank}of{ranks}", NoiseGenerator(8), count=70)
    sets = [evaluation.real(), evaluation.generated(11)]
    requests = [StatsRequest(images=images, detector="colours", moments=True, capture=100) for images in sets]
    found = collect_stats(evaluation, requests)
    out = [(s.rows().tolist(), [a.tolist() for a in s.mean_cov()]) for s in map(found.get, requests)]
    (folder / f"out{rank}of{ranks}.json").write_text(json.dumps(out))


RANKS = """
import sys
from pathlib import Path
import torch
from tests.metrics.test_stats_pipeline import write_statistics
from torch_utils import distributed
with distributed.session(torch.device("cpu")):
    write_statistics(Path(sys.argv[1]))
"""


def test_two_ranks_get_what_one_gets(tmp_path):
    write_statistics(tmp_path)
    outcome = Launch([sys.executable, "-c", RANKS, str(tmp_path)], 2, environment={"OMP_NUM_THREADS": "1"}).finish()
    assert outcome.status == 0, outcome.err
    results = [json.loads((tmp_path / name).read_text()) for name in ("out0of1.json", "out0of2.json", "out1of2.json")]
    for one, other in ((results[0], results[1]), (results[1], results[2])):
        for (rows, moments), (rows2, moments2) in zip(one, other):
            assert rows == rows2  # the same images, the same bits
            for a, b in zip(moments, moments2):
                np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-9)  # sums in another order


def test_merge_keeps_what_requests_differ_in():
    images = ImageSet(kind="generated", num_images=4)
    base = StatsRequest(images=images, detector="a")
    requests = [
        dataclasses.replace(base, capture=2),
        dataclasses.replace(base, output="directions", capture=3),
        dataclasses.replace(base, detector="b", moments=True),
        dataclasses.replace(base, moments=True),
    ]
    merged = stats_pipeline._merge(requests)
    assert merged[requests[0]] == merged[requests[3]] == dataclasses.replace(base, moments=True, capture=2)
    assert len(set(merged.values())) == 3
