"""Attention by clip: which kernel takes a batch, and in which precision."""

from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.testing import assert_close

from whisper_aut.models import attention
from whisper_aut.models.attention import (
    Segments,
    cast_for_products,
    clip_attention,
    use_flash_attention_3,
)

LENGTHS = (3, 5, 5)
needs_kernels = pytest.mark.skipif(
    torch.__version__ < "2.11", reason="flash attention with windows, and FA3, are new in 2.11"
)


@needs_kernels
@pytest.mark.parametrize(
    ("capability", "dtype", "flash"),
    [
        ((8, 0), torch.bfloat16, True),
        ((9, 0), torch.float16, True),
        ((7, 5), torch.float16, False),  # a T4
        ((9, 0), torch.float32, False),
    ],
)
def test_flash_attention_takes_half_precision_from_ampere_on(
    capability: tuple[int, int], dtype: torch.dtype, flash: bool, monkeypatch: pytest.MonkeyPatch
):
    taken: list[torch.dtype] = []

    def varlen_attn(query: Tensor, *_, window_size: Any, **__) -> Tensor:
        taken.append(query.dtype)
        return query

    monkeypatch.setattr(attention, "varlen_attn", varlen_attn)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    attention._has_flash.cache_clear()
    with FakeTensorMode():
        segments = Segments.of(LENGTHS, LENGTHS, torch.device("cuda"))
        query, key, value = (
            torch.empty(sum(LENGTHS), 2, 4, device="cuda", dtype=dtype) for _ in range(3)
        )
        attended = clip_attention(query, key, value, segments)
    attention._has_flash.cache_clear()
    assert attended.shape == (sum(LENGTHS), 2, 4)
    assert taken == ([dtype] if flash else [])


def test_attention_runs_in_the_precision_of_the_values():
    query, key, value = torch.randn(
        3, sum(LENGTHS), 2, 4, generator=torch.Generator().manual_seed(0)
    )
    segments = Segments.of(LENGTHS, LENGTHS, query.device)
    mixed = clip_attention(query, key, value.bfloat16(), segments)
    assert mixed.dtype == torch.bfloat16
    assert_close(mixed.float(), clip_attention(query, key, value, segments), atol=0.02, rtol=0.02)


@pytest.mark.parametrize("causal", [False, True])
def test_a_key_head_serves_a_group_of_query_heads(causal: bool):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(sum(LENGTHS), 6, 4, generator=generator)
    key, value = torch.randn(2, sum(LENGTHS), 2, 4, generator=generator)
    segments = Segments.of(LENGTHS, LENGTHS, query.device)
    attended = clip_attention(query, key, value, segments, causal=causal)
    start = 0
    for length in LENGTHS:
        rows = slice(start, start + length)
        for head in range(6):
            q, k, v = query[rows, head], key[rows, head // 3], value[rows, head // 3]
            scores = q @ k.T / 2
            if causal:
                scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -torch.inf)
            assert_close(attended[rows, head], scores.softmax(-1) @ v)
        start += length


def test_flash_attention_gets_keys_without_copies_for_each_query_head(
    monkeypatch: pytest.MonkeyPatch,
):
    heads: list[int] = []

    def varlen_attn(query: Tensor, key: Tensor, *_, window_size: Any, **__) -> Tensor:
        heads.append(key.shape[1])
        return query

    monkeypatch.setattr(attention, "varlen_attn", varlen_attn)
    monkeypatch.setattr(attention, "_has_flash", lambda device: True)
    segments = Segments.of(LENGTHS, LENGTHS, torch.device("cpu"))
    query, key = (torch.zeros(sum(LENGTHS), n, 4, dtype=torch.bfloat16) for n in (6, 2))
    clip_attention(query, key, key, segments)
    assert heads == [2]


@pytest.mark.parametrize(
    ("signature", "expected"),
    [("*_, window_size=None", True), ("*_, is_causal=False", False), ("", False)],
    ids=["PyTorch 2.11", "PyTorch 2.10", "before"],
)
def test_older_versions_of_pytorch_attend_by_sdpa(
    signature: str, expected: bool, monkeypatch: pytest.MonkeyPatch
):
    varlen_attn = eval(f"lambda {signature}: None") if signature else None
    monkeypatch.setattr(attention, "varlen_attn", varlen_attn)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert attention._has_flash.__wrapped__(torch.device("cuda")) is expected


@needs_kernels
@pytest.mark.parametrize(
    ("capability", "problem", "used"),
    [((9, 0), None, True), ((8, 0), None, False), ((9, 0), RuntimeError("no kernels"), False)],
)
def test_flash_attention_3_is_used_on_hopper_where_it_is_installed(
    capability: tuple[int, int],
    problem: Exception | None,
    used: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    activated = []

    def activate(name: str) -> None:
        if problem:
            raise problem
        activated.append(name)

    monkeypatch.setattr(torch.nn.attention, "activate_flash_attention_impl", activate)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert not use_flash_attention_3(), "it is not installed"
    monkeypatch.setattr(attention, "find_spec", lambda name: ModuleType(name))
    assert use_flash_attention_3() is used
    assert activated == (["FA3"] if used else [])
    assert ("no kernels" in caplog.text) is (problem is not None)


def test_a_tensor_is_cast_once_for_all_products_that_read_it():
    hidden = torch.randn(3, 4)
    assert cast_for_products(hidden) is hidden
    with torch.autocast("cpu", torch.bfloat16):
        assert cast_for_products(hidden).dtype == torch.bfloat16
