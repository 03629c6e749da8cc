"""Trains the reader of evaluation's prompt adherence."""
