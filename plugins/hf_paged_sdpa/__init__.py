"""The torch attention backend: serves CPU, and is the reference everywhere.

Keys and values of a request are read where they lie. Blocks in a row are one view, so a request whose blocks follow
each other costs one attention call and no copy; what lies in several runs is attended run by run and merged by
log-sum-exp (Milakov & Gimelshein 2018, arXiv:1805.02867). No mask spans two requests.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from hf_paged import hookimpl
from hf_paged.batch import CacheSpec
from hf_paged.protocols import AttentionBackend

NAME = "sdpa"


@hookimpl
def register_attention_backends(
    register: Callable[[str, Callable[[CacheSpec], AttentionBackend]], None], config: Any
) -> None:
    """Offer the backend under the name "sdpa"."""

    def build(spec: CacheSpec) -> AttentionBackend:
        from hf_paged_sdpa.backend import SDPABackend

        return SDPABackend(config.deterministic)

    register(NAME, build)


@hookimpl(trylast=True)
def select_attention_backend(spec: CacheSpec, device: Any, names: Sequence[str]) -> str | None:
    """Serve whatever no other backend claims."""
    return NAME
