"""Canonical states: what layers are, their arrays, and fitting them to a model."""
