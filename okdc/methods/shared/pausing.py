"""A member that sits a step out: it ends as it began, though losses were made of what it said."""

from __future__ import annotations

import torch
from torch import nn


class Pause(nn.Module):
    """Lets a member sit steps out: weights, what the optimizer remembers of them, and buffers stay as they are.

    Call `hold` in `before_step` where the member is to sit out, and `keep` in every `after_step`. The member must share
    no weights with others. `losses` are the same in every step, because on several devices each parameter takes part in
    each. All devices have to decide alike, so by numbers that are the same on all (`okdc.ranks.mean_`, `gather`).
    """

    def __init__(self, member: nn.Module) -> None:
        super().__init__()
        self._member = (member,)  # in a tuple, as it is the cohort's to train, move and save
        for i, buffer in enumerate(member.buffers()):  # batch norm has seen the step before it is known who learns
            self.register_buffer(f"kept{i}", buffer.clone())

    @torch.no_grad()
    def hold(self) -> None:
        """Undo what forward and backward passes have done to the member, so that the optimizer passes over it."""
        for parameter in self._member[0].parameters():
            parameter.grad = None  # zero would still move it, by momentum and weight decay
        for live, kept in zip(self._member[0].buffers(), self.buffers(), strict=True):
            live.copy_(kept)

    @torch.no_grad()
    def keep(self) -> None:
        """Remember the member's buffers as they are at the end of a step."""
        for live, kept in zip(self._member[0].buffers(), self.buffers(), strict=True):
            kept.copy_(live)
