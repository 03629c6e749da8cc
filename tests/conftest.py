"""Makes property tests repeatable. What tests share lies in ``helpers``, which is on the import path."""

import os
import tempfile

import pytest
from hypothesis import settings

# what is fitted in tests is kept in a place of their own, and they find nothing that was fitted before
os.environ["DDIT_RT_CACHE"] = tempfile.mkdtemp(prefix="ddit_rt-tests-")

# importing pipelines makes transformers warn of image processors; a test of what a command prints may be the first to
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

if "PYTEST_XDIST_WORKER" in os.environ:
    # workers side by side, and what they start: a thread each, or they wait for each other's
    os.environ.setdefault("OMP_NUM_THREADS", "1")

settings.register_profile("ddit_rt", deadline=None, derandomize=True, max_examples=25, database=None)
settings.load_profile("ddit_rt")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--thorough", action="store_true", help="also run the tests marked thorough")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--thorough"):
        return
    thorough = [item for item in items if item.get_closest_marker("thorough")]
    items[:] = [item for item in items if item not in set(thorough)]
    config.hook.pytest_deselected(items=thorough)
