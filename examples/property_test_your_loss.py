"""Find the bug in a loss, in one call: `python examples/property_test_your_loss.py` (5 seconds)."""

import torch
import torch.nn.functional as F

import trainfn as tfn
import trainfn.testing as tt

model = torch.nn.Sequential(torch.nn.Embedding(11, 8), torch.nn.Linear(8, 11))


def wrong(model, batch):  # the mean over all tokens of the batch, times its rows: looks right, trains, and is not
    losses = F.cross_entropy(model(batch["input_ids"]).mT, batch["labels"], reduction="none")
    mask = batch["attention_mask"]
    mean = (losses * mask).sum() / mask.sum()
    return tfn.Mean(mean * len(mask), torch.tensor(float(len(mask))))


def right(model, batch):
    losses = F.cross_entropy(model(batch["input_ids"]).mT, batch["labels"], reduction="none")
    return tfn.Mean.of(losses, batch["attention_mask"])


for loss in (wrong, right):
    try:
        tt.check_row_additive(loss, model, tt.token_batches())
        print(f"{loss.__name__}: holds")
    except tt.LawViolation as error:
        print(f"{loss.__name__}: {error}\n")
