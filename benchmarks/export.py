"""Measure the quality of the forms that plain engines run, and the difference between an export and its original.

    python -m benchmarks.export [--config ...] [--output ...]

Perplexity is that of the whole held-out evaluation text. Logits are compared on random tokens.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.result import CONFIGS, RESULTS, ROOT, save_result


def run(config: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the measurements of every form in every dtype."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from optimum_mla.calibrate.text import token_windows
    from optimum_mla.export.latent_norm import with_latent_norms
    from optimum_mla.measure.quality import perplexity
    from optimum_mla.pipeline import build_transformation
    from optimum_mla.pipeline.exporting import exported_model

    path, length = ROOT / config["model"], config["row_tokens"]
    tokenizer = AutoTokenizer.from_pretrained(path)
    calibration = token_windows(tokenizer, path / "calibration.txt", length, config["calibration_windows"])
    evaluation = token_windows(tokenizer, path / "evaluation.txt", length)
    runs = []
    for dtype in config["dtypes"]:
        for case in config["runs"]:
            source: Any = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype))
            found = {**case, "dtype": dtype, "perplexity_source": perplexity(source, evaluation)}
            converted = build_transformation(case["method"], dict(case["options"]), calibration)(source)
            found["perplexity_converted"] = perplexity(converted, evaluation)  # type: ignore[arg-type]
            if case.get("norm_at_export"):
                converted = with_latent_norms(converted, calibration).model  # type: ignore[arg-type]
            if case["options"].get("shared_rope"):
                exported, report = exported_model(config["model"], converted, "deepseek_v3", pad=False)  # type: ignore[arg-type]
                found["perplexity_exported"] = perplexity(exported, evaluation)
                found["largest_logit_difference"] = report.largest_logit_difference
                found["largest_logit"] = report.largest_logit
            print({name: value for name, value in found.items() if name != "options"}, flush=True)
            runs.append(found)
    return runs


def main() -> None:
    """Run the config and write the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", type=Path, default=CONFIGS / "export.json")
    parser.add_argument("--output", type=Path, default=RESULTS / "export.json")
    arguments = parser.parse_args()
    config = json.loads(arguments.config.read_text(encoding="utf-8"))
    save_result(arguments.output, config, runs=run(config))


if __name__ == "__main__":
    main()
