"""Options of the test run."""

from __future__ import annotations

import gc


def pytest_addoption(parser):
    parser.addoption("--update-formulas", action="store_true", help="rewrite formulas/ with what is generated now")


def pytest_collection_finish():
    # what the imports made lives to the end: no collection need look at it
    gc.freeze()
