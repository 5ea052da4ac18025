"""How good scores are: measured from what was said before the answer was known."""
