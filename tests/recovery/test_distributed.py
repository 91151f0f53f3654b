"""Training by several processes: as good as by one."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from optimum_mla.pipeline import TextOptions, convert, finetune
from optimum_mla.recovery.recipe import Recipe
from optimum_mla.report.schema import RecoveryReport
from tests.cases import UNCALIBRATED

REFERENCE = Path(__file__).resolve().parents[2] / "benchmarks" / "reference_model"
SIZES: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
    "initializer_range": 0.1,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`source`, `converted` and `train.txt`."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(folder / "source")
    AutoTokenizer.from_pretrained(REFERENCE).save_pretrained(folder / "source")
    convert(str(folder / "source"), folder / "converted", "gqa2mla", {"kv_cache_ratio": 0.5}, UNCALIBRATED)
    (folder / "train.txt").write_text((REFERENCE / "calibration.txt").read_text()[:3000])
    return folder


def run(processes: int, *program: str) -> subprocess.CompletedProcess[str]:
    """A Python program under torchrun."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--master_port", str(port)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, *launcher, *program]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240, check=False)


def same_training(models: Path, tmp_path: Path, training: dict[str, Any] | None = None, **recipe: Any) -> None:
    """Two processes of the command with batches of 2 do what one does with batches of 4."""
    recipe = {"sequence_length": 32, "lora_rank": 4, **recipe}
    steps = {"max_steps": 4, "save_steps": 2, "logging_steps": 1, **(training or {})}
    texts = {"eval_data": str(REFERENCE / "evaluation.txt"), "eval_samples": 2, "eval_length": 32}
    data = str(models / "train.txt")
    one = finetune(
        *(str(models / "converted"), tmp_path / "one", data, Recipe(**recipe)),
        training={**steps, "per_device_train_batch_size": 4},
        texts=TextOptions(**texts),
    )
    assert one is not None

    options = {**recipe, **steps, **texts, "per_device_train_batch_size": 2, "train_data": data}
    flags = [
        word
        for name, value in options.items()
        for word in ([f"--{name.replace('_', '-')}"] if value is True else [f"--{name.replace('_', '-')}", str(value)])
    ]
    program = ["-m", "optimum.commands.optimum_cli", "mla-finetune", "-m", str(models / "converted")]
    done = run(2, *program, *flags, str(tmp_path / "two"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Saved to") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]
    two = RecoveryReport(**json.loads((tmp_path / "two" / "recovery_report.json").read_text()))

    alone, together = (load_file(next((tmp_path / name).glob("*.safetensors"))) for name in ("one", "two"))
    assert alone.keys() == together.keys()
    for name, value in alone.items():
        torch.testing.assert_close(together[name], value, rtol=0.0, atol=1e-5, msg=name)
    assert [e["loss"] for e in two.losses] == pytest.approx([e["loss"] for e in one.losses], abs=1e-5)
    assert (two.steps, two.tokens_seen) == (one.steps, one.tokens_seen) == (4, 4 * 4 * 32)
    assert two.perplexity_converted == pytest.approx(one.perplexity_converted, rel=1e-6)
    assert two.perplexity_recovered == pytest.approx(one.perplexity_recovered, rel=1e-5)
    assert two.perplexity_recovered != pytest.approx(two.perplexity_converted, rel=1e-4)


def test_two_processes_train_as_one_does(models: Path, tmp_path: Path) -> None:
    same_training(models, tmp_path, train="kv")


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"train": "lora"},
        {"train": "full", "objective": "sft"},
        {"train": "attention", "stage1": "layerwise", "stage1_share": 0.5},
        {"train": "kv", "training": {"gradient_checkpointing": True}},
    ],
)
def test_two_processes_train_anything_as_one_does(options: dict[str, Any], models: Path, tmp_path: Path) -> None:
    same_training(models, tmp_path, **options)


@pytest.mark.slow
def test_bad_input_of_two_processes_ends_both(models: Path, tmp_path: Path) -> None:
    done = run(
        2,
        *("-m", "optimum.commands.optimum_cli", "mla-finetune", "-m", str(models / "source")),
        *("--train-data", str(models / "train.txt"), str(tmp_path / "out")),
    )
    assert done.returncode != 0
    assert "is not converted" in done.stderr
    assert list(tmp_path.iterdir()) == []


