"""A directory of files becomes open checkpoints in training order."""
