"""How something of the Hugging Face hub gets onto a machine that does not reach it, in words."""

from __future__ import annotations


def without_network(setting: str, name: str, *, is_set: bool, folder_setting: str | None = None) -> str:
    """The way by dtrain's own download command.

    Args:
        name: what is downloaded, with the settings that say which part.
        is_set: whether HF_HUB_OFFLINE is.
        folder_setting: takes the folder, where that is not `setting`.
    """
    variable = "" if is_set else ", here with HF_HUB_OFFLINE=1"
    return (
        f"Without a network: where there is one, run `dtrain download {setting}={name} download.to=FOLDER`, copy the "
        f"folder here and set {folder_setting or setting}=FOLDER; or leave download.to out and copy the cache "
        f"(HF_HOME){variable}"
    )
