"""Parameter types, shared options and one-line errors."""

import dataclasses
import errno
import json
from pathlib import Path

import click
import numpy as np
import pytest
from click.testing import CliRunner

from dnnlib import cli


def run(decorator, *arguments):
    """Return the parameters that a command with ``decorator`` receives, or the text of its error."""
    received = {}

    @click.command()
    @decorator
    def command(**parameters):
        received.update(parameters)

    result = CliRunner().invoke(command, arguments)
    return received if result.exit_code == 0 else result.output


@pytest.mark.parametrize(
    ("text", "seeds"),
    [
        ("0-3,7", [0, 1, 2, 3, 7]),
        ("5", [5]),
        (" 1 , 2 - 4 ", [1, 2, 3, 4]),
        ("3,3,1", [3, 3, 1]),
        ("7-7", [7]),
        ("4294967295", [4294967295]),
    ],
)
def test_parse_seeds_valid_gives_the_list(text, seeds):
    assert cli.parse_seeds(text) == seeds


@pytest.mark.parametrize(
    ("text", "token"),
    [
        ("3-1", "'3-1'"),
        ("a", "'a'"),
        ("1,b-2", "'b-2'"),
        ("-1", "'-1'"),
        ("1--2", "'1--2'"),
        ("1-2-3", "'1-2-3'"),
        ("1.5", "'1.5'"),
        ("", "''"),
        ("1,,2", "''"),
        ("0-1000000", "'0-1000000'"),
        ("0-999999,5", "'5'"),
        ("4294967296", "'4294967296'"),
        ("9" * 5000, "'9999"),
        ("٣", "'٣'"),
    ],
)
def test_parse_seeds_invalid_raises_and_names_the_token(text, token):
    with pytest.raises(ValueError, match="seeds: expected") as raised:
        cli.parse_seeds(text)
    assert token in str(raised.value)
    assert len(str(raised.value)) < 200


def test_seeds_option_gives_a_list_or_a_usage_error():
    assert run(cli.seeds_option(), "--seeds", "0-1,9") == {"seeds": [0, 1, 9]}
    assert run(cli.seeds_option(required=False)) == {"seeds": None}
    assert "'3-1'" in run(cli.seeds_option(), "--seeds", "3-1")


@pytest.mark.parametrize("text", ["0,0,0.2", "0 0 .2", " 0, 0 ,2e-1 "])
def test_vec3_valid_gives_a_tuple(text):
    assert cli.VEC3.convert(text, None, None) == (0.0, 0.0, 0.2)


@pytest.mark.parametrize("text", ["0,0", "0,0,0,0", "0,0,nan", "0,inf,0", "0,x,0", "", "0,,0"])
def test_vec3_invalid_raises_bad_parameter(text):
    with pytest.raises(click.BadParameter, match="expected 3 (finite )?numbers"):
        cli.VEC3.convert(text, None, None)


@pytest.mark.parametrize(("text", "grid"), [("4x2", (4, 2)), ("1X1", (1, 1)), ("3,2", (3, 2)), (" 4 x 2 ", (4, 2))])
def test_grid_valid_gives_columns_and_rows(text, grid):
    assert cli.Grid().convert(text, None, None) == grid


@pytest.mark.parametrize("text", ["4", "0x1", "4x", "-1x2", "4x2x1", "axb", "1.5x2", ""])
def test_grid_invalid_raises_bad_parameter(text):
    with pytest.raises(click.BadParameter, match="expected COLUMNSxROWS"):
        cli.Grid().convert(text, None, None)


@pytest.mark.parametrize("text", ["auto", "cpu", "cuda", "cuda:3", "CUDA:0"])
def test_device_option_valid_gives_the_lower_case_name(text):
    assert run(cli.device_option(), "--device", text) == {"device": text.lower()}


@pytest.mark.parametrize("text", ["gpu", "cuda:", "cuda:x", "cuda:-1", ""])
def test_device_option_invalid_is_a_usage_error(text):
    assert "expected auto, cpu, cuda or cuda:N" in run(cli.device_option(), "--device", text)


@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "x", "1e999"])
def test_finite_float_invalid_raises_bad_parameter(text):
    with pytest.raises(click.BadParameter):
        cli.FiniteFloat().convert(text, None, None)


def test_positive_float_excludes_zero():
    assert cli.POSITIVE_FLOAT.convert("18.837", None, None) == 18.837
    with pytest.raises(click.BadParameter):
        cli.POSITIVE_FLOAT.convert("0", None, None)


@pytest.mark.parametrize(("text", "suffix"), [("glb", "glb"), (".glb", "glb"), (".PLY", "ply"), ("Mrc", "mrc")])
def test_suffix_valid_gives_it_in_lower_case_without_the_dot(text, suffix):
    taken = run(cli.option("--shape-format", type=cli.Suffix(["ply", "glb", "mrc"])), "--shape-format", text)
    assert taken == {"shape_format": suffix}


@pytest.mark.parametrize("text", ["stl", "", ".", "..ply", "ply.", "p"])
def test_suffix_other_is_a_usage_error_that_lists_the_known(text):
    shown = run(cli.option("--shape-format", type=cli.Suffix(["ply", "glb"])), "--shape-format", text)
    assert "Invalid value for '--shape-format'" in shown
    assert "'ply', 'glb'" in shown


@pytest.mark.parametrize("flag", ["--image-mode", "--image_mode"])
def test_option_snake_case_alias_is_accepted(flag):
    assert run(cli.option("--image-mode"), flag, "x") == {"image_mode": "x"}


@pytest.mark.parametrize(
    ("flag", "value"), [("--a-b", True), ("--a_b", True), ("--no-a-b", False), ("--no_a_b", False)]
)
def test_option_on_off_flag_has_both_aliases(flag, value):
    assert run(cli.option("--a-b/--no-a-b", default=None), flag) == {"a_b": value}


