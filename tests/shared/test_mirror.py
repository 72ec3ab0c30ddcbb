"""A dataset below a URL is the same dataset, and what is asked of it is all that is fetched."""

from typing import Any

import numpy as np
import object_store
import pytest
import small_datasets

from llmt_shared.dataset import Dataset, open_dataset
from llmt_shared.errors import FormatError
from llmt_shared.objects import ObjectPath


@pytest.fixture(scope="module", params=["pretrain", "sft", "preference"])
def local(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return open_dataset(small_datasets.build_kind(tmp_path_factory.mktemp("data"), request.param))


@pytest.fixture(scope="module")
def url(server: object_store.Server, local: Dataset) -> ObjectPath:
    return object_store.upload(server, local.folder, local.kind)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, tuple):
        return all(_same(*each) for each in zip(a, b, strict=True))
    return np.array_equal(a, b) if isinstance(a, np.ndarray) else a == b


def test_every_row_is_that_of_the_local_copy(local, url):
    remote = open_dataset(url)
    assert remote.digest == local.digest
    for ours, theirs in ((remote.train, local.train), (remote.validation, local.validation)):
        rows = range(0, len(theirs), 3)
        assert len(ours) == len(theirs)
        assert all(_same(ours[row], theirs[row]) for row in rows)
        assert _same(ours.pairs(rows), theirs.pairs(rows))
        assert _same(ours.targets(rows), theirs.targets(rows))


def test_the_folder_has_all_but_the_chunks(local, url):
    folder = open_dataset(url).folder
    copied = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert copied == {entry.path for entry in local.manifest.files if "/c/" not in entry.path}


def test_one_row_costs_one_row_of_tokens(local, url, server):
    remote = open_dataset(url)
    server.seen.clear()
    remote.train[0]
    (read,) = [where for _, path, where in server.seen if "/tokens/" in path]
    assert read == f"bytes=0-{local.train.length * local.train.token_dtype.itemsize - 1}"


def test_a_dataset_of_a_web_server_is_read_though_nothing_is_listed(local):
    with object_store.web_server(local.folder) as url:
        assert _same(open_dataset(url).train[1], local.train[1])


def test_a_missing_and_a_truncated_file_are_named_before_anything_is_read(local, server):
    url = object_store.upload(server, local.folder, f"damaged-{local.kind}")
    (url / "train/tokens/c/0/0").unlink()
    (url / "train/row_targets/c/0").write_bytes(b"short")
    with pytest.raises(FormatError, match=r"(?s)row_targets/c/0: truncated: 5 bytes.*|tokens/c/0/0: missing") as error:
        open_dataset(url)
    assert f"{url}/train/tokens/c/0/0: missing" in str(error.value)
    assert f"{url}/train/row_targets/c/0: truncated: 5 bytes" in str(error.value)


def test_a_small_file_with_other_bytes_is_refused(local, server):
    url = object_store.upload(server, local.folder, f"flipped-{local.kind}")
    content = (local.folder / "ledger.json").read_bytes()
    (url / "ledger.json").write_bytes(content[:-3] + b"?" + content[-2:])
    with pytest.raises(FormatError, match=r"ledger.json: sha256 is .*, also when it is read again"):
        open_dataset(url)


def test_a_bit_that_flips_on_the_way_is_read_again(local, url, server, without_faults):
    server.faults = object_store.Faults(flipped=0.3, only="ledger")
    assert open_dataset(url).digest == local.digest


def test_what_holds_no_manifest_is_no_dataset(server):
    server.url("unfinished/train/zarr.json").write_bytes(b"{}")
    with pytest.raises(FormatError, match=r"s3://bucket/unfinished: no dataset .MANIFEST.json: no such object"):
        open_dataset("s3://bucket/unfinished")


def test_a_dataset_that_grows_is_told_from_none(server):
    server.url("growing/PACKING.json").write_bytes(b"{}")
    with pytest.raises(FormatError, match=r"s3://bucket/growing: unfinished; run the same `llmt-prep pack` again"):
        open_dataset("s3://bucket/growing")


@pytest.mark.parametrize(("content", "wanted"), [(None, "is not there any more"), (b"short", "has 5 bytes; wanted")])
def test_a_chunk_that_goes_or_shrinks_after_the_dataset_was_opened_is_damage(local, server, content, wanted):
    url = object_store.upload(server, local.folder, f"changing-{local.kind}-{content is None}")
    remote, chunk = open_dataset(url), url / "train/tokens/c/0/0"
    chunk.unlink() if content is None else chunk.write_bytes(content)
    with pytest.raises(FormatError, match=rf"{chunk}: {wanted}.*\. Copy the dataset there again or pack it again"):
        remote.train[0]
