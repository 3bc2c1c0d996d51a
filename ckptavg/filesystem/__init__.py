"""File access: reads by ``pread``, atomic writes, locks, digests, strict JSON."""
