"""The bench without a GPU: rows and floors, the worker's time limit, what is skipped and why, a run on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest
import torch

from extend_attn.bench import main, results
from extend_attn.bench.check import error_of
from extend_attn.bench.data import make_batch
from extend_attn.bench.problems import NOMINAL, PUBLISHED, ROWS, Row, floor, rows_named
from extend_attn.bench.providers import DEFAULT, OWN, PROVIDERS, Device, Skip, providers_named
from extend_attn.bench.providers.flash_attention import keys_of
from extend_attn.bench.providers.sglang import tile_of
from extend_attn.bench.runner import WorkerProcess, tasks_of
from extend_attn.bench.timing import rotations
from extend_attn.bench.worker import Worker

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
HOPPER = Device("cuda", "NVIDIA H200", (9, 0))
CPU = Device("cpu", "a CPU")

# Floors (us) of the published table: an H200 with 4555 GB/s and 793 TFLOP/s, and which of the two binds.
PUBLISHED_FLOORS = {
    "prefill_long": (347, "compute"), "prefill_chat": (5.2, "compute"), "verify_chat": (29.1, "memory"),
    "verify_summ": (29.8, "memory"), "verify_burst": (2.2, "memory"), "chunk8": (11.0, "memory"),
    "chunk16": (86.8, "compute"), "chunk32": (44.2, "memory"), "verify_full8k": (231, "memory"),
    "extend_pref": (195, "compute"), "one_verify": (7.2, "memory"), "d128_prefill": (693, "compute"),
    "d128_verify": (231, "memory"), "d128_extend_pref": (390, "compute"), "d128_decode64": (230, "memory"),
    "d512_prefill": (173, "compute"), "d512_verify": (231, "memory"),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED_FLOORS)
def test_floors_are_the_published_ones(name):
    us, bound = PUBLISHED_FLOORS[name]
    found = floor(ROWS[name], NOMINAL)
    assert found.bound == bound
    assert found.us == pytest.approx(us, rel=0.012)


COUNTED = [
    Row("plain", 1, 5, 3),
    Row("cut", 2, 4, 9, 6),
    Row("wide", 1, 3, 2, 50),
    Row("ragged", 4, 2, 9, ragged=True),
    Row("uneven", 4, 7, 9, uneven=True),
]


@pytest.mark.parametrize("row", COUNTED, ids=lambda row: row.name)
def test_counts_are_those_of_the_mask(row):
    """Pairs, and keys of the prefix, counted one by one, from the rule of the window."""
    pairs, seen = 0, set()
    for b, (prefix, new) in enumerate(zip(row.prefixes, row.new_lengths)):
        for m in range(new):
            for key in range(prefix + m + 1):
                if not row.window or prefix + m <= key + row.window:
                    pairs += 1
                    seen.update({(b, key)} if key < prefix else ())
    assert row.visible_pairs == pairs
    assert row.visible_keys == len(seen)
    assert row.flops == 4 * 256 * 8 * pairs
    assert row.bytes == 2 * (len(seen) * 4 * 512 + row.num_tokens * (4 + 8) * 512)


def test_what_rows_may_add_counts_too():
    latent = Row("latent", 2, 1, 10, 0, 96, 4, 1, latent_v=64)
    assert latent.bytes == 2 * 2 * (11 * 96 + 4 * (96 + 64)) and latent.flops == 2 * 2 * 160 * 4 * 11
    half = Row("half", 2, 1, 10, kv_dtype="float8_e4m3fn")
    assert Row("whole", 2, 1, 10).bytes - half.bytes == 2 * 10 * 2 * 4 * 256
    assert sorted(Row("ragged", 4, 1, 10, ragged=True).prefixes) == [1, 4, 7, 10]
    uneven = Row("uneven", 4, 10, 6, uneven=True)
    assert sorted(uneven.new_lengths) == [1, 4, 7, 10] and uneven.prefixes == [0, 6, 0, 6]
    assert Row("tree", 2, 3, 10, tree=True).bytes - Row("none", 2, 3, 10).bytes == 2 * 9


def test_prefix_slots_come_in_runs_of_a_page():
    slots = make_batch(Row("paged", 2, 3, 32, page=16), torch.device("cpu"), num_sets=1).sets[0].prefix_slots
    runs = slots.view(-1, 16)
    assert (runs[:, 0] % 16 == 0).all() and (runs - runs[:, :1] == torch.arange(16)).all()
    with pytest.raises(ValueError, match="page"):
        Row("paged", 2, 3, 33, page=16)


ADDED = [
    dict(tree=True), dict(ragged=True), dict(uneven=True), dict(page=4), dict(latent_v=32),
    dict(kv_dtype="float8_e4m3fn"),
]  # fmt: skip


@pytest.mark.parametrize("added", ADDED, ids=str)
def test_the_library_answers_rows_with_more(added):
    """Worker and provider on a CPU: the batch that a row describes, against the reference."""
    row = Row("small", 3, 4, 20, 0, 64, 4, 1 if "latent_v" in added else 2, **added)
    answer = Worker(torch.device("cpu")).answer({"op": "measure", "row": row.to_json(), "provider": OWN})
    assert answer.get("us_do_bench", 0) > 0, answer


def test_rows_are_found_by_name_group_and_shape():
    assert rows_named("published") == list(PUBLISHED)
    assert [row.name for row in rows_named("chunk8,published")][:2] == ["chunk8", "prefill_long"]
    assert {row.name for row in rows_named(None, on_gpu=False)} == {"tiny_prefill", "tiny_verify"}
    assert Row.parse("2,3,4,-").window == 0
    assert Row.parse("2,3,4,5,128,32,8").num_q_heads == 32
    assert Row.from_json(json.loads(json.dumps(ROWS["chunk8"].to_json()))) == ROWS["chunk8"]
    with pytest.raises(ValueError, match="chunk9"):
        rows_named("chunk9")
    with pytest.raises(ValueError, match="B,E,P,W"):
        Row.parse("1,2,3")
    with pytest.raises(ValueError, match="query heads"):
        Row("odd", 1, 1, 0, num_q_heads=7)


def test_sets_rotate_past_the_cache():
    l2 = 60 << 20
    for row in PUBLISHED:
        sets = rotations(row.bytes, l2)
        assert 2 <= sets <= 20
        assert sets == 20 or sets * row.bytes >= 4 * l2 or row.bytes >= 2 * l2


def test_batch_is_scattered_and_poisoned():
    row = ROWS["tiny_verify"]
    batch = make_batch(row, torch.device("cpu"))
    assert len(batch.sets) >= 2
    first, second = batch.sets[:2]
    assert not torch.equal(first.q, second.q)
    assert not torch.equal(first.prefix_slots, first.prefix_slots.sort().values)
    used = torch.zeros(first.k_pool.shape[0], dtype=torch.bool)
    used[first.all_slots.flatten()] = True
    assert first.all_slots.unique().numel() == row.batch * (row.prefix + row.new_tokens)
    assert first.k_pool[~used].isnan().all() and first.v_pool[~used].isnan().all()
    assert not first.k_pool[used].isnan().any()
    assert torch.equal(first.k_pool[first.all_slots[:, row.prefix :]].flatten(0, 1), first.k)
    assert torch.equal(first.prefix_slots.view(row.batch, -1), first.all_slots[:, : row.prefix])
    assert first.o.isnan().all()
    assert batch.expected().isfinite().all()


@pytest.mark.parametrize("page_size", [1, 64])
def test_flash_attention_pages_hold_the_keys(page_size):
    row = ROWS["tiny_verify"]
    batch = make_batch(row, torch.device("cpu"), num_sets=1)
    keys = keys_of(batch, 0, page_size)
    length = row.prefix + row.new_tokens
    for cache, rows in zip((keys.k, keys.v), batch.gathered(0)):
        assert cache.shape[1] == page_size
        paged = cache[keys.page_table.long()].flatten(1, 2)[:, :length]
        assert torch.equal(paged, rows)


def test_a_wrong_result_is_seen():
    reference = torch.randn(40, 2, 8)
    assert not error_of(reference.bfloat16(), reference).wrong
    assert error_of(reference + 0.2 * torch.eye(8)[0], reference).wrong
    late = reference.clone()
    late[-1, -1, -1] = float("nan")
    assert error_of(late, reference).wrong
    with pytest.raises(ValueError, match="shape"):
        error_of(reference[:-1], reference)


def test_each_row_that_is_refused_has_a_reason():
    assert PROVIDERS[OWN].refuses(ROWS["d512_verify"], HOPPER) is None
    assert "head dim" in PROVIDERS["fa3"].refuses(ROWS["d512_prefill"], HOPPER)
    assert "prefix" in PROVIDERS["sdpa-cudnn"].refuses(ROWS["extend_pref"], HOPPER)
    assert "9.x" in PROVIDERS["fa3"].refuses(ROWS["chunk8"], Device("cuda", "NVIDIA L4", (8, 9)))
    for name, provider in PROVIDERS.items():
        assert provider.name == name and provider.what
        if name != OWN:
            assert provider.refuses(ROWS["chunk8"], CPU) == "needs a GPU"


@pytest.mark.parametrize(
    "name, said",
    [("sglang-tuned", "sglang"), ("fa3", "FlashAttention"), ("flashinfer-fa2", "flashinfer"), ("vllm-triton", "vllm"),
     ("fa4", "flash-attn-4")],
)
def test_absent_peers_are_skipped_with_the_reason(name, said, monkeypatch):
    for module in ("sglang", "flash_attn_interface", "flash_attn", "vllm", "flashinfer"):
        monkeypatch.setitem(sys.modules, module, None)  # an import of it fails
    monkeypatch.setattr("extend_attn.bench.providers.flash_attention.find_spec", lambda _: None)
    monkeypatch.delenv("EXTEND_ATTN_BENCH_FA3", raising=False)
    batch = make_batch(ROWS["tiny_verify"], torch.device("cpu"), num_sets=1)
    with pytest.raises(Skip, match=said):
        PROVIDERS[name].prepare(batch)
    assert PROVIDERS[name].versions() == {}


def test_fa3_library_that_is_not_there(monkeypatch, tmp_path):
    monkeypatch.setenv("EXTEND_ATTN_BENCH_FA3", str(tmp_path / "missing.so"))
    with pytest.raises(Skip, match="missing.so"):
        PROVIDERS["fa3"].prepare(make_batch(ROWS["tiny_prefill"], torch.device("cpu"), num_sets=1))


def test_sglang_tile_is_exchanged_and_put_back():
    class Kernel:
        launched: list = []

        def __getitem__(self, grid):
            return lambda *args, **options: self.launched.append((grid, args, options))

    class Module:
        _fwd_kernel = Kernel()

        @staticmethod
        def _get_block_sizes_for_extend_attention(head_dim_qk, head_dim_v):
            return "installed"

    module = Module()
    before = module._fwd_kernel
    with tile_of(module, (256, 0, 256, 32, 64, 4), 2):
        assert module._get_block_sizes_for_extend_attention(256, 256) == (256, 0, 256, 32, 64, 4)
        module._fwd_kernel[(1, 2)]("q", num_stages=1, num_warps=4)
    assert Kernel.launched == [((1, 2), ("q",), {"num_stages": 2, "num_warps": 4})]
    assert module._fwd_kernel is before
    assert module._get_block_sizes_for_extend_attention(256, 256) == "installed"


def test_names_of_providers():
    assert providers_named(None) == DEFAULT and OWN in DEFAULT
    assert providers_named("all") == list(PROVIDERS)
    with pytest.raises(ValueError, match="fa9"):
        providers_named("fa9")


def test_a_hanging_measurement_is_killed_and_the_next_one_runs():
    started = time.monotonic()
    with WorkerProcess("cpu") as worker:
        hello = worker.ask({"op": "hello"})
        assert hello["type"] == "cpu" and "torch" in hello["versions"]
        child = worker._child
        hung = worker.ask({"op": "hang", "seconds": 600}, limit_s=0.5)
        assert hung["timed_out"] and "0.5 s" in hung["failed"]
        assert child.poll() is not None
        assert worker.ask({"op": "hello"})["type"] == "cpu"
        again = worker._child
    assert again.poll() is not None
    assert time.monotonic() - started < 300


def test_a_worker_that_cannot_start_says_why():
    with WorkerProcess("no-such-device") as worker:
        answer = worker.ask({"op": "hello"})
    assert "no-such-device" in answer["failed"]


def test_an_unknown_task_fails_and_the_worker_lives():
    with WorkerProcess("cpu") as worker:
        assert "KeyError" in worker.ask({"op": "nothing"})["failed"]
        assert worker.ask({"op": "hello"})["type"] == "cpu"


def test_tasks_cover_rows_providers_and_plans():
    rows = rows_named("chunk8,chunk16")
    tasks = tasks_of(rows, [OWN, "fa3"], {"chunk8": [None, "sglang"]}, OWN)
    assert [(t["row"]["name"], t["provider"], t["plan"]) for t in tasks] == [
        ("chunk8", OWN, None), ("chunk8", OWN, "sglang"), ("chunk8", "fa3", None),
        ("chunk16", OWN, None), ("chunk16", "fa3", None),
    ]  # fmt: skip


def test_list_and_dry_run_touch_nothing(capsys):
    assert main(["attention", "--list"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in (*ROWS, *PROVIDERS))
    assert main(["attention", "--dry-run", "--rows", "d512_verify", "--sweep", "--plan", '{"split_kv": 4}']) == 0
    planned = capsys.readouterr().out
    assert "split_kv" in planned and "12 tiles" in planned and "head dim 256" in planned


def test_listing_needs_no_torch():
    code = "import sys; from extend_attn.bench import main; main(['--list']); sys.exit('torch' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": os.path.join(ROOT, "python")}
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL, env=environment)


@pytest.mark.parametrize(
    "argv, said",
    [(["--rows", "nothing"], "nothing"), (["--providers", "x"], "extend_attn"), (["--plan", "{x"], "plan"),
     (["--shape", "1,2"], "B,E,P,W"), (["--read", "/nonexistent/x.json"], "x.json")],
)  # fmt: skip
def test_wrong_usage(argv, said, capsys):
    assert main(argv) == 2
    assert said in capsys.readouterr().err


def test_a_run_on_the_cpu(tmp_path, capsys):
    """From the command line to a valid file: a tiny row by the library, a peer that is skipped with its reason."""
    out = tmp_path / "run.json"
    status = main(["attention", "--device", "cpu", "--shape", "1,3,4,2,32,2,1", "--rows", "tiny_verify",
                   "--providers", f"{OWN},sdpa-flash", "--out", str(out)])  # fmt: skip
    assert status == 0
    data = results.load(str(out))
    assert {one["row"] for one in data["results"]} == {"tiny_verify", "shape_1_3_4_2_32_2_1"}
    for one in data["results"]:
        assert one["provider"] == OWN and one["us_graph"] is None and one["us_do_bench"] > 0
        assert one["error"] < 1e-2 and one["floor_us"] > 0
    assert {one["reason"] for one in data["skipped"]} == {"needs a GPU"}
    assert "tiny_verify" in capsys.readouterr().out


def test_host_cost_on_the_cpu(capsys):
    """A line for each plan of the library, none for the peers; what a plan can't be is wrong usage."""
    argv = ["host", "--device", "cpu", "--rows", "tiny_verify", "--providers", f"{OWN},sdpa-flash"]
    assert main([*argv, "--plan", "heuristic", "--plan", '{"pdl": false}']) == 0
    said = capsys.readouterr().out
    lines = [line for line in said.splitlines() if line.startswith("tiny_verify")]
    assert len(lines) == 2 and all(float(line.split()[3]) > 0 for line in lines)
    assert said.count("sdpa-flash: needs a GPU") == 1
    assert main([*argv, "--plan", "{pdl"]) == 2
    assert "plan" in capsys.readouterr().err


def test_a_spent_budget_starts_nothing(tmp_path):
    out = tmp_path / "run.json"
    options = ["--device", "cpu", "--rows", "tiny_verify", "--providers", OWN]
    assert main([*options, "--budget", "0", "--out", str(out)]) == 0
    data = results.load(str(out))
    assert data["results"] == [] and "budget" in data["skipped"][0]["reason"]


def test_short_entry_runs():
    entry = os.path.join(ROOT, "bench", "attention.py")
    shown = subprocess.run([sys.executable, entry, "--list"], check=True, capture_output=True, text=True).stdout
    assert "verify_summ" in shown
