"""Stepwise EM against batch EM on a million rows: passes over the data, and time, to the same objective.

    python benchmarks/online.py [--only a] [--quick] [--repeats N]

N = 1M rows, D = 8, K = 10 overlapping Gaussian clusters, full covariances, float32. Batch EM runs to convergence at the
default tol; stepwise EM, batches of 5000 rows in random order at the default rate, runs from the same start until it is
within 1e-3 nats a row of batch EM's last objective.

How it is measured. One process, compilation apart. The exact objective of stepwise EM is looked at after every
1/20 of a pass; these looks are not EM's work, and neither their passes nor their time count. What batch EM itself
takes until it is within 1e-3 of its end is printed beside its whole fit.
"""

import time

import jax
import jax.numpy as jnp
import numpy as np
from timing import Row, measure

from jaxem import EM, Mixture, Normal, em_fit, stepwise_em

CLOSE = 1e-3
BATCH = 5000


def data(rows: int) -> jax.Array:
    rng = np.random.default_rng(0)
    centres = rng.normal(scale=2.0, size=(10, 8))
    shapes = rng.normal(scale=0.5, size=(10, 8, 8)) + np.eye(8)
    labels = rng.choice(10, rows, p=rng.dirichlet(np.full(10, 5.0)))
    noise = rng.normal(size=(rows, 8)).astype(np.float32)
    x = np.empty((rows, 8), np.float32)
    for k in range(10):
        x[labels == k] = noise[labels == k] @ shapes[k].astype(np.float32) + centres[k].astype(np.float32)
    return jnp.asarray(x)


def race(quick: bool, repeats: int) -> list[Row]:
    x = data(50_000 if quick else 1_000_000)
    rows = x.shape[0]
    model = Mixture(Normal(), 10)
    start = model.init(jax.random.key(0), x[:20_000])

    seconds = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        batch = jax.block_until_ready(em_fit(model, start, x))
        seconds.append(time.perf_counter() - began)
    per_pass = float(np.median(seconds[1:])) / float(batch.num_passes)
    history = np.asarray(batch.history)[: int(batch.num_steps) + 1] / rows
    itself = 1 + int(np.argmax(history >= history[-1] - CLOSE))
    print(f"batch EM: {float(batch.num_passes):.0f} passes, {np.median(seconds[1:]):.3g} s, ", end="")
    print(f"objective a row {history[-1]:.6f}; within {CLOSE:g} of it after {itself}")

    algorithm = stepwise_em(BATCH)
    stride = rows // BATCH // 20
    init = jax.jit(lambda key: algorithm.init(model, start, x, key=key))
    advance = jax.jit(lambda state: jax.lax.fori_loop(0, stride, lambda _, s: algorithm.step(model, s, x), state))
    exact = jax.jit(lambda params: EM().init(model, params, x).loglik / rows)
    compiled = jax.block_until_ready(advance(init(jax.random.key(1))))
    jax.block_until_ready(exact(compiled.params))
    passes, times = [], []
    for seed in range(1, repeats + 1):
        began = time.perf_counter()
        state = jax.block_until_ready(init(jax.random.key(seed)))
        spent = time.perf_counter() - began
        while float(exact(state.params)) < history[-1] - CLOSE:
            assert state.num_passes < batch.num_passes, "stepwise EM does not come near batch EM"
            began = time.perf_counter()
            state = jax.block_until_ready(advance(state))
            spent += time.perf_counter() - began
        passes.append(float(state.num_passes))
        times.append(spent)
        print(f"stepwise EM, key {seed}: {passes[-1]:.2f} passes, {spent:.3g} s")
    whole, mine = float(batch.num_passes), float(np.median(passes))
    claim = f"stepwise EM, N = {rows:,}, within {CLOSE:g} a row of batch EM"
    return [
        Row(f"{claim}: passes", f"{mine:.2f}", f"batch EM, whole fit, {whole:.0f}", f"{whole / mine:.1f}x", "3x"),
        Row(f"{claim}: passes", f"{mine:.2f}", f"batch EM, as near, {itself}", f"{itself / mine:.1f}x", ""),
        Row(
            f"{claim}: time",
            f"{np.median(times):.3g} s",
            f"batch EM, as near, {itself * per_pass:.3g} s",
            f"{itself * per_pass / np.median(times):.1f}x",
            "",
        ),
    ]


if __name__ == "__main__":
    measure(__doc__.splitlines()[0], {"a": race}, ("jax", "numpy"), repeats=3)
