"""Saves and loads one path repeatedly: `python files_worker.py PATH SECONDS TOKENS` prints the outcomes."""

from __future__ import annotations

import json
import sys
import time
from collections import Counter

import torch

import turboattention as ta


def main(path: str, seconds: float, length: int) -> None:
    cache = ta.KVCache(1, 1, 16)
    cache.append(*torch.ones(2, 1, 1, length, 16))
    cache.save(path)
    met, end = Counter(), time.monotonic() + seconds
    while time.monotonic() < end:
        for name, act in (("saves", lambda: cache.save(path)), ("loads", lambda: ta.KVCache.load(path))):
            try:
                act()
                met[name] += 1
            except Exception as error:
                met[f"{name}: {type(error).__name__}: {error}"] += 1
    sys.stdout.write(json.dumps(met) + "\n")


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]), int(sys.argv[3]))
