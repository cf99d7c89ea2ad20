"""Times one training step of the common workload, for several numbers of experts.

    python benchmarks/train_step.py                          # E = 8, 16, 64, 128 in float32
    python benchmarks/train_step.py --experts 8 64 --dtypes float32 bfloat16

The workload: 4 layers (two of experts), M=256, H=1024, 8 heads of 32, top-2, capacity factor 2.0,
V=8192, 8 rows of 256 tokens, Adafactor. Each setting runs in a process of its own, so that peak
memory is its own. Reported: median step time, tokens/s, useful FLOP/s (active parameters and
attention, forward and backward), that as a share of the matrix product peak measured in the same
process and dtype, peak memory, and seconds to compile.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time

ROWS, ROW_TOKENS = 8, 256


def recipe_values(options: argparse.Namespace) -> dict:
    return {
        "model": {
            "num_layers": 4,
            "model_dim": 256,
            "ffn_dim": 1024,
            "num_heads": 8,
            "head_dim": 32,
            "vocab_size": 8192,
            "activation_dtype": options.dtype,
        },
        "moe": {
            "num_experts": options.num_experts,
            "capacity_factor": 2.0,
            "group_tokens": options.group_tokens,
            "dispatch": options.dispatch,
        },
        "batch": {"rows": ROWS, "row_tokens": ROW_TOKENS},
        "train": {"steps": 100, "remat": options.remat},
        "data": {"mixture": "quickstart"},
    }


def useful_flops(recipe) -> float:
    """Multiplications and additions a step needs: 6 per active parameter and token, attention.

    Embedding look-ups are free and the tied softmax is counted once, as 2VM per token.
    """
    m, moe = recipe.model, recipe.moe
    attention = 4 * m.model_dim * m.num_heads * m.head_dim
    dense, expert = 3 * m.model_dim * m.ffn_dim, 2 * m.model_dim * m.ffn_dim
    pairs = m.num_layers // 2
    per_pair = 2 * attention + dense + moe.experts_per_token * expert
    active = pairs * (per_pair + m.model_dim * moe.num_experts) + m.vocab_size * m.model_dim
    tokens = ROWS * ROW_TOKENS
    scores = m.num_layers * 2 * m.num_heads * m.head_dim * ROW_TOKENS * tokens  # causal or not
    return 6 * active * tokens + 6 * scores


def matmul_peak(dtype: str, seconds: float = 2.0) -> float:
    """Best FLOP/s of a 2048^3 product in this process, with float32 sums."""
    import jax
    import jax.numpy as jnp

    size = 2048
    x = jnp.ones((size, size), dtype)
    product = jax.jit(lambda a, b: jnp.matmul(a, b, preferred_element_type=jnp.float32))
    product(x, x).block_until_ready()
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        product(x, x).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def measure(options: argparse.Namespace) -> dict:
    """One setting, in this process."""
    import jax
    import numpy as np

    from glamcli.config.schema import Recipe
    from glamcli.parallel.mesh import make_mesh
    from glamcli.train.programs import make_decoder
    from glamcli.train.state import init_state
    from glamcli.train.step import make_train_step

    recipe = Recipe.model_validate(recipe_values(options))
    decoder = make_decoder(recipe, make_mesh(recipe.mesh))
    state = init_state(decoder, recipe.optimizer, recipe.seed)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, recipe.model.vocab_size, (ROWS, ROW_TOKENS + 1), dtype=np.int32)
    batch = {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "segments": np.ones((ROWS, ROW_TOKENS), np.int32),
        "source": np.zeros(ROWS, np.int32),
    }
    start = time.perf_counter()
    step = jax.jit(make_train_step(decoder, recipe, 1), donate_argnums=0)
    compiled = step.lower(state, batch).compile()
    compile_seconds = time.perf_counter() - start
    seconds = []
    for _ in range(options.steps + 2):
        start = time.perf_counter()
        state, sums = compiled(state, batch)
        jax.block_until_ready((state, sums))
        seconds.append(time.perf_counter() - start)
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    median = statistics.median(seconds[2:])
    flops = useful_flops(recipe)
    return {
        "step_seconds": median,
        "fastest_seconds": min(seconds[2:]),
        "tokens_per_second": ROWS * ROW_TOKENS / median,
        "useful_flops": flops,
        "flops_per_second": flops / median,
        "matmul_peak": matmul_peak(options.dtype),
        "peak_bytes": peak_bytes,
        "compile_seconds": compile_seconds,
        "loss": float(sums["loss_nats"]) / (ROWS * ROW_TOKENS),
    }


def run(options: argparse.Namespace, **setting) -> dict:
    """One setting, in a new process with huge pages."""
    environment = dict(os.environ)
    if options.huge_pages:
        environment["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
    chosen = json.dumps({**vars(options), **setting})
    done = subprocess.run(
        [sys.executable, __file__, "--one", chosen],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--experts", type=int, nargs="+", default=[8, 16, 64, 128])
    parser.add_argument("--dtypes", nargs="+", default=["float32"])
    parser.add_argument("--dispatch", nargs="+", default=["auto"])
    parser.add_argument("--remat", default="none")
    parser.add_argument("--group-tokens", type=int, default=ROWS * ROW_TOKENS)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--no-huge-pages", dest="huge_pages", action="store_false")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(argparse.Namespace(**json.loads(options.one)))))
        return
    print(
        "| E | dtype | dispatch | s/step | tokens/s | useful GFLOP/s | of matmul peak "
        "| peak GB | compile s |\n|--:|---|---|--:|--:|--:|--:|--:|--:|"
    )
    for dtype in options.dtypes:
        for dispatch in options.dispatch:
            for num_experts in options.experts:
                got = run(options, dtype=dtype, dispatch=dispatch, num_experts=num_experts)
                print(
                    f"| {num_experts} | {dtype} | {dispatch} | {got['step_seconds']:.3f} "
                    f"| {got['tokens_per_second']:,.0f} | {got['flops_per_second'] / 1e9:.0f} "
                    f"| {got['flops_per_second'] / got['matmul_peak']:.0%} "
                    f"| {got['peak_bytes'] / 2**30:.2f} | {got['compile_seconds']:.1f} |",
                    flush=True,
                )


main()
