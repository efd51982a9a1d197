"""Instructions for using models and data sets of the Hugging Face hub on a machine without a network."""

from __future__ import annotations


def offline_instructions(setting: str, name: str, *, is_set: bool, folder_setting: str | None = None) -> str:
    """Returns the instructions, which use dtrain's download command.

    Args:
        setting: the setting that names what to download.
        name: its value, followed by other settings that the download needs.
        is_set: whether HF_HUB_OFFLINE is set.
        folder_setting: the setting for the downloaded folder, if it is not `setting`.
    """
    variable = "" if is_set else ", here with HF_HUB_OFFLINE=1"
    return (
        f"Without a network: on a machine that has one, run `dtrain download {setting}={name} download.to=FOLDER`, copy "
        f"the folder here and set {folder_setting or setting}=FOLDER; or leave download.to out and copy the cache "
        f"(HF_HOME){variable}"
    )
