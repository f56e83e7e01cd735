"""Tasks of lm-evaluation-harness over any method's cache, through the harness's own Hugging Face model class.

Needs the package lm-eval (extra `eval`). Prompts, few-shot examples, answer filters and scores are those of the
harness; only the cache differs.
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import InputError
from ...integrations.transformers.language_model import LanguageModel
from ..baselines import CacheMethod
from ..intervals import share
from ..subject import PIECE, Progress

PREFIX = "lm-eval/"
ASKED = 128
"""Tokens at the end of a prompt that are read through the cache, so that the question attends to stored values."""

_Z = 1.959963984540054


def check(name: str, include: Path | None) -> None:
    """Raises InputError if lm-eval is not installed or does not have the task."""
    _entry(name, include)


def run(
    language: LanguageModel,
    method: CacheMethod,
    name: str,
    *,
    limit: int | None = None,
    data: Path | None = None,
    include: Path | None = None,
    progress: Progress = lambda done, total: None,
) -> dict[str, Any]:
    """Run one task or group of the harness: its metrics, and the bits per element of the caches.

    Args:
        limit: examples of each task; None: all.
        data: a folder with `gsm8k` and `bbh` in their published formats, used instead of the hub.
        include: a folder with further task files in the harness's format.

    Raises:
        InputError: the task is unknown, or its data cannot be loaded.
    """
    with _quiet():
        spec, files = _with_local_data(_entry(name, include), name, data), None
        try:
            with tempfile.TemporaryDirectory() as folder:
                if isinstance(spec, dict):
                    files = Path(folder, "task.yaml")  # JSON is YAML
                    files.write_text(json.dumps(spec), encoding="utf-8")
                tasks = list(_manager_of(name, include).load([str(files or name)])["tasks"].values())
        except Exception as error:  # the hub, the data set library and the harness raise errors of many kinds
            raise InputError(f"--tasks: the data of {PREFIX}{name} cannot be loaded: {_first_line(error)}") from error
        model = _model_class()(language, method, progress)
        options = {"task_manager": _manager_of(name, include), "log_samples": False, "bootstrap_iters": 1000}
        found = _lm_eval().simple_evaluate(model, tasks=tasks, limit=limit, **options)
    results, counts = ((found or {}).get(key, {}) for key in ("results", "n-samples"))
    asked = {task: row["effective"] for task, row in counts.items()}
    return {
        "bits_per_element": sum(model.bits) / len(model.bits) if model.bits else float("nan"),
        "metrics": dict(_metrics(results, asked)),
        "questions": sum(asked.values()),
    }


@cache
def _model_class() -> Callable[[LanguageModel, CacheMethod, Progress], Any]:
    base: Any = _lm_eval("models.huggingface").HFLM

    class MethodLM(base):
        """The harness's class, with a method's cache in its two calls of the model."""

        def __init__(self, language: LanguageModel, method: CacheMethod, progress: Progress):
            language.use(method.attention or language.own_attention)
            super().__init__(
                pretrained=language.model,
                tokenizer=language.tokenizer,
                max_length=language.context,
                batch_size=1,
                device=str(language.model.device),
            )
            self._method, self._progress, self._total = method, progress, 0
            self.bits: list[float] = []

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> Any:
            self._total += len(requests)
            return super().generate_until(requests, disable_tqdm=True)

        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> Any:
            self._total += len(requests)
            return super().loglikelihood(requests, disable_tqdm=True)

        @contextmanager
        def _cache(self) -> Iterator[Any]:
            self._progress(len(self.bits), max(self._total, len(self.bits) + 1))
            kept = self._method.make_cache(self.model.config)
            yield kept
            self.bits.append(self._method.bits_per_element(kept))

        @torch.inference_mode()
        def _model_call(self, inps: Tensor, attn_mask: Any = None, labels: Any = None) -> Tensor:
            """Logits [B, L, V] of the tokens, in pieces of `PIECE`."""
            with self._cache() as kept:
                return torch.cat([self.model(x, past_key_values=kept).logits for x in inps.split(PIECE, 1)], 1)

        @torch.inference_mode()
        def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **options: Any) -> Tensor:
            with self._cache() as kept:
                if context.shape[0] == 1 and context.shape[1] > ASKED:
                    self.model(context[:, :-ASKED], past_key_values=kept, logits_to_keep=1)
                return super()._model_generate(context, max_length, stop, past_key_values=kept, **options)

    return MethodLM


def _metrics(results: dict[str, dict[str, Any]], asked: dict[str, int]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Metrics such as "exact_match,strict-match" and their standard errors as values with 95 % intervals.

    Normal intervals; for a proportion of 0 or 1, where these have no width, Wilson intervals.
    """
    for task, row in results.items():
        for key, value in row.items():
            metric, _, rule = key.partition(",")
            if not isinstance(value, (int, float)) or not rule or metric.endswith("_stderr"):
                continue
            name = metric if rule == "none" else f"{metric} {rule}"
            prefix = f"{task}: " if len(results) > 1 else ""
            error = row.get(f"{metric}_stderr,{rule}")
            if error == 0 and value in (0, 1) and task in asked:
                yield prefix + name, share(round(value * asked[task]), asked[task])
            else:
                half = _Z * error if isinstance(error, (int, float)) else None
                low, high = (None, None) if half is None else (value - half, value + half)
                yield prefix + name, {"value": float(value), "low": low, "high": high}


