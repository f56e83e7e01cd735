"""Implementations of attention, the backends: each implements `contract.Backend` (`dispatch` has the table of them)."""
