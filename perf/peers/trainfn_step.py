import workloads as w
from gpt import autocast, model

import trainfn as tfn


def train(work, tick):
    def loss(gpt, batch):
        x, y = batch
        with autocast(work):
            return tfn.losses.cross_entropy(gpt(x), y)

    optimizer = tfn.optim.chain(
        tfn.optim.clip_by_global_norm(w.MAX_NORM),
        tfn.optim.adamw(w.LEARNING_RATE, *w.BETAS, w.EPS, weight_decay=w.WEIGHT_DECAY),
    )
    state = tfn.init(model(work), optimizer, storage="adopt")
    step = tfn.jit(tfn.train_step(loss, optimizer), donate=True, compile=work.compile, mode=work.mode)
    for batch in work.torch_batches():
        state, metrics = step(state, batch)
        tick(metrics["loss"].value)
