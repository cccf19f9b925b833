# make demo   a virtual environment, the packages, and `python generate.py`
# make test   the same environment plus the reference implementations, then the tests
# make clean  removes the environment
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip install --disable-pip-version-check
MOSHI := moshi==0.2.13 'sphn<0.3'

.PHONY: demo test clean
demo: $(VENV)/.run-installed
	$(PY) generate.py

test: $(VENV)/.test-installed
	$(PY) -m pytest -q

$(PY):
	$(PYTHON) -m venv $(VENV)

# The stamp files make the second `make` quick; a change of the requirements installs again.
$(VENV)/.run-installed: requirements.txt | $(PY)
	$(PIP) -r requirements.txt
	touch $@

# Torch comes first, and the official package without its dependencies: it would pull an older torch.
# requirements.txt is named again as a constraint, so that nothing moves what it pins.
$(VENV)/.test-installed: requirements-test.txt $(VENV)/.run-installed
	$(PIP) --no-deps $(MOSHI)
	$(PIP) -r requirements-test.txt -c requirements.txt
	touch $@

clean:
	rm -rf $(VENV)
