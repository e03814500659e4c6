"""The page about a run: curves, scores with intervals, feature maps and the recipe, in one file that needs nothing."""
