"""A dialogue as tokens, which the chat formats make."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dtrain.models.chat_template import ChatMessage

FormatName = Literal["turns", "template"]


@dataclass(frozen=True)
class EncodedDialogue:
    """The tokens of one dialogue.

    Attributes:
        ids: token ids.
        is_target: for each token, whether it is a training target.
    """

    ids: list[int]
    is_target: list[bool]

    @property
    def has_targets(self) -> bool:
        """Whether any token is a target. The first token does not count: nothing precedes it."""
        return any(self.is_target[1:])

    def truncated(self, length: int) -> EncodedDialogue:
        """Returns the first `length` tokens."""
        return EncodedDialogue(self.ids[:length], self.is_target[:length])


def is_learned(message: ChatMessage) -> bool:
    """Returns whether the tokens of a message may be targets: not with weight 0."""
    return message.get("weight") != 0
