#!/usr/bin/env bash
# Installs the project from this archive and runs the GPU benchmark and the GPU tests, offline:
#
#     bash run.sh OUT_DIR
#
# The results are gpu.json and one log per step in OUT_DIR; summary.txt lists the exit status and the
# seconds of each step (124: out of time). Environment variables:
#
#   PYTHON=python3    Python 3.12 with torch and torchvision
#   STEPS="install benchmark tests"
#   ARGUMENTS=...     parts and options of the benchmark, such as "training --compiled all"
#   LIMIT=420         seconds for the benchmark
#   TEST_LIMIT=200    seconds for the tests
#   DRY_RUN=1         tiny sizes on a CPU; the tests are then skipped
set -u
OUT=${1:?usage: bash run.sh OUT_DIR}
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
PYTHON=${PYTHON:-python3}
STEPS=${STEPS:-install benchmark tests}
PROJECT=$HERE/project
PY=$HERE/venv/bin/python
export TORCHINDUCTOR_CACHE_DIR=$HERE/inductor TRITON_CACHE_DIR=$HERE/triton MPLCONFIGDIR=$HERE/mpl
export DETECTRON2_DATASETS=$HERE/data PYTHONUNBUFFERED=1
: > "$OUT/summary.txt"
failed=0

# step NAME SECONDS COMMAND...: run a command with a time limit, and record its status.
step() {
  local name=$1 limit=$2 start=$SECONDS status
  shift 2
  timeout --kill-after 5 "$limit" "$@" > "$OUT/$name.log" 2>&1
  status=$?
  [ "$status" = 0 ] || failed=1
  printf '%-10s status %3d  %4d s\n' "$name" "$status" $((SECONDS - start)) | tee -a "$OUT/summary.txt"
  [ "$status" = 0 ] || tail -n 5 "$OUT/$name.log"
}

# A virtual environment that also sees the packages of $PYTHON, which may itself be one.
install() {
  set -e
  cd "$HERE"
  rm -rf venv project
  mkdir project
  tar xf project.tar -C project
  "$PYTHON" -m venv --without-pip venv
  "$PYTHON" - > "$("$PY" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/machine.pth" << 'EOF'
import site
for path in site.getsitepackages():
    print(f"import site; site.addsitedir({path!r})")
EOF
  options="-q --no-index --no-deps --no-cache-dir --disable-pip-version-check"
  "$PY" -m pip install $options --ignore-installed wheels/*.whl
  "$PY" project/tools/install_detectron2.py --wheel detectron2/*.whl
  "$PY" -m pip install $options --no-build-isolation --editable project
  "$PY" -W ignore -c "import torch, torchvision, timm, detectron2.modeling, senet_transfer as s
print(torch.__version__, torchvision.__version__, torch.version.cuda, s.__version__)"
}

benchmark() {
  cd "$PROJECT"
  exec "$PY" -W ignore tools/benchmark.py gpu ${ARGUMENTS:-} --output "$OUT/gpu.json" ${DRY_RUN:+--dry-run}
}

tests() {
  cd "$PROJECT"
  [ -n "${DRY_RUN:-}" ] || export REQUIRE_GPU=1
  export OMP_NUM_THREADS=2  # The workers share the cores.
  exec "$PY" -m pytest -m gpu -rs -n 8 --dist worksteal -p no:cacheprovider $(grep -rl "pytest.mark.gpu" tests --include=*.py)
}

export -f install benchmark tests
export HERE OUT PROJECT PY PYTHON
for name in $STEPS; do
  case $name in
    install) step install 300 bash -c install ;;
    benchmark) step benchmark "${LIMIT:-420}" bash -c benchmark ;;
    tests) step tests "${TEST_LIMIT:-200}" bash -c tests ;;
    *) echo "$name: no such step" | tee -a "$OUT/summary.txt"; failed=1 ;;
  esac
done
[ -f "$OUT/benchmark.log" ] && sed -n '/^Targets/,$p' "$OUT/benchmark.log" | tee -a "$OUT/summary.txt"
exit "$failed"
