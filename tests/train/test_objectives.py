"""Objectives: sums, and what they are divided by."""

import torch
from train.tiny_models import packed

from llmt_train.head import Scores
from llmt_train.objectives import clm, share


def test_clm_is_the_summed_negative_log_likelihood_over_the_steps_targets():
    batch = packed([[5, 3]], 10, targets=123.0)
    logps = torch.randn(10, generator=torch.Generator().manual_seed(0)).requires_grad_()
    logps = torch.where(batch.labels[0] >= 0, logps, 0.0)
    loss = share(clm(Scores(logps, logps, None), batch)["loss"], batch.denominators)
    torch.testing.assert_close(loss, -logps.sum() / 123.0)
