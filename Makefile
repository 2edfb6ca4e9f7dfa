BIN := .venv/bin
RUN := .venv/.run
ALL := .venv/.all
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile
NOTEBOOKS := $(sort $(wildcard notebooks/0*.ipynb))
unexport PYTHONDONTWRITEBYTECODE  # modules are compiled when they are first imported

.PHONY: run test lint soak lab notebooks paper bench cost

run: $(RUN)  ## distil a student on the built-in data
	$(BIN)/lesionkd run 04_distill

test: $(ALL)  ## all tests but the long ones; nbval compares the committed outputs of the notebooks
	$(BIN)/python -m pytest --nbval -n 2 --no-loadscope-reorder --durations 10

lint: $(ALL)  ## style, formatting, types, import rules
	$(BIN)/ruff check
	$(BIN)/ruff format --check lesionkd_core tests tools
	$(BIN)/mypy
	$(BIN)/lint-imports

soak: $(ALL)  ## the long tests: kills in every stage, full disks, flipped bits; then faults in the losses
	$(BIN)/python -m pytest -m soak
	$(BIN)/mutmut run
	$(BIN)/mutmut results

lab: $(RUN)  ## read and run the notebooks
	$(BIN)/python -m jupyterlab notebooks

notebooks: $(ALL)  ## execute and save all notebooks, then what is generated in README and docs
	$(BIN)/python -m nbconvert --to notebook --execute --inplace --ExecutePreprocessor.record_timing=False $(NOTEBOOKS)
	$(BIN)/python -m tools.readme_index

paper: $(RUN)  ## notebook 06, then notebooks/paper/paper.tex with its figures and numbers; needs pdflatex
	@command -v pdflatex > /dev/null || { echo "make paper needs pdflatex (Debian: texlive-latex-recommended, texlive-fonts-recommended)"; exit 1; }
	@results=$$($(BIN)/lesionkd run 06_paper_figures | sed -n 's/^results: //p') && \
	cd "$${results:?notebook 06 failed}" && for pass in 1 2; do \
	TEXINPUTS="$(CURDIR)/notebooks/paper:" pdflatex -interaction=batchmode -halt-on-error -output-directory=.. paper || exit 1; \
	done; echo "$${results%/*}/paper.pdf"

bench: $(RUN)  ## ratios of times in one run, into runs/bench.json; BEFORE=FILE shows an earlier one beside it
	$(BIN)/python -m tools.speed $(BEFORE)

cost: $(ALL)  ## latency of all networks in all engines, into data/results/cost.csv; needs an idle machine
	$(BIN)/python -m tools.cost

$(RUN): requirements.lock pyproject.toml
	@echo "installing packages into .venv: 1.4 GB on the disk, a minute or more"
	@test ! -e .venv/.unfinished || rm -rf .venv  # an installation was interrupted
	python3 -m venv .venv
	@touch .venv/.unfinished
	$(PIP) -r requirements.lock
	$(PIP) --no-deps --no-build-isolation -e .
	@rm .venv/.unfinished
	@touch $@

$(ALL): requirements-test.lock $(RUN)
	@echo "installing the packages of all extras into .venv: 1.3 GB more"
	@test ! -e .venv/.unfinished || { rm -rf .venv && $(MAKE) $(RUN); }
	@touch .venv/.unfinished
	$(PIP) -r requirements-test.lock
	@rm .venv/.unfinished
	@touch $@
