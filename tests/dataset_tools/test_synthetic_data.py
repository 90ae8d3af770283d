"""The data name `synth`: what it stands for, and that it is made once."""

from __future__ import annotations

from pathlib import Path

import pytest

from dataset_tools.synthetic_data import SyntheticData, names_synthetic_data
from training.dataset import HeadDataset


def parse(name: str, **options) -> SyntheticData:
    return SyntheticData.parse([name], [], Path("parent"), 16, **options)


def test_names_synthetic_data_tells_the_name_from_folders():
    assert names_synthetic_data(["synth"]) and names_synthetic_data(["imgs.zip", "synth:3x2"])
    assert not names_synthetic_data(["./synth"]) and not names_synthetic_data(["synthetic.zip"])


def test_parse_sizes_come_from_the_name_or_else_from_the_caller():
    assert parse("synth:3x2").request.num_images == 6
    assert parse("synth", size=(5, 4)).request.num_images == 20
    assert parse("synth:3x2").folder == Path("parent/synthetic-heads-16px-3x2")


@pytest.mark.parametrize("name", ["synth:", "synth:0x2", "synth:3", "synth:axb"])
def test_parse_malformed_name_is_refused(name):
    with pytest.raises(ValueError, match=r"--data: expected synth or synth:IDENTITIESxVIEWS.*" + name):
        parse(name)


@pytest.mark.parametrize(("images", "masks"), [(["synth", "imgs.zip"], []), (["synth"], ["masks.zip"])])
def test_parse_other_data_besides_is_refused(images, masks):
    with pytest.raises(ValueError, match="--data synth: expected no other data, it brings its masks"):
        SyntheticData.parse(images, masks, Path(), 16)


def test_make_shows_a_bar_once_and_then_finds_its_files(tmp_path, capsys):
    data = SyntheticData.parse(["synth:2x2"], [], tmp_path, 16)
    data.make()
    assert "synthetic heads" in capsys.readouterr().err
    dataset = HeadDataset(data.config)
    assert len(dataset) == 4 and dataset.has_masks
    data.make()
    assert capsys.readouterr().err == ""


def test_make_without_progress_is_silent(tmp_path, capsys):
    data = SyntheticData.parse(["synth:1x1"], [], tmp_path, 16)
    data.make(progress=False)
    assert capsys.readouterr().err == "" and (data.folder / "images.zip").is_file()
