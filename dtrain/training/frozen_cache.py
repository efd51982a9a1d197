"""The frozen part of a model is computed once per row, kept on disk, and read from then on (freeze.cache).

Rows are computed before the first step, in groups of equal length: there is no padding, and the groups depend on the data
alone. So a run gets the same bits at every world size and after a restart. Each node has its own folder of stores, next to
the tokenized data. A store's name is a hash of the frozen weights, the model's config, the arithmetic and the versions; a row
is found by its tokens. So neither the data, nor their order, nor the tokenizer has to be part of the name.

What cannot be right is refused with its reason. What the disk does not allow ends in one warning, and the frozen part is
computed in each step.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from torch import nn

from dtrain.config.schema import Config
from dtrain.console import log
from dtrain.data import frozen_store
from dtrain.data.cache import describe_os_error
from dtrain.data.frozen_store import FrozenStore, in_groups
from dtrain.data.order import StepPlan
from dtrain.data.seeding import seed_all
from dtrain.distributed.collectives import agree, all_gather_object, every_rank, node_first
from dtrain.distributed.heartbeat import Phase
from dtrain.distributed.serialization import Json
from dtrain.engine.build import engine_traits
from dtrain.engine.protocol import Engine, EngineTraits
from dtrain.errors import ConfigError
from dtrain.models import freezing
from dtrain.models.fast_linear import uses_fast_linear
from dtrain.models.frozen_border import find_border
from dtrain.models.frozen_prefix import Border
from dtrain.models.host_copy import copy_to
from dtrain.models.placement import compute_device
from dtrain.models.token_rows import TokenRows
from dtrain.tasks.protocol import Task
from dtrain.training import frozen_fill
from dtrain.training.frozen_fill import compute_missing, compute_rows, is_same
from dtrain.training.frozen_refusal import FREEZE, SHARDED, Refusal, find_refusal
from dtrain.training.frozen_rows import (
    DistinctRows,
    collated,
    collect,
    most_vectors,
    training_indices,
    trial_indices,
)

GIB = 2**30

NAMES_OF_OUTPUTS = ("id2label", "label2id", "problem_type", "dtrain_head", "_name_or_path", "architectures")
"""Entries of a model's config that do not change its frozen part."""


