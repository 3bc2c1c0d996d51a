"""Tasks of lm-evaluation-harness, scored on the model where it is."""
