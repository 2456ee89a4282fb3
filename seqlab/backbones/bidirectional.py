"""Bidirectional Mamba: each block scans left to right and right to left (BiMamba of Caduceus, arXiv 2403.03234).

With tied projections (the published models) in_proj and out_proj are shared, so both directions read one projection
of the input and, for `combine: add`, one out_proj serves their sum: out_proj is linear. No tensor is ever flipped; the
operators run right to left themselves.
"""

from torch import Tensor, nn

from seqlab.backbones.mamba import BackboneConfig, Mamba, MambaMixer, MixerState


class BidirectionalMixer(nn.Module):
    """fwd(x) combined with rev(x), (b l d_model) -> (b l d_model); it has no state to carry."""

    def __init__(self, config: BackboneConfig):
        super().__init__()
        self.config = config
        self.mamba_fwd = MambaMixer(config)
        self.mamba_rev = MambaMixer(config)
        self._tie()
        self.register_load_state_dict_post_hook(BidirectionalMixer._tie)  # load_state_dict(assign=True)

    def _tie(self, *_) -> None:
        """Both directions' projections hold the same parameters. Not the same modules: torch.func.functional_call leaves one
        that is reached under two names with the parameters that it was called with."""
        if self.config.tie_projections:
            for name in ("in_proj", "out_proj"):
                first, second = getattr(self.mamba_fwd, name), getattr(self.mamba_rev, name)
                if isinstance(first, nn.Linear) and isinstance(second, nn.Linear):  # not an adapter in its place
                    second.weight, second.bias = first.weight, first.bias

    def _apply(self, fn, recurse=True):
        """What `to`, `to_empty` and the like go through; from the meta device it makes a new parameter for each module."""
        super()._apply(fn, recurse)
        self._tie()
        return self

    def directions(self) -> tuple[MambaMixer, ...]:
        """Both mixers if they share their projections and their outputs add up, so that the block can be fused."""
        one_sum = self.config.tie_projections and self.config.combine == "add" and not self.config.bias
        return (self.mamba_fwd, self.mamba_rev) if one_sum else ()

    def forward(self, x: Tensor, state: None = None, mask: Tensor | None = None, return_state: bool = False):
        tied = self.config.tie_projections
        fwd, rev = self.mamba_fwd, self.mamba_rev
        u, z = fwd.in_proj(x).chunk(2, dim=-1)
        u_rev, z_rev = (u, z) if tied else rev.in_proj(x).chunk(2, dim=-1)
        y, _ = fwd.scan(u, z, mask=mask)
        y_rev, _ = rev.scan(u_rev, z_rev, mask=mask, reverse=True)
        if self.config.combine == "multiply":
            return fwd.out_proj(y) * rev.out_proj(y_rev), None
        if tied and fwd.out_proj.bias is None:
            return fwd.out_proj(y + y_rev), None
        return fwd.out_proj(y) + rev.out_proj(y_rev), None

    def direction(
        self,
        x: Tensor,
        reverse: bool,
        state: MixerState | None = None,
        mask: Tensor | None = None,
        return_state: bool = True,
    ) -> tuple[Tensor, MixerState | None]:
        """One direction alone, (b l d_model), which is causal in its own time: it can be fed in pieces, for `reverse`
        from the right. `meet` of both is what `forward` gives."""
        mixer = self.mamba_rev if reverse else self.mamba_fwd
        u, z = mixer.in_proj(x).chunk(2, dim=-1)
        y, state = mixer.scan(u, z, state, mask, reverse=reverse, return_state=return_state)
        return mixer.out_proj(y), state

    def meet(self, forwards: Tensor, backwards: Tensor) -> Tensor:
        """The two directions' outputs put together, (b l d_model)."""
        return forwards * backwards if self.config.combine == "multiply" else forwards + backwards


class BidirectionalMamba(Mamba):
    """A stack of bidirectional blocks; every output sees the whole sequence, so there is no state to carry."""

    is_causal = False

    def make_mixer(self, config: BackboneConfig) -> nn.Module:
        return BidirectionalMixer(config)

    def forward(self, x: Tensor, state: None = None, mask: Tensor | None = None, return_state: bool = False):
        if state is not None:
            raise ValueError("a bidirectional backbone has no state: every position already sees the whole sequence")
        y, _ = super().forward(x, None, mask, return_state=False)
        return y, None

    def step(self, x: Tensor, state: None = None):
        raise ValueError("a bidirectional backbone cannot run one position at a time; use direction: causal")
