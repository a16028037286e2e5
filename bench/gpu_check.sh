#!/usr/bin/env bash
# Everything that only a machine with a GPU can show, in under 8 minutes: builds with the CUDA kernels, runs their tests,
# compute-sanitizer's memcheck and racecheck, and the benchmark, which writes bench/results/<GPU>.json.
#
#   bash bench/gpu_check.sh [--only build,test,sanitize,bench] [--seconds N]
#   bash bench/gpu_check.sh --only device
#
#   --only      parts, separated by commas; a part that needs the module builds it if it is not installed. `device` is
#               all tests of tests/ that see no GPU otherwise, on this one. A plain run has those that see most of the
#               package: all take as long as everything else together
#   --seconds   for everything together (default 475): a step gets what is left, a step without time left fails
#   PYTHON      the Python with a CUDA build of torch (default python3)
#   CMAKE_CUDA_ARCHITECTURES     default native, this machine's GPU
#   COMPUTE_SANITIZER            its path, where it is neither on the PATH nor beside nvcc
#   SPECNORM_EXT_COMMIT          goes into the JSON where there is no git (default: git's own)
#   OUT         a directory that gets the summary and the logs, as gpu_check.log, and the JSON, too
#
# A step that fails is reported and the others still run. Exit code: 0 if all passed, 1 if any failed or there is no GPU,
# 2 for a wrong option.
set -uo pipefail

usage() { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"; }
only=build,test,sanitize,bench
total=475
while [ $# -gt 0 ]; do
  case "$1" in
    --only=*) only=${1#*=} ;;
    --only | --seconds)
      if [ $# -lt 2 ]; then echo "gpu_check: $1: expected a value after it, got nothing" >&2; exit 2; fi
      if [ "$1" = --only ]; then only=$2; else total=$2; fi
      shift ;;
    --seconds=*) total=${1#*=} ;;
    -h | --help) usage; exit 0 ;;
    *) echo "gpu_check: expected --only or --seconds, got $1; --help lists the options" >&2; exit 2 ;;
  esac
  shift
done
for part in ${only//,/ }; do
  case "$part" in
    build | test | sanitize | bench | device) ;;
    *) echo "gpu_check: --only: expected build, test, sanitize, bench or device, got $part" >&2; exit 2 ;;
  esac
done
case "$total" in
  '' | *[!0-9]*) echo "gpu_check: --seconds: expected a whole number, got $total" >&2; exit 2 ;;
esac
wants() { case ",$only," in *",$1,"*) return 0 ;; *) return 1 ;; esac; }

python=${PYTHON:-python3}
if ! command -v "$python" >/dev/null 2>&1; then
  echo "gpu_check: expected PYTHON to be a program, got $python; set it to the Python that has a CUDA build of torch"
  exit 1
