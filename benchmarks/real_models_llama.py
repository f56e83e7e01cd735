"""llama.cpp's part of real_models.py: `PYTHON real_models_llama.py FILE.gguf THREADS CONTEXT < TOKENS`.

Runs in an environment with llama-cpp-python and nothing of this project. Reads token ids, separated by commas, from
stdin: the first CONTEXT are the prompt, the rest follow one by one. Prints a JSON list with an entry for each cache
type.
"""

from __future__ import annotations

import json
import sys
import time
from statistics import median

from llama_cpp import Llama

TYPES = {"f16": 1, "q8_0": 8, "q4_0": 2}
ROUNDS = 3


def main() -> None:
    file, threads, context = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    ids = [int(part) for part in sys.stdin.read().split(",")]
    print(json.dumps([measure(file, threads, ids[:context], ids[context:], name) for name in TYPES]))


def measure(file: str, threads: int, prompt: list[int], rest: list[int], name: str) -> dict[str, object]:
    model = Llama(
        model_path=file,
        n_ctx=len(prompt) + len(rest) + 8,
        n_threads=threads,
        n_threads_batch=threads,
        type_k=TYPES[name],
        type_v=TYPES[name],
        flash_attn=True,
        verbose=False,
    )
    read, steps = [], []
    for _ in range(ROUNDS):
        model.reset()
        begun = time.perf_counter()
        model.eval(prompt)
        read.append(time.perf_counter() - begun)
    for token in rest:
        begun = time.perf_counter()
        model.eval([token])
        steps.append(time.perf_counter() - begun)
    return {"cache": name, "prompt_seconds": median(read), "token_seconds": median(steps)}


if __name__ == "__main__":
    main()
