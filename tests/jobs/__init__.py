"""Small real trainings that leave checkpoints, each a task file of its own."""