fi
case "$python" in  # steps run in another directory
  */*) python=$(cd "$(dirname "$python")" && pwd)/$(basename "$python") ;;
esac
repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
out=${OUT:-}
case "$out" in '' | /*) ;; *) out=$PWD/$out ;; esac

gpu=$("$python" -c '
import sys
try:
    import torch
except ImportError:
    sys.exit("there is no torch")
if not torch.cuda.is_available():
    sys.exit(f"torch.cuda.is_available() is False (torch {torch.__version__})")
print(torch.cuda.get_device_name(0))' 2>&1)
if [ $? -ne 0 ]; then
  echo "gpu_check: no GPU for $python: ${gpu##*$'\n'}; run this on a machine with an NVIDIA GPU and a CUDA build of torch"
  exit 1
fi
gpu=${gpu##*$'\n'}  # past warnings

# Nothing below needs to write into the checkout: where it may not, results stay in the temporary directory.
work=$(mktemp -d "${TMPDIR:-/tmp}/specnorm_gpu_check.XXXXXX") || exit 1
logs=$work/logs
mkdir -p "$logs"
touch "$work/began"  # results are what is newer
results=$repo/bench/results
if ! { mkdir -p "$results" && [ -w "$results" ]; } 2>/dev/null; then results=$work/results; mkdir -p "$results"; fi
cd "$work" || exit 1  # not the checkout: its specnorm_ext/ has no compiled module

export PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
export PIP_ROOT_USER_ACTION=ignore PIP_BREAK_SYSTEM_PACKAGES=1 PIP_DISABLE_PIP_VERSION_CHECK=1
unset SPECNORM_EXT_CUDA_STRATEGY SPECNORM_EXT_TEST_CUDA_ON_CPU
commit=${SPECNORM_EXT_COMMIT:-}
if [ -z "$commit" ]; then
  # safe.directory: another user, such as root, may run this in the owner's checkout
  commit=$(git -c safe.directory='*' -C "$repo" rev-parse --short HEAD 2>/dev/null || echo unknown)
  if [ -n "$(git -c safe.directory='*' -C "$repo" status --porcelain --untracked-files=no 2>/dev/null)" ]; then
    commit=$commit+changes
  fi
fi
echo "gpu_check: $gpu, commit $commit, parts: $only, at most $total s"

summary=() failed=0
# step NAME LIMIT LINES COMMAND...: runs it with a time limit, its output in a log, of which the last lines are shown.
step() {
  local name=$1 limit=$2 lines=$3 begin=$SECONDS left=$((total - SECONDS)) code verdict
  shift 3
  if [ "$left" -lt 10 ]; then
    summary+=("$(printf '%-10s %5s    not run: %s s left of %s' "$name" - "$left" "$total")")
    failed=$((failed + 1))
    return 1
  fi
  if [ "$limit" -gt "$left" ]; then limit=$left; fi
  echo "== $name (at most $limit s)"
  timeout --kill-after=5 "$limit" "$@" >"$logs/$name.log" 2>&1 </dev/null
  code=$?
  case "$code" in
    0) verdict=ok ;;
    124 | 137) verdict="FAILED: stopped after $limit s" ;;
    *) verdict="FAILED: exit code $code" ;;
  esac
  if [ "$code" -ne 0 ]; then failed=$((failed + 1)); lines=60; fi
  tail -n "$lines" "$logs/$name.log" | cut -c1-300
  summary+=("$(printf '%-10s %5s s  %s' "$name" "$((SECONDS - begin))" "$verdict")")
  echo "${summary[-1]}"
  return "$code"
}

# ---- build ------------------------------------------------------------------------------------------------------------

installed() {
  "$python" -c 'import specnorm_ext, sys; sys.exit(not specnorm_ext.build_info()["cuda_kernels"])' >/dev/null 2>&1
}
# With line numbers for compute-sanitizer, which change no code. The build directory lies outside of the checkout.
export CUDAFLAGS="-lineinfo ${CUDAFLAGS:-}"
install=("$python" -m pip install -v --no-build-isolation --no-deps
  "--config-settings=build-dir=$work/build"
  "--config-settings=cmake.define.SPECNORM_EXT_CUDA=ON"
  "--config-settings=cmake.define.CMAKE_CUDA_ARCHITECTURES=${CMAKE_CUDA_ARCHITECTURES:-native}")
if ! "$python" -c 'import os, sys, sysconfig; sys.exit(not os.access(sysconfig.get_path("platlib"), os.W_OK))'; then
  echo "gpu_check: the site-packages of $python cannot be written to: installing into a temporary directory"
  install+=(--target "$work/site")
  export PYTHONPATH=$work/site${PYTHONPATH:+:$PYTHONPATH}
fi
if ! command -v nvcc >/dev/null 2>&1 && [ -x /usr/local/cuda/bin/nvcc ]; then export PATH=$PATH:/usr/local/cuda/bin; fi
if wants build || ! installed; then
  step build 240 3 "${install[@]}" "$repo"
  if installed; then
    "$python" -c 'import specnorm_ext as s; print({k: v for k, v in s.build_info().items() if "cuda" in k or "torch" in k})'
  else
    echo "gpu_check: the module with CUDA kernels cannot be imported after the build; the other parts need it" >&2
    "$python" -c 'import specnorm_ext; print(specnorm_ext.build_info())' 2>&1 | tail -n 3
    summary+=("$(printf '%-10s %5s    %s' import - 'FAILED: no module with CUDA kernels, nothing else was run')")
    failed=$((failed + 1))
    only=build
  fi
fi

# ---- test -------------------------------------------------------------------------------------------------------------

# -v names tests, so that the log of a hang tells which were done
tests=("$python" -m pytest -c "$repo/pyproject.toml" --rootdir "$repo" -p no:cacheprovider -v --tb=short
  -o faulthandler_timeout=60 --durations=5)
failures() { grep -E '^(FAILED|ERROR|E  )|Exit: ' "$logs/$1.log" | cut -c1-300 | head -n 40; }
has_xdist() { "$python" -c 'import xdist' >/dev/null 2>&1; }

if wants test; then
  # A thousand short tests of values, whose time is the CPU's, for what they are compared with: side by side where
  # pytest-xdist is installed. What is about time, memory and waiting has the GPU to itself.
  parallel=()
  if has_xdist; then parallel=(-n 4); fi
  step values 150 8 "${tests[@]}" "${parallel[@]}" "$repo/tests/test_cuda.py" "$repo/tests/test_cuda_stacks.py" ||
    { echo "-- tests that failed, and how:"; failures values; }
  step runtime 120 8 "${tests[@]}" "$repo/tests/test_cuda_runtime.py" "$repo/tests/test_cuda_layers.py" ||
    { echo "-- tests that failed, and how:"; failures runtime; }
  # Of the tests that know nothing of a GPU those that see most of the package, as on the second device in each CI run.
  parallel=()
  if has_xdist; then parallel=(-n auto --maxprocesses 8 --dist loadfile); fi
  general=(sigma_normalize_autograd layers group parametrization_faults lipschitz_graph losses pacgen)
  files=()
  for name in "${general[@]}"; do files+=("$repo/tests/test_$name.py"); done
  step general 90 8 "${tests[@]}" "${parallel[@]}" --device cuda "${files[@]}" ||
    { echo "-- tests that failed, and how:"; failures general; }
fi

# ---- compute-sanitizer --------------------------------------------------------------------------------------------------

if wants sanitize; then
  sanitizer=${COMPUTE_SANITIZER:-$(command -v compute-sanitizer || true)}
  if [ -z "$sanitizer" ]; then
    for place in "$(dirname "$(command -v nvcc || echo /usr/local/cuda/bin/nvcc)")" /usr/local/cuda/compute-sanitizer; do
      if [ -x "$place/compute-sanitizer" ]; then sanitizer=$place/compute-sanitizer; fi
    done
  fi
  if [ -z "$sanitizer" ]; then
    echo "gpu_check: compute-sanitizer is neither on the PATH nor beside nvcc; install it (it comes with the CUDA toolkit) or set COMPUTE_SANITIZER"
    summary+=("$(printf '%-10s %5s    %s' sanitize - 'FAILED: there is no compute-sanitizer')")
    failed=$((failed + 1))
  else
    # Errors of API calls are not reported: torch makes some on purpose, and a failed launch of ours raises. Without the
    # caching allocator each tensor is an allocation of its own, whose end memcheck knows.
    step memcheck 75 4 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$sanitizer" --tool memcheck --error-exitcode 1 \
      --report-api-errors no --target-processes all --print-limit 20 "$python" "$repo/tests/cuda_sanitizer_cases.py" --seconds 40
    step racecheck 75 4 "$sanitizer" --tool racecheck --error-exitcode 1 --target-processes all --print-limit 20 \
      "$python" "$repo/tests/cuda_sanitizer_cases.py" --seconds 40
    for tool in memcheck racecheck; do
      if [ -f "$logs/$tool.log" ]; then grep -E '^=+ +(Error|Invalid|Warning|Race)' "$logs/$tool.log" | cut -c1-200 | sort | uniq -c | head -n 12; fi
    done
  fi
fi

# ---- bench --------------------------------------------------------------------------------------------------------------

if wants bench; then
  left=$((total - SECONDS))
  budget=$((left < 190 ? left - 25 : 165))  # a case that has begun may end after it
  if [ "$budget" -lt 10 ]; then budget=10; fi
  step bench 190 90 "$python" "$repo/bench/bench_cuda.py" --out "$results" --commit "$commit" --budget "$budget"
fi

# ---- the general tests, on this device ----------------------------------------------------------------------------------

if wants device; then
  # Thousands of small tests, whose time is that of Python and of launches: as many processes as share the GPU well.
  # It says in the end which tests it left out, and why. All the time that is left: whoever asks for this part waits.
  parallel=()
  if has_xdist; then parallel=(-n auto --maxprocesses 8 --dist loadfile); fi
  step device "$total" 40 "${tests[@]}" "${parallel[@]}" --device cuda "$repo/tests" ||
    { echo "-- tests that failed, and how:"; failures device; }
fi

# ---- what there is to keep ----------------------------------------------------------------------------------------------

{
  echo "gpu_check: $gpu, commit $commit, $SECONDS s"
  printf '%s\n' "${summary[@]}"
} | tee "$logs/summary.txt"
if [ -n "$out" ]; then
  mkdir -p "$out"  # one file, the summary first: where only a few come back
  for log in "$logs"/summary.txt "$logs"/*.log; do printf '\n==== %s\n' "$(basename "$log")"; tail -c 1500000 "$log"; done \
    >"$out/gpu_check.log"
  if wants bench; then find "$results" -name '*.json' -newer "$work/began" -exec cp {} "$out/" \; ; fi
fi
if wants bench; then find "$results" -name '*.json' -newer "$work/began" -exec echo "gpu_check: wrote" {} \; ; fi
if [ "$failed" -ne 0 ]; then
  echo "gpu_check: $failed steps failed; logs in ${out:+$out and }$logs"
  exit 1
fi
echo "gpu_check: all passed; logs in ${out:+$out and }$logs"
