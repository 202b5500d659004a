"""One script for any number of processes prints the same numbers, up to the order of additions.

Start it in one of three ways::

    python examples/ranks.py                                         # one process
    torchrun --nproc_per_node 2 examples/ranks.py --zero 3           # two processes, each with half of the state
    accelerate launch examples/ranks.py                              # the processes of `accelerate config`

A small transformer learns to sort digits. The plan says how the state is sharded; no other line depends on ranks. With
`--save FOLDER`, each rank writes its part of every checkpoint, and any number of processes can resume from it.
"""

import argparse

import torch
from torch import Tensor, nn

import trainfn as tfn

LENGTH, DIGITS, ROWS = 8, 10, 64


class Sorter(nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.digit, self.place = nn.Embedding(DIGITS, width), nn.Embedding(LENGTH, width)
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(width, 4, 64, 0.1, batch_first=True) for _ in range(2))
        self.head = nn.Linear(width, DIGITS)

    def forward(self, x: Tensor) -> Tensor:  # x[B, T] -> logits[B, T, 10]
        h = self.digit(x) + self.place.weight
        for block in self.blocks:
            h = block(h)
        return self.head(h)


def loss(model: Sorter, batch: dict[str, Tensor]) -> tuple[tfn.Mean, tfn.Metrics]:
    logits = model(batch["x"])
    return tfn.losses.cross_entropy(logits, batch["y"]), {"accuracy": tfn.metrics.accuracy(logits, batch["y"])}


def digits(count: int, seed: int) -> dict[str, Tensor]:
    x = torch.randint(DIGITS, (count, LENGTH), generator=torch.Generator().manual_seed(seed))
    return {"x": x, "y": x.sort(dim=1).values}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--zero", type=int, choices=(0, 1, 2, 3), help="split so much, whatever the launcher says")
    parser.add_argument("--steps", type=int, default=200, help="optimizer updates (default: %(default)s)")
    parser.add_argument("--save", metavar="FOLDER", help="save checkpoints there, and resume from the newest one")
    parser.add_argument("--compile", action="store_true", help="compile the step, communication included")
    args = parser.parse_args()

    launch = tfn.launch.settings()  # the processes find each other; one process alone does nothing
    plan = launch.plan if args.zero is None else tfn.Plan.zero(args.zero)
    torch.manual_seed(0)
    optimizer = tfn.optim.chain(tfn.optim.clip_by_global_norm(1.0), tfn.optim.adamw(3e-3))
    state = tfn.shard(tfn.init(Sorter().to(launch.device), optimizer), plan)
    step = tfn.jit(tfn.train_step(loss, optimizer, plan=plan), donate=True, compile=args.compile)

    data = digits(4096, seed=1)
    batches = tfn.data.loader(data, tfn.data.shuffled(len(data["x"]), ROWS, seed=0))  # `fit` gives each rank its rows
    store = None if args.save is None else tfn.Checkpoints(args.save, every=50, keep=2)
    state = tfn.fit(step, state, batches, until=args.steps, callbacks=[tfn.callbacks.log(50)], checkpoints=store)

    held = sum(p.to_local().nbytes if hasattr(p, "to_local") else p.nbytes for p in tfn.tree.leaves(state.opt_state))
    held_out = tfn.data.loader(digits(500, seed=2), tfn.data.sequential(500, 250), epochs=1)
    metrics = tfn.callbacks.values(tfn.evaluate(tfn.eval_step(loss, plan=plan), state, held_out))
    if launch.rank == 0:
        print(f"{plan.world} process(es), {held:,} bytes of optimizer state on each")
        print(f"held out: loss {metrics['loss']:.4f}, accuracy {metrics['accuracy']:.3f}")


if __name__ == "__main__":
    main()
