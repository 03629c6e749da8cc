"""Draws the demo model's pictures and trains it: ``python -m examples.demo_model.train --out RUN``."""
