# make demo | test | quick | lint | types | oldest | newest | constraints | clean
# Each target makes its environment by itself from python3 (3.10 or newer) and pip or uv; nothing else is needed.
# demo and test install what constraints.txt names, the set that was tested, so that they do tomorrow what they do today.

PYTHON ?= python3
VENV   ?= .venv
JOBS   ?= 2

UV     ?= $(shell command -v uv || echo $(VENV)/bin/uv)
# torch and torchvision must match each other, so the pairs are named; the package itself takes any torch from 2.6 on.
TORCH  ?= torch==2.13.0 torchvision==0.28.0
# The newest transformers do without Python 3.10; there it gets the newest of the tested ones that does not.
OLDER_HF ?= transformers==5.17.0 ; python_full_version < '3.11'

OLDEST       ?= build/venv-oldest
OLDEST_TORCH ?= torch==2.11.0 torchvision==0.26.0
OLDEST_HF    ?= transformers==5.16.0
NEWEST       ?= build/venv-newest

# One thread per test process, or two processes fight for the cores; no test may reach for a hub.
TESTS := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
ARGS  ?=

.PHONY: demo test quick lint types oldest newest constraints clean

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

# The quick tests against the oldest versions that pyproject.toml allows.
oldest: $(OLDEST)/.ready
	$(TESTS) $(OLDEST)/bin/python -m pytest -n $(JOBS) -m quick $(ARGS)

# What somebody gets who installs today without constraints.txt: made anew each time, so that it is the newest release
# of everything. torch is not pinned either; torchvision names the one torch that it was built for, so the pair matches.
# Names first what moved in transformers; its deprecation warnings are errors, so that a rename shows a release early.
newest:
	rm -rf $(NEWEST)
	$(call environment,$(NEWEST),-e '.[dev]')
	$(NEWEST)/bin/python -m mllm_squeeze.upstream.symbols; moved=$$?; \
	$(TESTS) $(NEWEST)/bin/python -m pytest -n $(JOBS) -m quick --deprecations=error $(ARGS) && exit $$moved

# Write constraints.txt anew from today's releases, for every Python and system at once; then run `make test`, and only
# commit what passes. CUDA's packages and triton stay out: each torch names its own exactly, and only some systems have them.
constraints: $(VENV)/.ready
	mkdir -p build
	printf '%s\n' $(TORCH) "$(OLDER_HF)" > build/tested.txt
	$(UV) pip compile --quiet --universal --python-version 3.10 --no-python-downloads --system-certs --no-header \
		--no-annotate --constraints build/tested.txt --extra dev --output-file build/resolved.txt --upgrade pyproject.toml
	{ echo '# The tested set of packages. Made by `make constraints`, used by `make demo` and `make test`.'; \
	  grep -vE '^(nvidia-|cuda-|triton==)' build/resolved.txt; } > constraints.txt

clean:
	rm -rf $(VENV) $(OLDEST) $(NEWEST) build dist out .pytest_cache .mypy_cache .ruff_cache

# What builds the package itself is of the tested set, too (UV_BUILD_CONSTRAINT for uv, the other for pip).
$(VENV)/.ready: export UV_BUILD_CONSTRAINT := constraints.txt
$(VENV)/.ready: export PIP_BUILD_CONSTRAINT := constraints.txt
$(VENV)/.ready: pyproject.toml constraints.txt Makefile
	$(call environment,$(VENV),-c constraints.txt -e '.[dev]')
	touch $@

# The tested set, but for what the oldest torch and transformers want older.
$(OLDEST)/.ready: pyproject.toml constraints.txt Makefile
	mkdir -p build
	grep -vE '^(torch|torchvision|transformers|tokenizers|huggingface-hub|setuptools)==' constraints.txt > build/oldest.txt
	$(call environment,$(OLDEST),-c build/oldest.txt $(OLDEST_TORCH) $(OLDEST_HF) -e '.[dev]')
	touch $@

# $(call environment,FOLDER,REQUIREMENTS): uv installs in seconds, the one on the path or one that pip fetches; where it
# cannot, pip does the same. --without-pip: Debian's python3 can do that without the package python3-venv.
define environment
test -x $(1)/bin/python || $(PYTHON) -m venv --without-pip $(1)
{ command -v uv > /dev/null && uv pip install --system-certs --python $(1)/bin/python $(2); } \
|| { $(PYTHON) -m pip --python $(1)/bin/python install --quiet uv \
     && $(1)/bin/uv pip install --system-certs --python $(1)/bin/python $(2); } \
|| $(PYTHON) -m pip --python $(1)/bin/python install $(2)
endef
