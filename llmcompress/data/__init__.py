"""Text to token sequences: local files, Hub data sets and Python's own documentation."""
