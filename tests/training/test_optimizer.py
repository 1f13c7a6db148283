# SPDX-License-Identifier: Apache-2.0
import torch

from spon_plugin.training.optimizer import FlatAdamW


def test_it_takes_the_steps_of_torch():
    torch.manual_seed(0)
    start = [torch.randn(3), torch.randn(2, 4)]
    rates, decays = [0.1, 0.01], [0.0, 0.5]
    ours, theirs = ([part.clone().requires_grad_() for part in start] for _ in range(2))
    flat = FlatAdamW(ours, rates, decays, max_grad_norm=1.0)
    groups = [
        {"params": [p], "lr": rate, "weight_decay": decay} for p, rate, decay in zip(theirs, rates, decays, strict=True)
    ]
    optimizer = torch.optim.AdamW(groups)
    for step in range(5):
        for parameters in (ours, theirs):
            sum(((p - 2) ** 2).sum() for p in parameters).backward()
        norm = torch.nn.utils.clip_grad_norm_(theirs, 1.0)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * (0.5 + step)
        optimizer.step()
        optimizer.zero_grad()
        torch.testing.assert_close(flat.step(0.5 + step), norm)
    for own, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(own, other)
        assert own.grad is None
