"""openvla-oft (commit 213c5ff8): what the patched host imports.

Fine-tuning makes an `EnergyPlugin` and calls `add_loss` and `save`; evaluation wraps its action head by
`rerank_action_head`. `vla-energy patch` puts these lines in.
"""

from vla_energy.hosts.config import HostEnergyConfig, HostRerankConfig, energy_field, rerank_field
from vla_energy.hosts.hidden_states import HostError
from vla_energy.hosts.inference import rerank_action_head
from vla_energy.hosts.training import EnergyPlugin

__all__ = [
    "EnergyPlugin",
    "HostEnergyConfig",
    "HostError",
    "HostRerankConfig",
    "energy_field",
    "rerank_action_head",
    "rerank_field",
]
