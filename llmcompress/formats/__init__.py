"""Weight formats, one per file: the layout on disk, and the module that runs it."""
