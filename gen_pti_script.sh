#!/usr/bin/env bash
# Invert photos, and show each head turning before and after tuning; see usage below.
set -euo pipefail

script=$(readlink -f -- "${BASH_SOURCE[0]}") || script=${BASH_SOURCE[0]}  # it may be called by a link
root=$(cd -- "$(dirname -- "$script")" && pwd -P)

usage() {
    cat <<'USAGE'
Usage: bash gen_pti_script.sh [options] [TARGET] [-- options of projector.py]

Invert photos, and make two videos of each head, before and after tuning. TARGET is a folder with dataset.json (also in
folders below it), or one photo (with `-- --camera ...` if there is no dataset.json beside it).

  option                variable     default    meaning
  --network NETWORK     NETWORK      demo       network: file, URL, init:PRESET, or the bundled one
  --target TARGET       TARGET       photos     the same as TARGET
  --outdir OUTDIR       OUTDIR       out/pti    results go to OUTDIR/<network>/<photo>
  --idx LIST            IDX          all        which photos: numbers and ranges such as 0,2-5, or all
  --steps N             STEPS        500        steps that search the latent
  --steps-pti N         STEPS_PTI    350        steps that tune the network
  --mask MASK           MASK                    mask of one photo, or folder of masks
  --vgg FILE            VGG                     published perceptual distance (TorchScript file or URL)
  --seed N              SEED         303        of all random numbers
  --cfg PATH            CFG          Head       camera path of the videos
  --w-frames N          W_FRAMES     240        frames of each video
  --device DEVICE       DEVICE       auto       auto, cpu, cuda or cuda:N
  --overwrite                                   replace results of other settings
  --help

PYTHON chooses the interpreter; else it is that of the active environment, or else of run.sh beside this script.

Each photo's folder gets what projector.py writes (latent.npz, tuned.safetensors, strip.png, metrics.json, ...), and
pre.mp4 and post.mp4. What is done is skipped. Stopped at any moment (Ctrl-C, kill), the same command goes on. A photo
that fails does not stop the others; failures are listed at the end.

Exit status: 0 all is there; 1 something failed; 2 wrong options; 130 or 143 stopped by Ctrl-C or SIGTERM.

Examples:
  bash gen_pti_script.sh photos
  bash gen_pti_script.sh --network spherehead.pkl --outdir "my heads" --idx 0,2-5 photos -- --space w --half
  NETWORK=init:debug STEPS=20 STEPS_PTI=10 W_FRAMES=24 bash gen_pti_script.sh photos
USAGE
}

say() { printf '%s\n' "gen_pti_script.sh: $*" >&2; }
refuse() { say "$*"; exit 2; }

# --- options ----------------------------------------------------------------------------------------------------------

network=${NETWORK:-demo} target=${TARGET:-photos} outdir=${OUTDIR:-out/pti} idx=${IDX:-all}
steps=${STEPS:-500} steps_pti=${STEPS_PTI:-350} mask=${MASK:-} vgg=${VGG:-} seed=${SEED:-303}
cfg=${CFG:-Head} w_frames=${W_FRAMES:-240} device=${DEVICE:-auto}
overwrite=() extra=()

set_option() {
    case $1 in
        --network) network=$2 ;;
        --target) target=$2 ;;
        --outdir) outdir=$2 ;;
        --idx) idx=$2 ;;
        --steps | --num-steps) steps=$2 ;;
        --steps-pti | --num-steps-pti) steps_pti=$2 ;;
        --mask) mask=$2 ;;
        --vgg) vgg=$2 ;;
        --seed) seed=$2 ;;
        --cfg) cfg=$2 ;;
        --w-frames) w_frames=$2 ;;
        --device) device=$2 ;;
        *) refuse "$1: expected an option of this script (see --help); those of projector.py stand behind --" ;;
    esac
}

read_options() {
    local targets=0
    while [[ $# -gt 0 ]]; do
        case $1 in
            -h | --help) usage; exit 0 ;;
            --overwrite) overwrite=(--overwrite); shift ;;
            --) shift; extra=("$@"); break ;;
            --*=*) set_option "${1%%=*}" "${1#*=}"; shift ;;
            -*)
                [[ $# -gt 1 ]] || { set_option "$1" ''; refuse "$1: expected a value behind it, came nothing"; }
                set_option "$1" "$2"
                shift 2
                ;;
            *) target=$1; targets=$((targets + 1)); shift ;;
        esac
    done
    [[ " ${extra[*]-} " != *" --dry-run "* ]] || refuse "--dry-run: expected projector.py for that, not this script"
    [[ $targets -le 1 ]] || refuse "expected one target, came $targets; the last is $target"
    [[ $w_frames =~ ^[1-9][0-9]*$ ]] || refuse "--w-frames: expected a number above 0, came '$w_frames'"
    [[ -e $target ]] || refuse "target: expected a folder of photos or a photo, but there is no $target (see --help)"
}

# --- processes --------------------------------------------------------------------------------------------------------

choose_python() {
    local candidate
    if [[ -n ${PYTHON:-} ]]; then
        python=("$PYTHON")
        return
    fi
    for candidate in python python3; do
        if "$candidate" -c 'import sys; from importlib.util import find_spec as f; sys.exit(not (f("torch") and f("click")))' \
            >/dev/null 2>&1; then
            python=("$candidate")
            return
        fi
    done
    python=("$root/run.sh" python)
}

