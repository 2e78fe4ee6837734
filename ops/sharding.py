"""Sharding rules: how the operators treat DTensors, registered with ``torch.distributed.tensor`` by `register_rules`.

Ranks attend to their own batch entries and heads, so that nothing is sent, and the result is placed as the query is. A
rule that left the choice to DTensor would send whole sequences without a word, and return another placement.

All that is used of torch's private parts is here: ``register_sharding``, which is public, offers rules for one mesh
dimension, of which the cheapest is taken, and cannot say that heads are split evenly over two.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._dtensor_spec import DTensorSpec
from torch.distributed.tensor._op_schema import OpSchema, OpSpec, OpStrategy, RuntimeSchemaInfo

from .placements import placements_of_inputs


def register_rules() -> None:
    """Register the rules of all operators that are opaque to DTensors; the others are compositions of these."""
    for name in ("attention_dynamic", "dense", "sparse"):
        register_rule(getattr(torch.ops.s2o, name).default)


def register_rule(operator: torch._ops.OpOverload) -> None:
    """Register the rule of an operator whose tensors have the names of those of ``s2o::attention``."""
    arguments = operator._schema.arguments
    # What is no tensor may decide the shapes of the results, so all of it belongs to what results are cached by.
    after_tensors = min(place for place, argument in enumerate(arguments) if argument.name == "value") + 1
    keywords = [argument.name for argument in arguments if argument.kwarg_only]
    DTensor._op_dispatcher.sharding_propagator.register_op_strategy(
        operator, _strategy, RuntimeSchemaInfo(after_tensors, keywords or None)
    )


def replicates_plain_tensors() -> bool:
    """Whether ``implicit_replication`` is on, in which plain tensors count as whole DTensors."""
    return bool(DTensor._op_dispatcher._allow_implicit_replication)


def _strategy(schema: OpSchema) -> OpStrategy:
    """The one way in which an operator runs on tensors of these placements.

    Raises:
        ValueError: There is none.
    """
    arguments = schema.op._schema.arguments
    given: dict[str, Any] = {
        argument.name: value.strategies[0].output_spec
        for argument, value in zip(arguments, schema.args_schema, strict=False)
        if isinstance(value, OpStrategy)
    }
    wanted, query = placements_of_inputs(given), given["query"]
    inputs = [DTensorSpec(query.mesh, wanted[name], spec.tensor_meta) for name, spec in given.items()]
    outputs = tuple(DTensorSpec(query.mesh, query.placements) for _ in schema.op._schema.returns)
    only = OpSpec(outputs if len(outputs) > 1 else outputs[0], inputs, [[0.0]] * len(inputs))
    return OpStrategy([only])
