"""Train a student to predict as its teacher does."""
