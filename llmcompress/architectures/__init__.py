"""The weights of each model family: every parameter spelled in named axes."""
