"""Thawing: parameters that begin to learn at a later epoch, the same way on every engine."""

from __future__ import annotations

from dtrain.config.schema import Config
from dtrain.engine.build import build_engine
from dtrain.engine.protocol import Engine
from dtrain.engine.state import broadcast_slots, host_slots
from dtrain.models import freezing
from dtrain.training.build import PreparedModel
from dtrain.training.monitors.protocol import RunState


def thaw(engine: Engine, epoch: int, config: Config, prepared: PreparedModel, state: RunState) -> Engine:
    """Collective. Unfreezes the parameters that `freeze.thaw` names for this epoch; returns the engine to continue with.

    Saves the state, changes the freezing, builds a new engine and restores the state. A live engine has fixed its
    gradient buckets: if requires_grad changes under it, DDP silently computes wrong gradients and ZeRO stops.
    """
    if not any(stage.epoch == epoch for stage in config.freeze.thaw):
        return engine
    context = engine.context
    slots = {entry.name: host_slots(entry.slots) for entry in engine.named_state(here=context.is_main)}
    scalars = engine.scalars()
    prepared.frozen_cache.close()  # what is read must not outlive the freezing
    module = engine.release()
    before = freezing.frozen_parameters(module)
    prepared.freeze(module, epoch)
    prepared.frozen_cache.find_again(module, epoch)  # it runs the model, which an engine would take for a step
    after = set(freezing.frozen_parameters(module))
    state.thawed.append([name for name in before if name not in after])
    rebuilt = build_engine(module, config, context, thawed=state.thawed)
    rebuilt.load_named_slots(lambda name, _shape: broadcast_slots(slots.get(name, {}), context))
    rebuilt.load_scalars(scalars)
    prepared.frozen_cache.reopen(rebuilt)
    prepared.train_mode(rebuilt.module)
    return rebuilt
