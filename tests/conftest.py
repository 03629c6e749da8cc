"""Puts this folder on the import path (``tiny``) and makes property tests repeatable."""

from hypothesis import settings

settings.register_profile("ddit_rt", deadline=None, derandomize=True, max_examples=25, database=None)
settings.load_profile("ddit_rt")
