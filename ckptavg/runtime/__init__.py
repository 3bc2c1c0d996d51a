"""The process itself: ranks, signals, seeds, threads and the progress callback."""
