"""`manylora serve`: runs on one base model behind an OpenAI-compatible HTTP interface.

transformers' own server has no adapters, and its continuous batching packs all requests into one
stream of tokens, where a row is no request: our layers take an adapter for each row. So a small
engine of our own (`engine.py`) decodes a batch that requests join and leave between two tokens.
"""
