"""Discovery of checkpoints: from a directory of files to open checkpoints in training order."""
