"""Linear layers with norm, gate and residual against float64; without a GPU the portable kernel, interpreted."""

import importlib
import itertools

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALVES = [torch.float16, torch.bfloat16]


def case(tokens, n, k, *, dtype=torch.bfloat16, bias=False, norm=False, gemma=False, residual=False, gate=None, seed=0):
    """(x, weight, keyword arguments) of a call with `n` outputs a token, outputs of about unit size."""
    generator = torch.Generator(DEVICE).manual_seed(seed)

    def rand(*shape, scale=1.0):
        return (torch.randn(*shape, device=DEVICE, generator=generator) * scale).to(dtype)

    rows = n if gate is None else 2 * n
    options = {"gate": gate}
    if bias:
        options["bias"] = rand(rows)
    if norm:
        options |= {"norm_weight": rand(k), "eps": 1e-5, "gemma": gemma}
    if residual:
        options["residual"] = rand(tokens, n)
    return rand(tokens, k), rand(rows, k, scale=k**-0.5), options


def budget(kit, x, weight, *, bias=None, norm_weight=None, eps=0.0, gemma=False, residual=None, gate=None):
    """(expected, bound), float64: float32 sums of exact products, of a normed x off by its roundings, rounded."""
    u = kit.roundoff[x.dtype]
    x64, w64 = x.double(), weight.double()
    relative = 2.0**-23 * (x.shape[1] + 8)  # of the sum of absolute products
    if norm_weight is not None:
        factor = norm_weight.double() + (1 if gemma else 0)
        x64 = x64 * torch.rsqrt(x64.pow(2).mean(-1, keepdim=True) + eps) * factor
        relative += (1 if gemma else 2) * u * (1 + u) + 2.0**-20
    y, off = x64 @ w64.T, (x64.abs() @ w64.abs().T) * relative
    if bias is not None:
        y = y + bias.double()
    if gate is not None:
        g, up = y.chunk(2, -1)
        g_off, up_off = off.chunk(2, -1)
        functional = torch.nn.functional
        a = (
            functional.silu(g)
            if gate == "silu"
            else functional.gelu(g, approximate="tanh" if "tanh" in gate else "none")
        )
        a_off = 1.2 * g_off + 2.0**-20 * (g.abs() + a.abs())  # no activation here is steeper than 1.13
        y, off = a * up, a_off * up.abs() + a.abs() * up_off + a_off * up_off
    if residual is not None:
        y = y + residual.double()
        off = off + 2.0**-22 * residual.double().abs()
    return y, (off + 2.0**-22 * y.abs()) * (1 + u) + u * y.abs() + kit.tiny[x.dtype] + 1e-300


def check(kit, x, weight, options, out):
    assert not out.isnan().any(), "an element was left unwritten"
    expected, bound = budget(kit, x, weight, **options)
    worst = ((out.double() - expected).abs() / bound).max().item()
    assert worst <= 1.01, f"{worst:.2f} times its error budget"


FEATURES = {
    "plain": {},
    "bias": {"bias": True},
    "norm": {"norm": True},
    "gemma's norm": {"norm": True, "gemma": True},
    "residual": {"residual": True},
    "silu": {"gate": "silu"},
    "gelu": {"gate": "gelu", "bias": True},
    "gelu_tanh, all": {"gate": "gelu_tanh", "bias": True, "norm": True, "residual": True},
}


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_features(kit, features, dtype, impl):
    import hf_paged_kernels as kernels

    x, weight, options = case(3, 48, 96, dtype=dtype, **FEATURES[features])
    out = kit.poisoned(3, 48, dtype=dtype, device=DEVICE)
    assert kernels.linear(x, weight, out=out, impl=impl, **options) is out
    check(kit, x, weight, options, out)


@pytest.mark.parametrize(
    ("tokens", "n", "k"),
    [(1, 64, 128), (1, 1, 1), (2, 33, 70), (8, 100, 257), (17, 64, 64), (70, 40, 200), (5, 130, 520)],
)
@pytest.mark.parametrize("gate", [None, "silu"])
def test_shapes(kit, tokens, n, k, gate):
    """Tails in every dimension, and more tokens than a program takes."""
    import hf_paged_kernels as kernels

    x, weight, options = case(tokens, n, k, gate=gate, seed=tokens + n + k)
    check(kit, x, weight, options, kernels.linear(x, weight, **options))


