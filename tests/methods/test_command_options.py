"""The options that the class of a method brings to `mla-convert`, those of an installed package among them."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from optimum.commands.mla.convert import MLAConvertCommand
from optimum.commands.mla.main import main
from optimum.commands.mla.method_options import built_in_options
from optimum.commands.mla.run import parsed
from optimum_mla import GQA2MLA, MHA2MLA, MLAGeometry, MLATransformation, XEcoMLA
from optimum_mla.convert.signature import MethodOptions
from optimum_mla.methods.command_options import BUILT_IN, EVERY_METHOD
from optimum_mla.models import SourceAttention
from optimum_mla.pipeline.recipes import Step

ROOT = Path(__file__).resolve().parents[2]
REFERENCE = ROOT / "benchmarks" / "reference_model"
MODULE = """
from optimum_mla import GQA2MLA

class Mine(GQA2MLA):
    name = "mine"
    command_options = {
        "span": {"type": int, "metavar": "N", "help": "Tokens of a span. Default: 4."},
        "deep": {"type": bool, "help": "Whether to go deep. Default: on."},
    }

    def __init__(self, span=4, deep=True, **options):
        super().__init__(**options)
        self.span, self.deep = span, deep
"""


def install(folder: Path, name: str, module: str) -> None:
    """Install a package of one module, which has the class `Mine`, as pip does."""
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[optimum_mla.transforms]\n{name} = {name}_module:Mine\n")
    (folder / f"{name}_module.py").write_text(module)


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with an installed package that offers the method `mine`."""
    install(tmp_path, "mine", MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "mine_module", raising=False)
    return tmp_path


