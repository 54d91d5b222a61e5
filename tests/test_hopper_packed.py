"""The packed Hopper family over ugly shapes: every head dim, GQA ratio, row count, type, split, and what repeats."""

from __future__ import annotations

from dataclasses import replace

import bars
import pytest
import torch
from modes import GPU

from extend_attn.plan import DeviceSpec, Plan, Tile, illegal, select
from extend_attn.problem import Problem

FAMILY = "hopper_packed"
H100 = replace(DeviceSpec.preset("h100"), triton="3.6.0")
VERIFY = Problem("bfloat16", 256, 256, 8, 4, 32, 128, 4, 32 * 8000)
RAGGED = [(4, 1000), (1, 0), (0, 77), (3, 63), (2, 64), (4, 65), (0, 0), (1, 2500)]
# (dim, dim_v, heads, V aliases K)
DIMS = [
    (64, 64, (8, 8), False),
    (96, 96, (4, 2), False),
    (128, 128, (8, 2), False),
    (192, 128, (4, 4), False),
    (128, 256, (4, 2), False),
    (256, 256, (8, 4), False),
    (512, 512, (8, 2), False),
    (576, 512, (16, 1), True),
]


def check(plan=None, **spec):
    mode = GPU[FAMILY]
    return mode.check(mode.case(**{"lengths": RAGGED, **spec}), plan={"family": FAMILY, **(plan or {})})


gpu = pytest.mark.gpu


@gpu
@pytest.mark.parametrize("splits", [1, 5])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim, dim_v, heads, alias", DIMS)
def test_head_dims(dim, dim_v, heads, alias, dtype, splits):
    check({"split_kv": splits}, dim=dim, dim_v=dim_v, heads=heads, alias=alias, dtype=dtype)


@gpu
@pytest.mark.parametrize("kv_dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim, dim_v, heads, alias", DIMS)
def test_fp8_pools(dim, dim_v, heads, alias, dtype, kv_dtype):
    check(
        dim=dim, dim_v=dim_v, heads=heads, alias=alias, dtype=dtype, kv_dtype=kv_dtype, k_scale=0.5, v_scale=0.25
    )  # fmt: skip


@gpu
@pytest.mark.parametrize("group", [1, 2, 3, 5, 6, 7, 12, 16])
def test_gqa_ratios(group):
    check(dim=128, heads=(2 * group, 2), lengths=[(1, 300), (2, 65), (3, 0)], window=100, sinks=torch.float32)


@gpu
@pytest.mark.parametrize("new", [1, 2, 5, 8, 16, 17, 33, 64])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_new_tokens(new, dim):
    """Up to four row blocks; causal, a window inside the new tokens, and lengths below the bound."""
    check(dim=dim, heads=(4, 2), lengths=[(new, 200), (max(1, new - 3), 0), (new, 7)], window=20)


@gpu
@pytest.mark.parametrize("tile", [(64, 64, 8, 2), (16, 128, 4, 2), (32, 64, 4, 4), (16, 64, 8, 3)])
def test_tiles(tile):
    check({"tile": tile}, dim=128, heads=(8, 2), mask="tree", tree_positions=True, window=700)


# Rows that one consumer of two has alone, tokens whose heads both have, a window's edge inside a tile of one of them.
SHARED = {
    "plain": dict(dim=128, heads=(32, 2)),
    "window": dict(dim=128, heads=(10, 2), window=150, cut=[3, 0, 5, 1, 0, 2, 0, 9], sinks=torch.float32),
    "tree": dict(dim=64, heads=(24, 2), mask="tree", tree_positions=True, window=700),
    "unified": dict(dim=128, heads=(32, 2), unified=True, mask="random", logit_cap=20.0),
    "scaled": dict(dim=128, heads=(16, 2), k_scale=0.5, v_scale=0.25),
    "fp8": dict(dim=128, heads=(16, 2), kv_dtype=torch.float8_e4m3fn, k_scale=0.5, v_scale=0.25),
    "latent": dict(dim=576, dim_v=512, heads=(16, 1), alias=True),
}