@pytest.mark.parametrize(("tokens", "n"), [(6, 40), (100, 40), (100, 36)])
def test_in_place_and_strided(kit, tokens, n):
    """Slices of merged projections as x, residual and out; out is the residual; what lies beside it stays."""
    import hf_paged_kernels as kernels

    x, weight, options = case(tokens, n, 64, residual=True)
    wide_x = torch.full((tokens, 200), float("nan"), dtype=x.dtype, device=DEVICE)
    wide_x[:, 72:136] = x
    wide_out = torch.full((tokens, 96), 7.0, dtype=x.dtype, device=DEVICE)
    wide_out[:, 24 : 24 + n] = options["residual"]
    wide_w = torch.full((n, 80), float("nan"), dtype=x.dtype, device=DEVICE)
    wide_w[:, 8:72] = weight
    out = wide_out[:, 24 : 24 + n]
    kernels.linear(wide_x[:, 72:136], wide_w[:, 8:72], residual=out, out=out)
    check(kit, x, weight, options, out)
    assert (wide_out[:, :24] == 7).all()
    assert (wide_out[:, 24 + n :] == 7).all()


def test_norm_leaves_x_alone(kit):
    import hf_paged_kernels as kernels

    x, weight, options = case(4, 32, 64, norm=True)
    before = x.clone()
    kernels.linear(x, weight, **options)
    assert torch.equal(x, before)


def test_no_tokens():
    import hf_paged_kernels as kernels

    x, weight, options = case(0, 32, 64, norm=True)
    assert kernels.linear(x, weight, **options).shape == (0, 32)


@pytest.mark.parametrize("tokens", [9, 100])
def test_nan_stays_in_its_row(kit, tokens):
    """A token's NaN reaches that token alone."""
    import hf_paged_kernels as kernels

    x, weight, options = case(tokens, 64, 128, norm=True, residual=True)
    expected = kernels.linear(x, weight, **options)
    x[4] = float("nan")
    got = kernels.linear(x, weight, **options)
    assert got[4].isnan().all()
    others = [i for i in range(tokens) if i != 4]
    assert torch.equal(got[others], expected[others])


ILLEGAL = {
    "x of float32": ("x", lambda x: x.float(), TypeError),
    "x of three dimensions": ("x", lambda x: x[None], ValueError),
    "weight of another dtype": ("weight", lambda x: x.half(), TypeError),
    "weight of another k": ("weight", lambda x: x[:, 1:], ValueError),
    "weight transposed": ("weight", lambda x: torch.zeros_like(x).T.contiguous().T, ValueError),
    "weight of odd rows": ("weight", lambda x: x[:-1], ValueError),
    "bias of another size": ("bias", lambda x: torch.zeros(3, device=DEVICE), ValueError),
    "norm_weight of another size": ("norm_weight", lambda x: torch.zeros(3, device=DEVICE), ValueError),
    "residual of another size": (
        "residual",
        lambda x: torch.zeros(3, 64, dtype=torch.bfloat16, device=DEVICE),
        ValueError,
    ),
    "out of another dtype": ("out", lambda x: torch.zeros(3, 32, device=DEVICE), TypeError),
    "gate unknown": ("gate", lambda x: "relu", ValueError),
    "eps negative": ("eps", lambda x: -1.0, ValueError),
}


@pytest.mark.parametrize("name", ILLEGAL)
def test_illegal_arguments_are_refused(name):
    import hf_paged_kernels as kernels

    argument, change, error = ILLEGAL[name]
    x, weight, options = case(3, 32, 64, gate="silu")
    arguments = {"x": x, "weight": weight, **options}
    arguments[argument] = change(arguments.get(argument))
    word = "weight|x" if argument == "x" else argument
    with pytest.raises(error, match=word):
        kernels.linear(**arguments)


def test_serves_only_what_was_measured():
    """Nothing off a Hopper GPU, nothing in float32, no odd sizes, not beyond the tokens that were measured."""
    import hf_paged_kernels as kernels

    hopper = DEVICE == "cuda" and torch.cuda.get_device_capability() == (9, 0)
    device = torch.device(DEVICE)
    for tokens in (1, 8, 64):
        assert kernels.linear_serves(tokens, 4096, 4096, torch.bfloat16, device) == hopper
        assert kernels.linear_serves(tokens, 28672, 4096, torch.float16, device, norm=True, gate=True) == hopper
    assert not kernels.linear_serves(8, 4096, 4096, torch.float32, device)
    assert not kernels.linear_serves(8, 4096, 4097, torch.bfloat16, device)
    assert not kernels.linear_serves(8, 64, 64, torch.bfloat16, device)
    assert not kernels.linear_serves(64, 57344, 8192, torch.bfloat16, device, norm=True, gate=True)
    assert not kernels.linear_serves(256, 4096, 4096, torch.bfloat16, device)
    assert not kernels.linear_serves(0, 4096, 4096, torch.bfloat16, device)
    assert not kernels.linear_serves(8, 4096, 4096, torch.bfloat16, torch.device("cpu"))


