"""Every method on the bundled model: `python benchmarks/accuracy.py --text TEXT [--calibration DIR]`.

Runs `turboattention eval` into build/accuracy (a run that was ended goes on from there), and writes
benchmarks/results/accuracy-bundled.json, docs/accuracy.png and what stands between the markers of docs/accuracy.md.
`--table` only writes the page again; `--check` fails where it differs from the file.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from accuracy_tables import page

from turboattention.evaluation.report.charts import pareto
from turboattention.evaluation.report.evaluation import loss_points

ROOT = Path(__file__).parents[1]
RESULTS, PAGE, PICTURE = (
    ROOT / name for name in ("benchmarks/results/accuracy-bundled.json", "docs/accuracy.md", "docs/accuracy.png")
)
BEGIN, END = "<!-- accuracy:begin -->", "<!-- accuracy:end -->"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, help="a text that the model was not trained on")
    parser.add_argument("--calibration", type=Path, help="what `turboattention calibrate` made, of another text")
    parser.add_argument("--methods", default="all")
    parser.add_argument("--passages", type=int, default=8)
    parser.add_argument("--tasks", default="recall,needle,copy,arithmetic", help="of the generated ones")
    parser.add_argument("--questions", type=int, default=64, help="of each generated task at each length")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "accuracy")
    parser.add_argument("--table", action="store_true", help="only write the page")
    parser.add_argument("--check", action="store_true", help="fail where the page differs")
    options = parser.parse_args()
    if not (options.table or options.check):
        if options.text is None:
            parser.error("--text: expected a file, got none")
        RESULTS.write_text(json.dumps(rounded(measure(options)), indent=1) + "\n", encoding="utf-8")
    document = json.loads(RESULTS.read_text(encoding="utf-8"))
    text = PAGE.read_text(encoding="utf-8")
    new = with_section(text, page(document))
    if options.check:
        print("" if text == new else f"{PAGE.name}: differs from {RESULTS.name}; run benchmarks/accuracy.py --table")
        return int(text != new)
    PAGE.write_text(new, encoding="utf-8")
    pareto(loss_points(document, "kl", 1), ylabel="KL from the own cache, nats").savefig(PICTURE, dpi=110)
    return 0


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """What `turboattention eval` writes."""
    call = [sys.executable, "-m", "turboattention", "eval", "--methods", options.methods, "--out", str(options.out)]
    call += ["--text", str(options.text)]
    call += ["--calibration", str(options.calibration)] if options.calibration else []
    # Passages and questions have limits of their own, so they are two runs into one folder.
    subprocess.run([*call, "--tasks", "perplexity,heads", "--limit", str(options.passages)], check=True)
    texts = json.loads((options.out / "results.json").read_text(encoding="utf-8"))
    generated = ["--tasks", options.tasks, "--limit", str(options.questions)]
    subprocess.run([*call, *generated], check=True)
    asked = json.loads((options.out / "results.json").read_text(encoding="utf-8"))
    return texts | {"units": texts["units"] + asked["units"]}


def rounded(value: Any) -> Any:
    """Six significant digits; what tells runs apart, and not what was measured, is left out."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {name: rounded(x) for name, x in value.items() if name not in ("reused", "seconds")}
    return [rounded(x) for x in value] if isinstance(value, list) else value


def with_section(text: str, section: str) -> str:
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    return f"{before}{BEGIN}\n{section}\n{END}{after}"


if __name__ == "__main__":
    sys.exit(main())
