# make demo | test | test-slow | examples | docs | faults | soak | gpu-check | gpu-bench | coverage | lint | lock -- each sets up
# what it needs in ./.venv first.
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
# requirements-BACKEND.lock was resolved for Python 3.11; another Python has a lock where its pins must differ.
VERSIONS := 3.11 3.12 3.13
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
LOCK := $(firstword $(wildcard requirements-$(BACKEND)-$(VERSION).lock) requirements-$(BACKEND).lock)
TORCH_PIN := $(shell grep '^torch==' requirements-gpu.lock)
# Not in the CPU lock: the CUDA-only companions of torch, which is installed apart, and scikit-learn, which lm-eval needs
# for other tasks only, and which transformers imports in every process where it is installed (2.5 CPU seconds).
EXCLUDED := torch torchvision torchaudio torchcodec triton scikit-learn
COMPILE := $(UV) pip compile --no-header --no-annotate --no-emit-package onpolicy-skd -q

unexport PYTHONDONTWRITEBYTECODE
export HF_HUB_DISABLE_TELEMETRY := 1
export RAY_USAGE_STATS_ENABLED := 0
export NO_MKDOCS_2_WARNING := 1

.PHONY: demo test test-slow examples docs faults soak gpu-check gpu-bench coverage lint lock setup clean

# Half of the 200 steps of `skd train --config demo`, with prompts for these steps only and no evaluation of the teacher. The
# learner trains on rollouts while vLLM generates the others.
demo: $(READY)
	rm -rf runs/demo
	$(RUN) -m onpolicy_skd.train --config configs/demo.yaml run.steps=100 pipeline.streaming=true \
		data.train_problems=6400 eval.teacher=false

# Each worker of pytest-xdist has its share of the cores. Files with Ray and engines come first: they take longest.
test: $(READY)
	$(RUN) -m pytest -m "not slow" tests/integration tests/unit \
		-n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder

# One by one: each starts several processes, which use all cores. MINUTES=N starts no test after N minutes and lists those
# it skips; the order of the files depends on the commit.
test-slow: $(READY)
	$(RUN) -m pytest -m slow $(if $(MINUTES),--minutes $(MINUTES) -rs)

# The notebook and the scripts of examples/, executed.
examples: $(READY)
	$(RUN) -m pytest -m slow tests/integration/test_examples.py

# The documentation as a site in site/; a broken link is an error.
docs: $(READY)
	$(RUN) -m mkdocs build --strict

# Processes killed, disks filled, files damaged: what becomes of runs (docs/reliability.md). About 40 minutes on two cores.
faults: $(READY)
	$(RUN) -m eval.faults --out runs/faults

# Two thousand steps of the demo's loop, watched for anything that grows. About 15 minutes.
soak: $(READY)
	$(RUN) -m eval.soak --out runs/soak

# The GPU path in about ten minutes, each check with a criterion. Models from the hub, whose download takes longer, or
# from folders: ARGS="student.model=FOLDER teacher.model=FOLDER".
gpu-check: $(READY)
	$(RUN) -m eval.gpu_check --json runs/gpu_check.json $(ARGS)

# The learner at the shapes of Qwen3-1.7B <- Qwen3-8B, random weights: no models are needed. Whole steps need them:
# ARGS="--run gsm8k_one_gpu".
gpu-bench: $(READY)
	$(RUN) -m eval.gpu_bench --out runs/gpu_bench.json $(ARGS)

# Every branch of the mathematics.
coverage: $(READY)
	$(RUN) -m pytest tests/unit/selection tests/unit/loss --cov-branch --cov-fail-under=100 \
		--cov=onpolicy_skd.selection --cov=onpolicy_skd.loss --cov-report=term-missing

lint: $(READY)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m pyright

setup: $(READY)

$(READY): $(LOCK) pyproject.toml setup.py
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install -q uv==0.13.9
	$(UV) pip install -q --python $(RUN) --no-deps -r $(LOCK) \
		|| $(RUN) -m pip install -q --no-deps -r $(LOCK)
ifeq ($(BACKEND),cpu)
# The bare wheel first: it is all that a CPU build needs. A CUDA build will not import without its libraries.
	$(RUN) -m pip install -q --no-deps $(TORCH) $(TORCH_PIN)
	$(RUN) -c "import torch" 2>/dev/null || $(RUN) -m pip install -q $(TORCH) $(TORCH_PIN)
endif
	$(RUN) -m pip install -q --no-deps --no-build-isolation -e .
	touch $(READY)

# The pins: resolved from pyproject.toml, those there are kept where they fit. networkx is torch's, which the CPU lock
# leaves out. A lock for 3.12 or 3.13 stays only if it differs from the one for 3.11.
lock:
	test -x $(UV) || ($(PYTHON) -m venv $(VENV) && $(RUN) -m pip install -q uv==0.13.9)
	for name in $(EXCLUDED); do echo "$$name ; sys_platform == 'never'"; done > .overrides.txt
	set -e; for v in $(VERSIONS); do \
		for b in cpu gpu; do test -f requirements-$$b-$$v.lock || cp requirements-$$b.lock requirements-$$b-$$v.lock; done; \
		printf 'networkx\nsetuptools\nwheel\n' | $(COMPILE) --python-version $$v pyproject.toml - --extra cpu --extra dev \
			--override .overrides.txt -o requirements-cpu-$$v.lock; \
		printf 'setuptools\nwheel\n' | $(COMPILE) --python-version $$v pyproject.toml - --extra gpu --extra dev \
			-o requirements-gpu-$$v.lock; \
	done
	set -e; for b in cpu gpu; do \
		mv requirements-$$b-3.11.lock requirements-$$b.lock; \
		for lock in requirements-$$b-*.lock; do cmp -s $$lock requirements-$$b.lock && rm $$lock || true; done; \
	done
	rm -f .overrides.txt

clean:
	rm -rf $(VENV) build site *.egg-info
