"""Every test starts from the same seed, and Hypothesis draws the same examples on every machine.

`pytest --hypothesis-profile=explore` draws new and more ones.
"""

from __future__ import annotations

import contextlib
import os
import resource
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import settings

# Triton decides where a function is defined whether its interpreter runs it, and defines its own library when it is
# imported, which any test may do first: so it is imported here. Kernels are left to tests/kernels/triton.
with pytest.MonkeyPatch.context() as _patch, contextlib.suppress(ImportError):
    _patch.setenv("TRITON_INTERPRET", "1")
    import triton  # noqa: F401

settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.register_profile("explore", deadline=None, max_examples=1_000, print_blob=True)
settings.load_profile("repeatable")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.environ.get("TURBOATTENTION_LONG") != "1":
        for item in items:
            if item.get_closest_marker("long"):
                item.add_marker(pytest.mark.skip(reason="takes minutes: make test-long"))


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def file_limit() -> Callable[[int], contextlib.AbstractContextManager[None]]:
    """A disk that is full after so many bytes of a file: the operating system rejects further writes."""

    @contextlib.contextmanager
    def limited(size: int) -> Iterator[None]:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limited
