"""The tests: unit, conformance (every handler), cli, chaos (real processes) and model."""
