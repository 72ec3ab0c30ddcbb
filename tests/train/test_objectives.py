"""Objectives: sums, and what they are divided by."""

import torch
from train.tiny_models import packed

from llmt_train.objectives import clm


def test_clm_is_the_summed_negative_log_likelihood_over_the_steps_targets():
    batch = packed([[5, 3]], 10, targets=123.0)
    logps = torch.randn(10, generator=torch.Generator().manual_seed(0)).requires_grad_()
    terms = clm(logps, batch)
    torch.testing.assert_close(terms.loss_sum, -logps.sum())
    assert terms.denominator == 123.0
    assert torch.equal(torch.autograd.grad(terms.loss_sum, logps)[0], -torch.ones(10))
