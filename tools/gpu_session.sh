#!/usr/bin/env bash
# Everything that needs a GPU, without a network, in three calls of at most ten minutes each:
#     tools/gpu_session.sh [tests|times|counters|PART ...] [--folder FOLDER] [--archive FILE.tgz]
# tests: the tests, then memcheck, racecheck and initcheck of one case of each kernel; times: each kernel, then the
# target cases against everyone, flex_attention last, since its compiler takes its time; counters: Nsight Compute.
# Without a name, all three run (`make gpu`); a part can be named alone, as in the log. Each part has a limit of its own.
# What it printed and measured stays in the folder (docs/results/<gpu>-<date>), also if it fails, and then the exit code
# is 1 at the end; the archive holds the folder and is renewed after every part.
set -uo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-.venv/bin/python}
[ -x "$PYTHON" ] || PYTHON=$(command -v python3)
declare -A parts=(
    [tests]="pytest memcheck racecheck initcheck"
    [times]="kernels-float16 kernels-bfloat16 kernels-float32 targets compiled flex"
    [counters]="counters-float16 counters-table"
)
known=" ${parts[tests]} ${parts[times]} ${parts[counters]} "
chosen='' out='' archive=''
while [ $# -gt 0 ]; do
    case $1 in
        tests | times | counters) chosen+=" ${parts[$1]} " ;;
        --folder) out=${2:?} && shift ;;
        --archive) archive=${2:?} && shift ;;
        *)
            [[ $known == *" $1 "* ]] ||
                { echo "gpu_session: error: got '$1'; give tests, times, counters, one of$known, --folder or --archive." >&2; exit 2; }
            chosen+=" $1 "
            ;;
    esac
    shift
done
chosen=${chosen:-$known}

# The working directory must not come first in the path of modules: its zoo/ would hide the links below.
export PYTHONSAFEPATH=1
# Where nothing could be installed, the folders under their import names will do.
if ! (cd / && "$PYTHON" -c 'import zoo.kernels, zoo.tools') 2>/dev/null; then
    links=$(mktemp -d)
    trap 'rm -rf "$links"' EXIT
    mkdir "$links/zoo"
    ln -s "$PWD"/zoo/* "$PWD/kernels" "$PWD/recipes" "$PWD/tools" "$links/zoo/"
    ln -s "$PWD/checkpoints" "$links/zoo/manifest"
    export PYTHONPATH=$links${PYTHONPATH:+:$PYTHONPATH}
fi

gpu=$("$PYTHON" -c 'import torch; print(torch.cuda.get_device_name().replace(" ", "-") if torch.cuda.is_available() else "")')
if [ -z "$gpu" ] && [ -z "${ZOO_GPU_REHEARSAL:-}" ]; then
    echo "gpu_session: error: PyTorch ($PYTHON) sees no GPU here; run it on a machine with one, or set" \
        "ZOO_GPU_REHEARSAL=1 to see each part start and end for want of a GPU." >&2
    exit 1
fi
out=${out:-docs/results/${gpu:-rehearsal}-$(date +%F)}
mkdir -p "$out" || exit 1
exec > >(tee -a "$out/session.log") 2>&1
failed=()

# part NAME SECONDS COMMAND...: SIGINT first, so that what was measured is kept
part() {
    local name=$1 limit=$2 start=$SECONDS code
    shift 2
    [[ $chosen == *" $name "* ]] || return 0
    if [ -z "$(command -v "$1")" ]; then
        echo "== $name: there is no $1 here"
        return 0
    fi
    echo "== $name (at most $limit s)"
    timeout --signal=INT --kill-after=10 "$limit" "$@" > >(tee "$out/$name.log") 2>&1
    code=$?
    [ $code -eq 0 ] || failed+=("$name")
    echo "== $name ended with $code after $((SECONDS - start)) s"
    [ -z "$archive" ] || tar -czf "$archive" -C "$(dirname "$out")" "$(basename "$out")"
}

kernel_times=("$PYTHON" tests/gpu/kernel_times.py)
pytest=("$PYTHON" -m pytest -m gpu -p no:cacheprovider -q tests/gpu)
bench=("$PYTHON" -m zoo.tools.benchmark kernels --device cuda --backward --cases 'target-*' --seconds 0.5)
metrics=gpu__time_duration.sum,sm__inst_executed.sum,dram__bytes.sum,l1tex__data_pipe_lsu_wavefronts.sum
metrics+=,sm__inst_issued.avg.pct_of_peak_sustained_active,sm__warps_active.avg.pct_of_peak_sustained_active

nvidia-smi 2>/dev/null || rocm-smi 2>/dev/null || true
part pytest 300 "${pytest[@]}" -n 10 -k 'not compiles'
# A case of each kernel; without PyTorch's cache of memory, which hides accesses beyond a tensor.
for check in memcheck racecheck initcheck; do
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 part "$check" 95 compute-sanitizer --tool "$check" --error-exitcode 3 \
        "${kernel_times[@]}" --batch 1 --cases '*/7x7x512-block*' '*/14x14x*-block14x14' '*/*-unbiased' '*/*-line_decay' \
        '*/14x14x*-7x7' 'routed*/28x28x*' 'routed*/14x14x*' 'flow*/*' 'linear*/*' 'selective*/14x14x*' 'selective*/1x197x*' \
        'gated*/196x96-*'
done
for dtype in float16 bfloat16 float32; do
    part "kernels-$dtype" 60 "${kernel_times[@]}" --times --dtype "$dtype" --json "$out/kernels-$dtype.json"
done
part counters-float16 200 ncu --profile-from-start off --clock-control none --nvtx --metrics "$metrics" --csv --page raw \
    --log-file "$out/counters-float16.csv" "${kernel_times[@]}"
if [ -f "$out/counters-float16.csv" ]; then
    part counters-table 20 "${kernel_times[@]}" --counters "$out/counters-float16.csv" --json "$out/counters-float16.json"
fi
part targets 90 "${bench[@]}" --without flex --dtype fp16 bf16 --json "$out/targets.json" --picture "$out/targets.png"
part compiled 90 "${pytest[@]}" -n 4 -k compiles
part flex 200 "${bench[@]}" --dtype fp16 --json "$out/flex.json" --picture "$out/flex.png"

if [ ${#failed[@]} -gt 0 ]; then
    echo "== failed: ${failed[*]}; the logs are in $out"
    exit 1
fi
echo "== all parts ended well; results are in $out"
