"""Times the Triton twins beside what a user would pick instead, in one run on one GPU: PyTorch as the stages write it ("eager"), the same under
torch.compile, and a library when it can be imported (mamba_ssm's `ops/triton`, fla, torchao, transformers).

Every case first checks the result it is about to time against plain PyTorch. Medians of `triton.testing.do_bench`, with the L2 cache flushed between
calls; forward passes are replayed from a CUDA graph, so that the time is the GPU's and not Python's. A floor is the larger of the bytes that must
move over the copy bandwidth and the operations over the rate of a large bf16 product, both measured at the start of the run.

Run:   python experiments/bench_kernels.py                      # several minutes on one H200; with mamba_ssm its autotuning takes most
       python experiments/bench_kernels.py --only ssd           # the cases whose name holds "ssd"
       python experiments/bench_kernels.py --no-compiled        # without torch.compile
Peers: put mamba_ssm, fla-core or torchao on PYTHONPATH; a peer that is missing leaves its column empty.
"""
from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
BF16, DEV = torch.bfloat16, "cuda"


def stage(name: str):
    """A numbered stage, importable from this folder."""
    if str(ROOT) not in sys.path: sys.path.insert(0, str(ROOT))
    return importlib.import_module(name)


@dataclass
class Case:
    """One line of the table. Contenders are functions without arguments; `check` compares what they return with plain PyTorch."""
    name: str
    target: float | tuple[float, str] | None        # the figure to reach in ms, or (factor, contender) whose time it may take
    ours: Callable
    eager: Callable | None = None
    compiled: Callable | None = None                # called with torch.compile around the stage's PyTorch function
    peers: dict[str, Callable] = field(default_factory=dict)
    bytes: float = 0.0                              # that must move
    flops: float = 0.0                              # that must be done on the tensor cores
    check: Callable[[], float] | None = None        # -> relative error, or 0.0 for bit-equal
    bound: float = 0.0      # of that error: two bf16 results differ by one rounding (0.2 %) for each product on the way; the tests are stricter
    graph: bool = True                              # forward only: replay from a CUDA graph


def relative(ours: Tensor, reference: Tensor) -> float:
    """Root mean square of the error over that of the reference; in pieces, because a gradient of all experts is 10 GB."""
    pairs = zip(ours.detach().flatten().split(2**28), reference.detach().flatten().split(2**28))
    sums = torch.stack([torch.stack(((a.float() - b.float()).square().sum(), b.float().square().sum())).double() for a, b in pairs]).sum(0)
    return (sums[0] / sums[1]).sqrt().item()


def worst(ours, reference) -> float: return max(relative(a, b) for a, b in zip(ours, reference))


def normal(*shape, dtype=BF16, std=1.0, grad=False) -> Tensor:
    return torch.empty(shape, device=DEV, dtype=dtype).normal_(std=std).requires_grad_(grad)


def peer(path: str) -> Callable | None:
    """module:function when it can be imported."""
    module, name = path.split(":")
    try: return getattr(importlib.import_module(module), name)
    except Exception: return None      # a peer may fail in many ways: missing, or not made for this torch


def forward_backward(run: Callable, inputs: list[Tensor], dy: Tensor) -> Callable:
    return lambda: torch.autograd.grad(run(), inputs, dy)


# The cases: one function each, whose tensors are gone when its case is. A group yields its cases one after the other.

def different_bits(a, b) -> float:
    """Share of the codes or scales of two quantised tensors that differ."""
    pairs = ((a.codes, b.codes), (a.block_scale, b.block_scale))
    return max((p.view(torch.uint8) != q.view(torch.uint8)).float().mean().item() for p, q in pairs)


