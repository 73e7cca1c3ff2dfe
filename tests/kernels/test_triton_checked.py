"""What has passed is not checked again; whatever a check looks at makes another signature."""

import pytest
import torch

pytest.importorskip("triton")

from arkcache.errors import InputError
from arkcache.kernels import triton_attention, triton_checked
from arkcache.kernels.triton_checked import Checked, signature


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
    monkeypatch.setattr(triton_checked, "MOST_SIGNATURES", 3)
    checked = Checked()
    for key in range(10):
        checked.add(key)
        assert key in checked
        assert sum(each in checked for each in range(10)) <= 3


def test_what_is_refused_is_refused_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """After the same shapes were right in another dtype, too, and right ones are checked once."""
    query, window = torch.randn(2, 3, 8), torch.randn(2, 5, 8)
    counts = torch.tensor([5, 3], dtype=torch.int32)
    sealed = torch.zeros(2, dtype=torch.int32)

    def attend(lengths: torch.Tensor) -> torch.Tensor:
        nothing = (None, None, None, None)
        return triton_attention.paged_attention(
            *(query, *nothing, window, window, lengths, sealed),
            layout=None,
            num_sink_pages=0,
            scale=1.0,
        )

    expected = attend(counts)
    for _ in range(2):
        with pytest.raises(InputError, match="lengths"):
            attend(counts.long())
    monkeypatch.setattr(triton_attention, "_check_all", None)
    assert torch.equal(attend(counts.clone()), expected)
