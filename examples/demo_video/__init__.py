"""Draws captioned moving scenes and trains the demo video model on them."""
