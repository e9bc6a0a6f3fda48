# Short verbs for people who work on tstitch-trt; users need only the two commands of the README.
PYTHON ?= python3

.PHONY: install lint format check test test-slow pages docs bench clean

install:  ## editable install with everything the tests and the linters need
	$(PYTHON) -m pip install scikit-build-core nanobind cmake ninja
	$(PYTHON) -m pip install --no-build-isolation -e ".[test,lint]"

lint:  ## ruff, clang-format
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	git ls-files '*.c' '*.cpp' '*.hpp' '*.h' '*.cu' | xargs clang-format --dry-run --Werror

format:  ## rewrite the sources in place
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .
	git ls-files '*.c' '*.cpp' '*.hpp' '*.h' '*.cu' | xargs clang-format -i

check: lint  ## the same, and types
	$(PYTHON) -m mypy

test:  ## on all cores
	$(PYTHON) -m pytest -n auto

test-slow:  ## the same on further models
	$(PYTHON) -m pytest -n auto -m slow

pages:  ## write the generated parts of docs/; QUICK=--quick leaves out what takes long
	PYTHONPATH=tests:$$PYTHONPATH $(PYTHON) -W ignore -m support.pages $(QUICK)

docs:  ## the site, in build/site; needs pip install ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(PYTHON) -m mkdocs build --strict

bench:  ## the built-in pair on this machine
	$(PYTHON) -m tstitch_trt.cli build fashion -o build/fashion.bundle
	$(PYTHON) -m tstitch_trt.cli bench build/fashion.bundle --batch 8 --against torch

clean:
	rm -rf build .mypy_cache .pytest_cache .ruff_cache
