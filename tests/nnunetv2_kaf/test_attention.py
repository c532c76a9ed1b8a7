import math

import pytest
import torch

from nnunetv2_kaf.attention import PositionEncoding, SelfBlock, attention_mask


@pytest.fixture
def block() -> SelfBlock:
    torch.manual_seed(0)
    return SelfBlock(16, 4, 2.0).double()


def test_equals_a_loop_over_heads_and_tokens(block: SelfBlock) -> None:
    tokens = torch.randn(2, 5, 16, dtype=torch.float64)
    valid = torch.tensor([[True] * 5, [True, True, True, False, False]])
    out = block(tokens, attention_mask(valid))
    for b in range(2):
        q, k, v = block.qkv(block.attention_norm(tokens[b])).view(5, 3, 4, 4).unbind(1)
        attended = torch.zeros(5, 4, 4, dtype=torch.float64)
        for head in range(4):
            for i in range(5):
                scores = torch.stack([q[i, head] @ k[j, head] / math.sqrt(4) for j in range(5) if valid[b, j]])
                values = torch.stack([v[j, head] for j in range(5) if valid[b, j]])
                attended[i, head] = scores.softmax(0) @ values
        expected = tokens[b] + block.out(attended.flatten(1))
        expected = expected + block.mlp(expected)
        torch.testing.assert_close(out[b], expected)


def test_permutation_equivariance_and_padding_invariance(block: SelfBlock) -> None:
    tokens = torch.randn(1, 6, 16, dtype=torch.float64)
    valid = torch.tensor([[True, True, False, True, True, True]])
    out = block(tokens, attention_mask(valid))
    order = torch.randperm(6)
    torch.testing.assert_close(block(tokens[:, order], attention_mask(valid[:, order])), out[:, order])
    padded = torch.cat([tokens, torch.randn(1, 3, 16, dtype=torch.float64) * 100], dim=1)
    mask = attention_mask(torch.cat([valid, torch.zeros(1, 3, dtype=torch.bool)], dim=1))
    torch.testing.assert_close(block(padded, mask)[:, :6], out)


def test_no_valid_token_gives_no_nan(block: SelfBlock) -> None:
    tokens = torch.randn(2, 4, 16, dtype=torch.float64, requires_grad=True)
    out = block(tokens, attention_mask(torch.zeros(2, 4, dtype=torch.bool)))
    out.sum().backward()
    assert torch.isfinite(out).all()
    assert tokens.grad is not None
    assert torch.isfinite(tokens.grad).all()


def test_position_encoding_is_a_function_of_position_alone() -> None:
    encode = PositionEncoding(3, (8, 12), 16)
    positions = torch.randn(2, 5, 3)
    out = encode(positions)
    assert out.shape == (2, 5, 16)
    torch.testing.assert_close(encode(positions[:, 2:3]), out[:, 2:3])
