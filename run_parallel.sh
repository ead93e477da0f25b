#!/usr/bin/env bash
# Pack a folder of samples into WebDataset shards, with background processes on this machine.
set -euo pipefail

here=$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")") # of the script, not of a link to it
if [[ ! -e $here/sharding ]]; then
  echo "run_parallel.sh: error: $here has no folder 'sharding'. Leave the script where it is and call" \
    'it by its path. A batch system copies what it is given: sbatch --wrap "/path/run_parallel.sh ..."' >&2
  exit 2
fi
python=${PYTHON:-$here/.venv/bin/python}
[[ -n ${PYTHON:-} || -x $python ]] || python=python3
if ! command -v "$python" >/dev/null; then
  echo "run_parallel.sh: error: no interpreter: $python (set PYTHON to one)" >&2
  exit 2
fi
"$python" -S "$here/sharding/__init__.py" || exit # it is too old

# What the steps below complain about is signed with the name of this script.
name=(--as run_parallel.sh)
start=("$python" "$here/sharding" "${name[@]}" start --hold "$$")
for flag in "$@"; do
  [[ $flag != --help && $flag != -h ]] || exec "${start[@]}" --help
done
# Check the flags and the source, lock the output, plan the run. That process holds the lock until
# everybody has closed descriptor 9: this script and its workers, whatever ends them.
exec 9< <("${start[@]}" "$@" || printf %s "$?")
IFS= read -r -d '' run <&9 || exit "${run:-1}"
IFS= read -r -d '' workers <&9
if [[ -z $run ]]; then # nothing is left to do; this says why
  echo "$workers"
  exit 0
fi

stop() { # exit-code
  trap '' INT TERM HUP
  # First, so that the process that holds the lock can end: when a signal cuts `wait` short just as
  # a worker ends, bash never learns of that end, and then waits until it has no child at all.
  exec 9<&-
  for pid in $(jobs -p); do
    kill "$pid" 2>/dev/null || true
  done
  wait
  again=''
  [[ $run == /* ]] || again=' with --resume' # a bucket has no lock that tells who is dead
  echo "run_parallel.sh: stopped; nothing was published; to continue, run the same command again$again" >&2
  exit "$1"
}
trap 'stop 130' INT
trap 'stop 143' TERM
trap 'stop 129' HUP

pids=()
for ((i = 0; i < workers; i++)); do
  "$python" "$here/create_webdataset.py" "${name[@]}" --run "$run" --shard-id "$i" --shard-step "$workers" &
  pids[i]=$!
done
for ((i = 0; i < workers; i++)); do
  code=0
  wait "${pids[i]}" || code=$?
  ((code < 2)) || # with code 1, the worker has said what failed
    echo "run_parallel.sh: worker $i ended with exit code $code" >&2
done

trap '' INT TERM HUP # publishing takes a moment, and must not be cut
summary=$("$python" "$here/sharding" "${name[@]}" publish --run "$run") # fails, and names them, if shards are missing
printf 'All shards created.\n%s\n' "$summary"
