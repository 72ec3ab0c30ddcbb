"""Batches of ids: fall-back, BOS and EOS, texts left out; compared with a plain loop over texts."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmt_prep.encoding import encode, encode_each, only, surrounded, text_of_place
from llmt_prep.engines import Encoded, Engine
from llmt_shared.errors import Stopped

id_lists = st.lists(st.lists(st.integers(0, 5), max_size=5), max_size=6)


def joined(lists: list[list[int]]) -> Encoded:
    return Encoded(
        np.array([token for ids in lists for token in ids], np.uint32), np.array([len(ids) for ids in lists], np.int64)
    )


def parted(encoded: Encoded) -> list[list[int]]:
    ends = np.cumsum(encoded.lengths)
    return [encoded.ids[end - n : end].tolist() for end, n in zip(ends, encoded.lengths, strict=True)]


@given(id_lists, st.sampled_from([None, 0, 1]), st.sampled_from([None, 0, 5]))
def test_bos_and_eos_stand_around_every_text_that_has_ids_and_are_not_doubled(lists, bos_id, eos_id):
    def surround(ids):
        if not ids:
            return []
        ids = ids if bos_id is None or ids[0] == bos_id else [bos_id, *ids]
        return ids if eos_id is None or ids[-1] == eos_id else [*ids, eos_id]

    assert parted(surrounded(joined(lists), bos_id, eos_id)) == [surround(ids) for ids in lists]


@given(id_lists, st.data())
def test_a_text_that_is_left_out_has_no_ids(lists, data):
    wanted = [data.draw(st.booleans()) for _ in lists]
    left = only(joined(lists), np.array(wanted, np.bool_))
    assert parted(left) == [ids if keep else [] for ids, keep in zip(lists, wanted, strict=True)]


@given(id_lists.filter(any))
def test_a_place_lies_in_its_text(lists):
    texts = [number for number, ids in enumerate(lists) for _ in ids]
    assert text_of_place(joined(lists), np.arange(len(texts))).tolist() == texts


def engine(name: str, refused: str = "") -> Engine:
    def encode_all(texts):
        if any(text in refused for text in texts if text):
            raise ValueError("cannot")
        return joined([list(text.encode()) for text in texts])

    return Engine(name, encode_all)


def test_the_fast_engine_serves():
    counts = Counter()
    result = encode(["a", "b"], engine("fast"), engine("slow"), counts)
    assert (parted(result.encoded), result.reasons, result.engine) == ([[97], [98]], {}, "fast")
    assert counts["fallbacks"] == 0


def test_a_batch_that_the_fast_engine_fails_on_falls_back_and_is_counted():
    counts = Counter()
    result = encode(["a", "b"], engine("fast", refused="b"), engine("slow"), counts)
    assert (parted(result.encoded), result.reasons, result.engine) == ([[97], [98]], {}, "slow")
    assert counts["fallbacks"] == 1


def test_a_text_that_no_engine_takes_has_a_reason_and_the_others_their_ids():
    result = encode(["a", "b", "c"], engine("fast", refused="b"), engine("slow", refused="b"), Counter())
    assert parted(result.encoded) == [[97], [], [99]]
    assert result.reasons == {1: "the tokenizer cannot encode this text: cannot"}


@pytest.mark.parametrize("raised", [Stopped("by SIGTERM"), KeyboardInterrupt(), MemoryError()])
def test_a_signal_during_encoding_is_no_failure_of_the_tokenizer(raised):
    def encode_all(texts):
        raise raised

    for engines in ((Engine("fast", encode_all), engine("slow")), (None, Engine("slow", encode_all))):
        with pytest.raises(type(raised)):
            encode(["a"], *engines, Counter())


def test_a_panic_of_rust_falls_back_too():
    class PanicException(BaseException):
        pass

    def encode_all(texts):
        raise PanicException("index out of bounds")

    assert encode(["a"], Engine("fast", encode_all), engine("slow"), Counter()).engine == "slow"


def test_texts_that_an_engine_refuses_are_left_out():
    each = encode_each(["a", "b", "c"], engine("fast", refused="b"))
    assert {text: ids.tolist() for text, ids in each.items()} == {"a": [97], "c": [99]}
