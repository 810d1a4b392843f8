# make demo: the main job.   make test: all tests.   Both set up .venv first (python3 3.11 to 3.14, g++, make).
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
SOURCES := $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
# The commands below never pick up another installation.
unexport PYTHONPATH
export MPLBACKEND := Agg

.PHONY: setup demo test test-slow bench lint format gallery docs sanitize gpu clean
.DEFAULT_GOAL := demo

setup: $(VENV)/.built

$(VENV)/.requirements: requirements-dev.txt
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

# An editable install; the compiled module is rebuilt by ninja, which touches only what changed.
$(VENV)/.built: $(VENV)/.requirements setup.py pyproject.toml $(SOURCES)
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(RUN) -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(RUN) setup.py --quiet build_ext --inplace
	touch $@

demo: setup
	$(RUN) examples/demo.py

# The whole suite with the kernels, then the op battery without them and with the instruction set forced down.
test: setup
	$(RUN) -m pytest tests
	$(RUN) -m pytest --doctest-modules python -p no:cacheprovider
	FINITE_WIDTH_DISABLE_EXT=1 $(RUN) -m pytest tests -m battery
	FINITE_WIDTH_ISA=avx2 $(RUN) -m pytest tests -m battery
	FINITE_WIDTH_ISA=generic $(RUN) -m pytest tests -m battery

test-slow: setup
	$(RUN) -m pytest tests --slow

bench: setup
	for wing in gemm ntk tt pathsgd bayes; do \
	  $(RUN) benchmarks/run.py --wing $$wing --refcheck --peers --json benchmarks/results/$$wing.json || exit 1; \
	done

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/clang-format --dry-run -Werror $(SOURCES)

format: setup
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	$(VENV)/bin/clang-format -i $(SOURCES)

clean:
	rm -rf build dist out python/*.egg-info python/finite_width/*.so $(VENV)/.built
