"""A result as JSON or as a table. Pure functions of plain data; torch is not imported here."""