child='' stopped=''

# shellcheck disable=SC2329  # the traps below call it
stop() {
    stopped=$1
    say "stopping; what was done so far is kept"
    if [[ -n $child ]]; then
        kill -TERM "$child" 2>/dev/null || true  # in the background it does not get Ctrl-C by itself
    fi
}

run() {  # a command that may be stopped at any moment; in the background, because a trap does not interrupt others
    local status=0
    [[ -z $stopped ]] || return 130
    "$@" </dev/null &
    child=$!
    [[ -z $stopped ]] || kill -TERM "$child" 2>/dev/null || true  # it came just before
    while :; do
        status=0
        wait "$child" || status=$?
        kill -0 "$child" 2>/dev/null || break  # else a signal ended the waiting, and the child is still saving
    done
    child=''
    [[ $status != 130 || -n $stopped ]] || stopped=INT  # heard by the child alone
    return "$status"
}

# --- one photo --------------------------------------------------------------------------------------------------------

project() {
    run "${python[@]}" "$root/projector.py" "${projection[@]}" ${overwrite[@]+"${overwrite[@]}"} --idx "$1"
}

video() {  # name, network, folder of the photo
    local file=$3/$1.mp4 note=$3/.$1.options
    local -a options=(--latent "$3/latent.npz" --cfg "$cfg" --w-frames "$w_frames" --device "$device")
    local text="$cfg $w_frames"
    if [[ -f $file && -f $note && $(<"$note") == "$text" && $file -nt $3/latent.npz && $file -nt $3/tuned.safetensors ]]
    then
        return 0
    fi
    rm -f -- "$note"
    run "${python[@]}" "$root/gen_videos.py" --network "$2" "${options[@]}" --output "$file" --overwrite || return
    printf '%s\n' "$text" >"$note"
}

one_photo() {  # number, name, folder, status; an error has been printed where it fails
    local status=0
    if [[ $4 != 'done' ]]; then
        project "$1" || status=$?
        if [[ $status != 0 ]]; then
            failures+=("$2 (inversion)")
            # 3 is about this photo; 1 and 2 are about all of them, such as a network that is not there.
            [[ $status != 1 && $status != 2 ]] || fatal=true
            return
        fi
    fi
    video pre "$network" "$3" || failures+=("$2 (video before tuning)")
    [[ -z $stopped ]] || return 0
    video post "$3/tuned.safetensors" "$3" || failures+=("$2 (video after tuning)")
}

# --- all --------------------------------------------------------------------------------------------------------------

# Prints number, name, folder and status of each photo, each ended by a zero byte.
list_photos='
import json, os, sys
for photo in json.load(sys.stdin)["photos"]:
    for field in ("index", "name", "folder", "status"):
        sys.stdout.buffer.write(os.fsencode(str(photo[field])) + b"\0")
'

main() {
    read_options "$@"
    choose_python
    projection=(--network "$network" --target "$target" --outdir "$outdir" --num-steps "$steps")
    projection+=(--num-steps-pti "$steps_pti" --seed "$seed" --device "$device")
    [[ -z $mask ]] || projection+=(--mask "$mask")
    [[ -z $vgg ]] || projection+=(--vgg "$vgg")
    projection+=(${extra[@]+"${extra[@]}"})

    local plan number name folder status=0
    plan=$("${python[@]}" "$root/projector.py" "${projection[@]}" --idx "$idx" --dry-run) || status=$?
    [[ $status -lt 128 ]] || exit "$status"  # stopped
    [[ $status == 0 ]] || exit 2
    local -a numbers=() names=() folders=() statuses=()
    while IFS= read -r -d '' number && IFS= read -r -d '' name && IFS= read -r -d '' folder && IFS= read -r -d '' status
    do
        numbers+=("$number") names+=("$name") folders+=("$folder") statuses+=("$status")
    done < <(printf '%s' "$plan" | "${python[@]}" -c "$list_photos")
    [[ ${#numbers[@]} -gt 0 ]] || { say "expected photos in the plan of projector.py, came none"; exit 1; }

    trap 'stop INT' INT
    trap 'stop TERM' TERM HUP
    local i total=${#numbers[@]} photos="${#numbers[@]} photos"
    [[ $total -gt 1 ]] || photos="1 photo"
    failures=() fatal=false
    for ((i = 0; i < total; i++)); do
        say "photo $((i + 1)) of $total: ${names[i]}"
        one_photo "${numbers[i]}" "${names[i]}" "${folders[i]}" "${statuses[i]}"
        if [[ -n $stopped ]]; then
            say "stopped; the same command goes on from here"
            [[ $stopped == INT ]] && exit 130
            exit 143
        fi
        if [[ $fatal == true ]]; then
            break
        fi
    done
    if [[ ${#failures[@]} -gt 0 ]]; then
        local count="${#failures[@]} failures"
        [[ ${#failures[@]} -gt 1 ]] || count="1 failure"
        say "$count among $photos:"
        printf '  %s\n' "${failures[@]}" >&2
        exit 1
    fi
    say "done: $photos in $outdir"
    exit 0  # bash reads on where it was in the file, which may have been replaced in the hours since
}

main "$@"
