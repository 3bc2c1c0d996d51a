"""Files and directories that strangers and crashes leave: made here, by code, and what must be said of each."""
