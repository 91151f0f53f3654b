"""A conversion that ends anywhere leaves no wrong output, and goes on to what an uninterrupted one gives."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch import Tensor
from transformers import AutoModelForCausalLM

from optimum_mla.convert import Run
from optimum_mla.core.errors import (
    CorruptWeightsError,
    MLAError,
    OptionError,
    OutputError,
    UnreadableModelError,
    VerificationError,
)
from optimum_mla.families.project import SourceAttention
from optimum_mla.pipeline import TextOptions, convert
from optimum_mla.pipeline.unfinished import UnfinishedConversion
from optimum_mla.report.schema import ConversionReport
from tests.cases import source_model, token_ids
from tests.measure.test_verify import swallowing_the_cache

TEXTS = TextOptions(calibration_data=token_ids(1, 400)[0].tolist(), calibration_samples=8, calibration_length=32)
OPTIONS = {"kv_cache_ratio": 0.5}
LAYERS = 3
REFERENCE = Path(__file__).resolve().parents[2] / "benchmarks" / "reference_model"


def hashes(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file that two equal conversions write alike: all but the report and the card, with times."""
    timed = ("conversion_report.json", "README.md")
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir() if p.name not in timed}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "model"
    source_model("llama").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def whole(model: Path) -> Path:
    """What an uninterrupted conversion writes."""
    convert(str(model), model.parent / "whole", options=OPTIONS, texts=TEXTS)
    return model.parent / "whole"


@pytest.fixture(autouse=True)
def _source_stays(model: Path) -> Iterator[None]:
    before = hashes(model)
    yield
    assert hashes(model) == before


def run(model: Path, output: Path, **changes: Any) -> Any:
    return convert(str(model), output, **{"options": OPTIONS, "texts": TEXTS, **changes})


def stopping_at(monkeypatch: pytest.MonkeyPatch, layer: int, error: BaseException) -> list[int]:
    """Make the writing of a layer fail; return the indices of the layers that are written from now on."""
    written: list[int] = []
    write = UnfinishedConversion.write_layer

    def failing(self: UnfinishedConversion, run: Any, index: int, attention: Any) -> None:
        if index == layer:
            raise error
        write(self, run, index, attention)
        written.append(index)

    monkeypatch.setattr(UnfinishedConversion, "write_layer", failing)
    return written


