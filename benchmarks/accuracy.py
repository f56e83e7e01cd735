"""The tables of accuracy: `make accuracy MODELS='qwen=FOLDER smollm2=FOLDER' WIKITEXT2=FILE BOOK=FILE DATA=FOLDER`.

For each model, the stages of accuracy_plan.py run in order, each as a `turboattention eval` into
build/accuracy/MODEL/STAGE, where an interrupted run resumes. The results of a model, including those of incomplete
stages, are written to benchmarks/results/accuracy-MODEL.json, from which docs/accuracy.md, its plots and the table of
README.md are generated.

`--stages` selects stages; `--collect` only collects results; `--table` only writes the pages; `--check` fails if a page
is out of date.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accuracy_plan import STAGES, Stage
from accuracy_tables import TITLES, first, page, readme
from transformers import AutoTokenizer

from turboattention.evaluation.baselines import METHODS
from turboattention.evaluation.report.charts import pareto
from turboattention.evaluation.report.evaluation import loss_points
from turboattention.files import write_figure, write_text

ROOT = Path(__file__).parents[1]
RESULTS, BUILD = ROOT / "benchmarks" / "results", ROOT / "build" / "accuracy"
BEGIN, END = "<!-- accuracy:begin -->", "<!-- accuracy:end -->"
PAGES = {"docs/accuracy.md": page, "README.md": readme}


def main() -> int:
    options = _options()
    models = dict(one.split("=", 1) for one in options.models)
    stages = [stage for stage in STAGES if not options.stages or stage.name in options.stages]
    failed = 0
    for stage in stages:  # stage by stage, so that every model has the first ones before any has the last
        for label, folder in models.items():
            if not options.collect and not options.table and _is_for(stage, label, Path(folder), options):
                if stage.calibrated and not _calibration(label).exists():
                    subprocess.run(_calibrate(label, folder, options), check=True, env=_environment())
                # A method may be unable to serve this model; the results of the others count.
                failed += subprocess.run(_call(stage, label, folder, options), env=_environment()).returncode != 0
                collect(label)
    for label in models:
        collect(label)
    documents = load()
    stale = [name for name in PAGES if not update(name, documents, check=options.check)]
    if options.check:
        print(
            "\n".join(f"{name}: differs from benchmarks/results; run benchmarks/accuracy.py --table" for name in stale)
        )
        return int(bool(stale))
    draw(documents)
    return int(failed > 0)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=[], metavar="LABEL=FOLDER", help="in the order of importance")
    parser.add_argument("--wikitext2", type=Path, help="the raw test split of WikiText-2")
    parser.add_argument("--book", type=Path, help="a book, or several")
    parser.add_argument("--data", type=Path, help="folder with gsm8k, aqua and bbh as published")
    parser.add_argument("--questioned", default="qwen", help="label of the model that answers questions")
    parser.add_argument("--questions", type=int, help="of a set, in place of the plan's number")
    parser.add_argument("--stages", nargs="*", help=", ".join(stage.name for stage in STAGES))
    parser.add_argument("--methods", help="in place of the plan's")
    parser.add_argument("--dtype", help="of the weights, in place of the plan's")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of the CPU")
    parser.add_argument(
        "--calibration-tokens", type=int, default=8192, help="of the book, for stages with a calibration"
    )
    parser.add_argument("--collect", action="store_true", help="measure nothing; take what there is")
    parser.add_argument("--table", action="store_true", help="only write the pages")
    parser.add_argument("--check", action="store_true", help="fail if a page differs")
    return parser.parse_args()


def _is_for(stage: Stage, label: str, folder: Path, options: argparse.Namespace) -> bool:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if config.get("max_position_embeddings", 0) < stage.least_context:
        return False
    if stage.wants_data:
        return options.data is not None and label == options.questioned
    if (stage.with_bos and _bos(folder) is None) or (stage.calibrated and options.book is None):
        return False
    return getattr(options, stage.text or "book") is not None


def _call(stage: Stage, label: str, folder: str, options: argparse.Namespace) -> list[str]:
    out = BUILD / label / stage.name
    call = [sys.executable, "-m", "turboattention", "eval", "--model", folder, "--out", str(out)]
    call += ["--tasks", stage.tasks, "--methods", options.methods or stage.methods]
    call += ["--dtype", options.dtype or stage.dtype, "--threads", str(options.threads)]
    call += [*stage.options(), "--piece", "64"]
    if stage.wants_data:
        limit = ["--limit", str(options.questions)] if options.questions else []
        return [*call, "--data", str(options.data), *limit]
    begin = ["--begin", str(_bos(Path(folder)))] if stage.with_bos else []
    calibration = ["--calibration", str(_calibration(label).parent)] if stage.calibrated else []
    return [*call, "--text", str(getattr(options, stage.text or "book")), *begin, *calibration]


def _calibration(label: str) -> Path:
    return BUILD / label / "calibration" / "calibration.json"


def _calibrate(label: str, folder: str, options: argparse.Namespace) -> list[str]:
    """Measure the widths of a model's heads on the book, which no calibrated stage reads."""
    call = [sys.executable, "-m", "turboattention", "calibrate", "--model", folder, "--text", str(options.book)]
    call += ["--tokens", str(options.calibration_tokens), "--dtype", options.dtype or "float32"]
    call += ["--threads", str(options.threads)]
    return [*call, "--out", str(_calibration(label).parent)]


