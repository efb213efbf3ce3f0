"""Models under PyTorch's ways of training in parallel, and under accelerate."""

import subprocess
import sys

import pytest
import torch
from accelerate import Accelerator

from tests.conftest import model_of
from tests.heads import CLASSES
from tests.interop.batches import batch_of


def replica_of(model):
    """What DataParallel makes for another device: the modules' copies, with plain tensors for parameters."""
    copies = {module: module._replicate_for_data_parallel() for module in model.modules()}
    made = {}
    for module, copied in copies.items():
        for name, child in module._modules.items():
            if child is not None:
                setattr(copied, name, copies[child])
        for name, parameter in module._parameters.items():
            if parameter is None:
                copied._parameters[name] = None
            else:
                made.setdefault(parameter, parameter.clone())
                setattr(copied, name, made[parameter])
    return copies[model]


@pytest.mark.parametrize("name", CLASSES)
def test_a_replica_of_data_parallel_computes_the_same(name):
    model, batch = model_of(name), batch_of(name)
    output, other = model(**batch), replica_of(model)(**batch)
    assert type(output)((key, value) for key, value in other.items()).keys() == output.keys()  # as it gathers them
    assert torch.equal(output[0], other[0])
    parameters = list(model.parameters())
    for a, b in zip(*(torch.autograd.grad(o[0].sum(), parameters, allow_unused=True) for o in (output, other)),
                    strict=True):  # fmt: skip
        assert (a is None and b is None) or torch.equal(a, b)
    assert list(torch.nn.DataParallel(model).state_dict()) == [f"module.{key}" for key in model.state_dict()]


@pytest.mark.parametrize("name", CLASSES)
def test_mixed_precision_of_accelerate_leaves_float32_outputs(name):
    accelerator = Accelerator(mixed_precision="bf16", cpu=True)
    model, batch = model_of(name), batch_of(name)
    with torch.no_grad():
        plain = model(**batch, output_hidden_states=True)
        mixed = accelerator.prepare_model(model)(**batch, output_hidden_states=True)
    assert type(mixed) is type(plain)
    for key in plain:
        for a, b in zip(*(value if isinstance(value, tuple) else [value] for value in (plain[key], mixed[key])),
                        strict=True):  # fmt: skip
            if isinstance(a, torch.Tensor):
                assert b.dtype == torch.float32
                torch.testing.assert_close(a, b, rtol=0, atol=0.2)
    if "loss" in plain:
        assert plain.loss != mixed.loss  # it was computed in bfloat16
    assert type(accelerator.unwrap_model(model, keep_fp32_wrapper=False)) is type(model)


WORKER = """
import copy, sys
import torch, torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from tests.conftest import model_of
from tests.interop.batches import batch_of

rank, store = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
for name in ("ModernBertForMaskedLM", "ModernBertDecoderForCausalLM"):
    batch = batch_of(name, size=4)
    count = (batch["labels"] != -100).sum() if "CausalLM" not in name else torch.tensor(4 * 9)
    mine = {key: value[2 * rank : 2 * rank + 2] for key, value in batch.items()}
    plain = model_of(name).train()
    plain(**batch, num_items_in_batch=count).loss.backward()
    wanted = {key: parameter.grad for key, parameter in plain.named_parameters()}
    replicated = DistributedDataParallel(model_of(name).train())
    sharded = model_of(name).train()
    for layer in sharded.model.layers:
        fully_shard(layer)
    fully_shard(sharded)
    for model in (replicated, sharded):
        (2 * model(**mine, num_items_in_batch=count).loss).backward()  # gradients are means over the processes
        for key, parameter in model.named_parameters():
            grad = parameter.grad
            grad = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
            torch.testing.assert_close(grad, wanted[key.removeprefix("module.")], rtol=0, atol=1e-5)
    half = model_of(name).eval()
    fully_shard(half, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, output_dtype=torch.float32))
    with torch.no_grad():
        assert half(**mine).logits.dtype == torch.float32
dist.destroy_process_group()
"""


def test_two_processes_have_the_gradients_of_one(tmp_path):
    """DistributedDataParallel and FSDP2."""
    command = [sys.executable, "-c", WORKER]
    running = [subprocess.Popen([*command, str(rank), str(tmp_path / "store")], stderr=subprocess.PIPE, text=True)
               for rank in range(2)]  # fmt: skip
    for process in running:
        _, errors = process.communicate(timeout=100)
        assert process.returncode == 0, errors
