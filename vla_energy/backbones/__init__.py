"""OpenVLA(-OFT) on stock transformers and timm; needs the `native` extra."""

from vla_energy.extras import NATIVE, require

require("native", NATIVE)  # before the imports, which fail less clearly on openvla-oft's versions

from vla_energy.backbones.config import CheckpointFolderError, OpenVLAConfig
from vla_energy.backbones.folder import LoadedVLA, load_openvla, save_openvla
from vla_energy.backbones.openvla import OpenVLA, VLAOutput
from vla_energy.backbones.processor import Processor

__all__ = [
    "CheckpointFolderError",
    "LoadedVLA",
    "OpenVLA",
    "OpenVLAConfig",
    "Processor",
    "VLAOutput",
    "load_openvla",
    "save_openvla",
]
