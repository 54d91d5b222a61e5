"""What the communicator does on the host: exchanges, options, captures, errors in words. No GPU, no kernel."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from extend_attn.comm import CommDisagreement, CommError, CommTimeout, Policy, virtual_ranks
from extend_attn.comm.capture import Capture
from extend_attn.comm.communicator import CustomAllReduce
from extend_attn.comm.errors import error_of, is_peer_lost
from extend_attn.comm.rendezvous import Hub, VirtualRendezvous
from extend_attn.comm.setup import Established, Options, Setup


def sides(world: int = 2):
    hub = Hub(world)
    return [VirtualRendezvous(hub, rank) for rank in range(world)]


def test_an_exchange_happens_when_the_last_rank_calls():
    seen = []
    one, two = sides()
    two.exchange("hello", "from 1", lambda values: seen.append((1, values)))
    assert not seen
    one.exchange("hello", "from 0", lambda values: seen.append((0, values)))
    assert seen == [(0, ["from 0", "from 1"]), (1, ["from 0", "from 1"])]


def test_exchanges_may_follow_each_other():
    seen = []
    for side in sides(3):
        side.exchange("a", side.rank, lambda _, s=side: s.exchange("b", s.rank + 10, seen.append))
    assert seen == [[10, 11, 12]] * 3


def test_ranks_that_call_different_things():
    one, two = sides()
    one.exchange("reset", None, lambda _: None)
    with pytest.raises(CommError, match="rank 0: reset, rank 1: capture"):
        two.exchange("capture", None, lambda _: None)


def test_a_rank_that_calls_twice():
    one, _ = sides()
    one.exchange("reset", None, lambda _: None)
    with pytest.raises(CommError, match="rank 0: called capture while its reset waits"):
        one.exchange("capture", None, lambda _: None)


OPTIONS = dict(dtypes=(torch.bfloat16,), max_bytes=1024, max_push_bytes=None, timeout_s=1, pdl=None, policy=Policy(()))


@pytest.mark.parametrize(
    "change, error, match",
    [
        ({"dtypes": ()}, TypeError, "dtypes: got"),
        ({"dtypes": (torch.int8,)}, TypeError, "dtypes: got .*int8"),
        ({"max_bytes": 15}, ValueError, "max_bytes: got 15"),
        ({"max_bytes": 1.5}, ValueError, "max_bytes: got 1.5"),
        ({"max_push_bytes": 0}, ValueError, "max_push_bytes: got 0"),
        ({"timeout_s": 0}, ValueError, "timeout_s: got 0"),
    ],
)
def test_bad_options(change, error, match):
    with pytest.raises(error, match=match):
        Options.of(**{**OPTIONS, **change})


def test_the_pdl_switch(monkeypatch):
    monkeypatch.delenv("EXTEND_ATTN_PDL", raising=False)
    assert Options.of(**OPTIONS).pdl
    monkeypatch.setenv("EXTEND_ATTN_PDL", "0")
    assert not Options.of(**OPTIONS).pdl
    assert Options.of(**{**OPTIONS, "pdl": True}).pdl, "an argument overrules the environment"


def test_world_and_device_are_checked_first():
    with pytest.raises(ValueError, match="world_size: got 9"):
        virtual_ranks(9)
    with pytest.raises(ValueError, match="device: got cpu"):
        virtual_ranks(2, "cpu")
    with pytest.raises(ValueError, match="torch.distributed is not initialized"):
        CustomAllReduce(None, "cuda:0")


class Identity(Setup):
    """A constructor that knows who it is without a GPU, and goes no further than the first step."""

    def __init__(self, side, done, options, **who):
        super().__init__(side, torch.device("cuda", 0), options, done)
        self._who = who

    def _identity(self):
        if "error" in self._who:
            raise OSError(self._who["error"])
        alike = {"max_bytes": self._options.max_bytes, "policy": self._options.policy.digest()}
        return {"alike": alike, "host": "a", "uuid": "0", "arch": "sm_90", "off": False, **self._who}


def construct(*who):
    found = []
    for side, facts in zip(sides(len(who)), who):
        options = Options.of(**{**OPTIONS, "max_bytes": facts.pop("max_bytes", 1024)})
        Identity(side, found.append, options, **facts).start()
    return [one.reason for one in found]


def test_reasons_to_fall_back_hold_for_all_ranks():
    assert construct({"host": "a"}, {"host": "b"}) == ["the ranks are on different hosts"] * 2
    assert construct({}, {"off": True}, {}) == ["EXTEND_ATTN_ALL_REDUCE=off"] * 3


def test_an_error_of_one_rank_is_raised_on_all():
    with pytest.raises(OSError, match="no GPU"):
        construct({"error": "no GPU"}, {})
    with pytest.raises(CommError, match="rank 1 failed in the constructor: OSError: no GPU"):
        construct({}, {"error": "no GPU"})


def test_ranks_are_constructed_alike():
    with pytest.raises(CommError, match=r"different max_bytes \(rank 0: 1024, rank 1: 2048\)"):
        construct({}, {"max_bytes": 2048})


class Core:
    """What a Capture needs of the module's Communicator."""

    def __init__(self):
        self.taken, self.filled = 0, {}

    def reserve_slots(self, count):
        self.room = count

    def take_slot(self):
        self.taken += 1
        return self.taken - 1

    def staging(self, rank):
        return 1000 + rank

    def open(self, handle):
        return int(handle) * 10_000

    def fill_slot(self, slot, inputs):
        self.filled[slot] = inputs


