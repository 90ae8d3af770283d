"""The script that inverts photos and makes videos: what it runs, passes over, survives and says.

Most tests give it a stand-in for Python, which writes down its calls; the last one runs the real commands.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from inference.inversion_results import RESULT_FILES
from tests.cli.running import REPO_ROOT, contents
from tests.helpers.photos import write_network, write_photos

SCRIPT = REPO_ROOT / "gen_pti_script.sh"
VARIABLES = (
    "NETWORK",
    "TARGET",
    "OUTDIR",
    "IDX",
    "STEPS",
    "STEPS_PTI",
    "MASK",
    "VGG",
    "SEED",
    "CFG",
    "W_FRAMES",
    "DEVICE",
)
# What happens to a photo is in its name: "bad", "broken", "crash", "stopped" or "slow"; "novideo" has no videos.
FAKE_PYTHON = f"""#!{sys.executable}
import json, os, pathlib, signal, sys, time
arguments = sys.argv[1:]
if arguments[0] == "-c":
    os.execv({sys.executable!r}, [{sys.executable!r}, *arguments])
here = pathlib.Path(__file__).parent
script, options = pathlib.Path(arguments[0]).resolve(strict=True), dict(zip(arguments[1::2], arguments[2::2]))
with open(here / "calls", "a") as file:
    file.write(json.dumps([script.name, *arguments[1:]]) + "\\n")
names = json.loads((here / "names.json").read_text())
if script.name == "projector.py":
    folders = [pathlib.Path(options["--outdir"]) / "net ö" / name for name in names]
    if arguments[-1] == "--dry-run":
        if "stopped" in options["--network"]:
            sys.exit(130)
        statuses = ["done" if (folder / "metrics.json").exists() else "new" for folder in folders]
        keys = ("index", "name", "folder", "status")
        photos = [dict(zip(keys, row)) for row in zip(range(99), names, map(str, folders), statuses)]
        print(json.dumps({{"photos": photos}}))
        sys.exit(0)
    number = int(options["--idx"])
    name, folder = names[number], folders[number]
    folder.mkdir(parents=True, exist_ok=True)
    if "bad" in name or "broken" in name:
        print("Error: cannot be read", file=sys.stderr)
        sys.exit(3 if "bad" in name else 1)
    if "stopped" in name:
        sys.exit(130)
    if "crash" in name:
        os.kill(os.getpid(), signal.SIGKILL)
    if "slow" in name and not (folder / "state").exists():
        def stop(*_):
            time.sleep(0.3)
            (folder / "state").write_text("saved")
            sys.exit(130)
        signal.signal(signal.SIGTERM, stop)
        (folder / "begun").write_text("")
        time.sleep(60)
    for file in ("latent.npz", "tuned.safetensors", "metrics.json"):
        (folder / file).write_text(file)
else:
    if "novideo" in options["--output"]:
        sys.exit(1)
    pathlib.Path(options["--output"]).write_text("video")
"""


def hear_ctrl_c():
    """Undo what a shell does that runs the tests in the background, in the child."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def start_script(script, arguments, folder, variables):
    """Start the script as a process group in a folder, with these of its variables alone."""
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    return subprocess.Popen(
        ["bash", str(script), *map(str, arguments)],
        cwd=folder,
        env=environment | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=hear_ctrl_c,
    )


class Stage:
    """A folder with a stand-in for Python, photos by name, and the output of runs."""

    def __init__(self, folder, names):
        self.folder, self.out = folder, folder / "out of it"
        (folder / "python").write_text(FAKE_PYTHON, encoding="utf-8")
        (folder / "python").chmod(0o755)
        (folder / "names.json").write_text(json.dumps(names))
        (folder / "my photos").mkdir()
        self.common = ["--network", "my net.pkl", "--outdir", str(self.out), "my photos"]

    def start(self, *arguments, script=SCRIPT, **variables):
        """Start the script as a process group."""
        variables = {"PYTHON": str(self.folder / "python"), **variables}
        return start_script(script, arguments, self.folder, variables)

    def run(self, *arguments, **options):
        """Run the script to its end; returns status and stderr."""
        process = self.start(*arguments, **options)
        out, errors = process.communicate(timeout=60)
        assert not out
        return process.returncode, errors

    def calls(self):
        """Return the calls since the last time, without the planning ones."""
        log = self.folder / "calls"
        calls = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
        log.unlink(missing_ok=True)
        return [call for call in calls if call[-1] != "--dry-run"]

    def photos(self):
        """Return what was done to which photo since the last time."""
        done = []
        for script, *arguments in self.calls():
            options = dict(zip(arguments[::2], arguments[1::2]))
            done.append(f"{script} {options.get('--idx') or options['--output'].rpartition('net ö/')[2]}")
        return done


@pytest.fixture
def stage(tmp_path):
    """Return a function that makes a stage of photos."""
    return lambda *names: Stage(tmp_path, list(names))


