"""Bound launches without a GPU: keys as fine as Triton's, each version's launcher, descriptors, hooks, variants."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_compile import FOLDERS, TESTS, compiling_python
from test_host import case, known

from extend_attn import calls
from extend_attn.kernels import bound, launchers, workspace


@pytest.mark.parametrize("folder", ["", *FOLDERS], ids=lambda folder: Path(folder).name or "installed")
def test_no_key_stands_for_two_kernels(folder):
    done = compiling_python(str(TESTS / "specialisations.py"), triton_folder=folder)
    assert done.returncode == 0 and "kernels" in done.stdout, done.stdout + done.stderr


class CudaLauncher:
    """What handle_of looks at, with the launch signature of a version's C launcher in ``expected``."""

    launch_cooperative_grid, launch_pdl = False, True
    global_scratch_size = profile_scratch_size = 0
    arg_annotations, kernel_signature = ["annotations"], b"signature"
    launch = staticmethod(lambda *arguments: None)


def compiled(launcher=CudaLauncher):
    return SimpleNamespace(run=launcher(), function=0xF00, packed_metadata=(4, 1, 0))


# What each version's launcher takes between the function and the kernel's arguments (from its driver.py and driver.c).
HEADS = {
    (3, 2): [(4, 1, 0), None, None, None],
    (3, 3): [False, None, (4, 1, 0), None, None, None],
    (3, 4): [False, True, None, (4, 1, 0), None, None, None],
    (3, 5): [False, True, None, None, (4, 1, 0), None, None, None],
    (3, 6): [False, True, None, None, (4, 1, 0), None, None, None],
    (3, 7): [False, True, (4, 1, 0), None, None, None, None, None, ["annotations"], b"signature"],
    (3, 9): [False, True, (4, 1, 0), None, None, None, None, None, ["annotations"], b"signature"],
}


@pytest.mark.parametrize("version", HEADS, ids=lambda version: "{}.{}".format(*version))
def test_what_a_launcher_takes(version):
    handle = launchers.handle_of(compiled(), version)
    assert list(handle.head) == [0xF00, *HEADS[version]]
    assert handle.one_tuple == (version >= (3, 7)) and handle.with_constants == (version > (3, 2))


def test_the_installed_launcher_has_what_is_read_from_it():
    """Names of the installed Triton's own launcher, so that a renamed attribute is seen here."""
    import inspect

    from triton.backends.nvidia.driver import CudaLauncher as own

    source = inspect.getsource(own)
    for name in launchers._MIDDLE[launchers.TRITON_VERSION]:
        assert name is None or name == launchers._METADATA or f"self.{name} =" in source


class Unlike(CudaLauncher):
    pass


class WithScratch(CudaLauncher):
    global_scratch_size = 128


WithScratch.__name__ = "CudaLauncher"


@pytest.mark.parametrize("launcher", [Unlike, WithScratch])
def test_a_launcher_that_is_not_known_has_no_handle(launcher):
    assert launchers.handle_of(compiled(launcher), (3, 6)) is None


def test_the_launcher_beneath_and_what_takes_descriptors_apart(monkeypatch):
    """As each version wraps them: a function around ``launcher``, and make_tensordesc_arg of two arguments or three."""
    from triton.backends.nvidia import driver

    def wrapped(launcher):
        return lambda *arguments: launcher(*arguments)

    class Described(CudaLauncher):
        launch = staticmethod(wrapped(print))

    Described.__name__ = "CudaLauncher"
    kernel = compiled(Described)
    kernel.metadata = SimpleNamespace(tensordesc_meta=["first", "second"])
    monkeypatch.setattr(driver, "make_tensordesc_arg", lambda arg, metadata: [arg, metadata])
    handle = launchers.handle_of(kernel, (3, 6))
    assert handle.launch is print and handle.apart(1, "k") == ["k", "second"]
    kernel.metadata = SimpleNamespace()
    monkeypatch.setattr(driver, "make_tensordesc_arg", lambda arg, metadata, launch: [arg, metadata])
    assert launchers.handle_of(kernel, (3, 9)).apart(1, "k") == ["k", None]
    assert launchers.handle_of(compiled(), (3, 6)).apart is None


