# make demo   a virtual environment, the packages, and `python generate.py`
# make live   the same and a web server, then the page to talk to it: http://localhost:8017
# make test   the same environment plus the reference implementations, then `make lint` and the tests
# make cuda   on a machine with a GPU: the environment of `make test`, then all that a GPU can show, as one table
#             (some of it: make cuda ARGS="--only tests,steps"; another torch: see "On a GPU" in README.md)
# make course the environment of `make demo` and JupyterLab, which opens the lessons as notebooks
# make lint   ruff: the rules and the layout, as pyproject.toml sets them
# make clean  removes the environment
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip install --disable-pip-version-check
# The official package asks for older versions of torch and numpy than the ones here, but runs with these: it is
# installed last and without its dependencies, which requirements-test.txt names.
MOSHI := moshi==0.2.13 'sphn<0.3'

.PHONY: demo live test cuda course lint clean
demo: $(VENV)/.run-installed
	$(PY) generate.py

live: $(VENV)/.live-installed
	$(PY) tools/live.py $(ARGS)

# In two processes of one thread each, a file of tests in one of them: twice as fast on two cores.
test: lint
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n 2 --dist loadfile

cuda: $(VENV)/.test-installed
	$(PY) tests/cuda_report.py $(ARGS)

course: $(VENV)/.course-installed
	$(PY) -m jupyter lab lessons/notebooks

lint: $(VENV)/.test-installed
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

$(PY):
	$(PYTHON) -m venv $(VENV)

# The stamp files make the second `make` quick; a change of the requirements installs again.
$(VENV)/.run-installed: requirements.txt | $(PY)
	$(PIP) -r requirements.txt
	touch $@

$(VENV)/.live-installed: requirements-live.txt $(VENV)/.run-installed
	$(PIP) -r requirements-live.txt -c requirements.txt
	touch $@

$(VENV)/.course-installed: requirements-course.txt $(VENV)/.run-installed
	$(PIP) -r requirements-course.txt -c requirements.txt
	touch $@

# requirements.txt is named again as a constraint, so that nothing moves what it pins.
$(VENV)/.test-installed: requirements-test.txt requirements-live.txt $(VENV)/.run-installed
	$(PIP) -r requirements-test.txt -c requirements.txt
	$(PIP) --no-deps $(MOSHI)
	touch $@

clean:
	rm -rf $(VENV)
