"""What the weights of each model family are: every parameter spelled in named axes."""
