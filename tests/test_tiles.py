"""Tiles that a caller may name, at head dims whose blocks differ: shared memory layouts of K and V then do too."""

from __future__ import annotations

import pytest
from modes import modes

# (block_m, block_n, num_warps, num_stages): warpgroup products and not, one buffer and several
TILES = [(64, 64, 4, 1), (64, 64, 4, 3), (64, 128, 4, 2), (128, 64, 8, 3), (64, 32, 4, 2), (32, 64, 4, 2)]
DIMS = [(64, 64), (64, 32), (128, 16), (104, 24), (96, 96), (80, 64), (192, 128)]


@pytest.mark.parametrize("mode", modes("tiled_gqa", "packed", reference=False, interpreted=False), indirect=True)
@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("dims", DIMS, ids=str)
def test_named_tiles(mode, dims, tile):
    case = mode.case(dim=dims[0], dim_v=dims[1], lengths=[(4, 1000), (130, 200)], heads=(4, 2))
    names = ("block_m", "block_n", "num_warps", "num_stages")
    mode.check(case, plan={**mode.plan, "tile": dict(zip(names, tile)), "tma": False})
    if mode.plan["family"] == "tiled":
        aligned = mode.case(dim=dims[0], dim_v=dims[1], lengths=[(300, 50), (130, 200)], heads=(4, 2), layout="plain")
        mode.check(aligned, plan={**mode.plan, "tile": dict(zip(names, tile)), "tma": True})
