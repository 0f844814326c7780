# make demo | test | test-slow | faults | soak | coverage | lint | lock -- each sets up what it needs in ./.venv first.
#
# BACKEND  cpu or gpu; found by itself (gpu where nvidia-smi lists one)
# PYTHON   the Python (3.11 to 3.13) that makes the virtual environment
# TORCH    extra arguments for installing PyTorch on CPU, for example an --index-url with CPU-only wheels

PYTHON ?= python3
BACKEND ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo gpu || echo cpu)
TORCH ?=
VENV := .venv
RUN := $(VENV)/bin/python
UV := $(VENV)/bin/uv
READY := $(VENV)/ready-$(BACKEND)
LOCK := requirements-$(BACKEND).lock
# The CUDA-only companions of torch that the CPU lock must not have; torch itself is installed apart.
EXCLUDED := torch torchvision torchaudio torchcodec triton
COMPILE := $(UV) pip compile --python-version 3.11 --no-header --no-annotate --no-emit-package onpolicy-skd -q

unexport PYTHONDONTWRITEBYTECODE
export HF_HUB_DISABLE_TELEMETRY := 1
export RAY_USAGE_STATS_ENABLED := 0

.PHONY: demo test test-slow faults soak coverage lint lock setup clean

demo: $(READY)
	rm -rf runs/demo
	$(RUN) -m onpolicy_skd.train --config configs/demo.yaml

test: $(READY)
	$(RUN) -m pytest -m "not slow"

test-slow: $(READY)
	$(RUN) -m pytest -m slow

# Processes killed, disks filled, files damaged: what becomes of runs (docs/reliability.md). About 40 minutes on two cores.
faults: $(READY)
	$(RUN) -m eval.faults --out runs/faults

# Two thousand steps of the demo's loop, watched for anything that grows. About 15 minutes.
soak: $(READY)
	$(RUN) -m eval.soak --out runs/soak

# Every branch of the mathematics.
coverage: $(READY)
	$(RUN) -m pytest tests/unit/selection tests/unit/loss --cov-branch --cov-fail-under=100 \
		--cov=onpolicy_skd.selection --cov=onpolicy_skd.loss --cov-report=term-missing

lint: $(READY)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m pyright

setup: $(READY)

$(READY): $(LOCK) pyproject.toml
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install -q uv==0.13.9
	$(UV) pip install -q --python $(RUN) --no-deps --compile-bytecode -r $(LOCK) \
		|| $(RUN) -m pip install -q --no-deps -r $(LOCK)
ifeq ($(BACKEND),cpu)
# The bare wheel first: it is all that a CPU build needs. A CUDA build will not import without its libraries.
	$(RUN) -m pip install -q --no-deps $(TORCH) torch==2.13.0
	$(RUN) -c "import torch" 2>/dev/null || $(RUN) -m pip install -q $(TORCH) torch==2.13.0
endif
	$(RUN) -m pip install -q --no-deps --no-build-isolation -e .
	touch $(READY)

# The pins: resolved from pyproject.toml. networkx is torch's, which the CPU lock leaves out.
lock:
	test -x $(UV) || ($(PYTHON) -m venv $(VENV) && $(RUN) -m pip install -q uv==0.13.9)
	for name in $(EXCLUDED); do echo "$$name ; sys_platform == 'never'"; done > .overrides.txt
	printf 'networkx\nsetuptools\nwheel\n' | $(COMPILE) pyproject.toml - --extra cpu --extra dev --override .overrides.txt -o requirements-cpu.lock
	printf 'setuptools\nwheel\n' | $(COMPILE) pyproject.toml - --extra gpu --extra dev -o requirements-gpu.lock
	rm -f .overrides.txt

clean:
	rm -rf $(VENV) build *.egg-info
