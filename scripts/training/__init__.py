"""Batches, engine, checkpoints, several processes. May import `phantoms` and what is below."""
