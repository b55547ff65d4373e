PYTHON ?= python

.PHONY: conformance

# PEFT's own tests, on our methods: see tests/conformance/manylora_conformance.py.
conformance:
	$(PYTHON) -m pip install --quiet $(addprefix -c ,$(wildcard constraints.txt)) diffusers pillow scipy pytest-xdist
	PYTHONPATH=src $(PYTHON) tests/conformance/run.py
