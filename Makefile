BIN := .venv/bin
SETUP := .venv/.done
NOTEBOOKS := $(sort $(wildcard notebooks/0*.ipynb))

.PHONY: run test lint soak lab notebooks paper bench cost

run: $(SETUP)  ## distil a student on the built-in data
	$(BIN)/lesionkd run 04_distill

test: $(SETUP)  ## all tests but the long ones; nbval compares the committed outputs of the notebooks
	$(BIN)/python -m pytest --nbval -n 2 --no-loadscope-reorder --durations 10

lint: $(SETUP)  ## style, formatting, types, import rules
	$(BIN)/ruff check
	$(BIN)/ruff format --check lesionkd_core tests tools
	$(BIN)/mypy
	$(BIN)/lint-imports

soak: $(SETUP)  ## the long tests: kills in every stage, full disks, flipped bits, every fault in the losses
	$(BIN)/python -m pytest -m soak

lab: $(SETUP)  ## read and run the notebooks
	$(BIN)/python -m jupyterlab notebooks

notebooks: $(SETUP)  ## execute and save all notebooks, then what is generated in README and docs
	$(BIN)/python -m nbconvert --to notebook --execute --inplace --ExecutePreprocessor.record_timing=False $(NOTEBOOKS)
	$(BIN)/python -m tests.readme_index

paper: $(SETUP)  ## notebook 06, then notebooks/paper/paper.tex with its figures and numbers; needs pdflatex
	@command -v pdflatex > /dev/null || { echo "make paper needs pdflatex (Debian: texlive-latex-recommended, texlive-fonts-recommended)"; exit 1; }
	@results=$$($(BIN)/lesionkd run 06_paper_figures | sed -n 's/^results: //p') && \
	cd "$${results:?notebook 06 failed}" && for pass in 1 2; do \
	TEXINPUTS="$(CURDIR)/notebooks/paper:" pdflatex -interaction=batchmode -halt-on-error -output-directory=.. paper || exit 1; \
	done; echo "$${results%/*}/paper.pdf"

bench: $(SETUP)  ## ratios of times in one run, into runs/bench.json; BEFORE=FILE shows an earlier one beside it
	@mkdir -p runs
	$(BIN)/python -m pytest tests/benchmarks -q --benchmark-only --benchmark-disable-gc --benchmark-json=runs/bench-raw.json --benchmark-columns=median,rounds
	$(BIN)/python -m tests.benchmarks.report runs/bench-raw.json runs/bench.json $(BEFORE)

cost: $(SETUP)  ## latency of all networks in all engines, into data/results/cost.csv
	$(BIN)/python -m tools.cost

$(SETUP): requirements.lock pyproject.toml
	@echo "installing packages into .venv: 3 GB on the disk, some minutes"
	python3 -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@
