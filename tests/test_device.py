"""What depends on the device, for the one that no test machine has: Apple's GPU."""

import warnings

import pytest
import torch
from ia2mini.models.checkpoint import TINY

from ia2mini import UsageError, open_subject
from ia2mini.batch import send
from ia2mini.cli.fit import dtype_note
from ia2mini.scale import device, graphs, memory
from ia2mini.train import Runs, Settings, State

HAS_MPS = torch.backends.mps.is_available()


def test_mps_is_an_experiment_in_float32():
    with pytest.warns(UserWarning, match="--device mps is an experiment"):
        assert device.weight_dtype(TINY, "mps", None) == torch.float32
    with pytest.warns(UserWarning, match="nobody has run"):
        assert device.weight_dtype(TINY, "mps", "float32") == torch.float32
    with pytest.raises(UsageError, match="--dtype bfloat16: on mps ia2mini computes in float32"):
        device.weight_dtype(TINY, "mps", "bfloat16")


def test_nothing_is_said_of_other_devices():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert device.weight_dtype(TINY, "cpu", "float16") == torch.float16
        assert device.weight_dtype(TINY, "cuda", None) == torch.bfloat16


@pytest.mark.parametrize("hardware", [True, False])
def test_bfloat16_on_a_cpu_without_it_is_said_to_be_slow_and_never_recommended(
    hardware, monkeypatch, recwarn
):
    monkeypatch.setattr(device, "bfloat16_in_hardware", lambda device: hardware)
    assert device.weight_dtype(TINY, "cpu", "bfloat16") == torch.bfloat16
    slow = [str(warning.message) for warning in recwarn]
    assert slow == ([] if hardware else [device.SLOW])
    recommended = "--dtype bfloat16 is faster" in dtype_note(open_subject("tiny", "cpu"))
    assert recommended == hardware
    assert "float32 is more exact" in dtype_note(open_subject("tiny", "cpu", "bfloat16"))


@pytest.mark.skipif(HAS_MPS, reason="there is an Apple GPU")
def test_without_an_apple_gpu_mps_is_one_line():
    with pytest.raises(UsageError, match="--device mps: not usable here .*; use --device cpu"):
        open_subject("tiny", "mps")


def test_on_mps_nothing_is_recorded_or_pinned_and_memory_has_no_estimate(monkeypatch):
    mps = torch.device("mps")
    assert graphs.recorded(len, mps) is len
    assert device.free_bytes(mps) == float("inf")
    sent = []
    tensor = torch.ones(2)
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *where: sent.append(where) or self)
    monkeypatch.setattr(torch.Tensor, "pin_memory", None)
    assert send(tensor, mps) is tensor and sent == [(mps,)]


@pytest.mark.parametrize("kind, emptied", [("mps", 1), ("cpu", 0)])
def test_the_cache_is_emptied_after_each_phase(kind, emptied, monkeypatch, model):
    calls = []
    monkeypatch.setattr(torch.mps, "empty_cache", lambda: calls.append("emptied"))
    monkeypatch.setattr(memory, "device_of", lambda model: torch.device(kind))
    state = State.begin(torch.zeros(2, 3))
    runs = Runs(state.theta, torch.ones(2), [[], []], [[], []], {}, [list, list])

    def train(model, adapter, runs, settings, state, hooks):
        calls.append(len(runs))
        return state

    found = memory.within_memory(train, at_once=1)(model, None, runs, Settings(), state, None)
    assert found is state
    assert calls == [1, 1] + ["emptied"] * emptied


@pytest.mark.skipif(not HAS_MPS, reason="no Apple GPU here")
def test_a_pass_on_mps_equals_the_cpus():
    ids = torch.arange(20, 40)[None]
    with pytest.warns(UserWarning, match="experiment"), torch.no_grad():
        there = open_subject("tiny", "mps").model(ids.to("mps")).cpu()
        here = open_subject("tiny", "cpu").model(ids)
    torch.testing.assert_close(there, here, atol=1e-3, rtol=1e-3)