@gpu
@pytest.mark.parametrize("share", [{}, {"split_kv": 5}, {"programs": 17}], ids=["whole", "split", "even"])
@pytest.mark.parametrize("kind", SHARED)
def test_two_consumers_share_the_rows(kind, share):
    check({"tile": {"block_m": 32 if kind == "fp8" else 64, "num_warps": 8}, "split_kv": 1, **share}, **SHARED[kind])


@gpu
@pytest.mark.parametrize("warps", [4, 8])
@pytest.mark.parametrize("sm_scale", [0.0, 3.0, -3.0, 1e-3])
@pytest.mark.parametrize("mask", [None, "tree"])
def test_maxima_that_grow_in_steps_of_every_size(warps, sm_scale, mask):
    """Logits from all alike to hundreds apart: maxima that stand, that move a tile, rows that see nothing at first."""
    check({"tile": {"block_m": 32, "num_warps": warps}}, dim=128, heads=(16, 2), sm_scale=sm_scale, mask=mask)


@gpu
@pytest.mark.parametrize("unified", [False, True])
@pytest.mark.parametrize("mask_prefix", [False, True])
@pytest.mark.parametrize("splits", [1, 4])
def test_masks(unified, mask_prefix, splits):
    check(
        {"split_kv": splits}, dim=256, heads=(8, 4), mask="random", mask_prefix=mask_prefix, unified=unified,
        window=64, cut=[3, 0, 5, 1, 0, 2, 0, 9], logit_cap=20.0, temperature_len=16, sm_scale=-0.1,
    )  # fmt: skip


@gpu
@pytest.mark.parametrize("scales", [(1.0, 3.0), (0.7, 1.0), (0.5, 0.25)])
@pytest.mark.parametrize("unified", [False, True])
def test_scaled_pools_of_the_query_type(scales, unified):
    check(dim=128, heads=(8, 2), k_scale=scales[0], v_scale=scales[1], unified=unified)


@gpu
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("layout", ["plain", "qkv"])
def test_layouts(index_dtype, layout):
    check(
        dim=128, heads=(8, 2), index_dtype=index_dtype, layout=layout, lead=3, pool_layout="strided",
        out_dtype=torch.float32, causal=False,
    )  # fmt: skip


@gpu
@pytest.mark.parametrize("programs", [1, 3, 17, 132, 500])
@pytest.mark.parametrize("kind", ["plain", "fp8", "unified", "rows", "tree"])
def test_even_shares(programs, kind):
    """Every way a run can begin and end: within a list, at a border, over several lists, past the last."""
    spec = {
        "plain": {},
        "fp8": dict(kv_dtype=torch.float8_e4m3fn, k_scale=0.5, v_scale=0.25),
        "unified": dict(unified=True, sinks=torch.float32),
        "rows": dict(lengths=[(20, 500), (0, 0), (40, 10), (1, 129), (33, 64)], heads=(8, 2), causal=False),
        "tree": dict(mask="tree", tree_positions=True, temperature_len=100),
    }[kind]
    check({"programs": programs, "split_kv": 1}, **{"dim": 128, "heads": (8, 2), **spec})