SHARDED = """
    import copy, sys, tempfile

    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor
    from transformers import AutoModelForCausalLM, TrainingArguments
    from transformers.utils import logging

    import optimum_mla
    from optimum_mla.recovery import DistillationTrainer, prepare
    from optimum_mla.recovery.parameters import full_state

    logging.set_verbosity_error()
    torch.set_num_threads(1)
    folder, choice = sys.argv[1:]
    arguments = TrainingArguments(tempfile.mkdtemp(), use_cpu=True, report_to="none", ddp_find_unused_parameters=False)
    # The trainer's arguments have started the process group.
    rank = arguments.process_index
    assert dist.get_world_size() == 2
    mesh = init_device_mesh("cpu", (2,))

    teacher = AutoModelForCausalLM.from_pretrained(f"{folder}/source")
    plain = AutoModelForCausalLM.from_pretrained(f"{folder}/converted")
    torch.manual_seed(0)
    plain = prepare(plain, choice, lora_rank=4)
    if choice == "lora":
        # B begins as zero, and A then has no gradient.
        for name, parameter in plain.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.05)
    sharded = copy.deepcopy(plain)
    ids = torch.randint(1, 4096, (4, 24), generator=torch.Generator().manual_seed(1))

    def loss_of(model, batch):
        trainer = DistillationTrainer(
            model, copy.deepcopy(teacher), kl_weight=0.7, ce_weight=0.3, temperature=2.0, args=arguments
        )
        return trainer.compute_loss(model, {"input_ids": batch, "labels": batch})

    whole = loss_of(plain, ids)
    whole.backward()
    wanted = {name: p.grad for name, p in plain.named_parameters() if p.requires_grad}

    base = sharded.get_base_model() if choice == "lora" else sharded
    for layer in base.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    gathered = full_state(sharded)
    assert full_state(plain) is None
    if rank == 0:
        state = plain.state_dict()
        assert gathered.keys() == state.keys()
        assert all(torch.equal(gathered[name], value) for name, value in state.items())
    else:
        assert gathered == {}
    optimizer = torch.optim.SGD([p for p in sharded.parameters() if p.requires_grad], lr=0.5)
    part = loss_of(sharded, ids[2 * rank : 2 * rank + 2])
    part.backward()
    mean = part.detach().clone()
    dist.all_reduce(mean)
    mean /= 2
    torch.testing.assert_close(mean, whole.detach(), rtol=0.0, atol=1e-5)
    given = {name: p.grad for name, p in sharded.named_parameters() if p.requires_grad}
    assert given.keys() == wanted.keys()
    largest = 0.0
    for name, gradient in given.items():
        assert isinstance(gradient, DTensor), name
        torch.testing.assert_close(gradient.full_tensor(), wanted[name], rtol=0.0, atol=1e-5, msg=name)
        largest = max(largest, wanted[name].abs().max().item())
    assert largest > 1e-3, largest

    optimizer.step()
    optimizer.zero_grad()
    after = loss_of(sharded, ids[2 * rank : 2 * rank + 2]).detach()
    dist.all_reduce(after)
    assert after / 2 < mean, (after, mean)
    if rank == 0:
        print(f"sharded and plain agree on {len(given)} gradients, loss {mean:.4f} to {after / 2:.4f}")
    dist.destroy_process_group()
"""


def check_sharded(models: Path, tmp_path: Path, choice: str) -> None:
    """Run the program above in two processes."""
    program = tmp_path / "sharded.py"
    program.write_text(textwrap.dedent(SHARDED))
    done = run(2, str(program), str(models), choice)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "sharded and plain agree on" in done.stdout


@pytest.mark.slow
def test_sharded_loss_and_gradients_are_the_whole_models(models: Path, tmp_path: Path) -> None:
    check_sharded(models, tmp_path, "full")


@pytest.mark.slow
@pytest.mark.parametrize("choice", ["lora", "kv"])
def test_sharded_parts_train_too(choice: str, models: Path, tmp_path: Path) -> None:
    check_sharded(models, tmp_path, choice)
