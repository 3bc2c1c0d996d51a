"""Reports and a browser for the tests of the page."""
