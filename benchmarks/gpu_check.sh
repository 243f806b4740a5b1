#!/usr/bin/env bash
# What the recipes do on one GPU, in at most eight minutes and without a network: random weights at the true shapes,
# synthetic shards. Every part runs under its own time limit in seconds and appends JSON lines to results.jsonl.
#   benchmarks/gpu_check.sh [OUT] [--device cpu] [PART ...]
# With `--device cpu` all shapes are tiny: a rehearsal, whose times mean nothing.
set -u
export PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
limits=(attention=35 worker=20 aut=70 aut_compiled=85 aut_zero2=60 aut_fsdp=60 uniwhisper=60 hugging_face=45 resume=45)

out=runs/gpu_check device=gpu scale=${GPU_CHECK_LIMITS:-1} chosen=()
while [ $# -gt 0 ]; do
    case $1 in
        --device) device=${2:?--device needs gpu or cpu}; shift ;;
        */*) out=$1 ;;
        *) chosen+=("$1") ;;
    esac
    shift
done
here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-$here/../.venv/bin/python}
[ -x "$python" ] || python=python3
check=("$python" "$here/gpu_check.py" --device "$device" --out "$out")
mkdir -p "$out"
: > "$out/results.jsonl"
"${check[@]}" prepare || exit 1
for entry in "${limits[@]}"; do
    part=${entry%%=*} limit=$((${entry##*=} * scale))
    [ ${#chosen[@]} -eq 0 ] || [[ " ${chosen[*]} " == *" $part "* ]] || continue
    began=$SECONDS
    timeout -k 5 "$limit" "${check[@]}" "$part" > "$out/$part.log" 2>&1
    status=$?
    [ $status -eq 0 ] || "${check[@]}" failed "$part" $status "$limit"
    echo "$part: exit status $status after $((SECONDS - began)) of $limit s"
done
"${check[@]}" table
