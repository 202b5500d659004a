"""The table of FSDP 1's sharding strategies, as plans."""

from __future__ import annotations

from typing import NamedTuple

from trainfn._plan import Plan

STRATEGIES = ("FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD", "HYBRID_SHARD", "HYBRID_SHARD_ZERO2")
VALID = f"one of {', '.join(STRATEGIES)}, or its number from 1 on."


class Strategy(NamedTuple):
    """A sharding strategy.

    Attributes:
        plan: The plan that does the same.
        detail: The plan, as a user would write it.
    """

    plan: Plan
    detail: str


def strategy(name: str, nodes: int) -> Strategy | None:
    """Return the strategy of a name, in either case, or of a number from ``"1"`` on; None if it is not valid.

    Args:
        name: As in ``fsdp_sharding_strategy``.
        nodes: The number of machines, for the hybrid strategies.
    """
    names = {str(i + 1): each for i, each in enumerate(STRATEGIES)}
    within = "parameters are sharded within each machine"
    table = {
        "FULL_SHARD": Strategy(Plan.fsdp(), "Plan.fsdp()"),
        "SHARD_GRAD_OP": Strategy(
            Plan.fsdp(reshard=False),
            "Plan.fsdp(reshard=False): parameters are sharded between steps, and full from the forward pass to the"
            " backward's end",
        ),
        "NO_SHARD": Strategy(Plan.replicated(), "Plan.replicated()"),
        "HYBRID_SHARD": Strategy(Plan.fsdp(replicate=nodes), f"Plan.fsdp(replicate={nodes}): {within}"),
        "HYBRID_SHARD_ZERO2": Strategy(
            Plan.fsdp(replicate=nodes, reshard=False), f"Plan.fsdp(replicate={nodes}, reshard=False): {within}"
        ),
    }
    return table.get(names.get(name, name.upper()))


def fsdp_plan(name: str, nodes: int = 1) -> Plan:
    """Return the plan that does what one of FSDP's sharding strategies does.

    Args:
        name: Such as ``"FULL_SHARD"``, in either case, or its number from ``"1"`` on.
        nodes: The number of machines, for the hybrid strategies.

    Raises:
        ValueError: If there is no such strategy.

    >>> fsdp_plan("shard_grad_op").reshard
    False
    """
    found = strategy(name, nodes)
    if found is None:
        raise ValueError(f"fsdp_plan({name!r}): that is not a strategy. Write {VALID}")
    return found.plan
