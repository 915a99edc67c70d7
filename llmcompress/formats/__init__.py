"""One weight format a file: what lies on the disk, and the module that runs it."""
