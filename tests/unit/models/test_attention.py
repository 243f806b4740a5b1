"""Attention by clip: which kernel takes a batch, and in which precision."""

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.testing import assert_close

from whisper_aut.models import attention
from whisper_aut.models.attention import Segments, clip_attention

LENGTHS = (3, 5, 5)


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

    def varlen_attn(query: Tensor, *_, **__) -> Tensor:
        taken.append(query.dtype)
        return query

    monkeypatch.setattr(attention, "varlen_attn", varlen_attn)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    attention._has_flash.cache_clear()
    segments = Segments.of(LENGTHS, LENGTHS, torch.device("cpu"))
    with FakeTensorMode():
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