def quantize_cases() -> Iterator[Case]:
    nvfp4, module = stage("01_nvfp4"), "torchao.prototype.mx_formats.nvfp4_tensor"
    x, stochastic = normal(16384, 8192), dict(seed=1, rounding="stochastic")
    torchao, scale = peer(f"{module}:nvfp4_quantize"), peer(f"{module}:per_tensor_amax_to_scale")
    theirs = torch.compile(lambda x: torchao(x, 16, scale(x.abs().amax().float())))
    ours, plain = lambda: nvfp4.quantize(x), lambda: nvfp4.quantize(x, impl="torch")
    out = x.numel() * (0.5 + 1 / 16)
    yield Case("NVFP4 quantise 16384×8192, amax included", 0.19, ours, plain, plain, {"torchao compiled": lambda: theirs(x)} if torchao else {},
               bytes=2 * x.nbytes + out, check=lambda: different_bits(ours(), plain()))
    pair, plain_pair = lambda: nvfp4.quantize_pair(x, **stochastic), lambda: nvfp4.quantize_pair(x, **stochastic, impl="torch")
    yield Case("  + column copy, Hadamard, stochastic", 0.35, pair, plain_pair, bytes=2 * x.nbytes + 2 * out,
               check=lambda: max(different_bits(a, b) for a, b in zip(pair(), plain_pair())), bound=1e-4)


def w4a16_case(rows: int, target: float | None) -> Case:
    nvfp4 = stage("01_nvfp4")
    x, w = normal(rows, 8192), normal(20480, 8192, std=0.02)
    q = nvfp4.quantize(w)
    ours = lambda: nvfp4.matmul_w4a16(x, q)
    return Case(f"W4A16 product, {rows} row{'s' * (rows > 1)}, 8192 → 20480", target, ours, lambda: nvfp4.matmul_w4a16(x, q, impl="torch"), None,
                {"cuBLAS, bf16 weights": lambda: x @ w.T}, bytes=q.nbytes + x.nbytes, flops=2 * rows * w.numel(),
                check=lambda: relative(ours(), x.float() @ q.dequantize().T), bound=3e-3)


def linear_case() -> Case:
    nvfp4 = stage("01_nvfp4")
    x, w, dy, recipe = normal(8192, 8192, grad=True), normal(8192, 8192, std=0.01, grad=True), normal(8192, 8192), nvfp4.NVFP4Recipe()
    ours = forward_backward(lambda: nvfp4.nvfp4_linear(x, w, recipe, seed=1), [x, w], dy)
    def plain():
        with nvfp4.plain_pytorch(): return ours()
    return Case("NVFP4Linear forward + backward 8192³, emulated", (1.6, "bf16 linear"), ours, plain, None,
                {"bf16 linear": forward_backward(lambda: F.linear(x, w), [x, w], dy)}, flops=6 * 8192**3,
                check=lambda: worst(ours(), plain()), bound=3e-3, graph=False)


def gemm_cases() -> Iterator[Case]:
    yield from (w4a16_case(rows, target) for rows, target in ((1, 0.034), (16, 0.040), (64, None)))
    yield linear_case()


def ssd_case(label: str, b: int, t: int, h: int, target: float, grad: bool) -> Case:
    mamba, theirs = stage("02_mamba"), peer("mamba_ssm.ops.triton.ssd_combined:mamba_chunk_scan_combined")
    x, B, C, dy = normal(b, t, h, 64, grad=grad), normal(b, t, 8, 128, grad=grad), normal(b, t, 8, 128, grad=grad), normal(b, t, h, 64)
    dt = F.softplus(normal(b, t, h, dtype=torch.float32) - 3).requires_grad_(grad)
    A, D = (-1 - 15 * torch.rand(h, device=DEV)).requires_grad_(grad), torch.ones(h, device=DEV, requires_grad=grad)
    moved = 2 * x.nbytes + B.nbytes + C.nbytes + dt.nbytes
    wrap = (lambda run: forward_backward(run, [x, dt, A, B, C, D], dy)) if grad else (lambda run: run)
    ours = wrap(lambda: mamba.ssd_chunked(x, dt, A, B, C, D)[0])
    eager = wrap(lambda: mamba.ssd_chunked(x, dt, A, B, C, D, impl="torch")[0])
    peers = {"mamba_ssm": wrap(lambda: theirs(x, dt, A, B, C, 128, D=D))} if theirs else {}
    several = (lambda out: out) if grad else (lambda out: [out])
    return Case(f"SSD forward{' + backward' * grad}, {label}", target, ours, eager, None, peers, bytes=moved * (2.5 if grad else 1),
                check=lambda: worst(several(ours()), several(eager())), bound=1e-2 if grad else 5e-3, graph=not grad)


def ssd_cases() -> Iterator[Case]:
    for label, size, forward, both in (("Ultra layer", (1, 8192, 256), 0.40, 2.2), ("Nano layer, batch 4", (4, 8192, 64), 0.42, 2.5)):
        yield from (ssd_case(label, *size, target, grad) for target, grad in ((forward, False), (both, True)))


