"""Memory for weights: aligned, one after another within a model, and given back with the last weight."""

import gc
import weakref

import pytest
import torch

from modernbert.engines.cpu.memory import memory_for, weights_together


@pytest.mark.parametrize("size", [1, 64, 1000, 9 * 2**20])
def test_a_weight_begins_a_cache_line(size):
    memory = memory_for(size)
    assert memory.shape == (size,)
    assert memory.dtype == torch.uint8
    assert memory.data_ptr() % 64 == 0


def test_weights_of_a_model_lie_one_after_another():
    with weights_together():
        first, second = memory_for(100), memory_for(200)
    assert second.data_ptr() - first.data_ptr() == 128
    assert first.data_ptr() % 2**21 == 0
    with weights_together():  # another model begins a block of its own
        other = memory_for(100)
    assert other.data_ptr() % 2**21 == 0
    assert other.untyped_storage().data_ptr() != first.untyped_storage().data_ptr()


def test_a_weight_larger_than_a_block_gets_one_of_its_own():
    with weights_together():
        small, large, after = memory_for(64), memory_for(70 * 2**20), memory_for(64)
    first = small.untyped_storage().data_ptr()
    assert large.untyped_storage().data_ptr() != first
    assert len(large) == 70 * 2**20
    assert after.data_ptr() % 64 == 0


def test_a_block_goes_with_its_last_weight():
    with weights_together():
        first, second = memory_for(100), memory_for(100)
    gone = weakref.ref(first.untyped_storage())
    storage = first.untyped_storage().data_ptr()
    assert second.untyped_storage().data_ptr() == storage
    del first
    gc.collect()
    second.fill_(7)  # is still there
    assert int(second[-1]) == 7
    del second
    gc.collect()
    assert gone() is None