def test_the_installed_launcher_is_wrapped_so():
    import inspect

    from triton.backends.nvidia import driver

    assert "launcher" in inspect.signature(driver.wrap_handle_tensordesc).parameters
    assert 2 <= driver.make_tensordesc_arg.__code__.co_argcount <= 3


def test_a_version_that_is_not_known_has_no_handle():
    assert launchers.handle_of(compiled(), (3, 10)) is None
    broken = SimpleNamespace(run=CudaLauncher(), packed_metadata=())  # without a function
    assert launchers.handle_of(broken, (3, 6)) is None


@pytest.mark.parametrize("which", ["launch_enter_hook", "launch_exit_hook"])
def test_hooks_are_seen(monkeypatch, which):
    hooks = SimpleNamespace(launch_enter_hook=None, launch_exit_hook=None)
    monkeypatch.setattr(launchers, "_HOOKS", hooks)
    assert not launchers.hooked()
    setattr(hooks, which, print)  # a function, up to 3.4
    assert launchers.hooked()
    setattr(hooks, which, SimpleNamespace(calls=[]))  # a chain, from 3.5 on
    assert not launchers.hooked()
    getattr(hooks, which).calls.append(print)
    assert launchers.hooked()


def test_hooks_of_the_installed_triton_are_where_they_are_looked_for():
    assert not launchers.hooked()
    assert hasattr(launchers._HOOKS, "launch_enter_hook") and hasattr(launchers._HOOKS, "launch_exit_hook")


def test_a_launch_with_hooks_is_not_ready(monkeypatch):
    one = bound.Bound(torch.device("cuda", 0), [], (), [], [[], []])
    assert one.ready()
    assert not bound.Bound(torch.device("cuda", 0), [], (), [], [[], [print]]).ready()
    monkeypatch.setattr(bound, "hooked", lambda: True)
    assert not one.ready()


@dataclasses.dataclass
class Descriptor:
    base: torch.Tensor
    shape: list
    block_shape: list


def test_descriptors_of_other_calls():
    """With other rows where the first dim is the rows, as they are where no dim is."""
    one, _ = known(case())
    calls.forget()
    rows, heads, dim = one.k_new.shape
    taken = []

    def apart(descriptor):
        taken.append(descriptor)
        return [descriptor, 7]

    own = [torch.zeros(8), torch.zeros(rows * heads * dim, dtype=torch.bfloat16)]

    def described(base, shape, block=()):
        return bound._Descriptor(Descriptor(base, shape, list(block)), one, own, apart)

    of_rows = described(one.k_new, [rows, heads, dim], [16, 1, dim])
    addresses = [0] * (bound._NONE + 3)
    addresses[1], addresses[bound._ROWS["k_new"]] = 4096, rows + 9
    made, seven = of_rows.pieces(tuple(addresses))
    assert of_rows.rows and made.shape == [rows + 9, heads, dim] and made.base.data_ptr() == 4096 and seven == 7
    of_workspace = described(own[1].view(rows, heads, dim), [1 << 30, 0x7FFF0000, heads, dim])
    addresses[bound._NONE + 2] = 12288
    assert of_workspace.rows is None and of_workspace.pieces(tuple(addresses))[0].base.data_ptr() == 12288
    with pytest.raises(bound.Unbindable, match="no workspace"):
        described(torch.zeros(4, heads, dim), [1 << 30, 0x7FFF0000, heads, dim])
    ragged = described(one.k_new, [1 << 30, 0x7FFF0000, heads, dim], [1, 16, 1, dim])
    assert ragged.rows is None and ragged.pieces(tuple(addresses))[0].shape == [1 << 30, 0x7FFF0000, heads, dim]
    del taken[:]
    for address, kept in ((4096, 0), (8192, 1), (4096, 1), (8192, 1)):  # encoded once an address
        addresses[1] = address
        assert of_rows.pieces(tuple(addresses))[0].base.data_ptr() == address and len(taken) == kept
    addresses[bound._ROWS["k_new"]] += 1  # and number of rows
    assert of_rows.pieces(tuple(addresses))[0].shape[0] == rows + 10 and len(taken) == 2
    for shape in ([1 << 30, rows, heads, dim], [rows * heads, dim]):
        with pytest.raises(bound.Unbindable, match="rows"):
            described(one.k_new, shape)
    with pytest.raises(bound.Unbindable):
        described(one.o, [rows, heads, dim])


