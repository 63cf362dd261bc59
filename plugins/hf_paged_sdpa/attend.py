"""Attention of a few queries over one run of keys, with the log-sum-exp that lets runs be merged."""

from __future__ import annotations

import torch

_FLASH_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    *,
    causal: bool = False,
    mask: torch.Tensor | None = None,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax(scale · q kᵀ) v, and the log-sum-exp of the scores.

    Args:
        query: [kv heads, group, n, head_dim]; the query heads that share a key head are one group.
        key, value: [kv heads, m, head_dim], [kv heads, m, value_head_dim].
        causal: query i sees keys 0 to i; n equals m then.
        mask: bool [n, m], True where a query sees a key. Every query has to see one.
        softcap: scores become softcap · tanh(score / softcap).

    Returns:
        Output [kv heads, group, n, value_head_dim] in the query's dtype, log-sum-exp [kv heads, group, n] in float32,
        or float64 for a float64 query.
    """
    if not flash_serves(query, value, softcap):
        return _by_definition(query, key, value, scale, causal, mask, softcap)
    group, n = query.shape[1:3]
    if n == 1 and mask is None:  # the group's heads are as good as queries of one head
        output, lse = flash(query.transpose(1, 2), key[:, None], value[:, None], scale)
        return output.transpose(1, 2), lse.transpose(1, 2)
    shared = (-1, group, -1, -1)  # one key head for the whole group, without a copy
    additive = None if mask is None else query.new_zeros(mask.shape).masked_fill_(~mask, -torch.inf)
    return flash(query, key[:, None].expand(shared), value[:, None].expand(shared), scale, causal, additive)


def flash_serves(query: torch.Tensor, value: torch.Tensor, softcap: float | None) -> bool:
    """Whether torch's fused CPU attention can do it."""
    same_size = query.shape[-1] == value.shape[-1]
    return query.device.type == "cpu" and not softcap and same_size and query.dtype in _FLASH_DTYPES


def flash(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    causal: bool = False,
    mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The fused CPU attention of torch, with its log-sum-exp; [batch, heads, queries, head_dim] each."""
    # The public function over it doesn't return the log-sum-exp.
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, causal, attn_mask=mask, scale=scale
    )


def merge(parts: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """One attention from several over disjoint keys: outputs weighted by exp(log-sum-exp)."""
    if len(parts) == 1:
        return parts[0]
    outputs, lses = zip(*parts, strict=True)
    stacked = torch.stack(lses)
    total = stacked.logsumexp(0)
    weights = (stacked - total).exp()[..., None]
    merged = sum(weight * output for weight, output in zip(weights, outputs, strict=True))
    assert isinstance(merged, torch.Tensor)
    return merged.to(outputs[0].dtype), total


def with_sinks(output: torch.Tensor, lse: torch.Tensor, sinks: torch.Tensor) -> torch.Tensor:
    """Let a logit without a value join each head's softmax: it takes its share of the weight and gives nothing.

    Args:
        output: [kv heads, group, n, value_head_dim].
        lse: [kv heads, group, n].
        sinks: [kv heads · group].
    """
    share = torch.sigmoid(lse - sinks.view(lse.shape[0], lse.shape[1], 1).to(lse.dtype))
    return output * share[..., None].to(output.dtype)


def _by_definition(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    causal: bool,
    mask: torch.Tensor | None,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    wide = torch.promote_types(query.dtype, torch.float32)
    scores = (query.to(wide) @ key[:, None].to(wide).transpose(-1, -2)) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    lse = scores.logsumexp(-1)
    weights = (scores - lse[..., None]).exp()
    return (weights @ value[:, None].to(wide)).to(query.dtype), lse
