"""Which features of a row are kept: codes of rows, rows of codes."""
