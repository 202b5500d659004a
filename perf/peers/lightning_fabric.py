import torch
import workloads as w
from gpt import mean_loss, model
from lightning.fabric import Fabric


def train(work, tick):
    fabric = Fabric(accelerator=work.device, devices=1, precision="bf16-mixed" if work.bf16 else "32-true")
    gpt = model(work)
    optimizer = torch.optim.AdamW(
        gpt.parameters(), w.LEARNING_RATE, w.BETAS, w.EPS, weight_decay=w.WEIGHT_DECAY, fused=True
    )
    gpt, optimizer = fabric.setup(torch.compile(gpt) if work.compile else gpt, optimizer)
    for x, y in work.torch_batches():
        loss = mean_loss(gpt(x), y)
        fabric.backward(loss)
        fabric.clip_gradients(gpt, optimizer, max_norm=w.MAX_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        tick(loss.detach())