def conv_case() -> Case:
    mamba, theirs = stage("02_mamba"), peer("fla.modules.convolution:causal_conv1d")
    x, w, bias = normal(1, 8192, 18432), normal(18432, 1, 4), normal(18432)
    taps = w[:, 0].contiguous()
    ours, plain = lambda: mamba.causal_conv1d(x, w, bias)[0], lambda: mamba.causal_conv1d(x, w, bias, impl="torch")[0]
    return Case("conv + SiLU forward, 8192×18432", 0.175, ours, plain, plain,
                {"fla": lambda: theirs(x, taps, bias, activation="silu")} if theirs else {}, bytes=2 * x.nbytes,
                check=lambda: relative(ours(), plain()), bound=3e-3)


def norm_case() -> Case:
    mamba, x, weight = stage("02_mamba"), normal(8192, 8192), normal(8192)
    ours, plain = lambda: mamba.rmsnorm(x, weight), lambda: mamba.rmsnorm(x, weight, impl="torch")
    return Case("RMSNorm forward, 8192×8192", None, ours, plain, plain, bytes=2 * x.nbytes, check=lambda: relative(ours(), plain()), bound=3e-3)


def gated_case() -> Case:
    mamba = stage("02_mamba")
    y, z, weight, dy = normal(8192, 16384, grad=True), normal(8192, 16384, grad=True), normal(16384, grad=True), normal(8192, 16384)
    both = lambda norm: forward_backward(lambda: norm(y, z, weight), [y, z, weight], dy)
    ours, plain = both(lambda *args: mamba.gated_rmsnorm(*args, 8)), both(lambda *args: mamba.gated_rmsnorm(*args, 8, impl="torch"))
    compiled = torch.compile(lambda *args: mamba.gated_rmsnorm(*args, 8, impl="torch"))
    return Case("gated RMSNorm forward + backward, 8192×16384, 8 groups", None, ours, plain, None, {"torch.compile": both(compiled)},
                bytes=8 * y.nbytes, check=lambda: worst(ours(), plain()), bound=4e-3, graph=False)


def state_case(b: int, form: str, target: float | None) -> Case:
    mamba, theirs = stage("02_mamba"), peer("mamba_ssm.ops.triton.selective_state_update:selective_state_update")
    h, p, g, n = 256, 64, 8, 128
    x, B, C, D, first = normal(b, h, p), normal(b, g, n), normal(b, g, n), torch.ones(h, device=DEV), torch.randn(b, h, p, n, device=DEV)
    dt, A = F.softplus(normal(b, h, dtype=torch.float32) - 3), -1 - 15 * torch.rand(h, device=DEV)
    fresh = lambda: mamba.quantize_state(first, form, seed=0) if form != "fp32" else first.clone()
    state, held = fresh(), first.to(torch.float32 if form == "fp32" else torch.float16)
    step = lambda state, impl="auto": mamba.ssd_step(x, dt, A, B, C, D, state, state_format=form, seed=1, impl=impl)[0]
    by_row = lambda z_h: z_h[..., None].expand(*z_h.shape, p)
    # the peer takes everything at full width, and insists on a bias
    peers, wide = {}, (by_row(dt), A[:, None, None].expand(h, p, n), B, C, by_row(D), None, by_row(torch.zeros_like(D)))
    if theirs and not form.startswith("int8"):
        peers["mamba_ssm" + ", plain cast" * (form != "fp32")] = lambda: theirs(held, x, *wide)
    moved = state.nbytes if isinstance(state, Tensor) else sum(part.nbytes for part in state)
    return Case(f"state update, batch {b}, {form}", target, lambda: step(state), lambda: step(state, "torch"), None, peers, bytes=2 * moved,
                check=lambda: relative(step(fresh()), step(fresh(), "torch")), bound=3e-3)


def state_cases() -> Iterator[Case]:
    for b, form, target in ((64, "fp32", 0.29), (64, "fp16_sr", 0.16), (64, "int8_sr", None), (1, "fp32", None)): yield state_case(b, form, target)


