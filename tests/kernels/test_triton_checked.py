"""What a check refuses, and that what has passed is not checked again: whatever a check looks at
makes another signature.
"""

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from arkcache.errors import InputError
from arkcache.kernels import triton_attention, triton_checked
from arkcache.kernels.arguments import Counts, Window
from arkcache.kernels.triton_checked import Checked, check, signature

CHECKED = torch.zeros(2, 3)
"""What passes as float32 [2, 3]."""


@pytest.mark.parametrize(
    ("shape", "how"),
    [
        ((2, 3), {}),
        ((2, None), {}),
        ((None, None), {"strides": "last stride 1"}),
        ((2, 3), {"device": CHECKED.device}),
    ],
)
def test_what_a_kernel_reads_passes(shape: tuple[int | None, ...], how: dict[str, Any]) -> None:
    assert check("it", CHECKED, shape, torch.float32, **how) == (2, 3)
    check("it", CHECKED, shape, torch.float16, torch.float32, **how)


def test_how_a_tensor_may_lie() -> None:
    wide, turned = torch.zeros(2, 6)[:, :3], torch.zeros(3, 2).T
    for tensor, refusing in ((wide, ["contiguous"]), (turned, ["contiguous", "last stride 1"])):
        for strides in ("contiguous", "last stride 1", "any strides"):
            if strides in refusing:
                with pytest.raises(InputError, match=f"strides .*expected .*, {strides}$"):
                    check("it", tensor, (2, 3), torch.float32, strides=strides)
            else:
                check("it", tensor, (2, 3), torch.float32, strides=strides)


@pytest.mark.parametrize(
    ("shape", "dtype", "how"),
    [
        ((2, 4), torch.float32, {}),
        ((3, None), torch.float32, {}),
        ((2, 3, None), torch.float32, {}),
        ((None,), torch.float32, {"strides": "any strides"}),
        ((2, 3), torch.int32, {}),
        ((2, 3), torch.float32, {"device": torch.device("meta")}),
    ],
)
def test_what_a_kernel_does_not_read_is_refused(
    shape: tuple[int | None, ...], dtype: torch.dtype, how: dict[str, Any]
) -> None:
    with pytest.raises(InputError, match=r"^it is torch\.float32 \[2, 3\] on cpu .*: expected "):
        check("it", CHECKED, shape, dtype, **how)


def test_a_refusal_says_what_was_given_and_what_is_expected() -> None:
    with pytest.raises(InputError) as refusal:
        check("window.key", torch.zeros(4, 5).T, (5, None), torch.int32, torch.int64)
    assert str(refusal.value) == (
        "window.key is torch.float32 [5, 4] on cpu with strides (1, 5): expected torch.int32 or "
        "torch.int64 [5, any], contiguous"
    )


def test_signatures_tell_apart_what_checks_look_at() -> None:
    tensor = torch.zeros(4, 6)
    others = [
        *(tensor[:, :5], tensor[1:], tensor.half(), tensor.to("meta")),
        *(tensor.T.contiguous().T, tensor[None], None),
    ]
    keys = [signature(each) for each in (tensor, *others)]
    assert len(set(keys)) == len(keys)
    assert signature(tensor, tensor) == signature(tensor, torch.ones(4, 6))
    assert signature(tensor, None) != signature(None, tensor)


def test_signatures_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_checked, "MAX_SIGNATURES", 3)
    checked = Checked()
    for key in range(10):
        checked.add(key)
        assert key in checked
        assert sum(each in checked for each in range(10)) <= 3


def test_what_is_refused_is_refused_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """After the same shapes were right in another dtype, too, and right ones are checked once."""
    query, plane = torch.randn(2, 3, 8), torch.randn(2, 5, 8)
    counts = torch.tensor([5, 3], dtype=torch.int32)
    sealed = torch.zeros(2, dtype=torch.int32)

    def attend(lengths: torch.Tensor) -> torch.Tensor:
        return triton_attention.paged_attention(
            query,
            None,
            Window(plane, plane),
            Counts(lengths, sealed),
            layout=None,
            num_sink_pages=0,
            scale=1.0,
        )

    expected = attend(counts)
    for _ in range(2):
        with pytest.raises(InputError, match="lengths"):
            attend(counts.long())
    monkeypatch.setattr(triton_attention, "check", None)
    assert torch.equal(attend(counts.clone()), expected)
