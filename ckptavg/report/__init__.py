"""Reports as JSON or as tables: pure functions of plain data. Only functions of `interval` import torch."""
