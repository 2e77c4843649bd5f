#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# All that a machine with one GPU can tell within some minutes, most important first:
#   benchmarks/gpu_check.sh [--minutes 10] [--wheels FOLDER] [--models 1.3b,3b,7b] [--dry-run] [OUT]
# OUT, or the variable of that name, is a folder for all results (default: gpu_check_out). What is needed: torch with
# CUDA, transformers, pytest, hypothesis, DeepSpeed, peft and psutil. Wheels of what the machine lacks may lie in FOLDER,
# made elsewhere by `pip wheel -w FOLDER deepspeed peft pytest hypothesis ...`; no network is used.
#   install    every wheel of FOLDER
#   tests      tests/gpu: kernels, methods, streams that are late at random, memory
#   sanitizer  the tests that PyTorch's CUDA sanitizer watches
#   steps      gpu_step.py, with the minutes that are left
# Each step has a time limit, and the next one runs whatever happened. OUT has a log of each; gpu_check.json has it all,
# and is printed last. --dry-run runs the same on a machine without GPU: tests are skipped, and the model is tiny.
set -uo pipefail
cd "$(dirname "$0")/.."
minutes=10 wheels="" models=1.3b,3b,7b out="${OUT:-gpu_check_out}" dry=""
while (($#)); do
    case "$1" in
        --minutes) minutes="$2"; shift ;;
        --wheels) wheels="$2"; shift ;;
        --models) models="$2"; shift ;;
        --dry-run) dry=yes models=tiny ;;
        -*) echo "unknown: $1; see the head of $0" >&2; exit 2 ;;
        *) out="$1" ;;
    esac
    shift
done
mkdir -p "$out" && out="$(cd "$out" && pwd)" || exit 2
rm -f "$out"/{install,tests,sanitizer,steps}.log "$out"/gpu_{check,step}.json "$out"/steps.tsv
python="${PYTHON:-python}"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
unset TRITON_INTERPRET
seconds="$("$python" -c "print(int(float('$minutes') * 60))")" || exit 2
end=$((SECONDS + seconds))

left() { echo $((end - SECONDS > 0 ? end - SECONDS : 0)); }

# step NAME LIMIT COMMAND...: at most LIMIT seconds, and no more than are left
step() {
    local name="$1" limit="$2" begin=$SECONDS code
    shift 2
    ((limit > $(left))) && limit=$(left)
    if ((limit < 2)); then
        printf '%s\tnot run\t0\n' "$name" >>"$out/steps.tsv"
        echo "$name: not run, no time is left"
        return
    fi
    echo "+ ($name, at most $limit s) $*"
    timeout -k 5 "$limit" "$@" >"$out/$name.log" 2>&1
    code=$?
    ((code == 124 || code == 137)) && code="over its $limit s"
    printf '%s\t%s\t%s\n' "$name" "$code" $((SECONDS - begin)) >>"$out/steps.tsv"
    tail -n "${show:-3}" "$out/$name.log" | cut -c1-300
}

pytest=("$python" -m pytest -p no:cacheprovider -v)
if [[ -n "$wheels" ]]; then
    step install 90 "$python" -m pip install -q --no-index --find-links "$wheels" "$wheels"/*.whl
fi
# two fifths of the time at most, so that steps are measured even where tests hang
step tests $((seconds * 2 / 5)) "${pytest[@]}" tests/gpu
TORCH_CUDA_SANITIZER=1 step sanitizer $((seconds / 10)) "${pytest[@]}" tests/gpu/test_sanitizer.py
options=(--models "$models" --out "$out/gpu_step.json")
[[ -n "$dry" ]] && options+=(--rows torch,tiles --steps 1 --seq-len 16 --micro-batch 2)
rest=$(($(left) - 15)) # for starting and for the report
((rest < 1)) && rest=1
show=60 step steps $((rest + 10)) "$python" benchmarks/gpu_step.py "${options[@]}" \
    --minutes "$("$python" -c "print(round($rest / 60, 3))")"

"$python" benchmarks/gpu_check_report.py "$out"
