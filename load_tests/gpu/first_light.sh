#!/usr/bin/env bash
# The first minutes on a GPU, most informative first: load_tests/gpu/first_light.sh FOLDER [--small] [PART…]
#
# Each part is a process of its own with a limit in seconds; what it finds is added to FOLDER/results.jsonl at once, and
# what it prints to FOLDER/log.txt. With --small: a tiny model on a CPU, to test this script. Wheels in .gpu-wheels
# (make gpu-wheels) are installed for these processes alone. The part `real` reads a model that $MODEL names.
set -u
cd "$(dirname "$0")/../.."
folder=$1
shift
small=
if [ "${1:-}" = --small ]; then
  small=--small
  shift
fi
parts=${*:-card tests attention decode bundled prefill beside}
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
export RESULTS=$folder/results.jsonl PYTHONUNBUFFERED=1 PYTHONPATH=${PYTHONPATH:-}:$PWD PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
export PYTEST_DISABLE_PLUGIN_AUTOLOAD=1  # a machine's own plugins warn, and warnings are errors
if [ -z "$small" ] && [ -d .gpu-wheels ]; then
  site=$(mktemp -d)
  python3 -m pip install -q --no-index --no-deps --no-compile --target "$site" .gpu-wheels/*.whl || exit 1
  export PYTHONPATH=$site:$PYTHONPATH
fi

limit_of() {
  case $1 in
    card) echo 40 ;;
    tests) echo 100 ;;
    attention | real) echo 60 ;;
    bundled) echo 90 ;;
    decode) echo 120 ;;
    prefill) echo 130 ;;
    *) echo 110 ;;
  esac
}

command_of() {
  if [ "$1" = tests ] && [ -n "$small" ]; then
    echo python3 -m pytest -p load_tests.gpu.recorder tests/memory/test_decode_device.py
  elif [ "$1" = sanitizer ]; then
    echo compute-sanitizer --tool memcheck --error-exitcode 9 python3 -m pytest -m gpu -p load_tests.gpu.recorder \
      tests/gpu/test_fused.py tests/gpu/test_decode.py tests/gpu/test_sets.py
  elif [ "$1" = tests ]; then
    echo python3 -m pytest -m gpu -p xdist -n 8 -p load_tests.gpu.recorder --tb=short tests/gpu
  else
    echo python3 -m load_tests.gpu.parts "$1" $small
  fi
}

status=0
for part in $parts; do
  started=$(date +%s%3N)
  timeout --kill-after=5 "$(limit_of "$part")" $(command_of "$part") >>"$folder/log.txt" 2>&1
  code=$?
  [ $code -eq 0 ] || status=1
  echo "{\"part\": \"$part\", \"name\": \"end\", \"status\": $code, \"milliseconds\": $(($(date +%s%3N) - started))}" | tee -a "$RESULTS"
done
exit $status
