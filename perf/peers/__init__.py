"""The competitors. Each file has one function, ``train(work, tick)``.

It trains for ever, the way a user of that library would write it, and calls ``tick(loss)`` when a step is done. All
timing happens in ``tick``, which also pauses the loop while others have the machine.
"""

from __future__ import annotations

from typing import NamedTuple


class Peer(NamedTuple):
    """A competitor: the module of this package that trains, whether compiled, and a line about it.

    Those with a ``mode`` of torch's compiler take part on accelerators alone.
    """

    module: str
    compile: bool
    about: str
    mode: str | None = None


PEERS = {
    "trainfn-compiled": Peer("trainfn_step", True, "tfn.jit(train_step, donate=True): the whole step in one graph"),
    "trainfn-reduced": Peer("trainfn_step", True, "its mode='reduce-overhead': a CUDA graph", "reduce-overhead"),
    "trainfn-eager": Peer("trainfn_step", False, "tfn.jit(train_step, donate=True, compile=False)"),
    "torch-compiled": Peer("torch_loop", True, "hand-written loop: torch.compile'd model and loss, fused AdamW"),
    "torch-reduced": Peer("torch_loop", True, "torch.compile's mode='reduce-overhead'", "reduce-overhead"),
    "torch-eager": Peer("torch_loop", False, "hand-written loop: fused AdamW"),
    "jax": Peer("jax_optax", True, "jax.jit + optax, donated: the whole step in one program"),
    "transformers-compiled": Peer("transformers_trainer", True, "transformers.Trainer(torch_compile=True)"),
    "transformers-eager": Peer("transformers_trainer", False, "transformers.Trainer, given a fused AdamW"),
    "fabric-compiled": Peer("lightning_fabric", True, "Lightning Fabric: torch.compile'd model, fused AdamW"),
    "fabric-eager": Peer("lightning_fabric", False, "Lightning Fabric: fused AdamW"),
}
