"""The competitors. Each file has one function, ``train(work, tick)``.

It trains for ever, the way a user of that library would write it, and calls ``tick(loss)`` when a step is done. All
timing happens in ``tick``, which also pauses the loop while others have the machine.
"""

from __future__ import annotations

from typing import NamedTuple


class Peer(NamedTuple):
    """A competitor: the module of this package that trains, whether compiled, and a line about it."""

    module: str
    compile: bool
    about: str


PEERS = {
    "trainfn-compiled": Peer("trainfn_step", True, "tfn.jit(train_step, donate=True): the whole step in one graph"),
    "trainfn-eager": Peer("trainfn_step", False, "tfn.jit(train_step, donate=True, compile=False)"),
    "torch-compiled": Peer("torch_loop", True, "hand-written loop: torch.compile'd model and loss, fused AdamW"),
    "torch-eager": Peer("torch_loop", False, "hand-written loop: fused AdamW"),
    "transformers-compiled": Peer("transformers_trainer", True, "transformers.Trainer(torch_compile=True)"),
    "transformers-eager": Peer("transformers_trainer", False, "transformers.Trainer, given a fused AdamW"),
    "fabric-compiled": Peer("lightning_fabric", True, "Lightning Fabric: torch.compile'd model, fused AdamW"),
    "fabric-eager": Peer("lightning_fabric", False, "Lightning Fabric: fused AdamW"),
    "jax": Peer("jax_optax", True, "jax.jit + optax, donated: the whole step in one program"),
}
