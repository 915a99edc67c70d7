"""Artefacts repacked for other engines."""