def built_layers(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The indices of the layers that are converted, and not taken from the journal, from now on."""
    built, build = [], Run._build

    def noting(self: Run, layer: int, *rest: Any) -> Any:
        built.append(layer)
        return build(self, layer, *rest)

    monkeypatch.setattr(Run, "_build", noting)
    return built


def installed_as_if(monkeypatch: pytest.MonkeyPatch, number: str) -> None:
    """Let this package have another version."""
    versions = lambda name: number if name == "optimum-mla" else version(name)  # noqa: E731
    monkeypatch.setattr(import_module("optimum_mla.pipeline.unfinished"), "version", versions)


@pytest.mark.parametrize("stop", range(LAYERS))
@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device"), MemoryError()], ids=str)
def test_an_interrupted_conversion_goes_on(
    model: Path, whole: Path, tmp_path: Path, stop: int, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        stopping_at(patched, stop, error)
        with pytest.raises(type(error)):
            run(model, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == [".out.unfinished"]
    built = built_layers(monkeypatch)
    report = run(model, tmp_path / "out", resume=True)
    assert built == list(range(stop, LAYERS))
    assert hashes(tmp_path / "out") == hashes(whole)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    expected = json.loads((whole / "conversion_report.json").read_text())
    found = json.loads((tmp_path / "out" / "conversion_report.json").read_text())
    assert found["layers"] == expected["layers"]
    assert (report.perplexity_before, report.perplexity_after) == (
        expected["perplexity_before"],
        expected["perplexity_after"],
    )


@pytest.mark.parametrize("options", [{}, {"rope_cache": "cached", "shared_rope": True}, {"layers": "1"}], ids=str)
def test_choices_for_all_layers_are_kept_too(
    model: Path, tmp_path: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = OPTIONS | options
    run(model, tmp_path / "whole", options=changed)
    with monkeypatch.context() as patched:
        stopping_at(patched, 2, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            run(model, tmp_path / "out", options=changed)

    def again(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr("optimum_mla.convert.run.choose_shared_rope", again)
    monkeypatch.setattr("optimum_mla.convert.search.LayerSearch.rank_curve", again)
    run(model, tmp_path / "out", options=changed, resume=True)
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")


def test_other_options_are_refused(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        stopping_at(patched, 1, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            run(model, tmp_path / "out")
    kept = hashes(tmp_path / ".out.unfinished")
    with pytest.raises(OptionError, match=r"kv_cache_ratio is 0\.25 and was 0\.5\. Give the options and the files"):
        run(model, tmp_path / "out", options={"kv_cache_ratio": 0.25}, resume=True)
    other = TextOptions(calibration_data=TEXTS.calibration_data, calibration_samples=4, calibration_length=32)
    with pytest.raises(OptionError, match="calibration data"):
        run(model, tmp_path / "out", texts=other, resume=True)
    with pytest.raises(OptionError, match="dtype is 'bfloat16' and was 'auto'"):
        run(model, tmp_path / "out", dtype="bfloat16", resume=True)
    with pytest.raises(OutputError, match=r"an unfinished conversion to .* Go on with it by --resume"):
        run(model, tmp_path / "out")
    with monkeypatch.context() as patched:
        installed_as_if(patched, "9.0")
        with pytest.raises(OptionError, match=r"optimum-mla is '9\.0' and was "):
            run(model, tmp_path / "out", resume=True)
    assert hashes(tmp_path / ".out.unfinished") == kept
    built = built_layers(monkeypatch)
    run(model, tmp_path / "out", options={"kv_cache_ratio": 0.25}, overwrite=True)
    assert built == [0, 1, 2]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("layers", "again"), [([0, 1], []), ((2, 1), [2]), (range(1, 3), [2]), (1, []), ({2}, [2])], ids=str
)
def test_options_from_python_are_those_that_the_journal_kept(
    model: Path, tmp_path: Path, layers: Any, again: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {**OPTIONS, "layers": layers}
    with monkeypatch.context() as patched:
        stopping_at(patched, 2, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            convert(model, tmp_path / "out", options=options, texts=TEXTS)
    with pytest.raises(OptionError, match=r"another one: layers is \[0\] and was \[\d"):
        run(model, tmp_path / "out", options={**OPTIONS, "layers": [0]}, resume=True)
    built = built_layers(monkeypatch)
    report = convert(model, tmp_path / "out", options=options, texts=TEXTS, resume=True)
    assert built == again
    assert ConversionReport.read(tmp_path / "out").model == str(report.model) == str(model)


@pytest.mark.parametrize(("line", "again"), [("options", [0, 1, 2]), ("layer 0", [0, 1, 2]), ("layer 1", [1, 2])])
@pytest.mark.parametrize("damage", [b"\0" * 30, b'{"key": "lay'], ids=["zeros", "torn"])
def test_a_damaged_journal_is_read_up_to_the_damage(
    model: Path,
    whole: Path,
    tmp_path: Path,
    line: str,
    again: list[int],
    damage: bytes,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with monkeypatch.context() as patched:
        stopping_at(patched, 2, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            run(model, tmp_path / "out")
    journal = tmp_path / ".out.unfinished" / "journal.jsonl"
    lines = journal.read_bytes().splitlines()
    (place,) = (number for number, text in enumerate(lines) if f'"key": "{line}"'.encode() in text)
    journal.write_bytes(b"\n".join([*lines[:place], damage, *lines[place + 1 :]]) + b"\n")
    built = built_layers(monkeypatch)
    run(model, tmp_path / "out", resume=True)
    assert built == again
    said = [message for message in caplog.messages if "damaged" in message]
    assert said == [
        f"warning: {journal} is damaged from line {place + 1} on. What it said from there on is done again."
    ]
    assert hashes(tmp_path / "out") == hashes(whole)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_damaged_layer_is_converted_again(
    model: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with monkeypatch.context() as patched:
        stopping_at(patched, 2, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            run(model, tmp_path / "out")
    shard = tmp_path / ".out.unfinished" / "layer-00000.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    built = built_layers(monkeypatch)
    run(model, tmp_path / "out", resume=True)
    assert built == [0, 2]
    assert "is not as it was written; its layer is converted again" in caplog.text
    assert hashes(tmp_path / "out") == hashes(whole)


def test_resume_without_an_unfinished_conversion_begins(model: Path, whole: Path, tmp_path: Path) -> None:
    run(model, tmp_path / "out", resume=True)
    assert hashes(tmp_path / "out") == hashes(whole)


def test_what_would_come_again_is_not_kept(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stopping_at(monkeypatch, 2, CorruptWeightsError("model: layer 2"))
    with pytest.raises(CorruptWeightsError):
        run(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def leaving_out_a_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint is written without one of its weights."""
    from optimum_mla.pipeline import unfinished

    whole = unfinished.weights_outside_layers
    written = lambda run: {name: tensor for name, tensor in whole(run).items() if name != "model.norm.weight"}  # noqa: E731
    monkeypatch.setattr(unfinished, "weights_outside_layers", written)


def scaling_what_was_factorized(monkeypatch: pytest.MonkeyPatch) -> None:
    """The attention of layer 2 gets other weights than its factorization says."""
    cast = Run._cast

    def wrong(self: Run, source: SourceAttention, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        found = cast(self, source, tensors)
        if source.module.layer_idx == 2:
            found = {name: 1.3 * tensor if tensor.is_floating_point() else tensor for name, tensor in found.items()}
        return found

    monkeypatch.setattr(Run, "_cast", wrong)


CHECKS: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], str, int]] = {
    "of the live cache": (swallowing_the_cache, "verify: the live DynamicCache of 2 x 24 tokens weighs 0 bytes", 3),
    "of what was written": (leaving_out_a_norm, "lacks 1 weights of its config, such as model.norm.weight", 3),
    "of a layer": (scaling_what_was_factorized, "verify: the attention of layer 2 has an output error", 2),
}
"""What goes wrong, the words of the check that finds it, and the layers that have been made by then."""


