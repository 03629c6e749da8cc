"""Damaged and made-up adapter files: whatever is in one, it is an adapter or an error of ours."""

import json
import struct

import pytest
import tiny
import torch
from adapters import trained
from hypothesis import given, settings
from hypothesis import strategies as st

import ddit_rt
from ddit_rt import Adapter, AdapterMismatchError

LENGTH = struct.Struct("<Q")


class Parts:
    """A small adapter's file, taken apart.

    Attributes:
        header: Of the safetensors file, without the description.
        description: What the adapter says about itself.
        data: The tensors' bytes.
    """

    def __init__(self, whole: bytes) -> None:
        (length,) = LENGTH.unpack_from(whole)
        self.whole = whole
        self.header = json.loads(whole[8 : 8 + length])
        self.description = json.loads(self.header.pop("__metadata__")["ddit_adapter"])
        self.data = whole[8 + length :]

    def joined(self, header=None, description=None) -> bytes:
        text = json.dumps(self.description if description is None else description)
        entries = self.header if header is None else header
        head = json.dumps({**entries, "__metadata__": {"ddit_adapter": text}}).encode()
        head += b" " * (-len(head) % 8)
        return LENGTH.pack(len(head)) + head + self.data


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("adapters") / "a.safetensors"


@pytest.fixture(scope="module")
def parts(path):
    return Parts(ddit_rt.save_adapter(trained(tiny.flux(), rank=1, multiples=(2,)), path).read_bytes())


def load(path, data: bytes) -> Adapter | None:
    """What the file gives: an adapter with finite weights, or None for an error that names the file."""
    path.unlink(missing_ok=True)  # an adapter's weights may lie in the mapped file
    path.write_bytes(data)
    try:
        adapter = ddit_rt.load_adapter(path)
    except AdapterMismatchError as error:
        assert str(path) in str(error) and len(str(error)) < 3000
        return None
    assert all(not weight.is_meta and weight.isfinite().all() for weight in adapter.parameters())
    return adapter


def test_the_parts_make_the_whole_again(path, parts):
    adapter = load(path, parts.whole)
    again = load(path, parts.joined())
    assert again.spec == adapter.spec
    assert all(torch.equal(one, other) for one, other in zip(again.parameters(), adapter.parameters()))


@settings(deadline=None)
@given(st.floats(0, 1, exclude_max=True))
def test_cut_short(path, parts, share):
    assert load(path, parts.whole[: int(share * len(parts.whole))]) is None


flips = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=4)


@settings(deadline=None, max_examples=150)
@given(flips, st.booleans())
def test_flipped_bytes(path, parts, flips, in_header):
    data = bytearray(parts.whole)
    reach = len(data) - len(parts.data) if in_header else len(data)
    for share, value in flips:
        data[int(share * reach)] = value
    load(path, bytes(data))


@settings(deadline=None)
@given(st.integers(0, 2**64 - 1) | st.integers(0, 2**25))
def test_a_header_of_another_length(path, parts, length):
    load(path, LENGTH.pack(length) + parts.whole[8:])


@pytest.mark.parametrize("length", [2**22 + 1, 2**33, 2**63, 2**64 - 1])
def test_a_huge_header_is_refused_unread(path, length):
    with path.open("wb") as file:
        file.write(LENGTH.pack(length))
        file.truncate(2**34)
    with pytest.raises(AdapterMismatchError, match=f"its header would have {length}"):
        ddit_rt.load_adapter(path)
    path.unlink()


numbers = st.integers() | st.integers(2**15, 2**60) | st.floats() | st.sampled_from([10**400, -(2**63), 1e308])
plain = st.none() | st.booleans() | numbers | st.text(max_size=5)
wrong = plain | st.lists(plain, max_size=4) | st.dictionaries(st.text(max_size=3), plain, max_size=3)
FIELDS = ["format", *ddit_rt.granularity.adapter.AdapterSpec.__dataclass_fields__]


@settings(deadline=None, max_examples=200)
@given(st.dictionaries(st.sampled_from(FIELDS), wrong, min_size=1, max_size=3), st.sets(st.sampled_from(FIELDS)))
def test_wrong_descriptions(path, parts, changes, missing):
    description = {name: value for name, value in {**parts.description, **changes}.items() if name not in missing}
    load(path, parts.joined(description=description))


sizes = wrong | st.lists(st.integers(-1, 2**62), max_size=3)


@settings(deadline=None, max_examples=100)
@given(st.dictionaries(st.sampled_from(["pop", "", "a.b", "a/b", "a..b", "training", "ü"]), sizes, max_size=4))
def test_wrong_layers(path, parts, layers):
    assert load(path, parts.joined(description={**parts.description, "layers": layers})) is None


names = st.sampled_from(["loras.", "loras.2", "loras.2.x.lora_A.weight", "loras.2.pop.lora_A.weight", "sizes.2", "ü"])
dtypes = st.sampled_from(["F64", "F32", "BF16", "F8_E4M3", "I64", "BOOL", "C64", "X"])


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_wrong_tensors(path, parts, data):
    header = {name: dict(entry) for name, entry in parts.header.items()}
    name = data.draw(st.sampled_from(sorted(header)))
    kind = data.draw(st.sampled_from(["name", "dtype", "shape", "data_offsets", "missing", "everything"]))
    if kind == "name":
        header[data.draw(names)] = header.pop(name)
    elif kind == "missing":
        del header[name]
    elif kind == "dtype":
        header[name]["dtype"] = data.draw(dtypes)
    elif kind == "everything":
        header[name] = data.draw(wrong)
    else:
        header[name][kind] = data.draw(sizes)
    if header != parts.header:
        assert load(path, parts.joined(header=header)) is None


@pytest.mark.parametrize(
    "change",
    [
        {"rank": 2**60},
        {"rank": 2**20},
        {"channels": 2**12, "width": 2**20, "patch": 2**6, "condition": 2**12},
        {"width": 2**63},
        {"condition": -1},
        {"alpha": float("nan")},
        {"alpha": 1e999},
        {"fingerprint": [float("nan")]},
        {"fingerprint": [1e30]},
        {"layers": {"blocks.0": [2**60, 8]}},
        {"layers": {f"blocks.{index}": [8, 8] for index in range(20_000)}},
        {"layers": {"pop": [8, 8]}},
        {"multiples": [4, 2]},
        {"multiples": "24"},
        {"shared": 1},
        {"rank": True},
        {"patch": 1.0},
        {"training": []},
    ],
)
def test_absurd_values_are_refused(path, parts, change):
    assert load(path, parts.joined(description={**parts.description, **change})) is None


def test_weights_of_several_types(path, parts):
    adapter = load(path, parts.whole)
    adapter.loras.half()
    ddit_rt.save_adapter(adapter, path)  # over the file that it was loaded from
    with pytest.raises(AdapterMismatchError, match="its tensors are F16, F32"):
        ddit_rt.load_adapter(path)


@pytest.mark.parametrize("text", ["", "[]", "3", "null", "[" * 100_000, '{"format": 2}', '{"format": [2]}'])
def test_a_description_that_is_none(path, parts, text):
    header = {**parts.header, "__metadata__": {"ddit_adapter": text}}
    head = json.dumps(header).encode()
    assert load(path, LENGTH.pack(len(head)) + head + parts.data) is None
