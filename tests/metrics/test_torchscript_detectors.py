"""Detectors from files: where they are found, what they are given, and what is refused."""

import hashlib
import io
import os
import pickle
import sys
import types

import numpy as np
import pytest
import torch
from torch.nn import functional

import metrics.torchscript_detectors as module_under_test
from dnnlib.util import DownloadError
from metrics.detectors import load_detector
from metrics.torchscript_detectors import KNOWN, Preparation, open_program, parse_source
from tests.helpers.toy_views import toy_context, toy_dataset

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit")


class Published(torch.nn.Module):
    """Takes bytes and flags, as the published detectors do."""

    def forward(self, img: torch.Tensor, return_features: bool = False, no_output_bias: bool = False) -> torch.Tensor:
        """Return features [B, 6], probabilities [B, 3], or [B, 1] without flags."""
        x = img.to(torch.float32)
        if return_features:
            return torch.cat([x.mean((2, 3)), x.std((2, 3))], 1)
        if no_output_bias:
            return torch.softmax(x.mean((2, 3)), 1)
        return x.mean((1, 2, 3))[:, None]


class Means(torch.nn.Module):
    """Means and largest value of what comes in, with its size."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return [B, 5, 1, 1]."""
        size = torch.full([x.shape[0], 1], float(x.shape[3]))
        return torch.cat([x.mean((2, 3)), x.amax((1, 2, 3))[:, None], size], 1)[:, :, None, None]


class Picky(torch.nn.Module):
    """Takes 8 pixels alone."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return [B, 3]."""
        if x.shape[3] != 8:
            raise RuntimeError("eight pixels, please")
        return x.mean((2, 3))


class Scalars(torch.nn.Module):
    """One number for all."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return []."""
        return x.mean()


def scripted(module, path):
    torch.jit.script(module).save(str(path))
    return str(path)


def sha256(path):
    with open(path, "rb") as file:
        return hashlib.sha256(file.read()).hexdigest()


@pytest.fixture(scope="module")
def context(tmp_path_factory):
    return toy_context(toy_dataset(tmp_path_factory.mktemp("data"), count=2))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("SPHEREHEAD_DETECTORS", str(tmp_path))
    return tmp_path


@pytest.fixture
def offline(monkeypatch, tmp_path):
    asked = []

    def refuse(url, **options):
        asked.append(url)
        raise DownloadError(f"{url}: no network")

    monkeypatch.setattr(module_under_test, "open_url", refuse)
    monkeypatch.setattr(module_under_test, "BUNDLED_FOLDER", tmp_path / "models" / "detectors")
    return asked


@pytest.fixture
def images():
    return torch.randint(0, 256, (2, 3, 12, 12), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


# What a name means ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "file", "preparation", "resize"),
    [
        ("a/my.pt", "a/my.pt", Preparation(), "none"),
        ("my.pt?size=224&resize=area", "my.pt", Preparation(size=224, resize="area"), "area average, to 224"),
        ("my.pt?input=clip&size=32", "my.pt", Preparation(input="clip", size=32), "bicubic, antialiased, to 32"),
        ("https://x.org/my.pt?dl=1&input=unit", "https://x.org/my.pt?dl=1", Preparation(input="unit"), "none"),
        ("hf://o/r/my.pt@v2?size=8#sha256=00", "hf://o/r/my.pt@v2#sha256=00", Preparation(size=8), None),
    ],
)
def test_suffix_says_how_images_are_prepared(spec, file, preparation, resize):
    source = parse_source(spec)
    assert source.files == (file,) and source.preparation == preparation and source.name == "my.pt"
    assert resize is None or source.preparation.filter_name == resize


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("my.pt?inputs=unit", "expected the options input, size and resize, got 'inputs'"),
        ("my.pt?input=bytes", "input: expected one of uint8, unit, symmetric, imagenet, clip, got 'bytes'"),
        ("my.pt?size=0", "size: expected pixels from 1 to 4096, or none, got '0'"),
        ("my.pt?size=a", "size: expected pixels"),
        ("my.pt?resize=lanczos", "resize: expected one of bicubic, bilinear, area, got 'lanczos'"),
    ],
)
def test_unknown_suffix_is_an_error(spec, message):
    with pytest.raises(ValueError, match=message):
        parse_source(spec)


