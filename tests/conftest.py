"""Settings shared by all tests: one thread per worker, no network, the import path of the fixtures, the markers."""

from __future__ import annotations

import os
import sys
from pathlib import Path

# Before torch and transformers are imported.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
sys.path.insert(0, str(Path(__file__).parent))

import pytest

import deprecations


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options of the suite."""
    deprecations.add_option(parser)


def pytest_configure(config: pytest.Config) -> None:
    """Register the markers, and make errors of deprecations where asked to."""
    deprecations.configure(config)
    config.addinivalue_line("markers", "quick: part of the subset that runs in under a minute")


def pytest_collection_finish(session: pytest.Session) -> None:
    """All files are imported now, and no test has run."""
    deprecations.listen(session.config)