def test_help_shows_every_option_and_variable(stage):
    process = stage().start("--help")
    shown, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, "")
    source = SCRIPT.read_text(encoding="utf-8")
    options = re.findall(r"^        (--[a-z-]+)(?: \| --[a-z-]+)?\) [a-z_]+=\$2 ;;$", source, re.MULTILINE)
    assert len(options) == len(VARIABLES)
    for word in (*options, *VARIABLES, "--overwrite", "PYTHON"):
        assert re.search(rf"(?<![\w-]){word}(?![\w-])", shown), word
    read = re.findall(r"\$\{([A-Z_]+):-", source)
    assert set(read) - {"PYTHON"} == set(VARIABLES)
    for option, variable, default in re.findall(r"^  (--[a-z-]+) [A-Z]+ +([A-Z_]+) +(\S*)  ", shown, re.MULTILINE):
        assert f"${{{variable}:-{default}}}" in source, option


def test_photo_is_inverted_and_shown_before_and_after(stage):
    stage = stage("ä b")
    assert stage.run(*stage.common)[0] == 0
    folder = str(stage.out / "net ö" / "ä b")
    projector, before, after = stage.calls()
    assert projector == [
        *("projector.py", "--network", "my net.pkl", "--target", "my photos", "--outdir", str(stage.out)),
        *("--num-steps", "500", "--num-steps-pti", "350", "--seed", "303", "--device", "auto", "--idx", "0"),
    ]
    common = ["--latent", f"{folder}/latent.npz", "--cfg", "Head", "--w-frames", "240", "--device", "auto", "--output"]
    assert before == ["gen_videos.py", "--network", "my net.pkl", *common, f"{folder}/pre.mp4", "--overwrite"]
    assert after == [
        *("gen_videos.py", "--network", f"{folder}/tuned.safetensors", *common, f"{folder}/post.mp4", "--overwrite")
    ]


def test_options_beat_variables_and_others_go_to_the_projector(stage):
    stage = stage("a")
    variables = {
        "STEPS": "7",
        "SEED": "1",
        "MASK": "the masks",
        "NETWORK": "no",
        "W_FRAMES": "9",
        "OUTDIR": str(stage.out),
    }
    status, errors = stage.run(
        "--seed=2", "--network", "yes", "my photos", "--", "--space", "w", "--half", "true", **variables
    )
    assert status == 0, errors
    projector, before, _ = stage.calls()
    options = dict(zip(projector[1::2], projector[2::2]))
    assert (options["--num-steps"], options["--seed"], options["--network"]) == ("7", "2", "yes")
    assert (options["--mask"], options["--space"], options["--half"]) == ("the masks", "w", "true")
    assert before[before.index("--w-frames") + 1] == "9"


def test_what_is_done_is_passed_over(stage):
    stage = stage("a", "b")
    stage.run(*stage.common)
    assert len(stage.photos()) == 6
    assert stage.run(*stage.common)[0] == 0
    assert not stage.photos()
    (stage.out / "net ö" / "b" / "post.mp4").unlink()
    stage.run(*stage.common)
    assert stage.photos() == ["gen_videos.py b/post.mp4"]


def test_videos_are_made_again_when_their_options_or_the_inversion_change(stage):
    stage = stage("a")
    stage.run(*stage.common)
    stage.photos()
    stage.run(*stage.common, "--w-frames", "24")
    assert stage.photos() == ["gen_videos.py a/pre.mp4", "gen_videos.py a/post.mp4"]
    os.utime(stage.out / "net ö" / "a" / "latent.npz", (time.time() + 5, time.time() + 5))
    stage.run(*stage.common, "--w-frames", "24")
    assert stage.photos() == ["gen_videos.py a/pre.mp4", "gen_videos.py a/post.mp4"]


def test_failures_do_not_stop_the_others_and_are_listed(stage):
    stage = stage("bad one", "a", "crash", "novideo", "z")
    status, errors = stage.run(*stage.common)
    assert status == 1
    assert [
        call for call in stage.photos() if call.startswith("gen") and not call.split()[1].startswith("novideo")
    ] == [f"gen_videos.py {name}/{video}.mp4" for name in "az" for video in ("pre", "post")]
    assert errors.splitlines()[-5:] == [
        "gen_pti_script.sh: 4 failures among 5 photos:",
        *("  bad one (inversion)", "  crash (inversion)", "  novideo (video before tuning)"),
        "  novideo (video after tuning)",
    ]
    assert "Error: cannot be read" in errors


def test_error_that_concerns_all_photos_stops_at_once(stage):
    stage = stage("broken", "a")
    status, errors = stage.run(*stage.common)
    assert status == 1
    assert stage.photos() == ["projector.py 0"]
    assert errors.splitlines()[-1] == "  broken (inversion)"


