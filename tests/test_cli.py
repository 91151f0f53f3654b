"""The commands as a user runs them."""

from __future__ import annotations

import re
import subprocess
import sys
from argparse import ArgumentParser
from pathlib import Path

import pytest
from optimum.commands.optimum_cli import main

from optimum_mla.report.schema import ConversionReport

ROOT = Path(__file__).resolve().parents[1]
REFERENCE = ROOT / "benchmarks" / "reference_model"
PROGRAM = str(Path(sys.executable).with_name("optimum-cli"))


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """`optimum-cli` in a process of its own."""
    return subprocess.run([PROGRAM, *arguments], capture_output=True, text=True, check=False)


def test_convert_prints_a_table_and_is_quiet_off_a_terminal(tmp_path: Path) -> None:
    done = run(
        *("mla-convert", "-m", str(REFERENCE), "--method", "mha2mla", "--kv-cache-ratio", "0.5"),
        *("--calibration-data", str(REFERENCE / "calibration.txt"), "--calibration-samples", "2"),
        *("--eval-data", str(REFERENCE / "evaluation.txt"), "--eval-samples", "2", str(tmp_path / "out")),
    )
    assert done.returncode == 0, done.stderr
    announced, report = done.stdout.split("\n\n", 1)
    assert "6 layers, 5 M parameters, bfloat16 on cpu" in announced
    assert "calibrated on 2 windows of 512 tokens" in announced
    assert "warning: fewer than 4 windows, so none is held back" in announced
    assert re.search(
        r"This should take \d+ MB of memory\. How long it takes is said after the first layer\.", announced
    )
    _, row = report[report.index("method ") :].splitlines()[1:3]
    cells = row.split()
    assert cells[:4] == ["mha2mla", "64", "768", "50.0"]
    assert float(cells[5]) > float(cells[4]) > 1
    assert "%|" not in done.stderr
    assert "form: per head" in done.stdout
    assert "chosen on the calibration text" in done.stdout
    assert "error in the hidden state" in done.stdout
    assert "\nsource: " in done.stdout
    assert "\nresult: " in done.stdout
    assert "The cache is 50 % of the source's" in done.stdout
    assert f"Next: optimum-cli mla-finetune -m {tmp_path / 'out'} --train-data TEXT" in done.stdout
    assert (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.compat
def test_bad_input_is_one_line_and_exit_code_two(tmp_path: Path) -> None:
    done = run("mla-convert", "-m", str(tmp_path / "missing"), str(tmp_path / "out"))
    assert done.returncode == 2
    assert done.stdout == ""
    # Where optimum-quanto is installed, optimum-cli itself complains about it before any command runs, and a CUDA build
    # of torch that there is no GPU.
    others = ("optimum.quanto.subpackage", "torch/utils/cpp_extension.py")
    (line,) = [line for line in done.stderr.splitlines() if not any(name in line for name in others)]
    assert line.startswith("error: model: ")
    assert list(tmp_path.iterdir()) == []


def test_two_sizes_are_refused_by_the_parser(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    arguments = ["mla-convert", "-m", str(REFERENCE), "--kv-lora-rank", "8", "--energy", "0.9", "out"]
    monkeypatch.setattr(sys, "argv", ["optimum-cli", *arguments])
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code == 2
    assert "not allowed with" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("mla-benchmark", "out"), "error: --model is missing. It is needed unless --compare is given."),
        (("mla-benchmark", "-m", "model"), "error: OUTPUT is missing. It is needed unless --compare is given."),
        (("mla-finetune", "out"), "error: --model is missing. Give it, here or in the --config file."),
        (("mla-finetune", "-m", "m", "out"), "error: --train-data is missing. Give it, here or in the --config file."),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_missing_option_is_named(
    arguments: tuple[str, ...],
    line: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["optimum-cli", *arguments])
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1] == line


def test_every_option_has_a_help_text_of_whole_sentences() -> None:
    from optimum.commands.register.register_mla import REGISTER_COMMANDS

    for command in REGISTER_COMMANDS:
        parser = ArgumentParser()
        command.parse_args(parser)
        for action in parser._actions:
            if "-h" not in action.option_strings:
                assert action.help, action.dest
                assert action.help[0].isupper() or ": " in action.help, action.dest
                assert action.help.endswith("."), action.dest
        assert parser.epilog is not None
        assert max(map(len, (parser.description or "").splitlines())) < 80


def test_help_imports_neither_torch_nor_transformers() -> None:
    script = (
        "import sys\n"
        "from argparse import ArgumentParser\n"
        "from optimum.commands.register.register_mla import REGISTER_COMMANDS\n"
        "for command in REGISTER_COMMANDS:\n"
        "    parser = ArgumentParser()\n"
        "    command.parse_args(parser)\n"
        "    print(parser.format_help())\n"
        "heavy = {'torch', 'transformers', 'optimum_mla'} & set(sys.modules)\n"
        "print('heavy:', sorted(heavy))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "heavy: []"
    assert "--kv-cache-ratio" in done.stdout


@pytest.mark.compat
def test_help_lists_the_command() -> None:
    assert "mla-convert" in run("--help").stdout


def test_no_init_file_in_the_optimum_namespace() -> None:
    assert list((ROOT / "optimum").rglob("__init__.py")) == []


def test_statistics_are_gathered_once_and_convert_at_several_sizes(tmp_path: Path) -> None:
    statistics, source = tmp_path / "statistics", str(REFERENCE)
    text = ("--calibration-data", str(REFERENCE / "calibration.txt"), "--calibration-samples", "4")
    gathered = run("mla-calibrate", "-m", source, *text, str(statistics))
    assert gathered.returncode == 0, gathered.stderr
    assert "Statistics of 6 layers on 4 windows of 512 tokens" in gathered.stdout
    assert f"Next: optimum-cli mla-convert -m {source} --statistics {statistics}" in gathered.stdout
    perplexities = []
    for share in ("0.75", "0.25"):
        out = tmp_path / share
        done = run(
            *("mla-convert", "-m", source, "--statistics", str(statistics), "--kv-cache-ratio", share, str(out)),
            *("--eval-data", str(REFERENCE / "evaluation.txt"), "--eval-samples", "2"),
        )
        assert done.returncode == 0, done.stderr
        assert "Statistics need the least time" in done.stdout
        report = ConversionReport.read(out)
        assert not report.options["heal"]
        perplexities.append(report.perplexity_after)
    assert perplexities[0] < 1.05 * report.perplexity_before
    assert perplexities[0] < perplexities[1] < 1.5 * report.perplexity_before
    refused = run("mla-convert", "-m", source, "--statistics", str(statistics), *text, str(tmp_path / "out"))
    assert refused.returncode == 2
    assert "--calibration-data and --statistics exclude each other" in refused.stderr
    again = run("mla-calibrate", "-m", source, *text, str(statistics))
    assert (again.returncode, "exists" in again.stderr) == (2, True)