def test_path_with_a_question_mark_that_exists_is_a_path(tmp_path):
    (tmp_path / "odd?.pt").write_bytes(b"")
    assert parse_source(str(tmp_path / "odd?.pt")).files == (str(tmp_path / "odd?.pt"),)


# How images are prepared ----------------------------------------------------------------------------------------------


def test_inputs_have_their_ranges(images):
    x = images.double()
    expected = {"uint8": x, "unit": x / 255, "symmetric": x / 127.5 - 1}
    for name, values in expected.items():
        torch.testing.assert_close(Preparation(input=name)(images).double(), values, rtol=1e-5, atol=1e-5)  # float32
    normalised = Preparation(input="imagenet")(images)
    by_hand = (x[:, 1] / 255 - 0.456) / 0.224
    torch.testing.assert_close(normalised[:, 1].double(), by_hand, rtol=1e-5, atol=1e-5)  # float32
    assert Preparation(input="bytes")(images) is images


def test_resize_is_antialiased_and_stays_in_range(images):
    area = Preparation(size=4, resize="area")(images)
    torch.testing.assert_close(area, images.float().view(2, 3, 4, 3, 4, 3).mean((3, 5)), rtol=1e-5, atol=1e-4)
    bicubic = functional.interpolate(images.float(), (5, 5), mode="bicubic", antialias=True).clamp(0, 255)
    torch.testing.assert_close(Preparation(size=5)(images), bicubic, rtol=1e-5, atol=1e-4)  # times 1 / 255 and back
    edge = torch.zeros(1, 3, 12, 12, dtype=torch.uint8)
    edge[..., 6:] = 255
    larger = Preparation(size=40, input="unit")(edge)
    assert larger.min() == 0 and larger.max() == 1


# Files ----------------------------------------------------------------------------------------------------------------


def test_path_is_a_detector(context, tmp_path, images):
    path = scripted(Means(), tmp_path / "my.pt")
    detector = load_detector(path + "?input=unit&size=8", context)
    rows = detector(images, "features")
    assert rows.shape == (2, 5) and rows.dtype == torch.float32 and not rows.requires_grad
    assert (rows[:, 4] == 8).all() and (rows[:, 3] <= 1).all() and detector.outputs == {"features"}
    info = detector.info
    assert (info.name, info.sha256, info.source) == ("my.pt", sha256(path), path)
    assert info.resize == "bicubic, antialiased, to 8"


def test_key_tells_files_and_preparations_apart(context, tmp_path):
    path = scripted(Means(), tmp_path / "my.pt")
    copy = tmp_path / "copy.pt"
    copy.write_bytes((tmp_path / "my.pt").read_bytes())
    keys = [load_detector(str(name), context).key for name in (path, copy, path + "?size=8", path + "?input=unit")]
    assert keys[0] == keys[1] and len(set(keys)) == 3


@pytest.mark.parametrize("name", ["inception", "vgg16"])
def test_published_files_are_found_and_called_as_published(context, folder, images, name):
    path = scripted(Published(), folder / KNOWN[name].files[0])
    detector = load_detector(name, context)
    x = images.float()
    expected = torch.cat([x.mean((2, 3)), x.std((2, 3))], 1)
    torch.testing.assert_close(detector(images, "features"), expected, rtol=1e-5, atol=0)  # sums in another order
    info = detector.info
    assert (info.name, info.resize, info.sha256) == (name, "in the network", sha256(path))
    if name == "inception":
        probabilities = detector(images, "probabilities")
        torch.testing.assert_close(probabilities, torch.softmax(x.mean((2, 3)), 1), rtol=1e-4, atol=1e-6)
    else:
        with pytest.raises(ValueError, match="one of the outputs features"):
            detector(images, "probabilities")


def test_dinov2_is_prepared_in_its_own_way(context, folder, images):
    scripted(Means(), folder / "dinov2.pt")
    detector = load_detector("dinov2", context)
    assert (detector(images, "features")[:, 4] == 224).all()
    assert detector.info.resize == "bicubic, antialiased, to 224"


