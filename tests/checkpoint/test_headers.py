"""Headers of safetensors files, before a library reads them."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.checkpoint import headers
from serve_app.checkpoint.headers import check_weights_file
from serve_app.errors import ModelLoadError
from tests.conftest import safetensors


def written(tmp_path, header, *, body=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file = tmp_path / "w.safetensors"
    size = len(text) if length is None else length
    file.write_bytes(size.to_bytes(8, "little") + text + body)
    return file


def tensor(shape, start, stop, dtype="BF16"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def test_check_weights_file_gives_the_tensors_of_a_sound_one(tmp_path):
    """With its metadata left out, and with empty tensors."""
    (tmp_path / "w.safetensors").write_bytes(safetensors({"a": [4, 2], "b": [0, 3], "c": []}))
    assert set(check_weights_file(tmp_path / "w.safetensors")) == {"a", "b", "c"}


@pytest.mark.parametrize(
    ("header", "body"),
    [
        ([], b""),
        ("x", b""),
        ({"a": None}, b""),
        ({"a": []}, b""),
        ({"a": {"dtype": "BF16", "shape": [1]}}, b"xx"),
        ({"a": tensor([1], 0, 2) | {"data_offsets": [0]}}, b"xx"),
        ({"a": tensor([1], "0", "2")}, b"xx"),
        ({"a": tensor([1], -2, 0)}, b"xx"),
        ({"a": tensor([1], 2, 0)}, b"xx"),
        ({"a": tensor([1], 0, 4)}, b"xx"),
        ({"a": tensor([1], 0, 2**63)}, b"xx"),
        ({"a": tensor([2], 0, 2)}, b"xx"),
        ({"a": tensor([-1, -1], 0, 2)}, b"xx"),
        ({"a": tensor([True], 0, 2)}, b"xx"),
        ({"a": tensor([1.0], 0, 2)}, b"xx"),
        ({"a": tensor(1, 0, 2)}, b"xx"),
        ({"a": tensor([1] * 40, 0, 2)}, b"xx"),
        ({"a": tensor([2**59] * 32, 0, 2)}, b"xx"),
        ({"a": tensor([1], 0, 2, "X")}, b"xx"),
        ({"a": tensor([1], 0, 2, ["BF16"])}, b"xx"),
        ({"a": tensor([2], 0, 4), "b": tensor([2], 2, 6)}, b"xxxxxx"),
        ({"a": tensor([1], 0, 2), "b": tensor([1], 0, 2)}, b"xx"),
        (b"{" * 50_000, b""),
        (b"\xff\xfe", b""),
    ],
)
def test_check_weights_file_names_a_header_that_makes_no_sense(tmp_path, header, body):
    """Places outside the file, over each other, of another size; types of any kind."""
    with pytest.raises(ModelLoadError, match=r"w\.safetensors is damaged") as caught:
        check_weights_file(written(tmp_path, header, body=body))
    assert len(caught.value.message) < 300


@pytest.mark.parametrize("length", [0, 1, 99, 2**32, 2**63, 2**64 - 1])
def test_check_weights_file_does_not_believe_a_length_that_is_not_the_headers(tmp_path, length):
    """Nothing of that size is ever read."""
    with pytest.raises(ModelLoadError, match="is damaged"):
        check_weights_file(written(tmp_path, {}, length=length))


def test_check_weights_file_bounds_a_header_before_it_is_parsed(tmp_path, monkeypatch):
    """Whatever the file's own size."""
    monkeypatch.setattr(headers, "HEADER_BYTES", 100)
    with pytest.raises(ModelLoadError, match="more than 100"):
        check_weights_file(written(tmp_path, b"{" + b" " * 100 + b"}"))


@pytest.mark.parametrize("content", [b"", b"1234567", b"12345678"])
def test_check_weights_file_without_a_header_is_cut_off(tmp_path, content):
    """Down to none at all."""
    (tmp_path / "w.safetensors").write_bytes(content)
    with pytest.raises(ModelLoadError, match="is damaged"):
        check_weights_file(tmp_path / "w.safetensors")
    with pytest.raises(ModelLoadError, match="is missing"):
        check_weights_file(tmp_path / "none.safetensors")


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["dtype", "shape", "data_offsets", "x"]), inner, max_size=4
        )
    ),
    max_leaves=12,
)


@given(st.dictionaries(st.text(max_size=5), JUNK, max_size=4), st.binary(max_size=64))
def test_check_weights_file_takes_any_header_or_says_one_sentence(tmp_path_factory, header, body):
    """Nothing else ever comes out."""
    file = written(tmp_path_factory.mktemp("w"), header, body=body)
    try:
        assert isinstance(check_weights_file(file), dict)
    except ModelLoadError as error:
        assert "is damaged" in error.message  # noqa: PT017
