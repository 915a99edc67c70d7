"""Let layers share weights."""
