"""Several documents in one row of a batch, none of which sees another: masks, positions, and whether a model obeys them."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
from torch import nn

from dtrain.errors import ConfigError

NOT_KEPT_APART = (
    "task.packing=documents needs a model that attends by a mask for each row (batch, 1, length, length) and takes "
    "position_ids, but {model} {fault}. Use task.packing=stream{cure}."
)


def own_document_only(document_ids: torch.Tensor, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """What the model is given besides the tokens, so that each sees the tokens of its own document up to itself.

    Args:
        document_ids: (batch, length) int64, the same number throughout a document; 0 for padding, which is at the end.
        dtype: of the model's weights, in which attention adds the mask.

    Returns:
        attention_mask: (batch, 1, length, length), 0 where it may look and the smallest number elsewhere.
        position_ids: (batch, length) int64, from 0 in each document.
    """
    length = document_ids.shape[1]
    seen = (document_ids[:, :, None] == document_ids[:, None, :]).tril()
    mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)
    places = torch.arange(length, device=document_ids.device).expand_as(document_ids)
    is_first = torch.ones_like(document_ids, dtype=torch.bool)
    is_first[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    starts = torch.where(is_first, places, 0).cummax(dim=1).values
    return {"attention_mask": mask[:, None], "position_ids": places - starts}


@torch.no_grad()
def check_keeps_apart(model: nn.Module, *, max_length: int) -> None:
    """Shows the model two documents in a row, twice, with another first one: the second must not notice.

    Models differ in what they make of such a mask: some refuse it, some (recurrent and hybrid ones) do without a word as
    they like. So it is asked, not looked up. Leaves modes and random state alone.

    Args:
        max_length: tokens in a row.

    Raises:
        ConfigError: it refuses, or what it says of the second document depends on the first or on its place; or it looks
            back through a window, of which such a mask would know nothing.
    """
    model = getattr(model, "module", model)  # where no probe asked before, it comes in DDP's wrapper
    window = getattr(getattr(model, "config", None), "sliding_window", None)
    if isinstance(window, int) and window < max_length:
        raise _refusal(model, f"looks back {window} tokens only, fewer than data.max_length={max_length}")
    weights = next(model.parameters())
    tokens = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]], device=weights.device)
    given = own_document_only(torch.tensor([[1, 1, 2, 2]] * 2, device=weights.device), weights.dtype)
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.autocast(weights.device.type, enabled=False):
            logits = model(input_ids=tokens, use_cache=False, **given).logits
    except (TypeError, ValueError, RuntimeError, IndexError, NotImplementedError) as error:
        raise _refusal(model, f"refuses that: {' '.join(str(error).split())[:200]}") from error
    finally:
        for module, mode in modes.items():
            module.training = mode
    # The second document of both rows and, of the other row, the first: the same two tokens.
    same = [logits[0, 2:], logits[1, 2:], logits[1, :2]]
    off = max(float((one - same[0]).abs().max()) for one in same[1:])
    if not off <= 1e-4 * float(logits.abs().max()):
        raise _refusal(model, "mixes documents all the same (another first document changed the second)")


def _refusal(model: nn.Module, fault: str) -> ConfigError:
    config: Any = getattr(model, "config", None)
    name = f"a {config.model_type} model" if hasattr(config, "model_type") else type(model).__name__
    cure = ""
    with suppress(AttributeError):
        if config._attn_implementation not in ("eager", "sdpa"):
            cure = ", or model.attn_implementation=sdpa"
    return ConfigError(NOT_KEPT_APART.format(model=name, fault=fault, cure=cure))
