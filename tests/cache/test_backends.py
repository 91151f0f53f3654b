"""What each library's codes are worth: the error of a column, its parameters, its independence of other columns."""

from __future__ import annotations

import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from optimum_mla.cache import CacheSettings, available_backends, register_backend
from optimum_mla.cache.backends import _BACKENDS, Backend, Encoded, check_settings, make_backend
from optimum_mla.core.errors import InvalidValueError, MissingDependencyError

KINDS = [("hqq", 8), ("hqq", 4), ("hqq", 3), ("hqq", 2), ("quanto", 8), ("quanto", 4), ("quanto", 2)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
every_kind = pytest.mark.parametrize(("name", "bits"), KINDS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES)


def step_sizes(columns: Tensor, name: str, bits: int) -> Tensor:
    """Distance between neighbouring codes of every column: [N]."""
    x = columns.float()
    if (name, bits) == ("quanto", 8):
        return 2 * x.abs().amax(0) / 255
    return (x.amax(0) - x.amin(0)) / (2**bits - 1)


def decode(backend: Backend, encoded: Encoded, rows: int, dtype: torch.dtype) -> Tensor:
    """Columns [g, N] from packed codes, as the cache computes them."""
    out = torch.empty(encoded.codes.shape[1], rows, dtype=dtype)
    backend.unpack(backend.pack(encoded.codes).t().contiguous(), out)
    out.mul_(encoded.scale[:, None])
    return out.t() if encoded.shift is None else (out + encoded.shift[:, None].to(dtype)).t()


def parameters_of(encoded: Encoded) -> list[Tensor]:
    return [tensor for tensor in encoded[1:] if tensor is not None]


def round_trip(backend: Backend, columns: Tensor) -> Tensor:
    return decode(backend, backend.encode(columns), columns.shape[0], columns.dtype)


@every_dtype
@every_kind
def test_the_error_is_half_a_step(name: str, bits: int, dtype: torch.dtype) -> None:
    columns = torch.randn(64, 300).to(dtype)
    errors = (round_trip(make_backend(name, bits), columns).float() - columns.float()).abs()
    allowed = 0.6 if bits < 8 else 1.3 if dtype == torch.bfloat16 else 0.7
    worst = (errors / step_sizes(columns, name, bits)).max().item()
    assert 0.4 < worst <= allowed


@given(
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from(DTYPES),
    rows=st.integers(1, 20).map(lambda n: 4 * n),
    count=st.integers(1, 9),
    size=st.sampled_from([1e-4, 1e-2, 1.0, 100.0]),
    offset=st.sampled_from([0.0, 1.0, -5.0]),
    seed=st.integers(0, 2**20),
)
def test_size_and_place_of_a_column_do_not_matter(
    kind: tuple[str, int], dtype: torch.dtype, rows: int, count: int, size: float, offset: float, seed: int
) -> None:
    random = torch.rand(rows, count, generator=torch.Generator().manual_seed(seed))
    columns = (size * (4 * random - 2 + offset)).to(dtype)
    columns[0], columns[-1] = size * (offset - 2), size * (offset + 2)  # no narrow ones
    name, bits = kind
    errors = (round_trip(make_backend(name, bits), columns).float() - columns.float()).abs()
    # Scale, zero, difference and product are each rounded once to 16 bits; the smallest scale of float16 is 2^-24.
    rounding = 4 * 2.0 ** (-9 if dtype == torch.bfloat16 else -11) * columns.float().abs().amax(0)
    smallest = 0.0 if dtype == torch.bfloat16 else 2.0**-25 * columns.float().abs().amax(0)
    smallest = smallest / step_sizes(columns, name, bits)
    assert (errors <= 0.52 * step_sizes(columns, name, bits) + rounding + smallest + 1e-7).all()


@every_dtype
@every_kind
def test_constant_columns_come_back(name: str, bits: int, dtype: torch.dtype) -> None:
    constants = torch.tensor([0.0, 0.05, -0.3, 1.0, -7.3, 100.0, 3000.0]).to(dtype)
    columns = constants.expand(32, -1)
    errors = (round_trip(make_backend(name, bits), columns).float() - columns.float()).abs()
    allowed = 2.0**-7 if (name, bits, dtype) == ("quanto", 8, torch.bfloat16) else 2.0**-8  # its scale is rounded too
    assert (errors <= allowed * columns.float().abs()).all()


@every_dtype
@every_kind
def test_a_column_does_not_depend_on_the_others(name: str, bits: int, dtype: torch.dtype) -> None:
    backend = make_backend(name, bits)
    columns = (torch.randn(24, 40) * torch.logspace(-3, 2, 40)).to(dtype)
    columns[:, 7] = 0.25
    stored = backend.encode(columns)
    for picked in ([0, 1], [39, 7], [3, 2, 31], list(range(5, 30))):
        part = backend.encode(columns[:, picked])
        assert torch.equal(stored.codes[:, picked], part.codes)
        for whole_tensor, part_tensor in zip(parameters_of(stored), parameters_of(part), strict=True):
            assert torch.equal(whole_tensor[picked], part_tensor)
        assert torch.equal(decode(backend, part, 24, dtype), decode(backend, stored, 24, dtype)[:, picked])


@every_dtype
@every_kind
def test_parameters_take_16_bits_and_codes_their_bits(name: str, bits: int, dtype: torch.dtype) -> None:
    backend = make_backend(name, bits)
    encoded = backend.encode(torch.randn(40, 6).to(dtype))
    parameters = parameters_of(encoded)
    expected = torch.bfloat16 if dtype == torch.bfloat16 else torch.float16
    assert [p.dtype for p in parameters] == [expected] * (1 if (name, bits) == ("quanto", 8) else 2)
    assert [p.shape for p in parameters] == [(6,)] * len(parameters)
    packed = backend.pack(encoded.codes)
    code_bits = 32 * 4 if bits == 3 else 40 * bits  # ten 3-bit codes a 32-bit number
    assert 8 * packed.element_size() * packed.shape[0] == code_bits
    assert packed.shape[1] == 6


@every_kind
@pytest.mark.parametrize("rows", [8, 40, 44])
def test_codes_survive_packing(rows: int, name: str, bits: int) -> None:
    backend = make_backend(name, bits)
    codes = backend.encode(torch.randn(rows, 30)).codes
    out = torch.empty(30, rows)
    backend.unpack(backend.pack(codes).t().contiguous(), out)
    assert torch.equal(out.t(), codes.float())
    assert codes.float().amax() - codes.float().amin() >= 2**bits - 2


@pytest.mark.compat
@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_hqq_itself_reads_its_codes(bits: int) -> None:
    from hqq.core.quantize import Quantizer

    columns = torch.randn(40, 30)
    codes, scale, shift = make_backend("hqq", bits).encode(columns)
    assert shift is not None
    packing = Quantizer.bit_to_packing[bits]
    offset = 128 if bits == 8 else 0
    meta = {
        "compute_dtype": torch.float32, "packing": packing, "view_as_float": False, "nbits": bits, "axis": 0,
        "group_size": 40, "shape": (40, 30), "scale": scale.float(), "zero": offset - shift.float() / scale.float(),
    }  # fmt: skip
    theirs = Quantizer.dequantize(Quantizer.pack[packing](codes + offset), meta)
    assert (round_trip(make_backend("hqq", bits), columns) - theirs).abs().max() <= 1e-5


@pytest.mark.compat
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_quanto_itself_reads_its_codes(bits: int) -> None:
    from optimum.quanto import AbsmaxOptimizer, MaxOptimizer, qint2, qint4, qint8, quantize_weight

    columns = torch.randn(40, 30).half()
    if bits == 8:
        quantized = quantize_weight(columns, qint8, -1, AbsmaxOptimizer()(columns, qint8, -1))
    else:
        kind = qint4 if bits == 4 else qint2
        quantized = quantize_weight(columns, kind, -1, *MaxOptimizer()(columns, kind, -1), optimized=False)
    errors = (round_trip(make_backend("quanto", bits), columns) - quantized.dequantize()).abs()
    assert errors.max() <= 4e-3  # roundings of float16


@pytest.mark.parametrize(("name", "bits"), [("hqq", 5), ("hqq", 1), ("quanto", 3), ("quanto", 6), ("hqq", 16)])
def test_bits_that_a_backend_cannot_do(name: str, bits: int) -> None:
    with pytest.raises(InvalidValueError) as caught:
        make_backend(name, bits)
    assert (caught.value.field, caught.value.received) == ("bits", bits)
    assert name in str(caught.value)
    with pytest.raises(InvalidValueError):
        check_settings(CacheSettings(bits=bits if bits != 16 else 7, backend=name))


def test_an_unknown_backend_gets_a_suggestion() -> None:
    with pytest.raises(InvalidValueError, match=r"Did you mean quanto\?") as caught:
        make_backend("qanto", 4)
    assert all(name in caught.value.allowed for name in available_backends())
    with pytest.raises(InvalidValueError) as caught:
        make_backend("zzz", 4)
    assert caught.value.remedy == ""


@pytest.mark.parametrize(("name", "library"), [("hqq", "hqq"), ("quanto", "optimum.quanto")])
def test_a_missing_library_names_the_extra(name: str, library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make_backend(name, 4)
    for loaded in [module for module in sys.modules if module.startswith(f"{library}.")]:
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setitem(sys.modules, library, None)
    monkeypatch.delitem(sys.modules, f"optimum_mla.cache.{name}")
    with pytest.raises(MissingDependencyError, match=rf"pip install 'optimum-mla\[{name}\]'"):
        make_backend(name, 4)
    with pytest.raises(MissingDependencyError):
        check_settings(CacheSettings(bits=4, backend=name))
    check_settings(CacheSettings(backend=name))  # nothing to quantize, so no library is needed


def test_a_backend_can_be_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("optimum_mla.cache.backends._BACKENDS", dict(_BACKENDS))
    register_backend("mine", "optimum_mla.cache.hqq:HQQBackend")
    assert available_backends() == ("hqq", "quanto", "mine")
    assert make_backend("mine", 4).bits == 4


@pytest.mark.parametrize(
    ("field", "value"),
    [("group_size", 4), ("group_size", 30), ("residual_length", -1), ("rope_bits", 4)],
)
def test_settings_that_cannot_be(field: str, value: int) -> None:
    with pytest.raises(InvalidValueError) as caught:
        CacheSettings(**{field: value})
    assert (caught.value.field, caught.value.received) == (field, value)


def test_settings_survive_a_config() -> None:
    settings = CacheSettings(bits=3, group_size=32, residual_length=5, rope_bits=8)
    assert CacheSettings.from_dict(settings.to_dict()) == settings
    assert CacheSettings.from_dict(None) == CacheSettings()
    assert not CacheSettings().quantized
    assert CacheSettings(rope_bits=8).quantized
    with pytest.raises(InvalidValueError, match="latent_cache"):
        CacheSettings.from_dict({"nbits": 4})


@every_dtype
@every_kind
@pytest.mark.parametrize("relative_range", [1e-5, 1e-4, 1e-3, 3e-3])
def test_narrow_columns_come_back(relative_range: float, name: str, bits: int, dtype: torch.dtype) -> None:
    """A range far below the numbers themselves must not overflow a zero in 16 bits."""
    columns = (torch.tensor([1.0, -3.0, 100.0]) * (1 + relative_range * torch.rand(32, 3))).to(dtype)
    errors = (round_trip(make_backend(name, bits), columns).float() - columns.float()).abs()
    assert (errors <= 2.0**-7 * columns.float().abs()).all()


@every_dtype
@every_kind
def test_a_lone_column_is_encoded_as_among_others(name: str, bits: int, dtype: torch.dtype) -> None:
    """One row, one token, one group: what a short batch without a window quantizes at every step."""
    backend = make_backend(name, bits)
    columns = torch.randn(24, 5).to(dtype)
    stored, alone = backend.encode(columns), backend.encode(columns[:, 3:4])
    assert torch.equal(alone.codes, stored.codes[:, 3:4])
    for whole_tensor, part_tensor in zip(parameters_of(stored), parameters_of(alone), strict=True):
        assert torch.equal(whole_tensor[3:4], part_tensor)
    assert torch.equal(decode(backend, alone, 24, dtype), decode(backend, stored, 24, dtype)[:, 3:4])
