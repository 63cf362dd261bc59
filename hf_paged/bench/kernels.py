"""`hf-paged bench kernels`: each kernel against what the GPU can do, measured in the same run."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from hf_paged.errors import ConfigError


def add_parser(subparsers: Any) -> None:
    """Add the command to `hf-paged bench`."""
    parser = subparsers.add_parser(
        "kernels",
        help="time, bandwidth and share of the GPU's limit of each kernel",
        description="Time each kernel in graph replay, beside torch's own attention, against the limits of this GPU.",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, with GPU and versions")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the benchmark of `hf_paged_kernels`.

    Raises:
        ConfigError: there is no CUDA GPU.
    """
    if not torch.cuda.is_available():
        raise ConfigError(f"bench kernels needs a CUDA GPU; torch {torch.__version__} sees none here")
    from hf_paged_kernels import bench

    bench.main([] if args.json is None else ["--json", str(args.json)])
    return 0
