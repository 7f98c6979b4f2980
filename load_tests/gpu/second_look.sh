#!/usr/bin/env bash
# What first_light.sh leaves: load_tests/gpu/second_look.sh FOLDER [--small] [PART…]
#
# Out-of-bounds accesses of the Triton kernels, what --deterministic costs, forks, growth with length, working sets; and
# where $RELEASED is a checkout of the authors' released code, the part `authors`.
set -u
folder=$1
shift
small=()
if [ "${1:-}" = --small ]; then
  small=(--small)
  shift
fi
[ $# -gt 0 ] || set -- sanitizer deterministic forks growth sets
exec "$(dirname "$0")/first_light.sh" "$folder" "${small[@]}" "$@"