def _with_local_data(entry: Any, name: str, data: Path | None) -> dict[str, Any] | None:
    """For GSM8K and BBH with files in `data`: the task's definition with these files. Else None."""
    path, bbh = entry.yaml_path, name.partition("shot_")[2]
    if data is None or path is None:
        return None
    if name.startswith("gsm8k") and (data / "gsm8k").is_dir():
        splits = {split: str(data / "gsm8k" / f"{split}.jsonl") for split in ("train", "test")}
        source: dict[str, Any] = {"data_files": splits}
    elif name.startswith("bbh_") and bbh and (data / "bbh" / "bbh" / f"{bbh}.json").is_file():
        source = {"data_files": {"test": str(data / "bbh" / "bbh" / f"{bbh}.json")}, "field": "examples"}
    else:
        return None
    return {"include": str(path), "dataset_path": "json", "dataset_name": None, "dataset_kwargs": source}


def _entry(name: str, include: Path | None) -> Any:
    with _quiet():
        try:
            entry = _manager_of(name, include).task_index.get(name)
        except ModuleNotFoundError as error:
            raise InputError(
                f'--tasks: {PREFIX}{name} needs lm-evaluation-harness: pip install ".[eval]" in a clone of the '
                "repository"
            ) from error
    if entry is None:
        raise InputError(f"--tasks: expected {PREFIX}NAME with a task of lm-evaluation-harness, got {name!r}")
    return entry


def _manager_of(name: str, include: Path | None) -> Any:
    """The task manager that has this task; the user's own takes precedence."""
    if include is not None and name in _manager(include).task_index:
        return _manager(include)
    return _manager(None)


@cache
def _manager(include: Path | None) -> Any:
    """The tasks of a folder, or the harness's own. Loading takes seconds."""
    return _lm_eval("tasks").TaskManager(
        include_path=None if include is None else str(include), include_defaults=include is None
    )


def _lm_eval(module: str = "") -> Any:
    """The harness, or one of its modules. Imported on first use, because it is optional and takes seconds."""
    return import_module(f"lm_eval.{module}".rstrip("."))


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the logs of the harness and the data set library; errors are raised as exceptions."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


class HarnessTask:
    """A task of the harness with the interface of `turboattention.evaluation`."""

    def __init__(self, name: str, limit: int | None, data: Path | None, include: Path | None):
        self.name, self._limit, self._data, self._include = name, limit, data, include

    @property
    def settings(self) -> dict[str, Any]:
        local = str(self._data) if self._data else None
        return {
            "questions": self._limit,
            "data": local,
            "lm-eval": _lm_eval().__version__,
            "piece": PIECE,
            "asked": ASKED,
        }

    def together(self, subject: Any) -> int:
        return 1

    def run(self, subject: Any, methods: Sequence[CacheMethod], parts: Any, progress: Progress) -> list[dict[str, Any]]:
        name, options = self.name.removeprefix(PREFIX), {"data": self._data, "include": self._include}
        return [
            run(subject.language, subject.fitted(method), name, limit=self._limit, progress=progress, **options)
            for method in methods
        ]
