"""Other people's layers with our router take their logits as ours does, and nothing else of them changes."""

from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from softmoe_train.bench.floor import LayerShape
from softmoe_train.bench.peers import OurRouter, build_peers

SHAPE = LayerShape(images=2, tokens=6, width=8, hidden=16, experts=3, slots=2)


class Peer(nn.Module):
    """The einsums of such a layer: logits, dispatch, combine."""

    def __init__(self) -> None:
        super().__init__()
        self.phi = nn.Parameter(torch.randn(8, 3, 2, generator=torch.Generator().manual_seed(1)))
        self.logits: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Route there and back, without experts."""
        self.logits = torch.einsum("bmd,dnp->bmnp", x, self.phi)
        dispatch = self.logits.softmax(1)
        slots = torch.einsum("bmd,bmnp->bnpd", x, dispatch)
        return torch.einsum("bnpd,bmnp->bmd", slots, dispatch)


@pytest.mark.parametrize("unit_lengths", [True, False])
def test_the_logits_are_taken_in_float32_and_nothing_else_is_replaced(unit_lengths: bool) -> None:
    peer = Peer()
    layer = OurRouter(peer, SHAPE, unit_lengths)
    x = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(2))
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    tokens, phi = (F.normalize(x, dim=-1), F.normalize(peer.phi, dim=0)) if unit_lengths else (x, peer.phi)
    assert peer.logits is not None and peer.logits.dtype == torch.float32
    torch.testing.assert_close(peer.logits, torch.einsum("bmd,dnp->bmnp", tokens, phi))
    assert layer.mode.seen == 1
    assert out.dtype == torch.bfloat16  # the mixing still follows autocast


@pytest.mark.skipif(not find_spec("soft_mixture_of_experts"), reason="the other packages are not installed")
def test_each_installed_peer_shows_one_product_of_logits() -> None:
    peers = build_peers(SHAPE, torch.device("cpu"))
    same = [peer.module for peer in peers if isinstance(peer.module, OurRouter)]
    assert len(same) * 2 == len(peers)
    for layer in same:
        layer(torch.randn(2, 6, 8))
        assert layer.mode.seen == 1
