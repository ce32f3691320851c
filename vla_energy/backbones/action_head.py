"""The host's L1 action head and proprio projector, with its parameter names."""

from __future__ import annotations

from torch import Tensor, nn


class _ResidualBlock(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.ffn = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.ffn(x)


class ResidualMLP(nn.Module):
    """The host's MLP of both continuous action heads: `(..., input_dim)` -> `(..., output_dim)`."""

    def __init__(self, input_dim: int, hidden_dim: int, output_dim: int, num_blocks: int = 2) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(input_dim)
        self.fc1 = nn.Linear(input_dim, hidden_dim)
        self.relu = nn.ReLU()
        self.mlp_resnet_blocks = nn.ModuleList(_ResidualBlock(hidden_dim) for _ in range(num_blocks))
        self.layer_norm2 = nn.LayerNorm(hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, output_dim)

    def forward(self, x: Tensor) -> Tensor:
        """`(..., input_dim)` -> `(..., output_dim)`."""
        x = self.relu(self.fc1(self.layer_norm1(x)))
        for block in self.mlp_resnet_blocks:
            x = block(x)
        return self.fc2(self.layer_norm2(x))


class L1ActionHead(nn.Module):
    """Action-token states to a chunk: the A states of a time step are read together (openvla-oft).

    Args:
        state_dim: width D of the language model.
        hidden_dim: width of the MLP.
        action_dim: A.
    """

    def __init__(self, state_dim: int, hidden_dim: int, action_dim: int) -> None:
        super().__init__()
        self.action_dim = action_dim
        self.model = ResidualMLP(state_dim * action_dim, hidden_dim, action_dim)

    def forward(self, states: Tensor) -> Tensor:
        """`(..., H*A, D)` -> normalised actions `(..., H, A)`."""
        *lead, tokens, dim = states.shape
        return self.model(states.reshape(*lead, tokens // self.action_dim, self.action_dim * dim))


class ProprioProjector(nn.Module):
    """Normalised proprioception `(B, P)` to one token `(B, D)`."""

    def __init__(self, proprio_dim: int, text_dim: int) -> None:
        super().__init__()
        self.proprio_dim = proprio_dim
        self.fc1 = nn.Linear(proprio_dim, text_dim)
        self.fc2 = nn.Linear(text_dim, text_dim)
        self.activation = nn.GELU()

    def forward(self, proprio: Tensor) -> Tensor:
        """`(B, P)` -> `(B, D)`.

        Raises:
            ValueError: P is not the dimension that the projector was built for.
        """
        if proprio.shape[-1] != self.proprio_dim:
            raise ValueError(f"proprio has {proprio.shape[-1]} dimensions, the checkpoint expects {self.proprio_dim}")
        return self.fc2(self.activation(self.fc1(proprio)))