def refused(words: list[str], capsys: pytest.CaptureFixture) -> str:
    """Return the last line on standard error of a command that ends with code 2."""
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_an_installed_method_brings_its_options_to_the_command(mine: Path) -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "optimum.commands.mla.main", "convert", "-m", str(REFERENCE)),
            *("--method", "mine", "--span", "3", "--no-deep", "--uncalibrated", str(mine / "out")),
        ],
        env={**os.environ, "PYTHONPATH": f"{mine}{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "mine" in done.stdout
    options = json.loads((mine / "out" / "conversion_report.json").read_text(encoding="utf-8"))["options"]
    assert (options["span"], options["deep"]) == (3, False)


def test_help_shows_the_options_of_installed_methods(mine: Path, capsys: pytest.CaptureFixture) -> None:
    install(mine, "broken", "import no_such_module_at_all\n")
    with pytest.raises(SystemExit):
        main(["convert", "--help"])
    shown = capsys.readouterr().out
    assert "options of mine:" in shown
    assert "--span N" in shown
    assert "--no-deep" in shown
    assert "options of broken:\n  its options cannot be read from broken_module:Mine: No module named" in shown


def test_an_option_of_another_method_is_one_line(mine: Path, capsys: pytest.CaptureFixture) -> None:
    convert = ["convert", "-m", str(REFERENCE), "--uncalibrated", "--method", "mha2mla", str(mine / "out")]
    line = refused([*convert, "--span=3"], capsys)
    assert line.startswith("error: mha2mla has no --span option.")
    assert refused([*convert, "--q-lora-rank", "3"], capsys).startswith("error: mha2mla has no --q-lora-rank option.")
    assert refused([*convert, "--spam", "3"], capsys).endswith("error: unrecognized arguments: --spam 3")


@pytest.mark.parametrize(
    ("module", "words"),
    [
        ("import no_such_module_at_all\n", "No module named 'no_such_module_at_all'"),
        (MODULE.replace('"span"', '"width"'), "the keyword argument width, which command_options declares"),
        (MODULE.replace("span", "seed"), "conflicting option string: --seed"),
        (MODULE.replace("span", "positional"), "conflicting option string: --positional"),
        (MODULE.replace('"help": "', '"help": "50 % of '), "format"),
        ("raise SystemExit('need a licence')\n", "need a licence"),
    ],
)
def test_a_method_whose_options_cannot_be_read_is_one_line(
    module: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    install(tmp_path, "broken", module)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "broken_module", raising=False)
    line = refused(["convert", "-m", str(REFERENCE), "--method", "broken", str(tmp_path / "out")], capsys)
    assert "method broken: its options cannot be read from broken_module:Mine: " in line
    with pytest.raises(SystemExit):
        main(["convert", "--help"])
    assert "options of broken:\n  its options cannot be read from" in capsys.readouterr().out
    assert words in line


def test_a_package_is_imported_only_for_its_method(mine: Path) -> None:
    script = (
        "import sys\n"
        "from argparse import ArgumentParser\n"
        "from optimum.commands.register.register_mla import REGISTER_COMMANDS\n"
        "for command in REGISTER_COMMANDS:\n"
        "    parser = ArgumentParser()\n"
        "    command.parse_args(parser)\n"
        "    parser.format_help()\n"
        "    if command.COMMAND.name == 'mla-convert':\n"
        "        parser.parse_args(['-m', 'model', '--kv-cache-ratio', '0.5', 'out'])\n"
        "print(sorted({'torch', 'transformers', 'optimum_mla', 'mine_module'} & set(sys.modules)))"
    )
    environment = {**os.environ, "PYTHONPATH": f"{mine}{os.pathsep}{ROOT}"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_step_of_a_recipe_has_them_too(mine: Path) -> None:
    step = Step("mla-convert", {"method": "mine", "span": 3, "deep": False}, "model", mine / "out")
    args = parsed(step, 1)
    assert (args.span, args.deep) == (3, False)
    assert {"span", "deep", "kv_cache_ratio"} <= set(args.method_options)


def test_the_command_has_what_the_built_in_methods_declare() -> None:
    parser = ArgumentParser()
    MLAConvertCommand.parse_args(parser)
    assert built_in_options() == BUILT_IN
    assert set(parser.get_default("method_options")) == set(BUILT_IN)
    assert EVERY_METHOD.keys() == vars(MethodOptions()).keys() - {"calibration"}
    for method in (GQA2MLA, MHA2MLA, XEcoMLA):
        own = {name: BUILT_IN[name] for name in inspect.signature(method).parameters if name in BUILT_IN}
        assert method.command_options == {name: one for name, one in own.items() if name not in EVERY_METHOD}


def method(**attributes: Any) -> type[MLATransformation]:
    """Define a class that answers the two questions, with further attributes."""

    class Some(MLATransformation):
        locals().update(attributes)

        def plan_layer(self, source: SourceAttention) -> MLAGeometry:
            return source.geometry

        def convert_layer(self, source: SourceAttention, geometry: MLAGeometry, calibration: Any) -> dict[str, Tensor]:
            return {}

    return Some


def test_a_class_that_lacks_something_is_refused_where_it_is_defined() -> None:
    method(name="some")
    with pytest.raises(TypeError, match=r"Some is no whole .*: name, by which users select it\.$"):
        method()
    with pytest.raises(TypeError, match=r"needs: problem\(source, geometry, calibration\), for `calibrated`\.$"):
        method(name="some", factorizations=("own", "calibrated"))
    with pytest.raises(TypeError, match=r"needs: rotary_damage\(source, calibration\), for `one_rotary_key`\.$"):
        method(name="some", one_rotary_key=True)
    with pytest.raises(TypeError, match=r"a help text for energy in command_options; .* of energy without default"):
        method(name="some", command_options={"energy": {"default": 1}})


def test_a_subclass_has_the_options_of_its_base() -> None:
    class More(XEcoMLA):
        name = "more"
        command_options = {"span": {"type": int, "help": "Tokens of a span."}}  # noqa: RUF012

        def __init__(self, span: int = 4, **options: Any) -> None:
            super().__init__(**options)
            self.span = span

    assert More.command_options.keys() == XEcoMLA.command_options.keys() | {"span"}
