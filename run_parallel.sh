#!/usr/bin/env bash
# Pack a folder of samples into WebDataset shards, with background processes on this machine.
set -euo pipefail
export OPENBLAS_NUM_THREADS=1 # numpy, which webdataset imports, would start threads in each worker

here=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
core=$here/create_webdataset.py
python=${PYTHON:-$here/.venv/bin/python}
[[ -n ${PYTHON:-} || -x $python ]] || python=python3

usage() {
  cat <<'EOF'
usage: run_parallel.sh [options]

Pack a folder of samples into WebDataset shards, with background processes on this machine.
Unless told otherwise, from source_data to webdataset_output beside this script.

the source:
  --source DIR       folder of the raw files, listed recursively
  --fields A,B       a sample's files (default: jpg,txt)
  --skip-incomplete  drop samples that lack a field
  --shuffle SEED     shuffle before sharding

the output:
  --output DIR       folder for the shards, made when it is missing
  --resume           keep the shards that an interrupted run finished

the work:
  --num-workers N    processes (default: 4)
  --num-shards N     shards (default: as many as workers)

examples:
  ./run_parallel.sh --source raw --output out --num-workers 8 --num-shards 64
  PYTHON=python3.12 ./run_parallel.sh --resume
EOF
}

refuse() { printf 'run_parallel.sh: error: %s (see --help)\n' "$1" >&2 && exit 2; }

main() {
  local workers=4 shards=as-workers options=()
  while (($#)); do
    case $1 in
      --num-*=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" && continue ;;
      -h | --help) usage && exit ;;
      --num-workers | --num-shards)
        (($# > 1)) || refuse "$1 needs a number"
        [[ $1 == --num-shards ]] && shards=$2 || workers=$2
        shift ;;
      *) options+=("$1") ;; # Python knows all others; the last of two flags wins
    esac
    shift
  done
  [[ $shards != as-workers ]] || shards=$workers
  [[ $workers =~ ^[1-9][0-9]{0,6}$ ]] || refuse "--num-workers $workers: not a number from 1"
  [[ $shards =~ ^[1-9][0-9]{0,6}$ ]] || refuse "--num-shards $shards: not a number from 1"

  # Python checks everything, takes the lock of the output, and becomes this script again, which
  # holds the lock from then on, as do its workers: the way of flock(1).
  exec "$python" "$core" --source="$here/source_data" --output="$here/webdataset_output" \
    ${options[@]+"${options[@]}"} --total-shards="$shards" \
    --start "$BASH" "${BASH_SOURCE[0]}" --staged "$((workers < shards ? workers : shards))"
}

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
    ((code < 2)) || echo "run_parallel.sh: worker $i ended with exit code $code" >&2
  done
  trap '' INT TERM HUP # publishing takes a moment, and must not be cut
  summary=$("$python" "$core" --publish "$staging") # fails, and names them, if shards are missing
  printf 'All shards created.\n%s\n' "$summary"
}

command -v "$python" >/dev/null || refuse "no interpreter: $python"
if [[ ${1-} == --staged && $# == 3 ]]; then
  pack "$2" "$3"
else
  main "$@"
fi
