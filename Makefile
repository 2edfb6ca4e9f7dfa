PY := .venv/bin/python
SETUP := .venv/.done
NOTEBOOKS := $(sort $(wildcard notebooks/0*.ipynb))

.PHONY: run test soak coverage lab notebooks paper bench cost
run: $(SETUP)  ## distil a student on the built-in data
	$(PY) -m lesionkd_core run 04_distill

test: $(SETUP)  ## unit, method, notebook and fault tests; nbval compares the committed outputs
	$(PY) -m pytest --nbval -n 2 --dist loadfile

soak: $(SETUP)  ## the slow tests: kills in every stage, full disks, flipped bits; prints the fault table of docs/trust.md
	$(PY) -m pytest -m soak

coverage: $(SETUP)  ## lines and branches of the core that the tests run, processes they start included; fails under 95 %
	$(PY) -m pytest -n 2 --dist loadfile --cov --cov-report=term-missing:skip-covered tests

lab: $(SETUP)  ## read and run the notebooks
	$(PY) -m jupyterlab notebooks

notebooks: $(SETUP)  ## execute all notebooks with the smoke profile and save them, then the README's index
	$(PY) -m nbconvert --to notebook --execute --inplace --ExecutePreprocessor.record_timing=False $(NOTEBOOKS)
	$(PY) -m tests.readme_index

paper: $(SETUP)  ## notebook 06, then notebooks/paper/paper.tex with its figures, tables and numbers; wants pdflatex
	@results=$$($(PY) -m lesionkd_core run 06_paper_figures | sed -n 's/^results: //p') && cd "$${results:?notebook 06 failed}" && for pass in 1 2; do \
	TEXINPUTS="$(CURDIR)/notebooks/paper:" pdflatex -interaction=batchmode -halt-on-error -output-directory=.. paper || exit 1; done; echo "$${results%/*}/paper.pdf"

cost: $(SETUP)  ## latency of all networks in all engines, Chromium included; into data/results/cost.csv (10 minutes on an idle machine)
	$(PY) -m tests.benchmarks.cost

bench: $(SETUP)  ## ratios of times, in one run; into runs/bench.json (BEFORE=an earlier one stands beside it)
	@mkdir -p runs
	$(PY) -m pytest tests/benchmarks -q --benchmark-only --benchmark-disable-gc --benchmark-json=runs/bench-raw.json --benchmark-columns=median,rounds
	$(PY) -m tests.benchmarks.report runs/bench-raw.json runs/bench.json $(BEFORE)

$(SETUP): requirements.lock pyproject.toml
	python3 -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@
