# All targets work in a fresh clone, because they run `make setup` first if it is needed. `make setup`
# installs the package, Detectron2 and all dependencies into .venv and changes nothing else.
#
#   PYTHON=...       the interpreter that creates .venv (3.11 to 3.13). To change it later, delete .venv.
#   TORCH_INDEX=...  the address of a package index with a different build of torch and torchvision (an
#                    older CUDA, ROCm, CPU only; see the "get started" page of the PyTorch website), for
#                    the first `make setup`. The index must have both packages in the versions listed
#                    in constraints.txt. If torch and torchvision are of different builds, imports fail
#                    with "operator torchvision::nms does not exist".

VENV := .venv
PY := $(VENV)/bin/python
READY := $(VENV)/.ready
WORKERS := 2
# Processes of the GPU tests, which share the GPU. Most of their time is spent compiling kernels.
GPU_WORKERS := 8
TRAINING_TESTS := $(addprefix tests/engine/classification/test_,small_images.py training.py) \
	$(addprefix tests/engine/test_,commands.py train_step.py trainer.py)
# Keep compiled modules, even where the environment says not to: to compile all tests takes 7 seconds
# per process.
export PYTHONDONTWRITEBYTECODE :=
PYTHONS := $(or $(PYTHON),python3.13 python3.12 python3.11 python3)
# The pinned versions of the CUDA packages only apply to the default build of torch.
CONSTRAINTS := $(if $(TORCH_INDEX),$(VENV)/constraints.txt,constraints.txt)

.DEFAULT_GOAL := help
.PHONY: help setup demo demo-instant test test-fast test-narrow test-faults test-slow test-gpu coverage \
	lint docs bench container

help: ## list these targets
	@sed -n 's/^\([a-z][a-z -]*\):.*## /\1|/p' Makefile | awk -F'|' '{ printf "  make %-14s %s\n", $$1, $$2 }'

setup: $(READY) ## install everything into .venv; does nothing if it is up to date
	@echo "Ready: source $(VENV)/bin/activate"

demo: ## train a small SE detector on rendered shapes and draw its predictions
demo: CONFIG := configs/demo_faster_rcnn_se_r18.yaml
demo: OUT := output/demo

demo-instant: ## smoke test: all steps of the demo in seconds, with almost no training
demo-instant: CONFIG := configs/instant/demo_faster_rcnn_se_r18.yaml
demo-instant: OUT := output/demo_instant

# The network is so small that a second thread would only compete with the data loader.
demo demo-instant: export OMP_NUM_THREADS := 1
demo demo-instant: $(READY)
	$(PY) datasets/prepare_shapes.py
	$(PY) tools/train_net.py --config-file $(CONFIG) --num-gpus 1 --overwrite \
		OUTPUT_DIR $(OUT)
	@$(PY) tools/predict.py --quiet --weights $(OUT)/model_final.pth --input datasets/shapes/val \
		--output $(OUT)/predictions --limit 12 > /dev/null
	@$(PY) tools/report.py $(OUT) --quiet > /dev/null
	@# These complete the table with which training ends.
	@printf '%-16s%s\n' predictions $(OUT)/predictions/ report $(OUT)/report.html

test: $(READY) ## run the tests except slow ones and fault injection
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(WORKERS) --dist worksteal -m "not slow and not faults"

test-fast: $(READY) ## run the quick tests: no training, no new processes, under a minute
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(WORKERS) --dist worksteal -m "not slow and not faults and not long"

test-narrow: $(READY) ## run the training tests with AVX2, which every x86-64 server supports
	ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 OMP_NUM_THREADS=1 $(PY) -m pytest \
		-n $(WORKERS) --dist worksteal -m "not slow and not faults" $(TRAINING_TESTS)

test-slow: $(READY) ## run all tests except fault injection
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(WORKERS) --dist worksteal -m "not faults"

test-faults: $(READY) ## run fault injection: kill runs, fill disks, damage and fuzz files
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(WORKERS) --dist worksteal -m faults

test-gpu: $(READY) ## run the tests that need a CUDA GPU, or skip them if there is none
	OMP_NUM_THREADS=2 $(PY) -m pytest -m gpu -rs -n $(GPU_WORKERS) --dist worksteal $$(grep -rl "pytest.mark.gpu" tests --include=*.py)

coverage: $(READY) ## run `make test` and write line and branch coverage to coverage.xml
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(WORKERS) --dist worksteal -m "not slow and not faults" \
		--cov --cov-report=term --cov-report=xml

lint: $(READY) ## check style and format (ruff), types (mypy) and spelling (codespell)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(PY) -m codespell_lib

container: ## build the container image senet_transfer with Docker
	docker build --tag senet_transfer .

docs: $(READY) ## build the documentation into site/, and check its links
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict
	@echo "Built: site/index.html; with search: $(PY) -m http.server --directory site"

bench: $(READY) ## compare with common alternatives; write output/benchmark.json
	$(PY) tools/benchmark.py --output output/benchmark.json

# The stamp file is written last, so that an interrupted setup is repeated by the next call. pip is
# upgraded first because old versions do not support --build-constraint. Detectron2 is installed after
# torch, which its build needs. The imports at the end detect incompatible packages immediately.
$(READY): pyproject.toml constraints.txt tools/install_detectron2.py
	@$(MAKE_VENV)
	@echo "Installing into $(VENV); the first time this downloads about 3 GB and uses 6 GB of disk space."
	@$(if $(TORCH_INDEX),grep -Ev '^cuda|^nvidia|^triton' constraints.txt > $(CONSTRAINTS))
	@$(PY) -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) --upgrade pip
	@$(PY) tools/pip_progress.py --log $(VENV)/setup.log --constraints $(CONSTRAINTS) -- \
		--build-constraint $(CONSTRAINTS) \
		$(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) --editable '.[dev,docs]'
	@$(PY) tools/install_detectron2.py
	@$(PY) -W ignore -c "import torchvision, detectron2.modeling"
	@touch $@

# Create .venv unless it already works. If only pip is missing, install it.
define MAKE_VENV
has_pip() { $(PY) -m pip --version >/dev/null 2>&1; }; \
if has_pip || { $(PY) -m ensurepip >/dev/null 2>&1 && has_pip; }; then exit 0; fi; \
lacking=; \
for python in $(PYTHONS); do \
	$$python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null || continue; \
	if $$python -c 'import ensurepip, venv' 2>/dev/null; then exec $$python -m venv --clear $(VENV); fi; \
	lacking="$$lacking $$($$python -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')"; \
done; \
echo "Cannot create $(VENV) (tried: $(PYTHONS))." >&2; \
if [ -n "$$lacking" ]; then \
	echo "A Python was found, but its venv module is missing. On Debian or Ubuntu, install:$$lacking" >&2; \
else \
	echo "Found no Python from 3.11 to 3.13. On Debian or Ubuntu, install: python3 python3-venv" >&2; \
	echo "To use a Python in another location: make setup PYTHON=/path/to/python3" >&2; \
fi; \
exit 1
endef
