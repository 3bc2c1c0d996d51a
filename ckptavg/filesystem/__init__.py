"""Files: bytes in by ``pread``, bytes out atomically, locks, digests, strict JSON."""
