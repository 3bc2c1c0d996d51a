"""Which averaging strategy is worth running, measured: ``./scripts/study/run.sh``."""
