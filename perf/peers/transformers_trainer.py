"""Steps are counted where the Trainer says one has ended, `on_step_end`: what it does between two steps counts.

Ready-made batches come from `get_train_dataloader`, so no data loading is timed, as for the others.
"""

import tempfile

import torch
import workloads as w
from gpt import mean_loss, model
from transformers import Trainer, TrainerCallback, TrainingArguments


class WithLoss(torch.nn.Module):
    def __init__(self, gpt):
        super().__init__()
        self.gpt = gpt

    def forward(self, input_ids, labels=None):
        return {"loss": mean_loss(self.gpt(input_ids), labels)}


class Batches(torch.utils.data.IterableDataset):
    def __init__(self, work):
        self.work = work

    def __iter__(self):
        for x, y in self.work.torch_batches():
            yield {"input_ids": x, "labels": y}


class Timed(Trainer):
    def get_train_dataloader(self):
        return torch.utils.data.DataLoader(self.train_dataset, batch_size=None)

    def training_step(self, *args, **kwargs):
        self.loss_of_step = super().training_step(*args, **kwargs)
        return self.loss_of_step


class Ticks(TrainerCallback):
    def __init__(self, tick):
        self.tick = tick

    def on_step_end(self, args, state, control, **kwargs):
        self.tick(self.trainer.loss_of_step)


def train(work, tick):
    net = WithLoss(model(work))
    optimizer = torch.optim.AdamW(
        net.parameters(), w.LEARNING_RATE, w.BETAS, w.EPS, weight_decay=w.WEIGHT_DECAY, fused=True
    )
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=10**9,
            max_grad_norm=w.MAX_NORM,
            lr_scheduler_type="constant",
            learning_rate=w.LEARNING_RATE,
            bf16=work.bf16,  # torch.autocast, as in the other torch loops
            torch_compile=work.compile,
            use_cpu=work.device == "cpu",
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        ticks = Ticks(tick)
        trainer = Timed(net, arguments, train_dataset=Batches(work), optimizers=(optimizer, None), callbacks=[ticks])
        ticks.trainer = trainer
        trainer.train()
