#!/usr/bin/env bash
# Everything that wants a GPU, in at most eight minutes on one NVIDIA GPU of 80 GB, without a network or an
# installation: the packages may lie in folders on PYTHONPATH, those of the rivals in a folder RIVALS of their own.
#
#     [PYTHON=python3] [LIMIT=480] [RIVALS=FOLDER] [EVALUATION_COMMIT=abc1234] evaluation/gpu_run.sh [FOLDER]
#
# Results go to FOLDER, by default evaluation/results, row by row, so a run that is cut short keeps what it has.
# The steps come in the order of their worth, each with a limit of its own.
set -uo pipefail
cd "$(dirname "$0")/.."
folder=${1:-evaluation/results}
python=${PYTHON:-python3}
end=$((SECONDS + ${LIMIT:-480}))
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(nproc)}" # for ours and for the rivals, which else take one
mkdir -p "$folder"

left() { echo $((end - SECONDS < $1 ? end - SECONDS : $1)); } # of so many seconds

step() { # name, limit in seconds, command
  local name=$1 most
  most=$(left "$2")
  shift 2
  if ((most < 10)); then
    echo "== $name: no time is left"
    return
  fi
  echo "== $name: at most $most s"
  timeout --kill-after=5 "$most" "$@" || echo "== $name: ended with $?"
}

compression() { # limit in seconds, options
  step "quantise" "$1" "$python" -m evaluation gpu-compression --limit "$(left "$1")" \
    --out "$folder/gpu_compression.json" ${RIVALS:+--rival-packages "$RIVALS"} "${@:2}"
}

mapfile -t marked < <(grep -rlE 'mark\.gpu|kernels\.on_gpu' tests --include='test_*.py')
step "tests" 60 "$python" -m pytest -q -m gpu -W default -p no:cacheprovider "${marked[@]}" |
  tee "$folder/gpu_tests.txt"
compression 60 --models 8b-4-layers --methods nf4-gptq
compression 270 --models 8b --methods nf4-gptq
step "decode" 75 "$python" -m evaluation speed --decode --eight-billion --pace 0.1 \
  --out "$folder/speed-cuda-decode.json"
compression 480 --models 8b-4-layers --methods w8a8 llmcompressor nf4-learned autoround gptqmodel
compression 480 --models 1b
step "losses" 480 "$python" -m evaluation gpu --models demo --out "$folder/gpu.json"
