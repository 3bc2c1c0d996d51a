"""The command line: parse, call one function, print. Torch is imported inside commands only."""