@pytest.mark.parametrize("gate", [None, "silu"])
@pytest.mark.parametrize("block_t", [8, 16, 32, 64])
def test_launch_parameters_fit(gate, block_t, monkeypatch):
    """Every entry of the table fits a Hopper multiprocessor's shared memory, and its tiles what the kernel takes."""
    from hf_paged_kernels import heuristics

    monkeypatch.setattr(heuristics, "sm_count", lambda device: 132)
    for n, k in ((4096, 4096), (4096, 14336), (14336, 4096), (128256, 4096), (8, 8)):
        c = heuristics.linear_config.__wrapped__(block_t, n, k, gate is not None, torch.device("cpu"))
        assert c.programs <= -(-n // (c.block_n // 2 if gate else c.block_n)) * c.split
        taken = 2 * c.block_k * (c.stages * c.block_n + c.x_stages * c.block_t) + 4 * c.block_n * c.block_t
        assert taken + 16 * (c.stages + c.x_stages) <= 227 * 1024
        assert c.block_k % 64 == 0
        assert c.block_n % 64 == 0
        assert c.block_t == block_t
        assert 1 <= c.programs <= 132
        assert c.split == 1 or gate is None


@pytest.mark.parametrize(
    ("tokens", "n", "k", "dtype", "kernel"),
    [
        (1, 40, 64, torch.bfloat16, "few"),
        (64, 40, 64, torch.float16, "few"),
        (65, 40, 64, torch.bfloat16, "many"),
        (1000, 40, 72, torch.bfloat16, "many"),
        (64, 36, 64, torch.bfloat16, "few"),  # only for many tokens does the copy engine write
        (65, 36, 64, torch.bfloat16, "portable"),
        (64, 40, 60, torch.bfloat16, "portable"),
        (64, 40, 64, torch.float32, "portable"),
        (0, 40, 64, torch.bfloat16, None),
    ],
)
@pytest.mark.parametrize("gate", [None, "silu"])
def test_which_kernel_serves_on_hopper(tokens, n, k, dtype, kernel, gate, monkeypatch):
    """By how many tokens there are, and what the copy engine takes."""
    from hf_paged_kernels import copies, heuristics, hopper_linear, hopper_matmul

    module, launched = importlib.import_module("hf_paged_kernels.linear"), {}
    monkeypatch.setattr(copies, "runs_on", lambda device: True)
    monkeypatch.setattr(heuristics, "sm_count", lambda device: 132)
    monkeypatch.setattr(hopper_linear, "launch", lambda *args: launched.update(few=args))
    monkeypatch.setattr(hopper_matmul, "launch", lambda *args: launched.update(many=args))
    monkeypatch.setattr(module, "_portable", lambda *args: launched.update(portable=args))
    for choose in (heuristics.linear_config, heuristics.matmul_config):
        monkeypatch.setattr(heuristics, choose.__name__, choose.__wrapped__)
    rows = n if gate is None else 2 * n
    x, weight, out = (torch.zeros(*shape, dtype=dtype) for shape in ((tokens, k), (rows, k), (tokens, n)))
    module._launch(x, weight, None, None, 0.0, False, None, gate, True, out)
    assert list(launched) == ([] if kernel is None else [kernel])
    if kernel == "few":
        assert launched["few"][-1].split == 1  # nothing is shared in deterministic mode
        assert launched["few"][-1].block_t >= tokens
    if kernel == "many":
        assert 1 <= launched["many"][-1].programs <= 132


@pytest.mark.parametrize("gated", [False, True])
def test_tiles_of_many_tokens(gated, monkeypatch):
    """Every tile that is chosen fits, all are, and few tokens get smaller ones than many."""
    from hf_paged_kernels import heuristics

    monkeypatch.setattr(heuristics, "sm_count", lambda device: 132)
    chosen = set()
    for n, tokens in itertools.product((8, 576, 4096, 14336, 128256), (65, 128, 200, 256, 512, 1000, 8192)):
        c = heuristics.matmul_config.__wrapped__(tokens, n, gated, torch.device("cpu"))
        leaving = c.block_t * (c.block_n // 2 if gated or c.block_n > 128 else c.block_n)
        assert 2 * (c.stages * 64 * (c.block_t + c.block_n) + leaving) + 16 * c.stages <= 227 * 1024
        assert 1 <= c.programs <= 132
        chosen.add((c.block_t, c.block_n))
    assert len(chosen) == (2 if gated else 4)
    large, small = (heuristics.matmul_config.__wrapped__(t, 4096, gated, torch.device("cpu")) for t in (8192, 100))
    assert (large.block_t, large.block_n) == (128, 256)
    assert small.block_t * small.block_n < 128 * 256


def test_custom_op_and_compile():
    import hf_paged_kernels as kernels

    x, weight, options = case(3, 32, 64, norm=True, residual=True, gate="silu")
    norm = options["norm_weight"], 1e-5, False
    arguments = (x, weight, None, *norm, options["residual"], "silu", False, x.new_empty(3, 32))
    torch.library.opcheck(kernels.linear.op, arguments, test_utils=("test_schema", "test_faketensor"))
    compiled = torch.compile(lambda x, w: kernels.linear(x, w) + 1, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, weight), kernels.linear(x, weight) + 1)
