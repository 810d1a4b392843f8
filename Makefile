# make demo: the main job.   make test: the tests but for the slow ones.   Both set up .venv first (python3 3.11 to 3.14, g++, make).
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
# One process for each core, four at most: most tests keep one core busy.
TEST := $(RUN) -m pytest -n auto --maxprocesses 4
SOURCES := $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
# ninja is found on the PATH, and lives in the environment.
INSIDE := PATH="$(CURDIR)/$(VENV)/bin:$$PATH"
# The commands below never pick up another installation.
unexport PYTHONPATH
export MPLBACKEND := Agg

.PHONY: setup demo test test-slow fuzz fuzz-nightly bench lint format gallery docs sanitize gpu clean
.DEFAULT_GOAL := demo

setup: $(VENV)/.built

$(VENV)/.requirements: requirements-dev.txt
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

# An editable install; the compiled module is rebuilt by ninja, which touches only what changed.
$(VENV)/.built: $(VENV)/.requirements setup.py pyproject.toml $(SOURCES)
	FINITE_WIDTH_SKIP_EXT=1 $(RUN) -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .
	@mkdir -p build
	@echo "building the compiled module (log: build/build.log)"
	@$(INSIDE) $(RUN) setup.py build_ext --inplace > build/build.log 2>&1 || { tail -n 60 build/build.log; exit 1; }
	@grep -A3 "compiled module was not built" build/build.log || true
	touch $@

demo: setup
	$(RUN) examples/demo.py

# The suite without its slow tests, and the docstrings' examples.
test: setup
	$(TEST) --doctest-modules tests python

test-slow: setup
	$(TEST) tests --slow

# Every op on random shapes, strides and values against its reference.
fuzz: setup
	FINITE_WIDTH_FUZZ=2000 $(TEST) tests/test_fuzz.py

fuzz-nightly: setup
	FINITE_WIDTH_FUZZ=50000 $(TEST) tests/test_fuzz.py

# Not here, since they take long: --wing scale, and the grid of Tensor-Train shapes (--wing tt --case grid).
bench: setup
	for wing in gemm ntk tt pathsgd bayes sweeps; do \
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

# Every example, quick, and out/gallery/index.html with what was expected beside what came out.
gallery: setup
	$(RUN) examples/gallery.py

$(VENV)/.docs: $(VENV)/.requirements requirements-docs.txt
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements-docs.txt
	touch $@

# site/: any warning is an error. The package is read, not imported.
docs: $(VENV)/.docs
	$(RUN) docs/generate.py
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict --quiet

# The CPU kernels with AddressSanitizer and UBSan, beside the ordinary build; leaks are tests of their own
# (Python and torch keep what looks like leaks until the process ends). First this processor's own instruction set.
sanitize: setup
	rm -rf build/sanitize && mkdir -p build/sanitize
	cp -r python csrc setup.py pyproject.toml README.md LICENSE build/sanitize && rm -f build/sanitize/python/finite_width/*.so
	cd build/sanitize && FINITE_WIDTH_SANITIZE=address,undefined FINITE_WIDTH_CUDA=0 FINITE_WIDTH_REQUIRE_EXT=1 \
	  $(INSIDE) $(CURDIR)/$(RUN) setup.py build_ext --inplace > build.log 2>&1 || { tail -n 60 build.log; exit 1; }
	for isa in "" avx2 generic; do \
	  FINITE_WIDTH_ISA=$$isa PYTHONPATH=$(CURDIR)/build/sanitize/python ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	  LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" \
	  $(TEST) tests/*/test_ops.py -m battery -k "kernel or threads or bad_input or gradcheck" -p no:cacheprovider || exit 1; \
	done

# On a machine with a GPU: build, test and measure the CUDA kernels with its own python3 and torch (2.11 or later), without
# a network or an environment of our own; under ten minutes. Writes benchmarks/results/<gpu>-<wing>.json.
gpu:
	PYTHON=$(PYTHON) .ci/gpu

clean:
	rm -rf build dist out site docs/figures docs/benchmark_figures.md python/*.egg-info python/finite_width/*.so $(VENV)/.built
