"""NEFTune: how large the noise is, and of what it is a function."""

import math

import pytest
import torch
from train.rows import NUM_SOURCES, chat_rows, count, pack
from train.steps import MARKS, make_module, run, task_of
from train.tiny_models import packed, tiny

from llmt_train.data.batch import PackedBatch, shard_tokens
from llmt_train.model.neftune import noisy_embeddings
from llmt_train.parallel.context import TokenSplit
from llmt_train.parallel.mesh import Axis

pytestmark = MARKS

ALPHA, SEED = 5.0, 3


def noise_of(batch: PackedBatch, alpha: float = ALPHA, seed: int = SEED) -> torch.Tensor:
    """What is added to the embeddings: [N, H]."""
    model = tiny("llama")
    embed = model.get_input_embeddings()
    torch.nn.init.zeros_(embed.weight)
    with noisy_embeddings(model, batch, alpha, seed):
        noise = embed(batch.input_ids)[0].detach()
    assert not embed(batch.input_ids).any()
    return noise


def placed(places: list[int], length: int = 512) -> PackedBatch:
    """Rows of a long document, a short one, and padding, at these places of the run's order."""
    return packed([[400, 40]] * len(places), length)._replace(row_places=tuple(places))


def test_noise_is_uniform_and_as_large_as_each_documents_own_length_says():
    noise = noise_of(placed([0, 1]))
    for row in range(2):
        for first, length in ((0, 400), (400, 40)):
            part = noise[512 * row + first : 512 * row + first + length]
            bound = ALPHA / math.sqrt(length * part.shape[1])
            assert 0.99 * bound < part.abs().max() <= bound * (1 + 1e-6)
            assert part.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.03)
            assert abs(part.mean().item()) < 0.03 * bound


def test_noise_is_a_function_of_a_rows_place():
    together, apart = noise_of(placed([4, 9, 2])), [noise_of(placed([place])) for place in (4, 9, 2)]
    assert torch.equal(together, torch.cat(apart))
    assert not torch.equal(apart[0], apart[1])


def test_noise_is_another_with_another_seed():
    assert not torch.equal(noise_of(placed([0])), noise_of(placed([0]), seed=SEED + 1))


def test_the_same_place_has_the_same_noise_whatever_the_generator_of_torch_did():
    first = noise_of(placed([0]))
    torch.rand(7)
    state = torch.random.get_rng_state()
    assert torch.equal(noise_of(placed([0])), first)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_alpha_scales_the_noise():
    torch.testing.assert_close(noise_of(placed([0]), alpha=10.0), 2 * noise_of(placed([0])), rtol=1e-6, atol=0)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_training_is_noisy_and_evaluation_is_not(family):
    """The noise reaches the loss in every family: gpt2 adds positions to its embeddings, gemma2 scales them."""
    rows, model = chat_rows(), tiny(family)
    batch = pack(rows, range(len(rows)), count(rows))
    results = []
    for settings in ({}, {"neftune": 5}):
        module = make_module(model, task=task_of("sft", settings), num_sources=NUM_SOURCES)
        loss = run(module, [batch], 1).losses[0]
        module.on_validation_epoch_start()
        with torch.no_grad():
            module.validation_step(batch, 0)
        results.append((loss, module.evaluation.means()["loss"]))
    (bare, evaluated), (noisy, evaluated_again) = results
    assert bare == pytest.approx(evaluated, rel=1e-6)
    assert evaluated_again == evaluated
    assert noisy != pytest.approx(bare, rel=1e-4)


@pytest.mark.parametrize("size", [2, 3, 6])
def test_a_token_has_the_same_noise_whichever_ranks_share_it(size):
    """Rows of 1536 tokens, of which ranks have less than a block, and parts of several rows."""
    batch = packed([[1100, 40], [300]], 1536)._replace(row_places=(4, 9))
    splits = [TokenSplit(cp=Axis(None, size, rank)) for rank in range(size)]
    parts = [noise_of(shard_tokens(batch, split)) for split in splits]
    assert torch.equal(torch.cat(parts), noise_of(batch))


def test_ranks_that_share_layers_have_the_same_noise():
    batch = packed([[30, 10]], 40)._replace(row_places=(4,))
    for rank in range(2):
        shared = shard_tokens(batch, TokenSplit(tp=Axis(None, 2, rank), sp=True))
        assert torch.equal(noise_of(shared), noise_of(batch))
