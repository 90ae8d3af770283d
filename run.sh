#!/usr/bin/env bash
# Run a command of this project, after setting everything up where that has not been done yet:
#   ./run.sh python gen_samples.py --network init:debug --seeds 0-3 --outdir out
#   ./run.sh pytest
# It uses the active virtual or conda environment, and otherwise makes .venv beside this file.
# PYTHON chooses the interpreter that .venv is made with (at least 3.10).
# Paths stay relative to the caller's directory; a script or test that is not there is taken from this one.
set -euo pipefail

tested_torch=2.13.0
cpu_index=https://download.pytorch.org/whl/cpu
lock_name=.spherehead-setup.lock
root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)

say() { printf 'run.sh: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }

# --- which environment ------------------------------------------------------------------------------------------------

is_new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; }
can_make_venv() { is_new_enough "$1" && "$1" -c 'import venv, ensurepip' 2>/dev/null; }

find_python() {
    local candidate
    for candidate in ${PYTHON:+"$PYTHON"} python3 python python3.13 python3.12 python3.11 python3.10; do
        if command -v "$candidate" >/dev/null && can_make_venv "$candidate"; then
            printf '%s\n' "$candidate"
            return
        fi
        if [[ $candidate == "${PYTHON:-}" ]]; then
            die "PYTHON=$PYTHON: expected Python 3.10 or newer that has the venv module"
        fi
    done
    die "expected Python 3.10 or newer with the venv module (on Debian and Ubuntu: apt install python3-venv)"
}

choose_environment() {
    ours=false
    if [[ -n ${VIRTUAL_ENV:-} && -x $VIRTUAL_ENV/bin/python ]]; then
        env=$VIRTUAL_ENV
    elif [[ -n ${CONDA_PREFIX:-} && ${CONDA_DEFAULT_ENV:-} != base && -x $CONDA_PREFIX/bin/python ]]; then
        env=$CONDA_PREFIX  # but never conda's own base environment
    else
        env=$root/.venv
        if [[ -e $env/.made-by-run.sh || ! -d $env || -z $(find "$env" -mindepth 1 ! -name "$lock_name" | head -n 1) ]]; then
            ours=true
        elif [[ ! -x $env/bin/python ]]; then
            die "$env: expected a working environment, or none; came something that run.sh did not make"
        fi
    fi
    python=$env/bin/python
    stamp=$env/.spherehead-setup
}

# --- set-up -----------------------------------------------------------------------------------------------------------

wanted_stamp() { printf '%s\n' "$root" "torch $tested_torch" "$("$python" -V 2>&1)" "$(cksum <"$root/pyproject.toml")"; }
is_ready() { [[ -x $python && -f $stamp ]] && [[ $(<"$stamp") == "$(wanted_stamp)" ]]; }
has_torch() {
    "$1" -c 'import sys, torch; sys.exit(tuple(int(n) for n in torch.__version__.split(".")[:2]) < (2, 4))' 2>/dev/null
}
pip_install() { "$python" -m pip install -qq --disable-pip-version-check --no-input "$@"; }

make_environment() {
    # No stamp means that an earlier set-up broke off: start over rather than guess what is whole.
    # A moved checkout needs a new one too: console scripts hold absolute paths.
    if [[ -f $stamp && $(head -n 1 "$stamp") == "$root" ]] && "$python" -m pip --version >/dev/null 2>&1; then
        return
    fi
    local base
    base=$(find_python)
    mkdir -p "$env"
    touch "$env/.made-by-run.sh"
    find "$env" -mindepth 1 -maxdepth 1 ! -name "$lock_name" ! -name .made-by-run.sh -exec rm -rf {} +
    if has_torch "$base"; then
        "$base" -m venv --system-site-packages "$env"
    else
        "$base" -m venv "$env"
    fi
}

install_torch() {
    local index=()
    if [[ $(uname -s) == Linux ]] && ! nvidia-smi -L >/dev/null 2>&1; then
        # The CPU builds have an index of their own, and their version x.y.z+cpu wins over x.y.z. Asking first is
        # quicker than pip's retries where that host cannot be reached; pip's own index then has to do.
        if "$python" - "$cpu_index/torch/" <<'PROBE' 2>/dev/null; then
import os, ssl, sys, urllib.request
context = ssl.create_default_context(cafile=os.environ.get("PIP_CERT") or os.environ.get("REQUESTS_CA_BUNDLE"))
urllib.request.urlopen(sys.argv[1], timeout=5, context=context).close()
PROBE
            index=(--extra-index-url "$cpu_index")
        fi
    fi
    pip_install "torch==$tested_torch" ${index[@]+"${index[@]}"}
}

set_up() {
    say "setting up $env (a few minutes, once)"
    if [[ $ours == true ]]; then
        make_environment
    fi
    is_new_enough "$python" || die "$python: expected Python 3.10 or newer, came $("$python" -V 2>&1)"
    rm -f "$stamp"
    has_torch "$python" || install_torch
    pip_install --editable "${root}[meshes,plots,test]"
    has_torch "$python" || die "torch does not import in $env; see: $python -c 'import torch'"
    wanted_stamp >"$stamp.tmp"
    mv "$stamp.tmp" "$stamp"
    say "ready: $("$python" -V), torch $("$python" -c 'import torch; print(torch.__version__)')"
}

ensure_set_up() {
    is_ready && return
    mkdir -p "$env"
    exec 9>"$env/$lock_name"
    if command -v flock >/dev/null; then
        flock --nonblock 9 || { say "waiting for another set-up of $env"; flock 9; }
    fi
    if ! is_ready; then
        # In a subshell of its own, because set -e does not hold inside a condition.
        set +e
        (set -e; set_up)
        local status=$?
        set -e
        [[ $status == 0 ]] || die "the set-up failed (see above); the next run starts it again"
    fi
    exec 9>&-
}

# --- the command ------------------------------------------------------------------------------------------------------

run_pytest() {
    # From the root, so that its settings and test paths apply; paths that exist for the caller are made absolute.
    local argument arguments=() caller=$PWD
    for argument in "$@"; do
        if [[ $caller != "$root" && $argument != /* && $argument != -* && -e $caller/${argument%%::*} ]]; then
            argument=$caller/$argument
        fi
        arguments+=("$argument")
    done
    cd -- "$root"
    exec "$python" -m pytest ${arguments[@]+"${arguments[@]}"}
}

main() {
    [[ $# -gt 0 ]] || die "expected a command, such as: ./run.sh pytest"
    choose_environment
    ensure_set_up
    export VIRTUAL_ENV=$env PATH=$env/bin:$PATH
    unset PYTHONHOME
    case $1 in
        pytest)
            shift
            run_pytest "$@"
            ;;
        python | python3)
            shift
            if [[ ${1:-} == *.py && $1 != /* && ! -e $1 && -e $root/$1 ]]; then
                set -- "$root/$1" "${@:2}"
            fi
            exec "$python" "$@"
            ;;
        *) exec "$@" ;;
    esac
}

main "$@"
