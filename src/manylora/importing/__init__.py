"""Adapters of other code, brought in as manylora's own."""
