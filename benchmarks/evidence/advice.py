"""Write the figures behind ``archsmith advise`` from finished comparisons.

Run the comparison first, for example::

    archsmith bench --strategy local-search --strategy tpe --arena nas-bench-201/cifar10 --budget "evaluations<=200"
    python benchmarks/evidence/advice.py runs/bench
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from archsmith.run.advise import FILE, write_advice
from archsmith.run.bench_report import bench_command


def main() -> None:
    """Read result files and write the package's ``advice.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("benches", nargs="+", type=Path, help="folders of finished benches")
    results = [json.loads((folder / "result.json").read_text()) for folder in parser.parse_args().benches]
    command = "; ".join(bench_command("runs/bench", result["bench"]) for result in results)
    write_advice(results, command=command)
    print(f"{FILE.name}: {sum(len(result['arenas']) for result in results)} arenas")


if __name__ == "__main__":
    main()
