"""Times one mixture-of-experts layer: forward and backward, gradients for input and all weights.

    GLIBC_TUNABLES=glibc.malloc.hugetlb=1 python benchmarks/moe_layer.py
    python benchmarks/moe_layer.py --tokens 2048 --model-dim 256 --ffn-dim 1024

Candidates take turns, so load from elsewhere hits all of them; compare ratios within a run. The
share of peak counts useful work only (6 x tokens x K x 2MH), against a 2048^3 float32 product
timed in the same turns. Padding to capacity or blocks is not useful work; nor is a dropped choice,
but it is counted, so that all forms are held to the same total.
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp

from glamcli.config.schema import Model, Moe
from glamcli.model.experts import MoeLayer, Routing
from glamcli.model.params import blueprint
from glamcli.model.routing import summary


def candidate(options, num_experts, dtype, dispatch):
    """A compiled function without arguments, and the share of choices it drops."""
    model = Model(
        num_layers=2,
        model_dim=options.model_dim,
        ffn_dim=options.ffn_dim,
        num_heads=1,
        head_dim=8,
        vocab_size=8,
    )
    moe = Moe(
        num_experts=num_experts,
        capacity_factor=options.capacity_factor,
        group_tokens=options.group_tokens,
    )
    plan = blueprint(lambda rngs: MoeLayer(rngs, model, moe))
    params = jax.jit(plan.init)(jax.random.key(0))
    rows = options.tokens // 256
    x_BSM = jax.random.normal(jax.random.key(1), (rows, 256, options.model_dim), dtype)
    mask_BS = jnp.ones((rows, 256), bool)
    dy_BSM = jax.random.normal(jax.random.key(2), x_BSM.shape, dtype)

    def loss(params, x_BSM):
        y_BSM, sums = plan.bind(params)(x_BSM, mask_BS, Routing(dispatch))
        stats = summary(sums)
        total = jnp.sum((y_BSM * dy_BSM).astype(jnp.float32))
        return total + 0.01 * stats["balance_loss"], stats["dropped_frac"]

    step = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    start = time.perf_counter()
    compiled = jax.jit(step).lower(params, x_BSM).compile()
    compile_seconds = time.perf_counter() - start
    dropped_frac = float(compiled(params, x_BSM)[0][1])
    return lambda: compiled(params, x_BSM), dropped_frac, compile_seconds


def seconds(run):
    start = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--model-dim", type=int, default=512)
    parser.add_argument("--ffn-dim", type=int, default=2048)
    parser.add_argument("--capacity-factor", type=float, default=2.0)
    parser.add_argument("--group-tokens", type=int, default=1024)
    parser.add_argument("--experts", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--dispatch", nargs="+", default=["gather", "dropless", "einsum"])
    parser.add_argument("--turns", type=int, default=6)
    options = parser.parse_args()

    square = jnp.ones((2048, 2048))
    multiply = jax.jit(jnp.matmul)
    useful = 6 * options.tokens * 2 * 2 * options.model_dim * options.ffn_dim
    print(f"{options}\nuseful {useful / 1e9:.1f} GFLOP, {jax.devices()[0].device_kind}")
    for num_experts in options.experts:
        runs = {
            (dtype, dispatch): candidate(options, num_experts, dtype, dispatch)
            for dtype in options.dtypes
            for dispatch in options.dispatch
        }
        times = {name: [] for name in [*runs, "peak"]}
        for _ in range(options.turns):
            times["peak"].append(seconds(lambda: multiply(square, square)))
            for name, (run, *_) in runs.items():
                times[name].append(seconds(run))
        peak = 2 * 2048**3 / min(times.pop("peak"))
        print(f"E={num_experts}: float32 product 2048^3 {peak / 1e9:.0f} GFLOP/s")
        for (dtype, dispatch), values in times.items():
            _, dropped_frac, compile_seconds = runs[dtype, dispatch]
            best = min(values)
            print(
                f"  {dtype:9s} {dispatch:9s} best {best:6.3f} s  median "
                f"{statistics.median(values):6.3f} s  {useful / best / 1e9:4.0f} GFLOP/s  "
                f"{useful / best / peak:5.1%} of peak  dropped {dropped_frac:5.1%}  "
                f"compile {compile_seconds:4.1f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
