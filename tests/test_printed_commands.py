"""Every command that the package prints or documents is one that it has, and one of each kind is run as printed."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import pytest

from optimum.commands.register.register_mla import REGISTER_COMMANDS
from optimum_mla.pipeline.inspecting import inspect
from optimum_mla.report.verdict import next_command
from tests.report.test_verdict import CONVERSION, answered

ROOT = Path(__file__).resolve().parents[1]
REFERENCE = ROOT / "benchmarks" / "reference_model"
FEW = ["--calibration-samples", "6", "--calibration-length", "64"]
COMMANDS = {command.COMMAND.name: command for command in REGISTER_COMMANDS}


class RefusedError(Exception):
    """A command line that its parser does not take."""


class Parser(argparse.ArgumentParser):
    """A parser that raises where that of the command line ends the process, and knows no abbreviations."""

    def error(self, message: str) -> NoReturn:
        raise RefusedError(message)


def parser_of(name: str) -> Parser:
    parser = Parser(prog=name, allow_abbrev=False)
    COMMANDS[name].parse_args(parser)
    return parser


def parse(line: str) -> None:
    """Parse a command line, with numbers for the placeholders of options that take numbers."""
    program, name, *words = shlex.split(line)
    assert program in ("optimum-cli", "optimum-mla"), line
    name = name if name.startswith("mla-") else f"mla-{name}"
    parser_of(name).parse_args(words)


def joined(text: str) -> Iterator[str]:
    """The command lines of a text, those that go on in the next line as one."""
    for line in text.replace("\\\n", " ").splitlines():
        if line.strip().startswith(("optimum-cli mla-", "optimum-mla ")) and not line.strip().endswith("--help"):
            yield " ".join(line.split("#")[0].split())


def documented() -> list[str]:
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    found = []
    for page in pages:
        for block in re.findall(r"^```bash\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S):
            found += joined(block)
    return found


def test_the_commands_of_the_help_and_of_the_pages_exist() -> None:
    examples = [line for name in COMMANDS for line in joined(parser_of(name).epilog or "")]
    assert len(examples) >= len(COMMANDS)
    pages = documented()
    assert len(pages) > 20
    for line in examples + pages:
        parse(line)
    with pytest.raises(RefusedError, match="unrecognized arguments: -b"):
        parse("optimum-cli mla-benchmark -m out -b source --eval-data TEXT out-report")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"perplexity_after": 30.0},
        {"answers": answered(20.0, 0.2)},
        {"perplexity_before": None},
        {"written_as": "deepseek_v3"},
    ],
)
def test_the_next_command_of_every_result_exists(changes: dict[str, Any]) -> None:
    line = next_command(replace(CONVERSION, **changes), "some folder")
    assert line is not None
    parse(line)


def test_options_that_messages_name_exist() -> None:
    """In error messages, announcements and reports: an option belongs to some command, and to the one before it."""
    options = {
        name: {text for action in parser_of(name)._actions for text in action.option_strings} for name in COMMANDS
    }
    everywhere = set().union(*options.values())
    others = {"--continuous-batching", "--upgrade"}  # of `transformers serve` and `pip install`
    for path in sorted((ROOT / "optimum_mla").rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        for option in re.findall(r"--[a-z][a-z-]*[a-z]\b(?!-)", text):
            assert option in everywhere | others, f"{path.name}: {option}"
        for name, given in re.findall(r"\b(mla-[a-z]+) ((?:--[a-z-]+(?: [\w.+]+)?,? ?)+)", text):
            for option in re.findall(r"--[a-z-]+[a-z]", given):
                assert option in options[name], f"{path.name}: {name} {option}"


def test_what_inspect_advises_exists() -> None:
    """The forms that engines run are options of `mla-convert`."""
    found = [engine.options for engine in inspect(str(REFERENCE)).engines]
    assert "any" in found
    for method, words in (one for options in found if options != "any" for one in advised(options)):
        parser_of("mla-convert").parse_args(["-m", "MODEL", "OUTPUT", "--method", method, *words])


def advised(options: str) -> list[tuple[str, list[str]]]:
    """The methods and their options in a form such as `gqa2mla or x-ecomla --export-format gguf`."""
    methods, _, words = options.partition(" --")
    return [(method, f"--{words}".split()) for method in methods.split(" or ")]


def run(line: str, folder: Path) -> str:
    """Run a command line as a user pastes it, but without the other plugins that `optimum-cli` loads for ten seconds.

    Returns what it prints.
    """
    line = line.replace("optimum-cli mla-", "optimum-mla mla-")
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-euc", line], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def next_of(output: str) -> str:
    (line,) = re.findall(r"^Next: (.*)$", output, re.M)
    return line


def pasted(line: str, **texts: str) -> str:
    """A printed command with a user's texts in the places of its placeholders, and little work to do."""
    line = line.replace("TEXT", str(REFERENCE / "evaluation.txt")).replace("RESULT", "result")
    name = line.split()[1]
    few = {
        "mla-benchmark": "--context-lengths 16 --batch-sizes 1 --new-tokens 2 --repeats 1 "
        "--eval-samples 2 --eval-length 16",
        "mla-finetune": "--max-steps 1 --per-device-train-batch-size 1 --sequence-length 16 --eval-samples 2 "
        "--eval-length 16",
        "mla-convert": " ".join(few for few in FEW if "--statistics" not in line),
    }
    return f"{line} {few.get(name, '')}"


@pytest.mark.slow
def test_each_kind_of_printed_command_runs(tmp_path: Path) -> None:
    """A user pastes what each command prints as the next one, from statistics to a report."""
    (tmp_path / "source").symlink_to(REFERENCE)
    source = "-m source"
    calibrated = run(f"optimum-cli mla-calibrate {source} {' '.join(FEW)} statistics", tmp_path)
    kinds = {next_of(calibrated).split()[1]: next_of(calibrated)}
    for options in (
        "--kv-cache-ratio 1.0 --positional full",  # loses nothing, so that the cache may be quantized
        "--kv-cache-ratio 0.25 --uncalibrated",  # of no use until it is trained
        f"--export-format deepseek_v3 {' '.join(FEW)}",
    ):
        output = f"out-{len(kinds)}"
        line = next_of(run(f"optimum-cli mla-convert {source} {options} {output}", tmp_path))
        kinds[line.split()[1]] = line
    assert kinds.keys() == {"mla-convert", "mla-quantize", "mla-finetune", "mla-benchmark"}
    for line in kinds.values():
        run(pasted(line), tmp_path)
    made = {path.name for path in tmp_path.iterdir()}
    assert {"result", "out-1-int4", "out-2-recovered", "out-3-report"} <= made


@pytest.mark.slow
def test_what_inspect_advises_is_written(tmp_path: Path) -> None:
    for engine in inspect(str(REFERENCE)).engines:
        for method, words in advised(engine.options) if not engine.blockers and engine.options != "any" else []:
            run(
                f"optimum-cli mla-convert -m {REFERENCE} out --overwrite --method {method} {' '.join([*words, *FEW])}",
                tmp_path,
            )
            assert (tmp_path / "out" / "export_report.json").is_file()
