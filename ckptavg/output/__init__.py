"""Write the output, one file or one directory, atomically."""
