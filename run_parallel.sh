#!/usr/bin/env bash
# Pack a folder of samples into WebDataset shards, with background processes on this machine.
set -euo pipefail

here=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
core=$here/create_webdataset.py
python=${PYTHON:-$here/.venv/bin/python}
[[ -n ${PYTHON:-} || -x $python ]] || python=python3

stop() {
  trap '' INT TERM HUP
  for pid in $(jobs -p); do
    kill "$pid" 2>/dev/null || true
  done
  wait
  echo 'run_parallel.sh: stopped; the previous dataset is untouched; --resume continues' >&2
  exit "$1"
}

pack() { # workers staging
  local workers=$1 staging=$2 pids=() i code summary
  trap 'stop 130' INT
  trap 'stop 143' TERM
  trap 'stop 129' HUP
  for ((i = 0; i < workers; i++)); do
    "$python" "$core" --run "$staging" --shard-id "$i" --shard-step "$workers" &
    pids[i]=$!
  done
  for ((i = 0; i < workers; i++)); do
    code=0
    wait "${pids[i]}" || code=$?
    ((code < 2)) || # with code 1 it has said itself what failed
      echo "run_parallel.sh: worker $i ended with exit code $code" >&2
  done
  trap '' INT TERM HUP # publishing takes a moment, and must not be cut
  summary=$("$python" "$core" --publish "$staging") # fails, and names them, if shards are missing
  printf 'All shards created.\n%s\n' "$summary"
}

if ! command -v "$python" >/dev/null; then
  echo "run_parallel.sh: error: no interpreter: $python (set PYTHON to one)" >&2
  exit 2
fi
if [[ ${1-} == --staged && $# == 3 ]]; then
  pack "$2" "$3"
else
  # Python checks the flags and the source, takes the lock of the output, and becomes this script
  # again, with --staged, the number of workers, and the folder in which their shards wait.
  exec "$python" "$core" --start "$BASH" "${BASH_SOURCE[0]}" "$@"
fi
