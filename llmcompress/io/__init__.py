"""Files: safetensors, the output folder, the journal, caches and locks."""
