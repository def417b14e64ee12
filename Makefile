# Every target makes what it needs first, so each works as the first command in a fresh clone:
# `make setup` puts the package, Detectron2 and all else into .venv, and nothing anywhere else.
#
#   PYTHON=...       the interpreter to make .venv with (3.11 to 3.13); to change it later, delete .venv
#   TORCH_INDEX=...  the address of a package index with another build of torch and torchvision (an
#                    older CUDA, ROCm, CPU only: the PyTorch site's "get started" page lists them), for
#                    the first `make setup`. It must hold both, at constraints.txt's versions: a torch
#                    and a torchvision of different builds fail with "operator torchvision::nms does
#                    not exist".

VENV := .venv
PY := $(VENV)/bin/python
READY := $(VENV)/.ready
WORKERS := 2
TRAINING_TESTS := $(addprefix tests/engine/classification/test_,small_images.py training.py) \
	$(addprefix tests/engine/test_,commands.py repeated_runs.py train_step.py trainer.py)
PYTHONS := $(or $(PYTHON),python3.13 python3.12 python3.11 python3)
# The pins for the default build of torch do not apply to another.
CONSTRAINTS := $(if $(TORCH_INDEX),$(VENV)/constraints.txt,constraints.txt)

.DEFAULT_GOAL := help
.PHONY: help setup demo demo-instant test test-fast test-narrow test-faults test-slow lint bench

help: ## list these targets
	@sed -n 's/^\([a-z][a-z -]*\):.*## /\1|/p' Makefile | awk -F'|' '{ printf "  make %-14s %s\n", $$1, $$2 }'

setup: $(READY) ## install everything into .venv; done again only after a change of versions
	@echo "Ready: source $(VENV)/bin/activate"

demo: ## train a small SE detector on drawn shapes, then draw its predictions
demo: CONFIG := configs/demo_faster_rcnn_se_r18.yaml
demo: OUT := output/demo

demo-instant: ## the same in seconds, to see every step run; it learns next to nothing
demo-instant: CONFIG := configs/instant/demo_faster_rcnn_se_r18.yaml
demo-instant: OUT := output/demo_instant

demo demo-instant: $(READY)
	$(PY) datasets/prepare_shapes.py
	$(PY) tools/train_net.py --config-file $(CONFIG) --num-gpus 1 OUTPUT_DIR $(OUT)
	$(PY) tools/predict.py --weights $(OUT)/model_final.pth --input datasets/shapes/val \
		--output $(OUT)/predictions --limit 12
	@echo
	@echo "Predictions, drawn on the images:  $(OUT)/predictions/"
	@echo "Log, metrics and model:            $(OUT)/log.txt, metrics.json, model_final.pth"
	@printf "All of it, to open in a browser:   "
	@$(PY) tools/report.py $(OUT)

test: $(READY) ## the tests, without the slow ones
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(WORKERS) --dist worksteal -m "not slow and not faults"

test-fast: $(READY) ## within a minute: the tests that neither train, start processes nor take a second
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(WORKERS) --dist worksteal -m "not slow and not faults and not long"

test-narrow: $(READY) ## the tests of training, with the vector instructions that every x86-64 server has
	ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 OMP_NUM_THREADS=1 $(PY) -m pytest \
		-n $(WORKERS) --dist worksteal -m "not slow and not faults" $(TRAINING_TESTS)

test-slow: $(READY) ## all tests but those of faults
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(WORKERS) --dist worksteal -m "not faults"

test-faults: $(READY) ## kill, stop, fill and damage runs at random points; fuzz what they read
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(WORKERS) --dist worksteal -m faults

lint: $(READY) ## style and format, with ruff; types of the public API, with mypy
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

bench: $(READY) ## compare with the usual alternatives; into output/benchmark.json
	$(PY) tools/benchmark.py --output output/benchmark.json

# The stamp is written last, so an interrupted set-up is taken up again by the next call. pip comes
# first (old ones lack --build-constraint), Detectron2 after all that torch needs, and the imports at
# the end find what does not fit together while the cause is still in sight.
$(READY): pyproject.toml constraints.txt tools/install_detectron2.py
	@$(MAKE_VENV)
	@echo "Installing into $(VENV); the first time this fetches about 3 GB, and takes 6 GB on disk."
	$(if $(TORCH_INDEX),grep -Ev '^cuda|^nvidia|^triton' constraints.txt > $(CONSTRAINTS))
	$(PY) -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) --upgrade pip
	$(PY) -m pip install -c $(CONSTRAINTS) --build-constraint $(CONSTRAINTS) \
		$(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) --editable '.[dev]'
	$(PY) tools/install_detectron2.py
	$(PY) -W ignore -c "import torchvision, detectron2.modeling"
	@touch $@

# Makes .venv, unless one that works is there (one that lacks only pip is completed).
define MAKE_VENV
has_pip() { $(PY) -m pip --version >/dev/null 2>&1; }; \
if has_pip || { $(PY) -m ensurepip >/dev/null 2>&1 && has_pip; }; then exit 0; fi; \
lacking=; \
for python in $(PYTHONS); do \
	$$python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null || continue; \
	if $$python -c 'import ensurepip, venv' 2>/dev/null; then exec $$python -m venv --clear $(VENV); fi; \
	lacking="$$lacking $$($$python -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')"; \
done; \
echo "Cannot make $(VENV) (tried: $(PYTHONS))." >&2; \
if [ -n "$$lacking" ]; then \
	echo "There is a Python without its venv module. On Debian or Ubuntu, install:$$lacking" >&2; \
else \
	echo "Found no Python from 3.11 to 3.13. On Debian or Ubuntu, install: python3 python3-venv" >&2; \
	echo "If you have one somewhere else: make setup PYTHON=/path/to/python3" >&2; \
fi; \
exit 1
endef
