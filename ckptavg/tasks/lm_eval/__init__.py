"""Scoring with lm-evaluation-harness on the model in memory, without writing candidates to disk."""
