"""`distill doctor`: whether this machine, and a recipe on it, are fit to train; each finding with a way out."""
