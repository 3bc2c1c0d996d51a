"""Measure which averaging strategy is worth running: ``./scripts/study/run.sh``."""
