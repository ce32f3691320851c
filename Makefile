# One thread: two beside another busy process are ten times slower than one, and a tiny model gains little from two.
# Every target does its own set-up on a fresh machine. Another interpreter: make setup PYTHON=python3.12
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.setup-done
LIBERO_STAMP := $(VENV)/.libero-done
DOCS_STAMP := $(VENV)/.docs-done
THREADS := OMP_NUM_THREADS=1

.PHONY: setup gl browser libero demo test test-host-pins check format bench docs dist dist-check clean

setup: $(STAMP) gl

# constraints.txt holds versions that need Python 3.11; an older one gets what pip finds.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "Python 3.10 or newer is needed: make setup PYTHON=python3.11"; exit 1; }
	@echo "installing into $(VENV); the first time takes a few minutes"
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@pins=$$($(PY) -c 'import sys; print("-c constraints.txt" if sys.version_info >= (3, 11) else "")'); \
	$(PY) -m pip install --disable-pip-version-check --progress-bar off --quiet $$pins -e '.[native,data,sim,retrieval,dev]'
	@touch $@

# Rollouts draw through OSMesa. Without it everything else works, so a failure here only tells how to get it.
gl: $(STAMP)
	@if ! $(PY) -c "import ctypes.util, sys; sys.exit(not ctypes.util.find_library('OSMesa'))"; then \
	  sudo=; [ "$$(id -u)" = 0 ] || sudo="sudo -n"; \
	  echo "installing libosmesa6 (off-screen rendering for rollouts)"; \
	  { $$sudo apt-get update -qq && $$sudo apt-get install -y -qq --no-install-recommends libosmesa6; } >/dev/null 2>&1 \
	  || echo "no OSMesa library: rollouts are left out. On Debian/Ubuntu: sudo apt-get install libosmesa6"; \
	fi

# The report is looked at in Chromium. Without it that test alone is left out (in CI it fails), so a failure only tells.
browser:
	@if ! command -v chromium >/dev/null && ! command -v chromium-browser >/dev/null && ! command -v google-chrome >/dev/null; then \
	  sudo=; [ "$$(id -u)" = 0 ] || sudo="sudo -n"; \
	  echo "installing chromium (the report is tested in it)"; \
	  { $$sudo apt-get update -qq && $$sudo apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core; } >/dev/null 2>&1 \
	  || echo "no Chromium: the test of the report's page is left out. On Debian/Ubuntu: sudo apt-get install chromium"; \
	fi

# The LIBERO simulator with 600 MB of assets: for its tests, recordings and rollouts; the demo does without.
libero: setup $(LIBERO_STAMP)

$(LIBERO_STAMP): $(STAMP)
	@echo "installing the LIBERO simulator into $(VENV); it downloads 400 MB"
	@pins=$$($(PY) -c 'import sys; print("-c constraints.txt" if sys.version_info >= (3, 11) else "")'); \
	$(PY) -m pip install --disable-pip-version-check --progress-bar off --quiet $$pins -e '.[libero]' || { \
	  echo "the LIBERO simulator could not be installed (the reason is above). Run 'make libero' again when that is mended;"; \
	  echo "without it, the other tests: $(PY) -m pytest -q"; exit 1; }
	@touch $@

demo: setup
	$(THREADS) $(PY) -m vla_energy.demo

# Two processes, a thread each; files stay whole, for what a module's fixtures make once.
test: setup libero browser
	$(THREADS) $(PY) -m pytest -q -n 2 --dist loadfile

# The core on openvla-oft's versions: an environment of its own (scripts/host_pins.py says where and how), not $(VENV).
test-host-pins:
	@host=$$($(PYTHON) scripts/host_pins.py) && \
	VLA_ENERGY_HOST_PINS=1 $(THREADS) "$$host" -m pytest -q tests/test_host_pins.py

check: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright
	$(VENV)/bin/interrogate vla_energy

format: $(STAMP)
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

# An hour or two; writes docs/benchmarks.md. make bench QUICK=1: minutes, small shapes, everything into runs/bench.
# With a checkout of openvla-oft: make bench BENCH='--host DIR --dlimp DIR --data_root_dir DATA'
bench: setup
	$(THREADS) $(PY) benchmarks/all.py $(if $(QUICK),--quick) $(BENCH)

docs: setup $(DOCS_STAMP)
	$(VENV)/bin/mkdocs build --strict

$(DOCS_STAMP): $(STAMP)
	@echo "installing what builds the site into $(VENV)"
	@pins=$$($(PY) -c 'import sys; print("-c constraints.txt" if sys.version_info >= (3, 11) else "")'); \
	$(PY) -m pip install --disable-pip-version-check --progress-bar off --quiet $$pins -e '.[docs]'
	@touch $@

# Wheel and sdist of the last commit, the same bytes each time.
dist: $(STAMP)
	$(PY) scripts/make_dist.py

# The slow proof: built twice, twine, the wheel in an empty environment. WITH="torch==2.13.0+cpu" takes other versions there.
dist-check: $(STAMP)
	$(PY) scripts/make_dist.py --check $(if $(WITH),--with $(WITH))

clean:
	rm -rf runs/demo build dist site *.egg-info .pytest_cache .ruff_cache .hypothesis
	find vla_energy tests scripts -name __pycache__ -type d -prune -exec rm -rf {} +