def test_absent_published_file_says_where_to_get_it_and_where_to_put_it(context, offline, folder):
    with pytest.raises(FileNotFoundError) as raised:
        load_detector("inception", context)
    message = str(raised.value)
    assert offline == [KNOWN["inception"].url]
    for part in (KNOWN["inception"].url, str(folder / "inception-2015-12-05.pt"), "no network", "SPHEREHEAD_DETECTORS"):
        assert part in message
    assert f"Put it to {folder / 'models' / 'detectors' / 'inception-2015-12-05.pt'}" in message


def test_absent_dinov2_says_how_to_make_it(context, offline, folder):
    with pytest.raises(FileNotFoundError, match="torch.hub.load.*torch.jit.trace.*Put it to"):
        load_detector("dinov2", context)
    assert offline == []


def test_unknown_name_lists_the_known_ones(context):
    with pytest.raises(FileNotFoundError, match="inceptoin: no such file; known names are view, inception, vgg16, din"):
        load_detector("inceptoin", context)
    with pytest.raises(ValueError, match="detector: expected"):
        load_detector(" ", context)


def test_checksum_in_a_url_is_checked(context, tmp_path):
    path = scripted(Means(), tmp_path / "my.pt")
    assert load_detector(f"file://{path}?size=8#sha256={sha256(path)}", context).info.sha256 == sha256(path)
    with pytest.raises(ValueError, match="expected sha256 0000"):
        load_detector(f"file://{path}#sha256={'0' * 64}", context)


def test_file_of_another_kind_is_an_error(context, tmp_path):
    (tmp_path / "text.pt").write_text("no network")
    with pytest.raises(ValueError, match="text.pt: expected a TorchScript file"):
        load_detector(str(tmp_path / "text.pt"), context)


@pytest.mark.parametrize(
    ("network", "message"),
    [(Picky(), "got an error: .*eight pixels"), (Scalars(), r"features: expected 'floats|features: expected floats")],
)
def test_network_that_does_not_fit_is_an_error_when_it_is_loaded(context, tmp_path, network, message):
    path = scripted(network, tmp_path / "my.pt")
    with pytest.raises(ValueError, match=message):
        load_detector(path, context)


# Pickles --------------------------------------------------------------------------------------------------------------


def archive():
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(Published()), file)
    return file.getvalue()


class Persistent:
    """Pickles as the published persistent objects do."""

    def __init__(self, state):
        self.state = state

    def __reduce__(self):
        description = {"type": "class", "version": 6, "module_src": "", "class_name": "Net", "state": self.state}
        return sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj, (description,)


@pytest.fixture
def published_module(monkeypatch):
    """Let pickle find the published function, which this project does not have, while it writes."""

    def _reconstruct_persistent_obj(description):
        raise AssertionError("executed")

    module = types.ModuleType("torch_utils.persistence")
    _reconstruct_persistent_obj.__module__ = module.__name__
    _reconstruct_persistent_obj.__qualname__ = "_reconstruct_persistent_obj"
    module._reconstruct_persistent_obj = _reconstruct_persistent_obj
    monkeypatch.setitem(sys.modules, module.__name__, module)


def test_archive_in_a_pickle_is_used(context, folder, images, published_module):
    state = {"blob": archive(), "name": "inception", "other": [b"PK\x03\x04 no archive"]}
    data = pickle.dumps({"net": Persistent(state)}, protocol=4)
    (folder / "inception-2015-12-05.pkl").write_bytes(data)
    detector = load_detector("inception", context)
    assert detector(images, "features").shape == (2, 6)
    assert detector.info.sha256 == hashlib.sha256(data).hexdigest()


def test_pickle_with_code_is_refused_and_not_executed(context, folder, tmp_path):
    class Harmful:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    (folder / "vgg16.pkl").write_bytes(pickle.dumps({"net": Harmful(), "blob": archive()}))
    with pytest.raises(ValueError, match="without executing what is in it .*mkdir.*Use the TorchScript file.*vgg16.pt"):
        load_detector("vgg16", context)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("content", [{"net": 1}, {"a": b"PK\x03\x04", "b": np.arange(3.0)}])
def test_pickle_without_an_archive_is_refused(tmp_path, content):
    path = tmp_path / "inception-2015-12-05.pkl"
    path.write_bytes(pickle.dumps(content))
    with pytest.raises(ValueError, match="expected one TorchScript archive in it, came 0.*inception-2015-12-05.pt"):
        open_program(str(path), str(path))
