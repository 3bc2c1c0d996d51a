"""The files that ``ckptavg init`` writes; each is also a module, so that it is linted."""
