# make demo | test | quick | lint | types | oldest | clean
# Each target makes its environment by itself from python3 (3.10 or newer) and pip or uv; nothing else is needed.

PYTHON ?= python3
VENV   ?= .venv
# torch and torchvision must match each other, so the pair is pinned here; the package itself takes any torch from 2.6 on.
TORCH  ?= torch==2.13.0 torchvision==0.28.0
JOBS   ?= 2

OLDEST       ?= build/venv-oldest
OLDEST_TORCH ?= torch==2.11.0 torchvision==0.26.0
OLDEST_HF    ?= transformers==5.16.0

# One thread per test process, or two processes fight for the cores; no test may reach for a hub.
TESTS := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
ARGS  ?=

.PHONY: demo test quick lint types oldest clean

demo: $(VENV)/.ready
	HF_HUB_OFFLINE=1 $(VENV)/bin/mllm-squeeze demo --out out/demo $(ARGS)

test: $(VENV)/.ready
	$(TESTS) $(VENV)/bin/python -m pytest -n $(JOBS) $(ARGS)

quick: $(VENV)/.ready
	$(TESTS) $(VENV)/bin/python -m pytest -n $(JOBS) -m quick $(ARGS)

lint: $(VENV)/.ready
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

types: $(VENV)/.ready
	$(VENV)/bin/mypy

# The same tests against the oldest versions that pyproject.toml allows.
oldest: $(OLDEST)/.ready
	$(TESTS) $(OLDEST)/bin/python -m pytest -n $(JOBS) -m quick $(ARGS)

clean:
	rm -rf $(VENV) $(OLDEST) build dist out .pytest_cache .mypy_cache .ruff_cache

$(VENV)/.ready: pyproject.toml Makefile
	$(call environment,$(VENV),$(TORCH) -e '.[dev]')

$(OLDEST)/.ready: pyproject.toml Makefile
	$(call environment,$(OLDEST),$(OLDEST_TORCH) $(OLDEST_HF) -e '.[dev]')

# $(call environment,FOLDER,REQUIREMENTS): uv installs in seconds, the one on the path or one that pip fetches; where it
# cannot, pip does the same. --without-pip: Debian's python3 can do that without the package python3-venv.
define environment
test -x $(1)/bin/python || $(PYTHON) -m venv --without-pip $(1)
{ command -v uv > /dev/null && uv pip install --system-certs --python $(1)/bin/python $(2); } \
|| { $(PYTHON) -m pip --python $(1)/bin/python install --quiet uv \
     && $(1)/bin/uv pip install --system-certs --python $(1)/bin/python $(2); } \
|| $(PYTHON) -m pip --python $(1)/bin/python install $(2)
touch $@
endef