def test_alignment_that_no_signature_holds_is_not_bound():
    parameter = SimpleNamespace(name="kv_indices", do_not_specialize=False, do_not_specialize_on_alignment=False)
    with pytest.raises(bound.Unbindable, match="alignment"):
        bound._fact(parameter, torch.zeros(4))


def test_each_tensors_alignment_is_a_fact():
    """The query or the pool off by 8 bytes: the same bits together, another kernel each."""
    one = case(layout="plain", dim=32)
    calls.forget()

    def moved(name):
        rows = one.kwargs[name]
        flat = torch.empty(rows.numel() + 2, dtype=rows.dtype)[2:].view(rows.shape)
        return {name: flat.copy_(rows)}

    problems = [known(one, **moved(name))[1] for name in ("q_extend", "k_extend", "k_buffer")]
    assert len({id(prepared) for prepared in problems}) == 3
    assert {prepared.problem.alignment for prepared in problems} == {8}
    calls.forget()


def test_a_workspace_is_kept_for_its_stream_and_grows(monkeypatch):
    made = []

    def make(self, device):
        made.append(self)
        return torch.empty(self.elements, dtype=self.dtype)

    stream, capturing = [1], [False]
    monkeypatch.setattr(workspace.Workspace, "make", make)
    monkeypatch.setattr(workspace, "_kept", workspace._Kept())
    monkeypatch.setattr(workspace, "_current_stream", lambda device: stream[0])
    monkeypatch.setattr(workspace, "_is_capturing", lambda: capturing[0])
    device = torch.device("cuda", 0)
    small, large = workspace.Workspace("partial", 8), workspace.Workspace("partial", 64)
    (first,) = workspace.workspaces([small], device)
    assert workspace.workspaces([small], device)[0] is first and len(made) == 1
    (grown,) = workspace.workspaces([large], device)
    assert grown is not first and workspace.workspaces([small], device)[0] is grown
    stream[0] = 2
    assert workspace.workspaces([small], device)[0] is not grown
    capturing[0] = True  # each graph its own
    assert workspace.workspaces([small], device)[0] is not workspace.workspaces([small], device)[0]


def test_addresses_are_asked_for_once(monkeypatch):
    """Until a workspace is replaced; each stream, and each call under capture, has its own."""
    made, stream, capturing, device = [], [1], [False], torch.device("cuda", 0)

    def make(self, device):
        made.append(torch.zeros(self.elements))
        return made[-1]

    monkeypatch.setattr(workspace.Workspace, "make", make)
    monkeypatch.setattr(workspace, "_kept", workspace._Kept())
    monkeypatch.setattr(workspace, "_reserves", {})
    monkeypatch.setattr(workspace, "_current_stream", lambda device: stream[0])
    monkeypatch.setattr(workspace, "_is_capturing", lambda: capturing[0])
    small, large, token = (workspace.Workspace("partial", 8),), (workspace.Workspace("partial", 64),), object()
    first = workspace.addresses_of(small, device, 1, token)
    assert workspace.addresses_of(small, device, 1, token) == first == (made[0].data_ptr(),) and len(made) == 1
    grown = workspace.addresses_of(large, device, 1, object())
    assert workspace.addresses_of(small, device, 1, token) == grown != first
    stream[0] = 2
    assert workspace.addresses_of(small, device, 2, token) != grown
    capturing[0] = True
    before = len(made)
    workspace.addresses_of(small, device, 2, token)
    assert len(made) == before + 1
    capturing[0] = False
    monkeypatch.setattr(workspace, "MAX_ADDRESSES", 3)
    for _ in range(10):  # launches come and go; what is kept of them does not grow without bound
        assert workspace.addresses_of(small, device, 2, object()) == workspace.addresses_of(small, device, 2, token)
        assert len(workspace._kept.addresses) <= 3