@gpu
@pytest.mark.parametrize("batch", [1, 40, 300])
@pytest.mark.parametrize("spread", [0, 5, 900])
def test_even_shares_of_many_sequences(batch, spread):
    """Equal lists are not cut (spread 0); more sequences than one look takes."""
    lengths = [(1 + b % 2 * (spread > 0), 600 - spread // 2 + b * 37 % (spread + 1)) for b in range(batch)]
    check({"programs": 132, "split_kv": 1}, dim=64, heads=(2, 1), lengths=[(e, max(p, 0)) for e, p in lengths])


# Rows and columns that divide into slices in every way: one row, half a row, several; few parts and many.
MERGED = [
    dict(dim=256, heads=(8, 4), lengths=[(4, 8000), (4, 300), (1, 5000), (0, 0), (2, 0)]),
    dict(dim=64, heads=(2, 1), lengths=[(1, 6000)]),
    dict(dim=128, heads=(32, 2), lengths=[(4, 3000), (3, 4500)], sinks=torch.float32),
    dict(dim=256, heads=(32, 2), lengths=[(4, 3000)], logit_cap=20.0),
    dict(dim=512, heads=(8, 2), lengths=[(4, 3000), (2, 900)]),
    dict(dim=576, dim_v=512, heads=(16, 1), alias=True, lengths=[(4, 3000)]),
]


@gpu
@pytest.mark.parametrize("patience", [None, 0])
@pytest.mark.parametrize("splits", [2, 4, 7, 16, 33])
@pytest.mark.parametrize("spec", MERGED, ids=lambda spec: f"{spec['dim']}-{spec['heads'][0]}")
def test_parts_are_merged(monkeypatch, spec, splits, patience):
    """By all programs together, and by the last one to arrive where nobody waits."""
    if patience is not None:
        from extend_attn.kernels.hopper import launch_packed

        monkeypatch.setattr(launch_packed, "PATIENCE", patience)
    check({"split_kv": splits}, **spec)
    _words_are_ready()


def _words_are_ready():
    """Every word of arrivals is at the begin of an epoch once the launches are over."""
    from extend_attn.kernels import workspace

    torch.cuda.synchronize()
    kept = [words for key, words in workspace._kept.tensors.items() if key[2] == "arrivals"]
    assert kept and all((words % (1 << 16) == 0).all() for words in kept)


def _repeats(case, plan, times):
    mode = GPU[FAMILY]
    first, _, _ = mode.call(case, plan=plan)
    return all(
        torch.equal(first.nan_to_num(), mode.call(case, plan=plan)[0].nan_to_num()) for _ in range(times)
    )  # fmt: skip


@gpu
@pytest.mark.parametrize("share", [{}, {"split_kv": 7}, {"split_kv": 16}, {"programs": 17}])
def test_repeats_are_bit_identical(share):
    plan = {"family": FAMILY, "split_kv": 1, **share}
    assert _repeats(GPU[FAMILY].case(lengths=RAGGED, dim=256, heads=(8, 4)), plan, 150)


@gpu
def test_repeats_on_a_busy_gpu_are_bit_identical():
    """Programs that are kept from starting hand their slices over; no bit shows who merged."""
    case = GPU[FAMILY].case(lengths=[(4, 8000)], dim=256, heads=(8, 4))
    noise = torch.randn(2048, 2048, device="cuda")
    other = torch.cuda.Stream()
    for _ in range(30):
        with torch.cuda.stream(other):
            for _ in range(4):
                noise = (noise @ noise).tanh()
        assert _repeats(case, {"family": FAMILY, "split_kv": 33}, 5)
    _words_are_ready()


@gpu
def test_graphs_of_splits_replay_side_by_side_with_changed_lengths():
    """Each capture has words of its own, and takes none that a replay would have to zero."""
    plan = {"family": FAMILY, "split_kv": 16}
    mode = GPU[FAMILY]
    cases = [mode.case(lengths=[(4, 3000), (2, 5000)], dim=128, heads=(8, 2), seed=seed) for seed in (1, 2)]
    for case in cases:
        mode.check(case, plan=plan)
    expected = [mode.call(case, plan=plan)[0] for case in cases]
    graphs, outs = [], []
    for case in cases:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outs.append(mode.call(case, plan=plan)[0])
        graphs.append(graph)
    streams = [torch.cuda.Stream() for _ in cases]
    for cut in (0, 2900, 0, 2999):
        for case, out in zip(cases, outs):
            out.fill_(float("nan"))
            case.kwargs["kv_indptr"][1:] -= cut  # sequences begin or end earlier
        wanted = [mode.call(case, plan=plan)[0] for case in cases] if cut else expected
        torch.cuda.synchronize()
        for _ in range(20):
            for graph, stream in zip(graphs, streams):
                with torch.cuda.stream(stream):
                    graph.replay()
        torch.cuda.synchronize()
        for case, out, want in zip(cases, outs, wanted):
            used = case.expected.used
            assert torch.equal(out[used], want[used])
            case.kwargs["kv_indptr"][1:] += cut


@gpu
@pytest.mark.parametrize("share", [{}, {"split_kv": 16}, {"programs": 17}, None])
@pytest.mark.parametrize("late", ["kv_indptr", "kv_indices", "k_buffer", "v_buffer", "q_extend", "qo_indptr"])
def test_what_the_kernel_ahead_writes_last_is_seen(late, share):
    """Dependent launches start, and look ahead at what old indices say, while it still runs."""
    from late_writer import write_late

    import extend_attn

    mode = GPU[FAMILY]
    spec = dict(lengths=[(4, 3000), (2, 700), (3, 0), (1, 1500)], dim=128, heads=(8, 2), layout="plain")
    case = mode.case(**spec, window=-1 if share is not None else 1000)  # under a window rows are prefetched
    plan = {"family": FAMILY, "pdl": True, "split_kv": 1, **(share or {})}
    mode.check(case, plan=plan)
    tensor = case.kwargs[late]
    new = tensor.clone()
    old = new.flip(0) if late == "kv_indices" else torch.zeros_like(new)
    for _ in range(5):
        out, buffer = case.out()
        tensor.copy_(old)
        torch.cuda.synchronize()
        write_late(tensor, new)
        extend_attn.extend_attention_fwd(o_extend=out, plan=plan, **case.kwargs)
        torch.cuda.synchronize()
        bars.assert_right(case, out, buffer, None)


# -- without a GPU


@pytest.mark.parametrize(
    "problem, plan, device, reason",
    [
        (VERIFY, {}, "a100", "sm_90"),
        (VERIFY, {}, "b200", "sm_90"),
        (replace(VERIFY, dtype="float32", kv_dtype="", out_dtype=""), {}, "h100", "16-bit"),
        (replace(VERIFY, head_dim_qk=100, head_dim_v=100), {}, "h100", "multiples of 8"),
        (replace(VERIFY, alignment=8), {}, "h100", "aligned to 8 bytes"),
        (VERIFY, {"tile": Tile(8, 32)}, "h100", "block_n: 32"),
        (VERIFY, {"tile": Tile(128, 64)}, "h100", "block_m: 128"),
        (VERIFY, {"tile": Tile(8, 64, 8)}, "h100", "block_m: 8"),
        (VERIFY, {"tile": Tile(64, 64, 4)}, "h100", "registers: "),
        (VERIFY, {"tile": Tile(8, 64, 2)}, "h100", "num_warps: 2"),
        (VERIFY, {"tile": Tile(8, 64, 4, 1)}, "h100", "num_stages: 1"),
        (VERIFY, {"tile": Tile(8, 128, 4, 5)}, "h100", "shared memory: "),
        (VERIFY, {"pack_gqa": True}, "h100", "pack_gqa"),
        (VERIFY, {"tma": True}, "h100", "tma"),
        (VERIFY, {"programs": 132, "split_kv": 2}, "h100", "programs: 132 beside split_kv 2"),
        (replace(VERIFY, sliding_window=100), {"programs": 132}, "h100", "programs: 132; a window"),
    ],
)
def test_what_cannot_run_says_why(problem, plan, device, reason):
    made = Plan(FAMILY, Tile(8, 64, 4, 3)).merged(plan)
    said = illegal(problem, made, replace(DeviceSpec.preset(device), triton="3.6.0"))
    assert said is not None and reason in said
    assert illegal(VERIFY, Plan(FAMILY, Tile(8, 64, 4, 3)), H100) is None


def test_old_tritons_and_the_interpreter_have_no_gluon():
    plan = Plan(FAMILY, Tile(8, 64, 4, 3))
    assert "Triton 3.6" in illegal(VERIFY, plan, replace(H100, triton="3.5.1"))
    assert "interpreter" in illegal(VERIFY, plan, replace(H100, interpreted=True))


@pytest.mark.parametrize("rows", [1, 2, 4, 8, 16, 64])
@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (192, 128), (256, 256), (512, 512), (576, 512)])
@pytest.mark.parametrize("kv_dtype", ["bfloat16", "float8_e4m3fn"])
def test_every_head_dim_has_a_legal_plan(dims, rows, kv_dtype):
    alias = dims == (576, 512)
    problem = replace(
        VERIFY, head_dim_qk=dims[0], head_dim_v=dims[1], num_q_heads=4, max_len_extend=rows, num_tokens=32 * rows,
        v_aliases_k_pool=alias, v_aliases_k_new=alias, kv_dtype=kv_dtype,
    )  # fmt: skip
    assert select(problem, H100, plan={"family": FAMILY}).family == FAMILY
