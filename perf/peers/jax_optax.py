"""The same GPT in jax.

For bf16: float32 parameters and moments; matrix products, attention and the residual stream between them in bf16;
norms and the loss in float32, as torch.autocast has it. (There is no autocast in jax: the casts are written out.)
"""

import functools
import itertools
import os

import jax
import jax.numpy as jnp
import optax
import workloads as w

jax.config.update("jax_compilation_cache_dir", os.environ["PERF_CACHE"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def norm(p, name, x):
    x = x.astype(jnp.float32)
    centered = x - x.mean(-1, keepdims=True)
    scale = jax.lax.rsqrt((centered**2).mean(-1, keepdims=True) + 1e-5)
    return centered * scale * p[f"{name}.weight"] + p[f"{name}.bias"]


def logits_of(p, tokens, size, dtype, attention):
    def linear(name, x):
        return x.astype(dtype) @ p[f"{name}.weight"].astype(dtype).T

    rows, length = tokens.shape
    x = p["tokens.weight"][tokens] + p["positions.weight"][:length]
    for i in range(size.layers):
        b = f"blocks.{i}"
        qkv = linear(f"{b}.qkv", norm(p, f"{b}.norm1", x))
        q, k, v = jnp.moveaxis(qkv.reshape(rows, length, 3, size.heads, size.width // size.heads), 2, 0)
        attended = jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=attention).reshape(
            rows, length, size.width
        )
        x = x + linear(f"{b}.out", attended)
        hidden = jax.nn.gelu(linear(f"{b}.up", norm(p, f"{b}.norm2", x)), approximate=False)
        x = x + linear(f"{b}.down", hidden)
    return linear("head", norm(p, "norm", x)).astype(jnp.float32)


def train(work, tick):
    dtype = jnp.bfloat16 if work.bf16 else jnp.float32
    attention = "cudnn" if work.device == "cuda" and work.bf16 else None

    def loss_of(params, x, y):
        logits = logits_of(params, x, work.size, dtype, attention)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    optimizer = optax.chain(
        optax.clip_by_global_norm(w.MAX_NORM),
        optax.adamw(w.LEARNING_RATE, *w.BETAS, w.EPS, weight_decay=w.WEIGHT_DECAY),
    )

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, moments, x, y):
        loss, grads = jax.value_and_grad(loss_of)(params, x, y)
        updates, moments = optimizer.update(grads, moments, params)
        return optax.apply_updates(params, updates), moments, loss

    params = {name: jnp.array(weight) for name, weight in work.weights().items()}
    moments = optimizer.init(params)
    batches = [(jnp.array(x), jnp.array(y)) for x, y in work.batches()]
    for x, y in itertools.cycle(batches):
        params, moments, loss = step(params, moments, x, y)
        if work.device == "cpu":
            jax.block_until_ready((params, moments, loss))
        tick(loss)