def test_option_help_shows_the_kebab_case_alone():
    command = click.command()(cli.option("--image-mode", "-m", default="image")(lambda image_mode: None))
    shown = CliRunner().invoke(command, ["--help"]).output
    assert "--image-mode" in shown
    assert "-m" in shown
    assert "image_mode" not in shown


@pytest.mark.parametrize(
    ("arguments", "value"),
    [
        ((), False),
        (("--reload-modules",), True),
        (("--reload_modules", "True"), True),
        (("--reload-modules", "false"), False),
        (("--reload_modules=1",), True),
        (("--reload-modules", "--other", "1"), True),
    ],
)
def test_bool_option_value_is_optional(arguments, value):
    both = cli.group(cli.bool_option("--reload-modules", default=False), cli.option("--other"))
    assert run(both, *arguments)["reload_modules"] is value


def test_bool_option_wrong_value_is_a_usage_error():
    assert "maybe" in run(cli.bool_option("--shapes", default=False), "--shapes", "maybe")


@pytest.mark.parametrize(
    "arguments", [(), ("--reload-modules",), ("--reload_modules", "True"), ("--reload_modules=1",)]
)
def test_reload_modules_option_true_is_accepted_and_passes_nothing(arguments):
    assert run(cli.reload_modules_option(), *arguments) == {}


@pytest.mark.parametrize("arguments", [("--reload-modules", "false"), ("--reload_modules=False",)])
def test_reload_modules_option_false_is_a_usage_error_that_says_why(arguments):
    assert "code stored in a network file is never run" in run(cli.reload_modules_option(), *arguments)


def test_network_option_is_the_bundled_network_by_default_and_not_blank():
    assert run(cli.network_option(), "--network", "init:debug") == {"network": "init:debug"}
    assert run(cli.network_option()) == {"network": "demo"}
    assert "came nothing" in run(cli.network_option(), "--network", " ")


@pytest.mark.parametrize("flag", ["--trunc", "--truncation", "--truncation-psi", "--truncation_psi"])
@pytest.mark.parametrize("cutoff_flag", ["--trunc-cutoff", "--trunc_cutoff", "--truncation-cutoff"])
def test_truncation_options_aliases_set_the_same_parameters(flag, cutoff_flag):
    given = run(cli.truncation_options(), flag, "0.5", cutoff_flag, "3")
    assert given == {"truncation_psi": 0.5, "truncation_cutoff": 3}


def test_truncation_options_defaults_are_those_of_the_script():
    assert run(cli.truncation_options(psi=0.7)) == {"truncation_psi": 0.7, "truncation_cutoff": 14}


def test_noise_options_defaults_are_repeatable():
    assert run(cli.noise_options()) == {"noise_mode": "const", "noise_seed": 0}
    assert "'fresh'" in run(cli.noise_options(), "--noise-mode", "fresh")


def test_output_options_give_a_path_and_flags():
    given = run(cli.output_options(), "--outdir", "out", "--dry-run")
    assert given == {"outdir": Path("out"), "overwrite": False, "dry_run": True}
    assert "Missing option '--outdir'" in run(cli.output_options(required=True))


class OutOfMemoryError(RuntimeError):
    """Named as PyTorch names its own."""


@pytest.mark.parametrize(
    ("error", "message", "exit_code"),
    [
        (ValueError("seeds:\n expected"), "Error: seeds: expected", 1),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "a.pkl"), "Error: a.pkl: No such file", 1),
        (
            OSError(errno.ENOSPC, "No space left on device", "a.mp4"),
            "Error: no space left on the disk while writing a",
            1,
        ),
        (OSError("plain"), "Error: plain", 1),
        (MemoryError(), "Error: out of memory: MemoryError", 1),
        (OutOfMemoryError("CUDA out of memory"), "Error: out of memory: CUDA", 1),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "Error: out of memory", 1),
        (KeyboardInterrupt(), "Error: interrupted", 130),
    ],
)
def test_cli_errors_known_becomes_one_line(error, message, exit_code):
    @click.command()
    @cli.cli_errors()
    def command():
        raise error

    result = CliRunner().invoke(command)
    assert result.output.startswith(message)
    assert len(result.output.splitlines()) == 1
    assert result.exit_code == exit_code


@pytest.mark.parametrize("error", [RuntimeError("shape"), KeyError("k"), TypeError("t"), NotImplementedError("n")])
def test_cli_errors_fault_of_the_program_keeps_its_traceback(error):
    with pytest.raises(type(error)), cli.cli_errors():
        raise error


def test_cli_errors_variable_keeps_the_traceback(monkeypatch):
    monkeypatch.setenv("SPHEREHEAD_TRACEBACK", "1")
    with pytest.raises(ValueError, match="whole"), cli.cli_errors():
        raise ValueError("whole")


@pytest.mark.parametrize("error", [click.Abort(), click.exceptions.Exit(3), BrokenPipeError(), click.UsageError("u")])
def test_cli_errors_click_handles_its_own(error):
    with pytest.raises(type(error)), cli.cli_errors():
        raise error


def test_print_dry_run_prints_json(capsys):
    @dataclasses.dataclass
    class Request:
        outdir: Path

    cli.print_dry_run({"seeds": [0, 1], "request": Request(Path("out")), "psi": np.float32(0.5), "size": (1, 2)})
    expected = {"seeds": [0, 1], "request": {"outdir": "out"}, "psi": 0.5, "size": [1, 2]}
    assert json.loads(capsys.readouterr().out) == expected
    with pytest.raises(TypeError, match="came object"):
        cli.print_dry_run({"a": object()})