def test_zeros_of_captured_calls_come_from_a_reserve(monkeypatch):
    """Each has its own, of memory that was zeroed by an eager call; a graph zeroes its own where none is left."""
    capturing, device = [False], torch.device("cuda", 0)
    made = []
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda n, dtype, device: made.append(zeros(n, dtype=dtype)) or made[-1])
    monkeypatch.setattr(workspace, "RESERVE", 128)
    monkeypatch.setattr(workspace, "_kept", workspace._Kept())
    monkeypatch.setattr(workspace, "_reserves", {})
    monkeypatch.setattr(workspace, "_current_stream", lambda device: 1)
    monkeypatch.setattr(workspace, "_is_capturing", lambda: capturing[0])
    words = workspace.Workspace("arrivals", 40, torch.int32, zeroed=True)
    workspace.workspaces([words], device)
    assert [t.numel() for t in made] == [40, 128]
    capturing[0] = True
    first, second = (workspace.workspaces([words], device)[0] for _ in range(2))
    assert len(made) == 2 and second.data_ptr() - first.data_ptr() == 4 * 64 and first.numel() == 40
    workspace.workspaces([words], device)
    assert made[-1].numel() == 40 and len(made) == 3


# -- how many kernels a model compiles

MODELS = {
    "one window": dict(head_dim=256, num_q_heads=8, num_kv_heads=4),
    "full and sliding layers": dict(head_dim=256, num_q_heads=8, num_kv_heads=4, sliding_window=(-1, 1023)),
    "d128": dict(head_dim=128, num_q_heads=32, num_kv_heads=8),
    "d512": dict(head_dim=512, num_q_heads=8, num_kv_heads=2),
    "d128, one KV head": dict(head_dim=128, num_q_heads=8, num_kv_heads=1),
    "d128, groups of 7": dict(head_dim=128, num_q_heads=28, num_kv_heads=4),
    "d64, sinks, full and sliding layers": dict(
        head_dim=64, num_q_heads=64, num_kv_heads=8, sinks=True, sliding_window=(-1, 127)
    ),
    "d64, groups of 1": dict(head_dim=64, num_q_heads=16, num_kv_heads=16),
    "16 draft tokens": dict(head_dim=128, num_q_heads=32, num_kv_heads=8, max_len_extend=(1, 16, 8192)),
    "d256 fp8": dict(head_dim=256, num_q_heads=8, num_kv_heads=4, kv_dtype="float8_e4m3fn"),
    "fp8": dict(head_dim=128, num_q_heads=32, num_kv_heads=8, kv_dtype="float8_e4m3fn"),
    "latent": dict(
        head_dim=576, head_dim_v=512, num_q_heads=16, num_kv_heads=1, v_aliases_k_pool=True, v_aliases_k_new=True
    ),
}


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_a_model_compiles_few_kernels(arch):
    """Decode, verification and prefill, with and without prefix, batches from 1 to 256: at most 12 kernels, and up to
    16 of the plain families where layers of two kinds meet groups of 8. Batches between powers of two need no others.
    """
    code = f"""
from extend_attn import DeviceSpec, Problem
from extend_attn.warming import variants_of
device = DeviceSpec.preset({arch!r})
for name, model in {MODELS!r}.items():
    found = set().union(*(variants_of(problem, device) for problem in Problem.for_model(**model)))
    between = Problem.for_model(**model, batch_sizes=(3, 5, 6, 7, 10, 12, 14, 20, 24, 28, 40, 48, 56, 80, 112, 224))
    assert all(variants_of(problem, device) <= found for problem in between), name
    print(len(found), name)
"""
    done = compiling_python("-c", code)
    assert done.returncode == 0, done.stderr
    counts = {line.split(maxsplit=1)[1]: int(line.split()[0]) for line in done.stdout.splitlines()}
    assert counts.keys() == MODELS.keys()
    most = 12 if arch == "sm_90" else 16
    assert all(4 <= count <= most for count in counts.values()), counts
    assert sum(count <= 12 for count in counts.values()) >= len(counts) - 1, counts