@pytest.mark.parametrize("check", CHECKS)
def test_a_failed_check_keeps_what_was_made(
    model: Path,
    whole: Path,
    tmp_path: Path,
    check: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    break_it, words, layers = CHECKS[check]
    kept = tmp_path / ".out.unfinished"
    with monkeypatch.context() as patched:
        break_it(patched)
        for resume in (False, True):  # it comes again with the same software
            with pytest.raises(VerificationError, match=words) as raised:
                run(model, tmp_path / "out", resume=resume)
            assert f"Nothing was written to {tmp_path / 'out'}. {layers} converted layers" in str(raised.value)
            assert f"are kept in {kept}: the same command with --resume goes on" in str(raised.value)
            assert ".partial" not in str(raised.value)
            assert [path.name for path in tmp_path.iterdir()] == [kept.name]
            assert len(list(kept.glob("layer-*.safetensors"))) == layers
    installed_as_if(monkeypatch, "9.0")
    with pytest.raises(OptionError, match=r"kv_cache_ratio is 0\.25 and was 0\.5"):
        run(model, tmp_path / "out", options={"kv_cache_ratio": 0.25}, resume=True)
    built = built_layers(monkeypatch)
    run(model, tmp_path / "out", resume=True)
    assert built == list(range(layers, LAYERS))
    assert f"what was kept was made with optimum-mla {version('optimum-mla')}; this is 9.0" in caplog.text
    assert hashes(tmp_path / "out") == hashes(whole)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_too_little_space_is_said_before_the_work(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = built_layers(monkeypatch)
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(OutputError, match=r"has 0\.00 GB free, the result needs 0\.00 GB"):
        run(model, tmp_path / "out")
    assert built == []
    assert list(tmp_path.iterdir()) == []


def test_a_model_on_the_disk_converts_to_the_same(
    model: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("optimum_mla.pipeline.checkpoint.RESIDENT_BYTES", 0)
    report = run(model, tmp_path / "out")
    assert hashes(tmp_path / "out") == hashes(whole)
    expected = json.loads((whole / "conversion_report.json").read_text())
    assert report.perplexity_after == expected["perplexity_after"]
    monkeypatch.setattr("optimum_mla.pipeline.unfinished.RESIDENT_BYTES", 0)
    run(model, tmp_path / "shards")
    names = {path.name for path in (tmp_path / "shards").glob("model*.safetensors*")}
    assert names == {f"model-0000{i}-of-00004.safetensors" for i in range(1, 5)} | {"model.safetensors.index.json"}
    one, many = (AutoModelForCausalLM.from_pretrained(folder) for folder in (whole, tmp_path / "shards"))
    assert all(tensor.equal(many.state_dict()[name]) for name, tensor in one.state_dict().items())


@pytest.mark.parametrize("damage", ["vanished", "cut off"])
def test_a_source_that_breaks_off_is_said_and_what_was_done_stays(
    model: Path, whole: Path, tmp_path: Path, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("optimum_mla.pipeline.checkpoint.RESIDENT_BYTES", 0)
    source = tmp_path / "model"
    source_model("llama").save_pretrained(source)
    weights = source / "model.safetensors"
    content, times = weights.read_bytes(), (weights.stat().st_atime_ns, weights.stat().st_mtime_ns)
    write = UnfinishedConversion.write_layer

    def breaking(self: UnfinishedConversion, run: Any, index: int, attention: Any) -> None:
        write(self, run, index, attention)
        if index == 1:
            weights.unlink()
            if damage == "cut off":
                weights.write_bytes(content[: len(content) // 2])

    with monkeypatch.context() as patched:
        patched.setattr(UnfinishedConversion, "write_layer", breaking)
        with pytest.raises(UnreadableModelError, match="weights could not be read"):
            run(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    weights.unlink(missing_ok=True)
    weights.write_bytes(content)
    os.utime(weights, ns=times)
    built = built_layers(monkeypatch)
    run(source, tmp_path / "out", resume=True)
    assert built == [2]
    assert hashes(tmp_path / "out") == hashes(whole)


def killed_after(seconds: float, model: Path, output: Path) -> bool:
    """Convert in a process that is killed after some seconds; return whether it was done before."""
    child = os.fork()
    if child == 0:
        signal.setitimer(signal.ITIMER_REAL, seconds)  # SIGALRM ends a process that has no handler for it, at once
        try:
            run(model, output, resume=True)
        except BaseException:
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return not os.WIFSIGNALED(status)


@pytest.mark.parametrize("points", [3, pytest.param(50, marks=pytest.mark.slow)])
def test_a_killed_process_leaves_no_wrong_output(model: Path, whole: Path, tmp_path: Path, points: int) -> None:
    start = time.monotonic()
    assert not killed_after(0.001, model, tmp_path / "first")
    run(model, tmp_path / "first", resume=True)
    longest = time.monotonic() - start
    chance = random.Random(points)
    output = tmp_path / "out"
    for _ in range(points):
        if killed_after(chance.uniform(0, 1.2 * longest), model, output) or output.exists():
            assert hashes(output) == hashes(whole)
            AutoModelForCausalLM.from_pretrained(output)
            for path in output.iterdir():
                path.unlink()
            output.rmdir()
    run(model, output, resume=True)
    assert hashes(output) == hashes(whole)
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("call", [1, 3, 4, 8])
@pytest.mark.parametrize("function", ["os.fsync", "safetensors.torch.serialize_file", "os.rename", "os.replace"])
def test_a_failing_write_leaves_no_output(
    model: Path, whole: Path, tmp_path: Path, function: str, call: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, _, name = function.rpartition(".")
    real, calls = getattr(import_module(home), name), []

    def failing(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        if len(calls) == call:
            raise OSError(28, "No space left on device")
        return real(*args, **kwargs)

    failed = ""
    with monkeypatch.context() as patched:
        patched.setattr(function, failing)
        try:
            run(model, tmp_path / "out")
        except MLAError as error:
            failed = str(error)
    assert bool(failed) == (len(calls) >= call)
    if failed:
        assert "No space left on device" in failed
        assert not (tmp_path / "out").exists()
        run(model, tmp_path / "out", resume=True)
    assert hashes(tmp_path / "out") == hashes(whole)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_ctrl_c_is_one_line_and_the_command_goes_on(tmp_path: Path) -> None:
    command = [str(Path(sys.executable).parent / "optimum-mla"), "mla-convert", "-m", str(REFERENCE), "OUT"]
    command += ["--kv-cache-ratio", "0.5", "--calibration-samples", "4", "--calibration-length", "32"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    journal = tmp_path / ".OUT.unfinished" / "journal.jsonl"
    while process.poll() is None and not (journal.is_file() and '"layer 0"' in journal.read_text()):
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=120)
    if process.returncode == 0:
        pytest.skip("the conversion was done before the signal came")
    assert process.returncode == 130, stderr
    assert re.search(r"kept: \d converted layers and all choices\. The same command with --resume goes on\.", stderr)
    assert "interrupted: OUTPUT is as it was" in stderr
    assert "Traceback" not in stderr
    assert [path.name for path in tmp_path.iterdir()] == [".OUT.unfinished"]
    done = subprocess.run([*command, "--resume"], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["OUT"]
