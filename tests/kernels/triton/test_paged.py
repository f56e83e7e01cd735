"""Pages that a server manages, by the kernels in Triton's interpreter, against caches of one sequence each."""

from __future__ import annotations

import pytest
import torch

from turboattention.paged import BLOCK

from ...helpers import relative_error
from ...paging import MIXED, UNIFORM, Server, expected, serve, tokens
from . import tools  # noqa: F401

# Prefill over several blocks, in pieces beside decoding, and a block that decoding fills.
SEQUENCES = {7: 150, 3: 66, 5: 1}
SCHEDULE = [{7: 70, 3: 30}, {7: 60, 3: 33, 5: 1}, {3: 1, 7: 2}, {3: 2}, {7: 18}]


def served(head_bits, head_dim=16, schedule=SCHEDULE, sequences=SEQUENCES, **options):
    given = {key: tokens(10 * key, count, head_dim) for key, count in sequences.items()}
    server = Server(head_bits, head_dim, backend="triton")
    got = serve(server, given, schedule, **options)
    for key, sequence in given.items():
        want, cache = expected(sequence, head_bits, **options)
        assert relative_error(got[key], want) < 1e-3
        assert cache.store is not None
        for block in range(sequences[key] // BLOCK):
            page = cache.store.compressed.gather([cache.store.tables[0][block]])[0]
            assert torch.equal(server.page(key, block), page)


@pytest.mark.parametrize("options", [{}, {"window": 90}, {"softcap": 3.0, "scale": 0.5}], ids=str)
def test_mixed_steps_give_what_a_cache_of_its_own_does(options):
    served(UNIFORM[4], **options)
