#!/usr/bin/env bash
# First contact of Tandem's CUDA path with a GPU, in about 15 minutes; no GPU has run any of it yet.
#
#   scripts/gpu_first_contact.sh prepare      on a machine with network: wheels of what torch images lack, into .gpu/
#   scripts/gpu_first_contact.sh run          on the machine with the GPU, in the same checkout, without network
#
# `run` leaves in $OUT (default .gpu/out) one file a step and prints one line of each; it ends with 1 if a step failed.
#   facts      torch, GPU, what its flash attention takes
#   dry        the engine on CUDA tensors without numbers, and attention played on the processor: also passes without a GPU
#   gpu        tests/gpu: tokens as transformers', kernels, KV, a split service on one GPU
#   contact    scripts/gpu_contact.py: step times, waits, kernels, copies, each beside what was expected
#   benchmark  benchmarks/engine.py on random weights of 8b
# STEPS="facts gpu" runs some; PY is the interpreter; SHAPE=160m is for a small GPU, DEVICE=cpu for none (facts, contact,
# benchmark); PYTHON_VERSION (3.12) is that of the machine with the GPU, for `prepare`.
set -u
cd "$(dirname "$0")/.." || exit
PY=${PY:-python3}
DEVICE=${DEVICE:-cuda}
# Of constraints.txt. Images with torch and transformers have the rest; `run` says what is missing.
# For one without numba, 60 MiB more: NEEDS="numba llvmlite".
NEEDS="grpcio grpcio-health-checking grpcio-reflection protobuf msgpack pydantic pydantic_core annotated-types
  typing-inspection isal fastapi starlette annotated-doc uvicorn prometheus_client typer rich psutil httpx httpcore anyio h11
  sniffio pytest pluggy iniconfig pytest-asyncio pytest-timeout hypothesis sortedcontainers ${NEEDS:-}"
IMPORTS="torch transformers safetensors tokenizers numpy numba isal grpc grpc_health grpc_reflection msgpack pydantic yaml
  typer rich jinja2 fastapi uvicorn prometheus_client psutil httpx pytest pytest_asyncio pytest_timeout hypothesis"

prepare() {
  mkdir -p .gpu/wheels
  local pins=() name
  for name in $NEEDS; do
    pins+=("$(grep -iE "^${name//[-_]/[-_]}==" constraints.txt)") || { echo "constraints.txt has no $name" >&2; exit 1; }
  done
  "$PY" -m pip download -q --no-deps --only-binary=:all: --python-version "${PYTHON_VERSION:-3.12}" \
    --implementation cp --platform manylinux_2_28_x86_64 --platform manylinux_2_27_x86_64 \
    --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 --platform manylinux2010_x86_64 \
    --platform manylinux1_x86_64 -d .gpu/wheels "${pins[@]}" || exit
  du -sh .gpu
  echo "there: scripts/gpu_first_contact.sh run"
}

# What is there already stays: only what cannot be imported is installed, beside it.
install() {
  local missing
  missing=$("$PY" - $IMPORTS <<'END'
import importlib.util, sys
print(*(name for name in sys.argv[1:] if importlib.util.find_spec(name) is None))
END
  ) || exit
  if [ -n "$missing" ] && [ -d .gpu/wheels ]; then
    "$PY" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target .gpu/site .gpu/wheels/*.whl || exit
    export PYTHONPATH=$PWD/.gpu/site:$PYTHONPATH
    missing=$("$PY" -c 'import importlib.util, sys; print(*(n for n in sys.argv[1:] if importlib.util.find_spec(n) is None))' $IMPORTS)
  fi
  [ -z "$missing" ] || { echo "cannot import: $missing (add it to NEEDS of: scripts/gpu_first_contact.sh prepare)" >&2; exit 1; }
}

failed=0
# step NAME SECONDS COMMAND...
step() {
  local name=$1 seconds=$2 code
  shift 2
  case " ${STEPS:-facts dry gpu contact benchmark} " in *" $name "*) ;; *) return ;; esac
  timeout "$seconds" "$@" >"$OUT/$name.txt" 2>"$OUT/$name.err"
  code=$?
  [ $code = 0 ] || failed=1
  echo "== $name: exit code $code, $(grep -c . "$OUT/$name.txt") lines; $(tail -n 1 "$OUT/$name.txt")"
  grep -E '^(FAILED|ERROR|FAIL)' "$OUT/$name.txt" | cut -c1-200
}

run() {
  OUT=${OUT:-$PWD/.gpu/out}
  mkdir -p "$OUT" || exit
  export PYTHONUNBUFFERED=1 PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
  install
  command -v nvidia-smi >/dev/null && nvidia-smi --query-gpu=name,driver_version,memory.total,memory.used --format=csv
  local tests=("$PY" -m pytest -q -p no:cacheprovider --timeout 120)
  step facts 120 "$PY" scripts/gpu_contact.py --device "$DEVICE" environment
  step dry 400 "${tests[@]}" tests/unit/test_cuda_dry_run.py tests/unit/test_cuda_attention.py tests/unit/test_gpus.py
  step gpu 600 "${tests[@]}" tests/gpu
  step contact 600 "$PY" scripts/gpu_contact.py --device "$DEVICE" --shape "${SHAPE:-8b}"
  step benchmark 600 "$PY" benchmarks/engine.py --device "$DEVICE" --shape "${SHAPE:-8b}" --rounds 1 \
    --case 1x1024x1 --case 8x512x1 --case 1x16x48 --case 16x1024x16 --output "$OUT/benchmark.json"
  exit $failed
}

case ${1:-} in
  prepare) prepare ;;
  run) run ;;
  *) echo "usage: $0 prepare | run" >&2; exit 2 ;;
esac
