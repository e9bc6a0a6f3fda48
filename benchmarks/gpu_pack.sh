#!/usr/bin/env bash
# Collects what benchmarks/gpu.py needs on a GPU machine without a network, as wheels; see benchmarks/README.md.
#   benchmarks/gpu_pack.sh OUT [--python 3.12] [--cuda 13] [--rtx VERSION]... [--lean | --only PACKAGE,...]
#                          [--no-diffusers] [--no-own] [--split MIB]
# Leaves OUT/wheels/*.whl and OUT/rtx-VERSION/ (unpacked); with --split OUT/part.NN and OUT/SHA256 instead:
#   (cd OUT && sha256sum -c SHA256) && cat OUT/part.* | tar -xJ
# --lean: for a machine that has PyTorch, ONNX, ONNX Runtime, transformers, rich and pytest already.
# --cuda 12: for a driver older than 580.
set -euo pipefail

usage() { sed -n '2,8s/^# \{0,1\}//p' "$0" >&2; exit 2; }
refuse() { printf 'error: %s\nhint: %s\n' "$1" "$2" >&2; exit 2; }

root=$(cd "$(dirname "$0")/.." && pwd)
out='' pyver=3.12 cuda=13 split='' own=1 only='' rtx=()
packages=(msgspec click jinja2 markupsafe rich markdown-it-py mdurl pygments pillow cuda-core cuda-bindings
  cuda-pathfinder onnx onnxscript onnx-ir ml-dtypes protobuf safetensors typing-extensions onnxruntime-gpu flatbuffers
  pytest iniconfig pluggy packaging hypothesis sortedcontainers scipy)
diffusers=1 lean=''
while (($#)); do
  case $1 in
    --python) pyver=${2:?--python VERSION}; shift 2 ;;
    --cuda) cuda=${2:?--cuda RELEASE}; shift 2 ;;
    --rtx) rtx+=("${2:?--rtx VERSION}"); shift 2 ;;
    --only) only=${2:?--only PACKAGE,...}; shift 2 ;;
    --lean) lean=1; shift ;;
    --no-diffusers) diffusers=''; shift ;;
    --no-own) own=''; shift ;;
    --split) split=${2:?--split MIB}; shift 2 ;;
    -h | --help) usage ;;
    -*) refuse "unknown option $1" "known: --python --cuda --rtx --lean --only --no-diffusers --no-own --split" ;;
    *) [ -z "$out" ] || refuse "two output folders, $out and $1" "give one"; out=$1; shift ;;
  esac
done
[ -n "$out" ] || usage
[[ $pyver =~ ^3\.[0-9]+$ ]] || refuse "--python $pyver; allowed is 3.11 or newer" "--python 3.12"
[[ $cuda =~ ^1[23]$ ]] || refuse "--cuda $cuda; allowed is 12 or 13" "leave it out for 13 (driver 580 or newer)"
[[ -z $split || $split =~ ^[1-9][0-9]*$ ]] || refuse "--split $split; allowed is a whole number of MiB" "--split 56"
builder=''
if [ -n "$own" ]; then # a compiled wheel is for one Python: it must be this version's
  builder=python$pyver
  "$builder" -c '' 2>/dev/null || refuse "python$pyver is not here to build our own wheel with" \
    "install it, or --no-own and run there: python -m pip wheel --no-deps --no-build-isolation -w wheels CHECKOUT"
fi
[ -z "$lean" ] || [ -z "$only" ] || refuse "--lean and --only both say what to pack" "give one of them"
if [ -n "$only" ]; then IFS=, read -ra packages <<<"$only"; diffusers=''; fi
if [ -n "$lean" ]; then
  packages=(msgspec markupsafe cuda-core cuda-bindings cuda-pathfinder ${diffusers:+diffusers})
  [ -n "$own" ] || packages+=(scikit-build-core nanobind packaging pathspec) # it is built there
  diffusers='' # without what it needs
fi

platforms=()
for n in 39 35 34 31 28 27 24 17; do platforms+=(--platform "manylinux_2_${n}_x86_64"); done
platforms+=(--platform manylinux2014_x86_64 --platform manylinux1_x86_64 --platform linux_x86_64)
fetch() { # FOLDER REQUIREMENT...: what they need in turn is not followed, so that PyTorch is never fetched
  pip_download --no-deps -d "$@"
}
pip_download() {
  python3 -m pip download -q --only-binary=:all: --implementation cp --python-version "$pyver" \
    "${platforms[@]}" "$@"
}

mkdir -p "$out/wheels"
for package in "${packages[@]}"; do
  case $package in # as the extras gpu and gpu-cu12
    cuda-bindings) package+="==$cuda.*" ;;
    onnxruntime-gpu) [ "$cuda" = 13 ] || package+='==1.26.*' ;;
  esac
  fetch "$out/wheels" "$package"
done
if [ -n "$diffusers" ]; then # needs no PyTorch to be installed, and a long tail of others
  pip_download -d "$out/wheels" diffusers
  rm -f "$out"/wheels/numpy-*.whl # PyTorch has it
fi
for version in "${rtx[@]}"; do
  work=$(mktemp -d)
  fetch "$work" "tensorrt-rtx-cu$cuda-libs==$version" "tensorrt-rtx-cu$cuda-bindings==$version"
  for wheel in "$work"/*.whl; do python3 -m zipfile -e "$wheel" "$out/rtx-$version"; done
  rm -r "$work"
done
if [ -n "$own" ]; then
  "$builder" -m pip wheel -q --no-deps -w "$out/wheels" "$root"
fi
if [ -n "$split" ]; then
  (cd "$out" && tar -cf - wheels "${rtx[@]/#/rtx-}") | xz -T0 --x86 --lzma2=preset=6 | split -b "${split}m" -d - "$out/part."
  (cd "$out" && rm -r wheels "${rtx[@]/#/rtx-}")
  (cd "$out" && sha256sum part.* >SHA256)
fi
ls -l "$out"
