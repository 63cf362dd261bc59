"""The decorator that makes a public op of a kernel's launcher, its torch reference and one checked argument list."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from . import checks

P = ParamSpec("P")
R = TypeVar("R")

SOURCE = """
def {name}{head}:
    {result} = check({checked})
    implementation(impl, {first}.device)
    if impl == "torch":
        reference({reference})
    elif watched():
        custom({launch})
    else:
        launch({launch})
    return {result}
"""


def op(
    launch: Callable[..., None], reference: Callable[..., None] | None = None, *, writes: tuple[str, ...]
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Makes a public op of a function that checks arguments.

    The decorated function has the op's argument list, with types and defaults. It checks the arguments and returns the
    first of `writes`, allocated if the caller gave none. The op then calls `launch`, or `reference` if its argument
    `impl` is "torch", with the arguments that these name, and returns that tensor. A function without a reference has
    no `impl`.

    While torch compiles, records gradients or dispatches to a mode, `launch` runs as the custom op
    `hf_paged_kernels::NAME`, which is also the attribute `op`. Elsewhere it is called directly, since torch's dispatch
    of an op written in Python takes the host longer than the launch. The calls are generated here, once, so that none
    of this costs time when the op runs.

    Args:
        launch: launches the kernel; returns nothing.
        reference: computes the same in plain torch, slowly, on any device: the kernel's specification. It works in
            float64 where the inputs are float64, else in float32, and rounds once at the end, unless it says more.
        writes: the arguments that `launch` writes to.
    """

    def decorate(check: Callable[P, R]) -> Callable[P, R]:
        name, signature = check.__name__, inspect.signature(check)
        parameters = list(signature.parameters.values())
        head = [p.replace(annotation=p.empty) for p in parameters]
        custom = _custom_op(name, launch, signature, writes)
        source = SOURCE.format(
            name=name,
            head=signature.replace(parameters=head, return_annotation=signature.empty),
            checked=", ".join(f"{p.name}={p.name}" if p.kind is p.KEYWORD_ONLY else p.name for p in parameters),
            first=parameters[0].name,
            result=writes[0],
            reference=_names(reference),
            launch=_names(launch),
        )
        scope: dict[str, Any] = {
            "impl": "triton", "check": check, "implementation": checks.implementation, "reference": reference,
            "launch": launch, "custom": custom, "watched": _watched,
        }  # fmt: skip
        exec(compile(source, f"<op {name}>", "exec"), scope)
        made: Any = functools.update_wrapper(scope[name], check)
        made.op = custom
        return made

    return decorate


def _names(function: Callable[..., None] | None) -> str:
    return "" if function is None else ", ".join(inspect.signature(function).parameters)


def _custom_op(name: str, launch: Callable[..., None], signature: inspect.Signature, writes: tuple[str, ...]) -> Any:
    """Registers `launch` as a custom op with the types of `signature`; it returns nothing, and so does its fake."""

    def run(*args: Any) -> None:
        launch(*args)

    taken = [
        signature.parameters[name].replace(
            kind=inspect.Parameter.POSITIONAL_OR_KEYWORD, default=inspect.Parameter.empty
        )
        for name in inspect.signature(launch).parameters
    ]
    run.__signature__ = inspect.Signature(taken, return_annotation=None)  # type: ignore[attr-defined]
    custom = torch.library.custom_op(f"hf_paged_kernels::{name}", run, mutates_args=writes)
    custom.register_fake(lambda *args, **kwargs: None)
    return custom


def _watched() -> bool:
    return torch.compiler.is_compiling() or torch.is_grad_enabled() or is_in_torch_dispatch_mode()
