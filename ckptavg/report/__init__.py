"""Reports as JSON or as tables: pure functions of plain data. Only `interval` imports torch."""
