"""The stage `budget`: a size, a memory or a speed, for which a search finds the stages."""
