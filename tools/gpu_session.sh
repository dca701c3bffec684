#!/usr/bin/env bash
# Everything that needs a GPU, in one call of at most ten minutes, without a network:
#     tools/gpu_session.sh [folder]      (or: make gpu)
# Tests, then timings: the target cases against everyone, then all cases of each operator without flex_attention, whose
# compiler takes its time. Each part has a limit of its own; what it printed and measured stays in the folder
# (docs/results/<gpu>-<date>), also if it fails, and then the exit code is 1 at the end.
set -uo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-.venv/bin/python}
[ -x "$PYTHON" ] || PYTHON=$(command -v python3)

# Where nothing could be installed, the folders under their import names will do.
if ! (cd / && "$PYTHON" -c 'import zoo.kernels') 2>/dev/null; then
    links=$(mktemp -d)
    trap 'rm -rf "$links"' EXIT
    mkdir "$links/zoo"
    ln -s "$PWD"/zoo/* "$PWD/kernels" "$PWD/recipes" "$PWD/tools" "$links/zoo/"
    ln -s "$PWD/checkpoints" "$links/zoo/manifest"
    export PYTHONPATH=$links${PYTHONPATH:+:$PYTHONPATH}
fi

gpu=$("$PYTHON" -c 'import torch; print(torch.cuda.get_device_name().replace(" ", "-") if torch.cuda.is_available() else "")')
if [ -z "$gpu" ]; then
    echo "gpu_session: error: PyTorch ($PYTHON) sees no GPU here; run it on a machine with one." >&2
    exit 1
fi
out=${1:-docs/results/$gpu-$(date +%F)}
mkdir -p "$out" || exit 1
exec > >(tee "$out/session.log") 2>&1
failed=()

# part NAME SECONDS COMMAND...: SIGINT first, so that what was measured is kept
part() {
    local name=$1 limit=$2 start=$SECONDS code
    shift 2
    echo "== $name (at most $limit s)"
    timeout --signal=INT --kill-after=10 "$limit" "$@" > >(tee "$out/$name.log") 2>&1
    code=$?
    [ $code -eq 0 ] || failed+=("$name")
    echo "== $name ended with $code after $((SECONDS - start)) s"
}

settings=()
bench() {
    local name=$1 limit=$2
    shift 2
    part "bench-$name" "$limit" env "${settings[@]}" "$PYTHON" -m zoo.tools.benchmark kernels --device cuda --dtype fp16 --backward \
        --json "$out/$name.json" --picture "$out/$name.png" "$@"
}

nvidia-smi 2>/dev/null || rocm-smi 2>/dev/null || true
part tests 220 "$PYTHON" -m pytest -m gpu -p no:cacheprovider -n 4 -q tests/gpu
bench targets 100 --cases 'target-*' --seconds 1
for folder in kernels/*/op.py; do
    operator=$(basename "$(dirname "$folder")")
    bench "$operator" 50 --operators "${operator%%_*}" --without flex --seconds 0.3
done
# Once more with warps and stages chosen by timing: what the heuristics leave on the table.
settings=(ZOO_AUTOTUNE=1 TRITON_PRINT_AUTOTUNING=1)
bench autotuned 80 --cases 'target-*' --without flex --seconds 0.5

if [ ${#failed[@]} -gt 0 ]; then
    echo "== failed: ${failed[*]}; the logs are in $out"
    exit 1
fi
echo "== all parts ended well; results are in $out"
