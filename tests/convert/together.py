"""Run by `torchrun`: converts a model in several ways, each together with the other processes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from optimum_mla.core.processes import joined_processes
from optimum_mla.pipeline import TextOptions, assist, convert

if __name__ == "__main__":
    cases = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    with joined_processes() as processes:
        for case in cases:
            common = {"method": case["method"], "options": case["options"], "texts": TextOptions(**case["texts"])}
            if processes.leads:
                convert(case["model"], case["output"], **common, processes=processes, resume=case["resume"])
            else:
                assist(processes, case["model"], **common)
