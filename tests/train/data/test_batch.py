"""Rows laid end to end: what a model and a loss read from them."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from train.tiny_models import packed, tiny

from llmt_shared.segments import IGNORE, Spans
from llmt_train.data.batch import collate, pack_texts, shard_tokens
from llmt_train.model.load import forward_hidden
from llmt_train.parallel.context import TokenSplit
from llmt_train.parallel.mesh import Axis

LENGTH = 8


def two_rows(spans=None):
    tokens = np.arange(16, dtype=np.uint16).reshape(2, LENGTH)
    return collate(tokens, np.array([2, 1]), np.array([3, 5, 6]), np.array([1, 0, 1]), spans, {"targets": 11.0})


def test_segments_and_padding_tails_become_pieces():
    batch = two_rows()
    assert batch.input_ids.shape == batch.labels.shape == batch.position_ids.shape == (1, 16)
    assert batch.lengths == (3, 5, 6, 2)
    assert batch.cu_seqlens.tolist() == [0, 3, 8, 14, 16]
    assert batch.max_seqlen == 6
    assert batch.segment_ids_flat.tolist() == [0] * 3 + [1] * 5 + [2] * 6 + [3] * 2
    assert batch.segment_source.tolist() == [1, 0, 1, -1]
    assert batch.position_ids[0].tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 0, 1]


def test_labels_are_the_next_token_of_the_same_segment():
    wanted = [1, 2, IGNORE, 4, 5, 6, 7, IGNORE, 9, 10, 11, 12, 13, IGNORE, IGNORE, IGNORE]
    assert two_rows().labels[0].tolist() == wanted


def test_only_tokens_of_spans_are_labels():
    batch = two_rows(Spans(np.array([1, 10]), np.array([1, 2])))
    assert [(t, label) for t, label in enumerate(batch.labels[0].tolist()) if label != IGNORE] == [
        (0, 1),
        (9, 10),
        (10, 11),
    ]


def test_dtypes_are_those_that_kernels_take():
    batch = two_rows()
    int64 = (batch.input_ids, batch.labels, batch.position_ids, batch.segment_source)
    assert all(x.dtype == torch.int64 for x in int64)
    assert batch.cu_seqlens.dtype == batch.segment_ids_flat.dtype == torch.int32


def test_a_batch_of_padding_has_no_label_and_one_piece():
    empty = np.empty(0, np.int64)
    batch = collate(np.zeros((1, LENGTH), np.uint32), np.zeros(1, np.int64), empty, empty, None, {"targets": 5.0})
    assert (batch.labels == IGNORE).all()
    assert batch.lengths == (LENGTH,)
    assert batch.segment_source.tolist() == [-1]


def test_moving_moves_every_tensor_and_keeps_the_rest():
    batch = two_rows()
    moved = batch.to("meta")
    assert all(x.device.type == "meta" for x in moved if isinstance(x, torch.Tensor))
    assert (moved.lengths, moved.max_seqlen, moved.denominators) == (batch.lengths, 6, {"targets": 11.0})


def test_segments_carry_the_borders_and_the_backend():
    batch = two_rows()
    segments = batch.segments("sdpa", deterministic=True)
    assert (segments.lengths, segments.max_length) == (batch.lengths, batch.max_seqlen)
    assert (segments.backend, segments.deterministic) == ("sdpa", True)
    assert torch.equal(segments.cu_seqlens, batch.cu_seqlens)
    assert torch.equal(segments.ids, batch.segment_ids_flat)


@given(st.lists(st.lists(st.integers(1, 4), max_size=2), min_size=1, max_size=5), st.integers(0, 2**32 - 1))
def test_labels_equal_a_plain_loop(rows, seed):
    tokens = np.random.default_rng(seed).integers(0, 100_000, (len(rows), LENGTH)).astype(np.uint32)
    lengths = np.array([n for row in rows for n in row], np.int64)
    per_row = np.array([len(row) for row in rows])
    batch = collate(tokens, per_row, lengths, np.arange(len(lengths)), None, {"targets": 1.0})
    wanted, sources = np.full(tokens.shape, IGNORE), []
    for place, row in enumerate(rows):
        first = 0
        for n in row:
            wanted[place, first : first + n - 1] = tokens[place, first + 1 : first + n]
            first += n
        sources += [len([s for s in sources if s >= 0]) + i for i in range(len(row))] + [-1] * (first < LENGTH)
    assert batch.labels[0].tolist() == wanted.ravel().tolist()
    assert batch.segment_source.tolist() == sources
    assert sum(batch.lengths) == tokens.size


def test_lengths_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="segments of 9 tokens do not fit a row of 8"):
        collate(np.zeros((1, LENGTH), np.uint16), np.array([1]), np.array([9]), np.array([0]), None, {})


def parts_of(batch, size):
    """What each of ``size`` ranks keeps; nothing is exchanged."""
    return [shard_tokens(batch, TokenSplit(cp=Axis(None, size, rank))) for rank in range(size)]


@pytest.mark.parametrize("size", [1, 2, 4])
def test_ranks_share_the_tokens_and_know_all_pieces(size):
    batch = two_rows(Spans(np.array([1, 10]), np.array([1, 2])))
    batch = batch._replace(in_response=batch.labels[0] != IGNORE)
    parts = parts_of(batch, size)
    for name in ("input_ids", "labels", "position_ids", "segment_ids_flat", "in_response"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts], -1), getattr(batch, name))
    for part in parts:
        assert (part.lengths, part.max_seqlen) == (batch.lengths, batch.max_seqlen)
        assert torch.equal(part.segment_source, batch.segment_source)
        assert torch.equal(part.segments().cu_seqlens, batch.cu_seqlens)
        assert torch.equal(part.segments().ids, batch.segment_ids_flat)
        assert part.segments().ids.dtype == torch.int32


@pytest.mark.parametrize("size", [1, 2, 4])
def test_places_of_labels_are_counted_from_a_ranks_first_token(size):
    parts = parts_of(two_rows(Spans(np.array([1, 10]), np.array([1, 2]))), size)
    assert [part.label_places.tolist() for part in parts] == [
        (part.labels[0] != IGNORE).nonzero()[:, 0].tolist() for part in parts
    ]


def test_moving_keeps_the_ranks():
    part = parts_of(two_rows(), 2)[1]
    assert part.to("cpu").split == part.split
    assert part.to("cpu").segments().cp == Axis(None, 2, 1)


def test_tokens_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="16 tokens do not divide by the 3 ranks"):
        parts_of(two_rows(), 3)
    with pytest.raises(ValueError, match="16 tokens do not divide by the 6 ranks"):
        shard_tokens(two_rows(), TokenSplit(tp=Axis(None, 3, 0), cp=Axis(None, 2, 0), sp=True))


def test_texts_are_segments_of_one_row_padded_as_far_as_ranks_need():
    batch = pack_texts([[5, 6, 7], [8, 9]], TokenSplit(tp=Axis(None, 4, 1), sp=True))
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9, 0, 0, 0]]
    assert batch.lengths == (3, 2, 3)
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 0, 1, 2]]
    assert pack_texts([[5, 6, 7], [8, 9]]).lengths == (3, 2)


def test_a_long_padding_tail_does_not_choose_the_rotary_factors_of_the_documents_before_it():
    """Phi-3's long rotary factors serve every token of a call whose largest position is beyond the original ones."""
    factors = {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8, "factor": 8.0}
    ropes = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 32, **factors}
    model = tiny("phi3", original_max_position_embeddings=32, rope_parameters=ropes).eval()
    padded = packed([[20]], 60)
    bare = collate(padded.input_ids[:, :20].numpy(), np.array([1]), np.array([20]), np.zeros(1, np.int64), None, {})
    hidden = [forward_hidden(model, batch)[:20] for batch in (padded, bare)]
    torch.testing.assert_close(*hidden, rtol=0, atol=1e-6)