@pytest.mark.parametrize(
    ("number", "whole_group", "status"),
    [
        (signal.SIGINT, True, 130),
        (signal.SIGINT, False, 130),
        (signal.SIGTERM, False, 143),
        (signal.SIGHUP, False, 143),
    ],
)
def test_stopped_script_lets_the_projector_save_and_goes_on_later(stage, number, whole_group, status):
    """Ctrl-C in a terminal goes to the whole group, other signals to the script alone."""
    stage = stage("a", "slow", "z")
    process = stage.start(*stage.common)
    folder = stage.out / "net ö" / "slow"
    deadline = time.monotonic() + 60
    while not (folder / "begun").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    if whole_group:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == status, errors
    assert errors.splitlines()[-1] == "gen_pti_script.sh: stopped; the same command goes on from here"
    assert (folder / "state").read_text() == "saved"  # it waited
    assert stage.photos()[-1] == "projector.py 1"
    assert stage.run(*stage.common)[0] == 0
    assert stage.photos()[:2] == ["projector.py 1", "gen_videos.py slow/pre.mp4"]


def test_script_that_is_called_by_a_link_finds_the_others(stage):
    stage = stage("a")
    (stage.folder / "pti").symlink_to(SCRIPT)
    status, errors = stage.run(*stage.common, script="./pti")
    assert status == 0, errors
    assert len(stage.photos()) == 3


def test_ctrl_c_while_planning_is_no_wrong_option(stage):
    stage = stage("a")
    assert stage.run("--network", "stopped", "my photos")[0] == 130
    assert not stage.photos()


def test_ctrl_c_that_only_the_projector_hears_stops_the_script_too(stage):
    stage = stage("stopped", "z")
    status, errors = stage.run(*stage.common)
    assert status == 130
    assert errors.splitlines()[-1] == "gen_pti_script.sh: stopped; the same command goes on from here"
    assert stage.photos() == ["projector.py 0"]


@pytest.mark.parametrize(
    ("arguments", "culprit"),
    [
        (["--no-such-option", "3"], "--no-such-option: expected an option of this script"),
        (["--network"], "--network: expected a value"),
        (["--w-frames", "0"], "--w-frames: expected a number above 0, came '0'"),
        (["one", "two"], "expected one target, came 2; the last is two"),
        (["no such folder"], "there is no no such folder"),
        (["--idx"], "--idx: expected a value"),
    ],
)
def test_wrong_option_is_one_line(stage, arguments, culprit):
    stage = stage("a")
    status, errors = stage.run(*arguments)
    assert status == 2
    assert culprit in errors
    assert len(errors.splitlines()) == 1
    assert not stage.calls()


# The real commands ----------------------------------------------------------------------------------------------------


class RealRun:
    """Runs of the script with the real commands, in a folder with blanks in its names."""

    def __init__(self, folder, network):
        self.folder, self.network = folder, network
        self.photos = write_photos(folder / "my photos", ["a ü.png", "bad.png"])
        (self.photos / "bad.png").write_bytes(b"no picture")
        if not network.startswith("init:"):
            write_network(folder / network)

    def start(self, outdir):
        """Start the script."""
        variables = {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "STEPS": "12", "STEPS_PTI": "2"}
        options = ["--network", self.network, "--outdir", outdir, "--w-frames", "2", "my photos"]
        return start_script(SCRIPT, [*options, "--", "--video-interval", "4"], self.folder, variables)


@pytest.mark.slow
@pytest.mark.parametrize("network", ["init:debug", "net ö.safetensors"])
def test_real_flow_is_interrupted_goes_on_and_survives_a_bad_photo(tmp_path, network):
    flow = RealRun(tmp_path, network)
    process = flow.start("stopped")
    deadline = time.monotonic() + 300
    while not list((tmp_path / "stopped").rglob("frames/w-000004.jpg")) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 130, errors
    assert "a ü: stopped after latent step" in errors
    assert "Traceback" not in errors

    made = {}
    for outdir in ("stopped", "whole"):
        process = flow.start(outdir)
        _, errors = process.communicate(timeout=600)
        assert process.returncode == 1, errors
        assert errors.splitlines()[-2:] == ["gen_pti_script.sh: 1 failure among 2 photos:", "  bad (inversion)"]
        assert ("goes on where it stopped" in errors) == (outdir == "stopped")
        made[outdir] = results(tmp_path / outdir)
    assert made["stopped"] == made["whole"]
    names = {name.rpartition("/")[2] for name in made["whole"]}
    assert names == {"pre.mp4", ".pre.options", "post.mp4", ".post.options", *RESULT_FILES} - {
        "metrics.json",
        "tuned_full.safetensors",
    }


def results(folder):
    """Return the files of a folder, but for measurements of time."""
    return {name: file for name, file in contents(folder).items() if not name.endswith("metrics.json")}
