"""Recipes: YAML, its schema and its digest."""
