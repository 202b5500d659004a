import torch
import workloads as w
from gpt import autocast, mean_loss, model


def train(work, tick):
    gpt = model(work)
    optimizer = torch.optim.AdamW(
        gpt.parameters(), w.LEARNING_RATE, w.BETAS, w.EPS, weight_decay=w.WEIGHT_DECAY, fused=True
    )

    def loss_of(x, y):
        with autocast(work):
            return mean_loss(gpt(x), y)

    if work.compile:
        loss_of = torch.compile(loss_of, fullgraph=True, mode=work.mode)
    for x, y in work.torch_batches():
        loss = loss_of(x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(gpt.parameters(), w.MAX_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        tick(loss.detach())
