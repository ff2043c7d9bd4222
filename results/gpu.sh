#!/usr/bin/env bash
# results/gpu.sh OUT: tests, times and memory of icpo.py on one GPU, in at most 7 minutes, without a network.
# Each part has a limit in seconds and a file in OUT, so that one which fails or hangs loses no other.
#   TINY=1       a dry run on a CPU, with tiny shapes
#   WHEELS=DIR   wheels of what is missing here, say pytest, for the time of the run
#   PYTHON=...   another interpreter than python3
set -u
OUT=$(mkdir -p "$1" && cd "$1" && pwd) || exit
WHEELS=${WHEELS:+$(realpath "$WHEELS")}
cd "$(dirname "$0")/.." || exit
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python=${PYTHON:-python3} total=420 summary=()
export work python WHEELS TQDM_DISABLE=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
export PYTHONPATH="$work/wheels:$PWD:${PYTHONPATH:-}"

device=cuda task=() times=() bench=(--settings gpu --steps 2) model=runs/smollm2
# What runs a model: from sampling on
mapfile -t tests < <(sed -n '/^# -.* [Ss]ampling/,$ s/^def \(test_\w*\).*/test_icpo.py::\1/p' test_icpo.py)
if [ -n "${TINY:-}" ]; then
    export OMP_NUM_THREADS=1
    device=cpu tests=("${tests[@]:2:1}") bench=(--settings short --steps 1) model=runs/task/0.95-5-0/addition
    times=(--steps 1 --eval-rows 2 --prompts-per-step 2 --max-new-tokens 4)
    task=("${times[@]}" --imitation-steps 5 --eval-samples 2)
fi

part() {  # NAME SECONDS COMMAND...
    local name=$1 limit=$2 begin=$SECONDS ended
    (( limit = limit < total - SECONDS ? limit : total - SECONDS ))
    (( limit = limit < 1 ? 1 : limit ))
    shift 2
    timeout -k 5 "$limit" "$@" > "$OUT/$name.txt" 2>&1
    case $? in
        0) ended=passed ;; 77) ended=skipped ;; 124 | 137) ended="out of time" ;; *) ended=failed ;;
    esac
    summary+=("$name: $ended, $((SECONDS - begin)) s of $limit")
    echo "== ${summary[-1]}"
    tail -n 12 "$OUT/$name.txt" | cut -c 1-300
}

versions() {
    nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader
    if [ -n "$WHEELS" ]; then
        $python -m pip install -q --no-index --find-links "$WHEELS" --no-deps --target "$work/wheels" \
            "$WHEELS"/*.whl
    fi
    $python - "$1" <<'PYTHON'
import importlib.metadata, sys, torch
print(sys.version.split()[0], "torch", torch.__version__, "GPU:", torch.cuda.is_available())
for name in ("transformers", "numpy", "tqdm", "pytest", "trl"):
    try:
        print(name, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        print(name, "is not installed")
sys.exit(sys.argv[1] == "cuda" and not torch.cuda.is_available())
PYTHON
}

tests() {
    if ! $python -c "import pytest" 2> /dev/null; then
        echo "pytest is not installed: give its wheels in WHEELS, or its folder in PYTHONPATH"
        exit 77
    fi
    if (( $# == 1 )); then
        echo "test_icpo.py has no section on sampling"
        exit 1
    fi
    export ICPO_TEST_DEVICE=$1
    $python -m pytest -q -p no:cacheprovider "${@:2}"
}

run() {  # SCRIPT FOLDER FLAG...: a run into the folder, the last row of its metrics, and the seconds that it took
    TIMEFORMAT="%0R s in all"
    time $python "$1" --output-dir "${@:2}" || exit
    tail -n 1 "$2/metrics.jsonl"
}

times_tables() {  # as in the README
    if [ ! -e "$1" ]; then
        echo "no $1: results/real_model.py --weights writes it"
        exit 77
    fi
    run icpo.py "$work/times" --model "$1" --steps 60 --prompts-per-step 8 --max-new-tokens 24 --lr 1e-5 \
        --train-data examples/times_tables/train.jsonl --eval-data examples/times_tables/test.jsonl \
        --eval-samples 4 "${@:2}"
}
export -f versions tests run times_tables

part versions 25 bash -c 'versions "$@"' - $device
part tests 60 bash -c 'tests "$@"' - $device "${tests[@]}"
part builtin 100 bash -c 'run "$@"' - examples/addition.py "$work/builtin" --device $device "${task[@]}"
part benchmark 120 $python results/benchmark.py --device $device --output "$OUT/benchmark.json" "${bench[@]}"
part sampling 75 $python results/gpu.py sampling
part memory 45 $python results/gpu.py memory
part times_tables 120 bash -c 'times_tables "$@"' - $model --device $device "${times[@]}"
echo
printf '%s\n' "${summary[@]}" "all: $SECONDS s"
[[ " ${summary[*]}" != *failed* && "${summary[*]}" != *"out of time"* ]]
