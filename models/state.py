"""State: the named arrays that travel between server and clients."""

from __future__ import annotations

import torch

State = dict[str, torch.Tensor]
"""Wire name -> tensor, in sorted order of the names."""
