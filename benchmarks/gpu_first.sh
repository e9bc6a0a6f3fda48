#!/usr/bin/env bash
# The first half hour on a GPU: what runs there and is right, then how fast; see benchmarks/README.md.
#   benchmarks/gpu_first.sh [--wheels DIR] [--minutes 9] [--again] [--steps NAME,...] [--from FILE] [--list] [--smoke]
# Writes first.json and first.log into $OUT (build/gpu-first). --wheels: of gpu_pack.sh, installed beside the rest first.
# Ends with 0 if no step failed. All other options: benchmarks/gpu_first.sh --help
set -euo pipefail

refuse() { printf 'error: %s\nhint: %s\n' "$1" "$2" >&2; exit 2; }

root=$(cd "$(dirname "$0")/.." && pwd)
export OUT=${OUT:-$root/build/gpu-first} PYTHONUNBUFFERED=1
python=${PYTHON:-python3} words=() wheels=''
while (($#)); do
  case $1 in
    --wheels)
      compgen -G "${2-}/*.whl" >/dev/null || refuse "--wheels ${2-}: there are no wheels" \
        "--wheels DIR, with the wheels of benchmarks/gpu_pack.sh"
      wheels=$(cd "$2" && pwd)
      shift 2
      ;;
    *) words+=("$1"); shift ;;
  esac
done
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
GPUBENCH_STARTED=$(date +%s) # the minutes count from here
export GPUBENCH_STARTED
if [ -n "$wheels" ]; then
  site=$root/build/gpu-first-site
  install=("$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$site")
  "${install[@]}" "$wheels"/*.whl
  if ! compgen -G "$wheels/tstitch_trt-*.whl" >/dev/null; then # scikit-build-core and nanobind are among the wheels, or here
    PYTHONPATH=$site "${install[@]}" --no-build-isolation "$root"
  fi
  export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
fi
exec > >(trap '' INT TERM; exec tee -a "$OUT/first.log") 2>&1
exec "$python" "$root/benchmarks/gpubench/first.py" "${words[@]}" # in place of this shell: a signal reaches it