def communicator(side):
    comm = CustomAllReduce.__new__(CustomAllReduce)
    comm._closed, comm._core, comm._capture, comm._kept, comm._said = False, Core(), None, {}, set()
    comm._rendezvous, comm.rank = side, side.rank
    return comm


class Elsewhere(VirtualRendezvous):
    """Ranks of other processes, as far as a Capture can tell."""

    virtual = False


def test_slots_hold_base_plus_offset():
    """One slot a call, each rank's input by its handle; who copies in is read from its staging."""
    hub = Hub(2)
    comms = [communicator(Elsewhere(hub, rank)) for rank in range(2)]
    x = torch.zeros(4)
    exports = [{0: (b"7", 32, 1), 1: (b"7", 64, 1)}, {0: None, 1: (b"9", 16, 2)}]
    for comm, given in zip(comms, exports):
        with comm.capture() as nothing:
            assert nothing is None
            for call in range(2):
                comm._export = lambda address, g=given[call]: g
                comm._capture.note(("all_reduce", "one_shot_pull", call))
                if given[call] is None:
                    with pytest.warns(RuntimeWarning, match="copied first"):
                        assert comm._capture.register(x) == (call, True)
                else:
                    assert comm._capture.register(x) == (call, False)
    assert comms[0]._core.filled == {0: [x.data_ptr(), 1001], 1: [x.data_ptr(), 90_016]}
    assert comms[1]._core.filled == {0: [70_032, 1001], 1: [70_064, x.data_ptr()]}
    assert list(comms[0]._kept) == [1], "one tensor keeps an allocation alive"


def test_a_capture_is_one_exchange():
    """However many graphs and calls it holds."""
    hub = Hub(2)
    comms = [communicator(Elsewhere(hub, rank)) for rank in range(2)]
    x = torch.zeros(4)
    for comm in comms:
        comm._export = lambda address: (b"7", 0, 1)
        with comm.capture():
            for call in range(60 * 64):
                comm._capture.note(("all_reduce", "one_shot_pull", call))
                comm._capture.register(x)
    assert [comm.handle_exchanges for comm in comms] == [1, 1]
    assert len(comms[0]._core.filled) == 60 * 64


def test_captures_do_not_nest_and_end_once():
    comm = communicator(sides()[0])
    with comm.capture():
        with pytest.raises(RuntimeError, match="already entered"):
            comm.capture().__enter__()
    assert comm._capture is None


def test_a_capture_that_is_full():
    comm = communicator(sides()[0])
    capture = Capture(comm)
    comm._core.take_slot = lambda: -1
    with pytest.raises(RuntimeError, match="more than 16384 pulls"):
        capture.register(torch.zeros(4))


HEADER = {"op": 1, "dtype": 1, "count": 4096, "sequence": 5}


def test_errors_in_words():
    record = {"failure": 1, "peer": 3, "epoch": 5, "block": 0, "mine": HEADER, "theirs": None}
    error = error_of(2, record, 30.0)
    assert isinstance(error, CommTimeout)
    assert "rank 2, epoch 5, one_shot_push of 4096 bfloat16: nothing from rank 3 within 30 s" in str(error)
    norm = {"op": 4, "dtype": 0, "tokens": 9, "q_width": 256, "k_width": 64, "sequence": 5}
    error = error_of(0, {**record, "failure": 2, "theirs": norm}, 30.0)
    assert isinstance(error, CommDisagreement)
    assert "rank 3 is in another call, tp_qknorm of 9 tokens, q 256, k 64 float16" in str(error)
    error = error_of(0, {**record, "failure": 2, "theirs": {**HEADER, "sequence": 7}}, 30.0)
    assert "with sequence number 7" in str(error)
    assert "capture()" in str(error_of(0, {**record, "failure": 3}, 30.0))


def test_which_cuda_errors_mean_a_lost_peer():
    assert is_peer_lost(RuntimeError("cudaErrorIllegalAddress (an illegal memory access) from cudaMalloc at x:1"))
    assert not is_peer_lost(RuntimeError("cudaErrorMemoryAllocation (out of memory) from cudaMalloc at x:1"))


def test_importing_the_package_imports_no_torch():
    code = "import sys, extend_attn.comm, extend_attn.comm.policy; sys.exit('torch' in sys.modules)"
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parent.parent / "python")}
    assert subprocess.run([sys.executable, "-c", code], env=env).returncode == 0


def test_a_reason_is_kept():
    """A communicator that fell back says why where its own kernels are asked for by name."""
    comm = communicator(sides()[0])
    comm._established(Established(reason="the GPUs have no peer access to each other"))
    comm.dtypes = (torch.float32,)
    with pytest.raises(RuntimeError, match="no peer access"):
        comm._choose(torch.zeros(4), "one_shot_push", False)
    assert comm._choose(torch.zeros(4), "auto", False)[0] == "nccl"
