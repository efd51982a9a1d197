"""Settings with which a run goes on as it began: those that its version did not have, and choices that `auto` made then."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dtrain.config.error_messages import ABSENT, value_at
from dtrain.config.raw_settings import RawSettings, parse
from dtrain.config.schema import Config
from dtrain.errors import ConfigError

BEFORE: Mapping[tuple[str, str], Any] = {
    ("train", "sort_by_length"): False,
    ("model", "unpad"): "off",
    ("model", "fast_dropout"): False,
    ("model", "fast_linear"): "off",
    ("freeze", "cache"): "off",
}
"""What versions did that did not have a setting yet, where its default would change the numbers of a run."""

CHOICES = (("model", "unpad"),)
"""Settings whose value `auto` is open: config.yaml then has the choice that was made when the run began."""


def as_begun(old_yaml_text: str | None, config: Config) -> Config:
    """Returns the config for going on with a run: with what dtrain did before it had a setting, and with the run's choices.

    Another value that this start names itself stays as it is, and counts as a change.

    Args:
        old_yaml_text: the run's config.yaml; None without one.
    """
    if old_yaml_text is None:
        return config
    try:
        old: Any = parse(old_yaml_text, RawSettings(), file="config.yaml")
    except ConfigError:  # `differences` reports it
        return config
    old = with_earlier_behavior(old)
    for (section, name), earlier in BEFORE.items():
        part, value = getattr(config, section), value_at(old, (section, name))
        is_chosen = (section, name) in CHOICES and getattr(part, name) == "auto" and value in ("on", "off")
        if is_chosen or (name not in part.model_fields_set and value == earlier):
            config = config.model_copy(update={section: part.model_copy(update={name: value})})
            getattr(config, section).model_fields_set.discard(name)  # the user has not named it
    return config


def lacking(old_yaml_text: str | None) -> set[str]:
    """Returns the names of the settings of BEFORE that a config.yaml does not have, because it is older than they are."""
    if old_yaml_text is None:
        return set()
    old: Any = parse(old_yaml_text, RawSettings(), file="config.yaml")
    return {f"{section}.{name}" for section, name in BEFORE if value_at(old, (section, name)) is ABSENT}


def with_earlier_behavior(old: Any) -> Any:
    """Returns the values of a config.yaml, with what dtrain did before it had a setting that the file lacks."""
    for (section, name), value in BEFORE.items():
        part = old.get(section) if isinstance(old, Mapping) else None
        if isinstance(part, Mapping) and name not in part:
            old = {**old, section: {**part, name: value}}
    return old