class FrozenCache:
    """Decides whether the frozen part is read, fills the store, and puts what was read in place of the computation.

    Attributes:
        border: where the frozen part ends; None if it is computed in each step.
        hits: calls that were read.
        misses: calls that were computed, because a row was not in the store.
    """

    def __init__(
        self,
        config: Config,
        task: Task,
        plan: StepPlan,
        *,
        total_steps: int,
        train_mode: Callable[[nn.Module], None],
    ) -> None:
        self._config, self._task, self._plan, self._total_steps = config, task, plan, total_steps
        self._train_mode = train_mode
        self._steps = range(0)
        self._is_in_use = False
        self._why_off: str | None = None
        self._store: FrozenStore | None = None
        self._module: nn.Module | None = None
        self._dtype = torch.float32
        self.border: Border | None = None
        self.hits = self.misses = 0

    def find(self, module: nn.Module, epoch: int) -> None:
        """Finds the end of the frozen part, before an engine wraps the model. Every rank finds the same.

        Args:
            module: the bare model, frozen as this epoch needs it.

        Raises:
            ConfigError: freeze.cache=on, and there is no frozen part that can be read.
        """
        self._module, self.border, self._why_off = module, None, None
        self._steps = self._steps_as_frozen(epoch)
        settings = self._config.freeze
        # Parameters that no gradient reaches are frozen too, which is no reason to explain anything.
        if settings.cache == "off" or (settings.cache == "auto" and not settings.modules):
            return
        once = len(self._steps) <= self._plan.steps_per_epoch
        found = find_refusal(module, self._config, self._task, used_once=once) or self._find(module)
        if isinstance(found, Refusal):
            self._refuse(found)
        else:
            self.border = found

    def _refuse(self, refusal: Refusal) -> None:
        if self._config.freeze.cache == "on" and not self._is_in_use:  # a thaw may end it
            cure = f"{refusal.cure}, or use" if refusal.cure else "Use"
            raise ConfigError(
                "freeze.cache=on: the frozen part cannot be computed once and read from then on, because "
                f"{refusal.reason}. {cure} freeze.cache=auto."
            )
        self._why_off = refusal.reason

    def _steps_as_frozen(self, epoch: int) -> range:
        """Returns the steps from the last thaw to the next one."""
        starts = [stage.epoch for stage in self._config.freeze.thaw]
        begin = max((start for start in starts if start <= epoch), default=0)
        end = min((start for start in starts if start > epoch), default=None)
        per_epoch = self._plan.steps_per_epoch
        stop = self._total_steps if end is None else min(self._total_steps, end * per_epoch)
        return range(min(begin * per_epoch, stop), stop)

    def _find(self, module: nn.Module) -> Border | Refusal:
        batch = collated(self._task, "train", trial_indices(self._task))
        device = compute_device(module)

        def loss() -> torch.Tensor:
            seed_all(self._plan.seed, "frozen", 0)
            with freezing.frozen_statistics(module):  # model.batch_norm=train: a trial is no step
                return self._task.loss(module, {name: tensor.to(device) for name, tensor in batch.items()})

        self._train_mode(module)
        found = find_border(module, loss)
        return Refusal(found, FREEZE) if isinstance(found, str) else found

    def describe(self, traits: EngineTraits) -> str | None:
        """Returns what the plan says; None if there is nothing to say.

        Raises:
            ConfigError: freeze.cache=on, and the engine shards the model.
        """
        self._rule_out_sharding(traits)
        if self.border is not None:
            return f"{self.border.shown}, computed once and then read (freeze.cache={self._config.freeze.cache})"
        return None if self._why_off is None else f"off: {self._why_off}"

    def _rule_out_sharding(self, traits: EngineTraits) -> None:
        if self.border is not None and traits.is_sharded:
            self.border = None
            self._refuse(SHARDED)

    def open(self, engine: Engine) -> None:
        """Collective. Computes what is missing on this node, and reads from then on. Leaves the model in eval mode."""
        self._is_in_use = True
        context = engine.context
        self._rule_out_sharding(engine_traits(self._config, context))
        if agree(self.border is None, context):
            self.border = None
            return
        assert self.border is not None
        self._module = engine.module
        engine.module.eval()
        self.border.attach()
        with context.heartbeat.within(Phase.BUILDING), torch.no_grad(), engine.autocast():
            problem = self._fill(engine, self.border)
        problems = [found for found in all_gather_object(problem, context) if found is not None]
        if problems:
            self.close()
            if context.is_main:
                log.warning("freeze.cache: %s. The frozen part is computed in each step instead", problems[0])
            return
        assert self._store is not None
        self._store.load()
        self.border.read = self._read

    def close(self) -> None:
        """Ends the reading: from now on the model computes everything."""
        if self.border is not None and self._is_in_use:
            self.border.detach()
        self.border = self._store = None

    def find_again(self, module: nn.Module, epoch: int) -> None:
        """Finds the end of what is still frozen after a thaw. Does nothing if `open` was never called."""
        if self._is_in_use:
            self.find(module, epoch)

    def reopen(self, engine: Engine) -> None:
        """Collective. Reads what is still frozen after a thaw. Does nothing if `open` was never called."""
        if self._is_in_use:
            self.open(engine)

    @property
    def replaces_layers(self) -> bool:
        """Whether no layer of the model computes a call that is read."""
        return self.border is not None and self.border.is_above_layers

    def _read(self, rows: TokenRows) -> torch.Tensor | None:
        assert self._store is not None
        assert self.border is not None
        assert self._module is not None
        counts = rows.counts.tolist() if self.border.is_per_token else [1] * len(rows.counts)
        found = self._store.read(rows.keys(), counts)
        if found is None:
            self.misses += 1
            return None
        self.hits += 1
        device = compute_device(self._module)
        return copy_to(torch.from_numpy(found).view(self._dtype), device)

    def _fill(self, engine: Engine, border: Border) -> str | None:
        """Collective. Completes this node's store; returns what prevented it."""
        indices, tick = self._indices(), engine.context.heartbeat.tick
        trial = collect(self._task, {"train": trial_indices(self._task)}, progress=tick)
        if not trial.keys:
            return "no row has a token"
        vector = compute_rows(border, trial, [0], engine.module)
        self._dtype, vector_bytes = vector.dtype, vector.shape[-1] * vector.element_size()
        # Rows of a large table are not read for nothing. Equal rows are kept once, so the bound may be too high.
        bound = most_vectors(self._task, indices, is_per_token=border.is_per_token)
        is_small = bound is None or bound * vector_bytes <= self._limit
        most = None if is_small else int(self._limit) // vector_bytes
        rows = collect(self._task, indices, progress=tick, most=most, is_per_token=border.is_per_token)
        groups = in_groups(rows.lengths, tokens=frozen_fill.GROUP_TOKENS)
        counts = rows.lengths if border.is_per_token else [1] * len(rows.keys)

        def prepare() -> Json:
            if most is not None and rows.vectors(is_per_token=border.is_per_token) > most:
                return {"problem": self._too_large(border, (bound or 0) * vector_bytes)}
            try:
                return self._prepare_store(engine, border, rows, groups, counts, vector_bytes)
            except OSError as error:
                return {"problem": _cannot_use(error)}

        opened = node_first(prepare, engine.context)
        problem: str | None = opened.get("problem")  # of this node
        missing = [] if problem is not None else self._open_store(opened["folder"], vector_bytes, rows, groups, engine)

        def compute() -> Json:
            if problem is not None:
                return problem
            assert self._store is not None
            try:
                compute_missing(
                    self._store, border, rows, missing, counts, engine.module, progress=engine.context.heartbeat.tick
                )
            except OSError as error:
                return _cannot_use(error)
            return None

        # It may take hours, and another rank may have nothing to do: nobody waits in a collective.
        found: str | None = every_rank(compute, engine.context)
        return found

    def _open_store(
        self, folder: str, vector_bytes: int, rows: DistinctRows, groups: Sequence[Sequence[int]], engine: Engine
    ) -> list[Sequence[int]]:
        """Opens this node's store; returns the groups that this rank computes."""
        self._store = FrozenStore(Path(folder), vector_bytes=vector_bytes)
        self._store.load()
        topology = engine.context.topology
        # By position in the list of all groups: another job may publish rows while this one looks.
        return [
            group
            for number, group in enumerate(groups)
            if number % topology.local_world_size == topology.local_rank
            and any(rows.keys[row] not in self._store for row in group)
        ]

    @property
    def _limit(self) -> float:
        return self._config.freeze.cache_gb * GIB

    def _too_large(self, border: Border, needed: int) -> str:
        return (
            f"freeze.cache_gb={self._config.freeze.cache_gb:g} is less than the {needed / GIB:.3g} GiB of this run "
            f"({border.shown}): set freeze.cache_gb={needed / GIB * 1.05 + 0.1:.1f}"
        )

    def _indices(self) -> dict[str, Sequence[int]]:
        evaluated = [split for split in self._task.splits if split != "train"]
        if self._config.train.eval_every == "never":
            evaluated = []
        return {
            "train": training_indices(self._plan, self._steps),
            **{split: range(len(self._task.splits[split])) for split in evaluated},
        }

    def _prepare_store(
        self,
        engine: Engine,
        border: Border,
        rows: DistinctRows,
        groups: Sequence[Sequence[int]],
        counts: Sequence[int],
        vector_bytes: int,
    ) -> dict[str, Json]:
        """Creates or checks this node's store, on one rank of the node. Returns its folder, or what prevents its use."""
        cache_dir = self._config.data.cache_dir
        cache = cache_dir.expanduser() if cache_dir else Path(datasets.config.HF_DATASETS_CACHE) / "dtrain"
        root = cache / "frozen"
        folder = root / self._store_name(engine, border)
        if (needed := sum(counts) * vector_bytes) > self._limit:
            return {"problem": self._too_large(border, needed)}
        if folder.is_symlink():  # what it points to is not dtrain's
            return {"problem": f"{folder} is a symbolic link: remove it (rm {shlex.quote(str(folder))})"}
        folder.mkdir(parents=True, exist_ok=True)
        os.utime(folder)  # it is in use
        for damage in frozen_store.delete_damaged(folder, vector_bytes=vector_bytes):
            log.warning("freeze.cache: %s. It was deleted, and its rows are computed again", damage)
        store = FrozenStore(folder, vector_bytes=vector_bytes)
        store.load()
        if not is_same(store, border, rows, groups, engine.module):
            log.warning(
                "freeze.cache: %s has the results of another model. It was deleted, and is computed again", folder
            )
            shutil.rmtree(folder)
            folder.mkdir()
            store = FrozenStore(folder, vector_bytes=vector_bytes)
        missing = sum(count for key, count in zip(rows.keys, counts, strict=True) if key not in store) * vector_bytes
        used = frozen_store.stored_bytes(folder)
        frozen_store.make_room(root, folder, limit=int(self._limit) - used - missing)
        free = shutil.disk_usage(folder).free
        if missing > free:
            return {
                "problem": f"{folder} needs {missing / GIB:.3g} GiB, and its disk has {free / GIB:.3g} GiB free. Free space "
                "there, or set data.cache_dir to a folder on another disk"
            }
        if missing:
            log.info(
                "freeze.cache: computing %d rows of the frozen part once (%.3g GiB)", len(rows.keys), missing / GIB
            )
        return {"folder": str(folder)}

    def _store_name(self, engine: Engine, border: Border) -> str:
        """Returns a hash of all that the results depend on, besides a row's tokens."""
        model: Any = engine.module.config
        settings = {name: value for name, value in model.to_dict().items() if name not in NAMES_OF_OUTPUTS}
        device = compute_device(engine.module)
        identity = {
            "config": settings,
            "attention": getattr(model, "_attn_implementation", None),
            "class": type(engine.module).__name__,
            "kept": border.shown,
            "precision": [self._config.engine.precision, str(self._dtype), device.type],
            "fast_linear": uses_fast_linear(engine.module),
            "versions": [torch.__version__, transformers.__version__],
        }
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode())
        for name, tensor in border.frozen():
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()[:32]


def _cannot_use(error: OSError) -> str:
    return (
        f"the cache of the frozen part cannot be used: {describe_os_error(error)}. Free space there, make it writable, or set "
        "data.cache_dir to another folder, e.g. data.cache_dir=~/dtrain-cache"
    )