def grouped_cases() -> Iterator[Case]:
    """Even loads, 176 rows an expert. Ours gathers the rows while it loads them and stores relu² of the result; torch's reads sorted rows."""
    experts, moe = importlib.import_module("kernels.experts"), stage("03_latentmoe")
    tokens, k, e, l, f = 4096, 22, 512, 2048, 5120
    x, up = normal(tokens, l), normal(e, f, l, std=0.02)
    routing = experts._Routing((torch.arange(tokens * k, device=DEV) % e).view(tokens, k), e)
    x_ql = x.index_select(0, routing.order_q // k)
    ours = lambda: experts._rows_product("up", x, up, routing, BF16, gather=True)[0]
    grouped = lambda: torch._grouped_mm(x_ql, up.transpose(1, 2), offs=routing.offsets_e)
    yield Case("grouped up-projection, 4096 tokens × 22 of 512 experts", 4.0, ours, None, None, {"torch._grouped_mm": grouped},
               flops=2 * tokens * k * l * f, bytes=up.nbytes + x_ql.nbytes + 2 * tokens * k * f,
               check=lambda: relative(ours(), moe.relu2(grouped().float())), bound=6e-3)


class ServedExperts(torch.nn.Module):
    """Routed experts with weights in 4 bits, as a server holds them."""
    def __init__(self, experts):
        super().__init__()
        self.up, self.down = (stage("01_nvfp4").quantize(w.detach()) for w in (experts.up_proj, experts.down_proj))

    def forward(self, x, weights, chosen, impl="auto"):
        return stage("03_latentmoe").experts_grouped(x, weights, chosen, self.up, self.down, impl=impl)


def transformers_layer(ours):
    """transformers' layer around our weights, grouped_mm experts; None when it cannot be built."""
    try:
        from transformers.models.nemotron_h import modeling_nemotron_h as hf
        from transformers.models.nemotron_h.configuration_nemotron_h import NemotronHConfig
        config = NemotronHConfig(hidden_size=8192, n_routed_experts=512, num_experts_per_tok=22, moe_latent_size=2048, moe_intermediate_size=5120,
                                 moe_shared_expert_intermediate_size=10240, routed_scaling_factor=5.0)
        config._experts_implementation = "grouped_mm"
        with torch.device("meta"): layer = hf.NemotronHMoE(config)
        layer.load_state_dict(dict(ours.state_dict()), assign=True)
        return layer
    except Exception as error:
        print(f"transformers' layer cannot be timed: {type(error).__name__}: {str(error)[:200]}")
        return None


def moe_layer():
    """Ultra's layer in bf16, 11.2 billion parameters."""
    with torch.device("meta"): layer = stage("03_latentmoe").LatentMoE(8192, 512, 22, 5120, 10240, 2048, 5.0).to(BF16)
    layer = layer.to_empty(device=DEV)
    for p in layer.parameters(): p.data.normal_(std=0.02)
    layer.gate.e_score_correction_bias.zero_()
    return layer


def moe_work(tokens: int) -> float:
    """FLOPs of a forward pass: router, latent projections and shared expert, then 22 routed experts a token."""
    return 2 * tokens * (8192 * 512 + 2 * 8192 * 2048 + 2 * 8192 * 10240 + 22 * 2 * 2048 * 5120)


def moe_forward_case(layer, theirs, tokens: int, target: float) -> Case:
    x, weights = normal(1, tokens, 8192), sum(p.nbytes for p in layer.parameters())
    busy = 1 - (1 - 22 / 512) ** tokens
    ours, plain = lambda: layer(x)[0], lambda: layer(x, impl="torch")[0]
    peers = {"transformers grouped_mm": lambda: theirs(x)} if theirs else {}
    return Case(f"LatentMoE layer forward, {tokens} tokens", target, ours, plain, None, peers, bytes=busy * weights, flops=moe_work(tokens),
                check=lambda: relative(ours(), plain()), bound=8e-3)


def moe_served_case(layer, theirs, target: float) -> Case:
    x, experts, served = normal(1, 64, 8192), layer.experts, ServedExperts(layer.experts)
    def ours():
        layer.experts = served
        try: return layer(x)[0]
        finally: layer.experts = experts
    def plain():
        with stage("01_nvfp4").plain_pytorch(): return ours()
    busy, dense = 1 - (1 - 22 / 512) ** 64, 2 * (2 * 8192 * 2048 + 2 * 8192 * 10240)
    return Case("LatentMoE layer forward, 64 tokens, NVFP4 experts", target, ours, plain, None,
                {"transformers grouped_mm, bf16": lambda: theirs(x)} if theirs else {}, bytes=busy * (served.up.nbytes + served.down.nbytes) + dense,
                check=lambda: relative(ours(), plain()), bound=8e-3)


def moe_training_case(layer, theirs, target: float) -> Case:
    x, dy = normal(1, 4096, 8192, grad=True), normal(1, 4096, 8192)
    both = lambda run, model: forward_backward(run, [x, *model.parameters()], dy)
    ours, plain = both(lambda: layer(x)[0], layer), both(lambda: layer(x, impl="torch")[0], layer)
    peers = {"transformers grouped_mm": both(lambda: theirs(x), theirs)} if theirs else {}
    return Case("LatentMoE layer forward + backward, 4096 tokens", target, ours, plain, None, peers,
                bytes=3 * sum(p.nbytes for p in layer.parameters()), flops=3 * moe_work(4096), check=lambda: worst(ours(), plain()), bound=1e-2,
                graph=False)


def moe_cases() -> Iterator[Case]:
    layer = moe_layer().eval().requires_grad_(False)
    theirs = transformers_layer(layer)
    yield moe_forward_case(layer, theirs, 4096, 10.0)
    yield moe_forward_case(layer, theirs, 64, 5.6)
    yield moe_served_case(layer, theirs, 2.2)
    layer.train().requires_grad_(True)
    if theirs: theirs.requires_grad_(True)
    yield moe_training_case(layer, theirs, 32.0)


def loss_case(rows: int, d: int) -> Case:
    model04 = stage("04_model")
    h, w, labels = normal(rows, d, std=d**-0.5, grad=True), normal(131072, d, grad=True), torch.randint(0, 131072, (rows,), device=DEV)
    both = lambda run: forward_backward(run, [h, w], torch.ones((), device=DEV))
    ours, plain = both(lambda: model04.linear_cross_entropy(h, w, labels)), both(lambda: model04.linear_cross_entropy(h, w, labels, impl="torch"))
    return Case(f"linear + cross-entropy, forward + backward, {rows}×{d} → 131072", None, ours, plain, None,
                {"F.cross_entropy": both(lambda: F.cross_entropy((h @ w.T).float(), labels))}, flops=6 * rows * d * 131072,
                check=lambda: worst(ours(), plain()), bound=8e-3, graph=False)


def loss_cases() -> Iterator[Case]:
    yield from (loss_case(8192, d) for d in (1024, 8192))


def conv_norm_cases() -> Iterator[Case]:
    for case in (conv_case, norm_case, gated_case): yield case()


GROUPS = dict(quantise=quantize_cases, gemm=gemm_cases, ssd=ssd_cases, conv=conv_norm_cases, state=state_cases, grouped=grouped_cases, moe=moe_cases,
              loss=loss_cases)


def replayed(run: Callable) -> Callable:
    """A function that replays `run` from a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2): run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph): run()
    return graph.replay


def waits(run: Callable) -> bool:
    """Does a call make the CPU wait for the GPU? Such a function cannot be captured, and a failed capture spoils PyTorch's random numbers."""
    torch.cuda.set_sync_debug_mode("error")
    try: run()
    except RuntimeError: return True
    finally: torch.cuda.set_sync_debug_mode("default")
    return False


def milliseconds(run: Callable, graph: bool) -> tuple[float | None, str]:
    """(median ms, note) of one contender; what cannot be captured is called directly, what fails gives None and the reason."""
    from triton.testing import do_bench
    time_it = lambda f: do_bench(f, warmup=25, rep=150, return_mode="median")
    try:
        run()
        torch.cuda.synchronize()
        if not graph: return time_it(run), ""
        if waits(run): return time_it(run), "waits for the CPU: no graph"
        return time_it(replayed(run)), ""
    except Exception as error: return None, f"{type(error).__name__}: {str(error)[:120]}"


def yardsticks() -> tuple[float, float]:
    """(bytes per ms of a device copy, FLOPs per ms of a bf16 product 8192³)."""
    x = torch.empty(2**31, device=DEV, dtype=BF16)
    y, a, b = torch.empty_like(x), normal(8192, 8192), normal(8192, 8192)
    copy, product = milliseconds(lambda: y.copy_(x), False)[0], milliseconds(lambda: a @ b.T, False)[0]
    return 2 * x.nbytes / copy, 2 * 8192**3 / product


def measure(case: Case, copy_rate: float, product_rate: float, compiled: bool) -> dict:
    """Check, then time every contender of one case."""
    error = None
    try: error = case.check() if case.check else None
    except Exception as problem: return dict(case=case.name, failed=f"{type(problem).__name__}: {str(problem)[:200]}")
    if error is not None and not error <= case.bound: return dict(case=case.name, failed=f"error {error:.2e} is above {case.bound:.0e}")
    torch.cuda.empty_cache()
    contenders = {"ours": case.ours, "eager": case.eager, "compiled": None, **case.peers}
    if compiled and case.compiled is not None: contenders["compiled"] = torch.compile(case.compiled)
    times, notes = {}, {}
    for name, run in contenders.items():
        if run is None: continue
        ms, note = milliseconds(run, case.graph)
        torch.cuda.empty_cache()
        if ms is not None: times[name] = round(ms, 4)
        if note: notes[name] = note
    floor = max(case.bytes / copy_rate, case.flops / product_rate)
    rivals = {name: ms for name, ms in times.items() if name != "ours"}
    best = min(rivals, key=rivals.get) if rivals else None
    target = case.target if not isinstance(case.target, tuple) else round(case.target[0] * times[case.target[1]], 4)
    ratio = round(rivals[best] / times["ours"], 2) if best and "ours" in times else None
    return dict(case=case.name, ours_ms=times.get("ours"), target_ms=target, floor_ms=round(floor, 4), error=error, times=times, notes=notes,
                best=best, ratio=ratio)


@dataclass(frozen=True)
class Config:
    """Times the Triton twins on one GPU."""
    only: str = ""                      # cases or groups whose name holds this, or one of these: "ssd,conv"
    compiled: bool = True               # time torch.compile's version of the PyTorch path too
    out: Path = ROOT / "experiments"    # results.jsonl in this folder gets the rows


def main(config: Config) -> None:
    if not torch.cuda.is_available(): raise SystemExit("bench_kernels: no CUDA device here. The kernels' tests run on a CPU: pytest tests -k kernels")
    import triton
    nvfp4 = stage("01_nvfp4")
    torch.manual_seed(0)
    copy_rate, product_rate = yardsticks()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, Triton {triton.__version__}: "
          f"copy {copy_rate / 1e9:.2f} TB/s, bf16 8192³ {product_rate / 1e9:.0f} TFLOP/s")
    show = lambda ms: f"{ms:9.4f}" if ms is not None else f"{'':9}"
    print(f"{'milliseconds':62} {'ours':>9} {'asked':>9} {'floor':>9} {'eager':>9} {'compiled':>9} {'peer':>9}  best / ours")
    for group, cases in GROUPS.items():
        parts = config.only.split(",")
        matching = any(part in group for part in parts)
        started = time.perf_counter()
        for case in cases():
            if not matching and not any(part in case.name for part in parts): continue
            row = measure(case, copy_rate, product_rate, config.compiled)
            if "failed" in row: print(f"{row['case']:62} FAILED {row['failed']}", flush=True)
            else:
                times, peers = row["times"], [name for name in row["times"] if name not in ("ours", "eager", "compiled")]
                print(f"{row['case']:62} {show(row['ours_ms'])} {show(row['target_ms'])} {show(row['floor_ms'])} {show(times.get('eager'))} "
                      f"{show(times.get('compiled'))} {show(times[peers[0]] if peers else None)}  {row['ratio']}× {row['best']}  "
                      f"(error {row['error']:.1e}) {row['notes'] or ''}", flush=True)
            nvfp4.write_row(config.out, "bench_kernels", **row, copy_tb_s=round(copy_rate / 1e9, 2), product_tflop_s=round(product_rate / 1e9),
                            triton=triton.__version__)
            del case
            torch.cuda.empty_cache()
        if matching: print(f"  [{group}: {time.perf_counter() - started:.0f} s]", flush=True)


if __name__ == "__main__":
    import tyro
    main(tyro.cli(Config, description=__doc__))
