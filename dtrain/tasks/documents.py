"""Several documents in one row of a batch: masks and positions that separate them, and a check that a model obeys them."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
from torch import nn

from dtrain.errors import ConfigError
from dtrain.models.host_copy import host_copy, remember
from dtrain.models.modes import restored_modes
from dtrain.models.unpadding_layout import NAME

NOT_SEPARATED = (
    "task.packing=documents needs a model that accepts an attention mask for each row (batch, 1, length, length) and "
    "position_ids, but {model} {fault}. Use task.packing=stream{cure}."
)


def document_inputs(document_ids: torch.Tensor, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Returns further model inputs that let each token see only its own document, up to itself.

    Args:
        document_ids: (batch, length) int64, one number for all tokens of a document. 0 is padding, which is at the end.
        dtype: Data type of the model's weights, in which attention adds the mask.

    Returns:
        attention_mask: (batch, 1, length, length), 0 for visible tokens and the smallest number elsewhere.
        position_ids: (batch, length) int64, from 0 in each document.
    """
    length = document_ids.shape[1]
    visible = (document_ids[:, :, None] == document_ids[:, None, :]).tril()
    mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill(~visible, torch.finfo(dtype).min)
    places = torch.arange(length, device=document_ids.device).expand_as(document_ids)
    is_first = torch.ones_like(document_ids, dtype=torch.bool)
    is_first[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    starts = torch.where(is_first, places, 0).cummax(dim=1).values
    mask = mask[:, None]
    numbers = host_copy(document_ids)
    if numbers is not None and mask.device.type != "cpu":
        remember(mask, numbers)  # as layout_of_documents reads it
    return {"attention_mask": mask, "position_ids": places - starts}


@torch.no_grad()
def check_separates_documents(model: nn.Module, *, max_length: int) -> None:
    """Checks with two documents in a row that the first one does not change the logits of the second one.

    Models treat such a mask differently. Some refuse it; some (recurrent and hybrid ones) ignore it silently. A trial is
    therefore the only reliable check. It leaves training modes and the random state unchanged.

    Args:
        max_length: Tokens in a row.

    Raises:
        ConfigError: The model refuses the inputs, or the logits of the second document depend on the first one or on
            the place in the row. Also if the model uses a sliding window, which such a mask would overrule.
    """
    model = getattr(model, "module", model)  # without an earlier probe, the model is still in DDP's wrapper
    window = getattr(getattr(model, "config", None), "sliding_window", None)
    if isinstance(window, int) and window < max_length:
        raise _refusal(model, f"has a sliding window of {window} tokens, less than data.max_length={max_length}")
    weights = next(model.parameters())
    tokens = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]], device=weights.device)
    inputs = document_inputs(torch.tensor([[1, 1, 2, 2]] * 2, device=weights.device), weights.dtype)
    try:
        with restored_modes(model), torch.autocast(weights.device.type, enabled=False):
            model.eval()
            logits = model(input_ids=tokens, use_cache=False, **inputs).logits
    except (TypeError, ValueError, RuntimeError, IndexError, NotImplementedError) as error:
        raise _refusal(model, f"refuses them: {' '.join(str(error).split())[:200]}") from error
    # The same two tokens: the second document of both rows, and the first document of the second row.
    equal = [logits[0, 2:], logits[1, 2:], logits[1, :2]]
    difference = max(float((one - equal[0]).abs().max()) for one in equal[1:])
    if not difference <= 1e-4 * float(logits.abs().max()):
        raise _refusal(model, "still mixes documents (another first document changed the second)")


def _refusal(model: nn.Module, fault: str) -> ConfigError:
    config: Any = getattr(model, "config", None)
    name = f"a {config.model_type} model" if hasattr(config, "model_type") else type(model).__name__
    cure = ""
    with suppress(AttributeError):
        if config._attn_implementation not in ("eager", "sdpa", NAME):
            cure = ", or model.attn_implementation=sdpa"
    return ConfigError(NOT_SEPARATED.format(model=name, fault=fault, cure=cure))
