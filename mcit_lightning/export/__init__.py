"""Trained runs in the formats of the Hugging Face libraries: PEFT adapter folders, and model folders with merged weights."""

from mcit_lightning.export.merged import export_merged
from mcit_lightning.export.peft_folder import export_peft

__all__ = ["export_merged", "export_peft"]
