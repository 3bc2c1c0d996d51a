"""One file or one directory, written whole or not at all."""
