"""The tiled Hopper family at the head dims, groups and lengths that its own blocks break at; on a GPU of that kind."""

from __future__ import annotations

import pytest
import torch
from cases import make_case
from modes import GPU

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
    ),
]

# (new tokens, prefix): around 64 and 128, a neighbour's poisoned rows behind every end
UGLY = [
    (1, 129), (63, 64), (64, 63), (65, 0), (127, 1), (128, 128), (129, 500), (300, 65), (0, 70), (513, 1000), (0, 0),
]  # fmt: skip
DIMS = [
    *((dim, dim) for dim in (64, 80, 96, 128, 256, 384, 512)),
    (192, 128), (160, 64), (256, 128), (40, 24),
]  # fmt: skip


def check(gqa: bool, **spec) -> None:
    mode = GPU["hopper_tiled_gqa" if gqa else "hopper_tiled"]
    mode.check(make_case(**{"dtype": torch.bfloat16, "device": "cuda", "lengths": UGLY, "heads": (4, 2), **spec}))


@pytest.mark.parametrize("gqa", [False, True])
@pytest.mark.parametrize("dim, dim_v", DIMS)
def test_head_dims(dim, dim_v, gqa):
    check(gqa, dim=dim, dim_v=dim_v)


@pytest.mark.parametrize("gqa", [False, True])
@pytest.mark.parametrize("dim", [128, 256])
@pytest.mark.parametrize("window", [1, 63, 64, 100, 1000])
def test_windows(dim, window, gqa):
    check(gqa, dim=dim, window=window)


@pytest.mark.parametrize("heads", [(1, 1), (3, 3), (6, 2), (5, 1), (8, 2), (16, 2), (12, 2)])
@pytest.mark.parametrize("gqa", [False, True])
def test_groups(heads, gqa):
    if gqa and heads[0] // heads[1] % 2:
        pytest.skip("an odd group does not pair")
    check(gqa, dim=128, heads=heads)


@pytest.mark.parametrize("gqa", [False, True])
@pytest.mark.parametrize("no_prefix", [False, True])
@pytest.mark.parametrize(
    "spec",
    [
        dict(dtype=torch.float16),
        dict(out_dtype=torch.float32),
        dict(causal=False),
        dict(sinks=torch.float32),
        dict(logit_cap=20.0),
        dict(temperature_len=100),
        dict(temperature_len=100, window=200, cut=[5, 0, 77, 3, 0, 1, 2, 0, 9, 1, 0]),
        dict(sm_scale=-0.1),
        dict(sm_scale=0.0),
        dict(k_scale=0.5, v_scale=2.0),
        dict(layout="plain", pool_layout="strided", index_dtype=torch.int32),
        dict(lead=5, max_len_extend=2000),
    ],
    ids=str,
)
def test_features(spec, no_prefix, gqa):
    lengths = [(e, 0) for e, _ in UGLY] if no_prefix else UGLY
    check(gqa, dim=128, lengths=lengths, **spec)


@pytest.mark.parametrize("gqa", [False, True])
@pytest.mark.parametrize("batch, window", [(1, -1), (127, -1), (300, -1), (300, 50)])
def test_many_sequences(batch, window, gqa):
    """More sequences than the search for work items looks at in one step; empty ones among them."""
    pick = torch.Generator().manual_seed(batch)
    lengths = [tuple(pair) for pair in torch.randint(-20, 300, (batch, 2), generator=pick).clamp(min=0).tolist()]
    check(gqa, dim=64, lengths=lengths, window=window)


def test_fp32_output_of_sliced_values_is_not_rounded():
    check(True, dim=512, out_dtype=torch.float32, heads=(4, 2))


@pytest.mark.parametrize("gqa", [False, True])
@pytest.mark.parametrize("dim", [128, 256, 512])
def test_repeats_are_bit_identical(dim, gqa):
    mode = GPU["hopper_tiled_gqa" if gqa else "hopper_tiled"]
    case = make_case(dtype=torch.bfloat16, device="cuda", lengths=UGLY, heads=(4, 2), dim=dim)
    first = mode.call(case)[0].nan_to_num()
    assert all(torch.equal(first, mode.call(case)[0].nan_to_num()) for _ in range(150))


@pytest.mark.parametrize("tile", [dict(block_n=64), dict(num_stages=1), dict(block_n=64, num_stages=4)], ids=str)
def test_tiles(tile):
    case = make_case(dtype=torch.bfloat16, device="cuda", lengths=UGLY, heads=(4, 2), dim=128)
    GPU["hopper_tiled_gqa"].check(case, plan={"family": "hopper_tiled", "pack_gqa": True, "tile": tile})


@pytest.mark.parametrize("gqa", [False, True])
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("splits", [2, 5])
@pytest.mark.parametrize(
    "spec", [dict(), dict(sinks=torch.float32, k_scale=0.5, v_scale=2.0), dict(causal=False)], ids=str
)
def test_splits(spec, splits, dim, gqa):
    lengths = [(1, 129), (65, 700), (0, 70), (129, 0), (700, 1), (300, 1500)]
    case = make_case(dtype=torch.bfloat16, device="cuda", lengths=lengths, heads=(4, 2), dim=dim, **spec)
    GPU["hopper_tiled"].check(case, plan={"family": "hopper_tiled", "pack_gqa": gqa, "split_kv": splits})


@pytest.mark.parametrize("gqa", [False, True])
@pytest.mark.parametrize("dim", [64, 256])
@pytest.mark.parametrize(
    "spec", [dict(), dict(window=100), dict(k_scale=0.5, v_scale=2.0), dict(causal=False)], ids=str
)
def test_unified(spec, dim, gqa):
    check(gqa, dim=dim, unified=True, **spec)
