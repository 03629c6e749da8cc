"""Makes property tests repeatable. What tests share lies in ``helpers``, which is on the import path."""

from hypothesis import settings

settings.register_profile("ddit_rt", deadline=None, derandomize=True, max_examples=25, database=None)
settings.load_profile("ddit_rt")
