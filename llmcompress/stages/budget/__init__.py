"""The stage `budget`: a size, for which a search finds the stages."""
