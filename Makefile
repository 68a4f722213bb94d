# Two commands on a bare machine with Python 3.11 or newer: `make demo` and `make test`.
PYTHON ?= $(shell command -v python3.12 >/dev/null 2>&1 && python3.12 -c '' 2>/dev/null && echo python3.12 || \
	(command -v python3.11 >/dev/null 2>&1 && python3.11 -c '' 2>/dev/null && echo python3.11) || echo python3)
BIN := .venv/bin
DEMO := runs/demo

.PHONY: demo test lint docs clean-demo

# Runtime packages only. The stamp is newer than the requirements once they are installed.
.venv/runtime: pyproject.toml setup.py requirements.txt
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed; name one: make PYTHON=...")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	touch $@

# torch by itself first, so that no other package chooses its version. Its CPU build is enough: on Linux,
# PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu spares the download of CUDA.
.venv/test: .venv/runtime
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[test]'
	touch $@

# For the test of the web page: a Chromium that is there already, Playwright's, or the distribution's.
.venv/browser: .venv/test
	command -v chromium || command -v chromium-browser || command -v google-chrome || \
		$(BIN)/python -m playwright install $(if $(filter 0,$(shell id -u)),--with-deps) chromium || \
		{ apt-get update -qq && apt-get install -qq -y chromium; } || \
		echo "No Chromium could be installed: the test of the web page will be skipped."
	touch $@

# Each line is a command that a user would type; training that is already done is not repeated.
demo: .venv/runtime
	$(BIN)/python train.py --config configs/demo.py
	$(BIN)/python eval.py --config configs/demo.py --checkpoint $(DEMO)/asymmetric \
		--data.image_size=256 --data.crop=1,1 --data.mask.full_probability=0 --run.eval_pictures=6 \
		--json $(DEMO)/table.json --picture $(DEMO)/picture.png
	rm -rf $(DEMO)/diffusers $(DEMO)/from_diffusers
	$(BIN)/asymvq convert --checkpoint $(DEMO)/asymmetric --out $(DEMO)/diffusers --to diffusers
	$(BIN)/asymvq convert --checkpoint $(DEMO)/diffusers --out $(DEMO)/from_diffusers
	@echo
	@echo "checkpoint      $(DEMO)/asymmetric/checkpoints"
	@echo "table           $(DEMO)/table.json"
	@echo "picture         $(DEMO)/picture.png"
	@echo "PyTorch folder  $(DEMO)/diffusers (loaded back into $(DEMO)/from_diffusers)"

test: .venv/browser lint
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

lint: .venv/test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# Its own environment, since it needs nothing of ours: the API's pages are written from the source.
.venv/docs/bin/mkdocs: pyproject.toml
	$(PYTHON) -m venv .venv/docs
	.venv/docs/bin/python -m pip install --quiet --disable-pip-version-check $$($(PYTHON) -c \
		'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"])')
	touch $@

# Strict: a warning, such as a link that leads nowhere, is an error. The first variable silences mkdocs-material's
# advertisement against MkDocs 2.
docs: .venv/docs/bin/mkdocs
	NO_MKDOCS_2_WARNING=1 .venv/docs/bin/mkdocs build --strict

clean-demo:
	rm -rf $(DEMO)