def _bos(folder: Path) -> str | None:
    """The token that a tokenizer names BOS but does not add to a text; None if it adds one."""
    tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    return None if tokenizer("", verbose=False)["input_ids"] else tokenizer.bos_token


def _environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])}


def collect(label: str, build: Path = BUILD) -> dict[str, Any] | None:
    """Write all units of a model to its file of results: those of the build folder, and those of the existing file that
    the folder lacks, if they have the same weights and settings. None if there are no units."""
    path = RESULTS / f"accuracy-{label}.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"facts": {}, "stages": {}}
    measured: dict[str, list[dict[str, Any]]] = {}
    facts: dict[str, Any] = {}
    for stage in STAGES:
        paths = sorted((build / label / stage.name / "units").glob("*--*.json"))
        units = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
        if units:
            facts = facts or units[0]["settings"]["facts"] | {"model": TITLES.get(label, label)}
            name = stage.name.removesuffix("-more").removesuffix("-calibrated")  # the same text or questions
            measured[name] = measured.get(name, []) + units
    if not measured:
        return None
    kept = known if known["facts"].get("weights") == facts["weights"] else {"facts": {}, "stages": {}}
    facts = kept["facts"] or {name: value for name, value in facts.items() if name != "begin"}
    stages = dict(kept["stages"])
    for name, found in measured.items():
        units = [_short(unit, facts) for unit in found]
        stages[name] = units + [unit for unit in stages.get(name, []) if _completes(unit, units)]
    order, names = list(METHODS), [stage.name for stage in STAGES]
    for units in stages.values():
        units.sort(key=lambda u: (u["task"], order.index(u["method"]) if u["method"] in order else len(order)))
    document = rounded({"facts": facts, "stages": dict(sorted(stages.items(), key=lambda s: names.index(s[0])))})
    write_text(path, json.dumps(document, indent=1) + "\n")
    return document


def _completes(unit: dict[str, Any], measured: Sequence[dict[str, Any]]) -> bool:
    """Whether a known unit was not measured again, and compares with those that were."""
    same = [other for other in measured if other["task"] == unit["task"]]
    return (
        bool(same)
        and unit["method"] not in {other["method"] for other in same}
        and unit["settings"] == same[0]["settings"]
    )


def _short(unit: dict[str, Any], facts: dict[str, Any]) -> dict[str, Any]:
    """A unit without the fields that are equal for all units of a model or stage, or not used in tables."""
    given = unit["settings"]
    own = {
        name: given["facts"][name]
        for name in ("begin", "dtype")
        if name in given["facts"] and given["facts"][name] != facts.get(name)
    }
    numerics = {"numerics": given["numerics"]} if "numerics" in given else {}
    kept = {name: unit[name] for name in unit if name not in ("settings", "version", "shown")}
    return kept | numerics | {"settings": given["task"] | own}


def rounded(value: Any) -> Any:
    """Six significant digits; fields that identify a run instead of a measurement are left out."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {name: rounded(x) for name, x in value.items() if name not in ("reused", "seconds")}
    return [rounded(x) for x in value] if isinstance(value, list) else value


def load() -> dict[str, dict[str, Any]]:
    """Results by label: the models of the plan, then others, then the bundled one."""
    found = {
        path.stem.removeprefix("accuracy-"): json.loads(path.read_text(encoding="utf-8"))
        for path in sorted(RESULTS.glob("accuracy-*.json"))
    }
    order = [*TITLES, *(label for label in found if label not in TITLES and label != "bundled"), "bundled"]
    return {label: found[label] for label in order if label in found}


def update(name: str, documents: dict[str, dict[str, Any]], *, check: bool) -> bool:
    """Whether the page is up to date; otherwise update it, unless `check`."""
    path = ROOT / name
    text = path.read_text(encoding="utf-8")
    new = with_section(text, PAGES[name](documents)) if BEGIN in text else text
    if text != new and not check:
        write_text(path, new)
    return text == new


def with_section(text: str, section: str) -> str:
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    return f"{before}{BEGIN}\n{section}\n{END}{after}"


def draw(documents: dict[str, dict[str, Any]]) -> Sequence[Path]:
    """Draw KL against bits for each model's first text."""
    drawn = []
    for label, document in documents.items():
        units = first(document)
        points = loss_points({"units": units, "methods": _methods(units)}, "kl", 1)
        if len(points) > 1:
            path = ROOT / "docs" / f"accuracy-{label}.png"
            write_figure(path, pareto(points, ylabel="KL from the own cache, nats"))
            drawn.append(path)
    return drawn


def _methods(units: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    return [{"name": name, "title": title} for name, title in dict.fromkeys((u["method"], u["title"]) for u in units)]


if __name__ == "__main__":
    sys.exit(main())
