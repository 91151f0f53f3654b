"""`transformers serve` and `transformers chat` with converted models, as their users run them."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_mla.core.errors import UnsupportedModelError
from optimum_mla.models.coded import CodedGeneration
from optimum_mla.pipeline import TextOptions, convert

openai = pytest.importorskip("openai")

REFERENCE = Path(__file__).resolve().parents[1] / "benchmarks" / "reference_model"
PROGRAM = str(Path(sys.executable).with_name("transformers"))
TEMPLATE = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
PROMPTS = ("The king", "The ship", "A man", "My dear")
TOKENS = 8
PATIENCE = 120.0
"""Seconds within which a server must answer."""


@pytest.fixture(scope="module", params=["codes", "16-bit latents"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted reference model with a chat template."""
    base = tmp_path_factory.mktemp("served")
    source, output = base / "source", base / "converted"
    shutil.copytree(REFERENCE, source)
    (source / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    size = {"kv_cache_budget": 0.25} if request.param == "codes" else {"kv_cache_ratio": 0.5}
    text = str(REFERENCE / "calibration.txt")
    texts = TextOptions(calibration_data=text, calibration_samples=4, calibration_length=96)
    convert(str(source), str(output), "gqa2mla", size, texts)
    return output


@contextmanager
def served(folder: Path, *options: str) -> Iterator[str]:
    """Yield the address of a server with a model, which a process of its own runs."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [PROGRAM, "serve", str(folder), "--trust-remote-code", "--device", "cpu", "--port", str(port), *options]
    with (folder.parent / "server.log").open("w+", encoding="utf-8") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            _wait(process, f"http://localhost:{port}/health", Path(log.name))
            yield f"http://localhost:{port}"
        finally:
            process.terminate()
            process.wait()


def _wait(process: subprocess.Popen[bytes], address: str, log: Path) -> None:
    end = time.monotonic() + PATIENCE
    while process.poll() is None and time.monotonic() < end:
        try:
            with urllib.request.urlopen(address, timeout=5):
                return
        except OSError:
            time.sleep(0.5)
    raise AssertionError(f"the server does not answer: {log.read_text(encoding='utf-8')}")


def generated(folder: Path, prompt: str) -> str:
    """What the model writes after a prompt where nobody serves it."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    inputs = tokenizer(prompt, return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)
    return str(tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


def test_generate_batch_is_refused_in_one_line(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    if isinstance(model, CodedGeneration):
        return  # It has the attention of its source, and with it the paged cache, which holds no codes.
    assert not hasattr(model, "init_continuous_batching")
    with pytest.raises(UnsupportedModelError, match=r"^generate_batch: the paged cache .*Use generate"):
        model.generate_batch([[1, 2]])


@pytest.mark.compat
def test_a_client_gets_what_generate_gives(folder: Path) -> None:
    model = str(folder)
    with served(folder) as address:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none")
        chat: dict[str, Any] = {
            "model": model,
            "messages": [{"role": "user", "content": "The king said"}],
            "max_tokens": TOKENS,
            "temperature": 0,
        }
        whole = client.chat.completions.create(**chat).choices[0].message.content
        pieces = [part.choices[0].delta.content for part in client.chat.completions.create(**chat, stream=True)]

        def complete(prompt: str) -> str:
            answer = client.completions.create(model=model, prompt=prompt, max_tokens=TOKENS, temperature=0)
            return str(answer.choices[0].text)

        with ThreadPoolExecutor(len(PROMPTS)) as pool:
            together = list(pool.map(complete, PROMPTS))
        told = subprocess.run(
            [PROGRAM, "chat", model, address, f"max_new_tokens={TOKENS}", "do_sample=False"],
            input="The king said\nn\n!exit\n",
            capture_output=True,
            text=True,
            check=False,
            cwd=folder.parent,
            # It asks the server by the hub's client, which goes nowhere, not even to this machine, when it is offline.
            env={name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"},
        )
    expected = generated(folder, "The king said\n")
    assert expected.strip()
    assert whole == expected
    assert "".join(filter(None, pieces)) == expected
    assert sum(bool(piece) for piece in pieces) > 1, "nothing was streamed"
    assert together == [generated(folder, prompt) for prompt in PROMPTS]
    assert expected.split("\n")[-1].split()[0] in told.stdout, told.stderr


def test_continuous_batching_gives_way_to_plain_generation(folder: Path) -> None:
    if (folder / "latent_codec.safetensors").is_file():
        return  # It has the attention of its source, and with it the paged cache, which holds no codes.
    with served(folder, "--continuous-batching") as address:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none")
        found = client.completions.create(model=str(folder), prompt="The king", max_tokens=TOKENS, temperature=0)
    assert found.choices[0].text == generated(folder, "The king")
    assert "does not support continuous batching" in (folder.parent / "server.log").read_text(encoding="utf-8")
