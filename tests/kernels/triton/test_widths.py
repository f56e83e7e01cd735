"""A width that no configuration has: kernels derive what depends on a width from its planes."""

from __future__ import annotations

import pytest

from . import tools  # noqa: F401  (skips without Triton)  # isort: skip

from turboattention import config, dispatch
from turboattention.kv import widths

from ...helpers import normals, relative_error
from ...paging import Server, expected, serve, tokens
from .attending import OFF, both, filled


@pytest.fixture(autouse=True)
def five_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages of 5 bits, which the reference and these kernels have, and the CPU's kernels do not."""
    allowed = (*config.WIDTHS, 5)
    for module in (config, widths):
        monkeypatch.setattr(module, "WIDTHS", allowed)
    monkeypatch.setattr(dispatch, "quantizer_on", lambda device: None)


@pytest.mark.parametrize("queries", [1, 20])  # over packed pages, and over blocks unpacked before
@pytest.mark.parametrize("bits", [(5, 5), (2, 5), (5, 4)], ids=str)
def test_over_a_cache(bits, queries):
    cache = filled([200], 32, OFF.replace(bits=bits))
    both(normals(1, 4, queries, 32), cache)


@pytest.mark.parametrize("bits", [((5, 5), (5, 5)), ((5, 4), (3, 5))], ids=str)
def test_over_pages_of_a_server(bits):
    sequence = tokens(1, 90)
    server = Server(bits, backend="triton")
    got = serve(server, {0: sequence}, [{0: 63}, {0: 1}, {0: 1}, {0: 25}])  # a page that decode fills, and then tiles
    want, cache = expected(sequence, bits)
    assert relative_error(got[0], want) < 1e-3
    assert server.holds(0, cache, 1)
