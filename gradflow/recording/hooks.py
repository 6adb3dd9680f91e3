"""Forward hooks on every module of a model, as a context manager: who is running, and what it returned.

Only forward hooks and tensor hooks are used. Full backward hooks wrap every output in an autograd function of
their own, which breaks on in-place ops, skips nested outputs and costs five times as much.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.jit import ScriptModule
from torch.utils.hooks import RemovableHandle

OnOutput = Callable[[str, nn.Module, Any], None]
"""Called with the fully qualified name, the module and what its forward returned."""


COMPILED_CHILD = "_orig_mod"
"""Where ``torch.compile`` keeps the module it wraps."""


def qualified_names(module: nn.Module) -> dict[nn.Module, str]:
    """Every module once, under its first fully qualified name; compiled wrappers are looked through."""
    return {
        child: clean_name(path)
        for path, child in module.named_modules()
        if COMPILED_CHILD not in child._modules
    }


def clean_name(path: str) -> str:
    """A fully qualified name without the steps that ``torch.compile`` adds."""
    return (
        ".".join(part for part in path.split(".") if part != COMPILED_CHILD)
        if COMPILED_CHILD in path
        else path
    )


def runs_no_children(module: nn.Module) -> bool:
    """True for a leaf of torch.nn itself, whose forward is known to run one op and no user code."""
    return not module._modules and type(module).__module__.startswith("torch.nn.modules.")


class ModuleHooks:
    """Keeps the stack of running modules and passes each output on.

    Args:
        names: Modules and their fully qualified names.
        on_output: Called after each forward of each module.
    """

    def __init__(self, names: dict[nn.Module, str], on_output: OnOutput) -> None:
        self._names = names
        self._on_output = on_output
        self.running: list[str] = []
        """Fully qualified names of the modules that are running, outermost first."""
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> ModuleHooks:
        try:
            for module, name in self._names.items():
                self._register(module, name)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.running.clear()

    def _register(self, module: nn.Module, name: str) -> None:
        if isinstance(module, ScriptModule):
            return  # TorchScript takes no hooks
        on_output, stack = self._on_output, self.running
        if runs_no_children(module):

            def after_leaf(module: nn.Module, args: Any, output: Any) -> None:
                on_output(name, module, output)

            self._handles.append(module.register_forward_hook(after_leaf))
            return

        def before(module: nn.Module, args: Any) -> None:
            stack.append(name)

        def after(module: nn.Module, args: Any, output: Any) -> None:
            # A forward that raised and was caught left its name, and those inside it, behind.
            while stack and stack.pop() != name:
                pass
            on_output(name, module, output)

        self._handles.append(module.register_forward_pre_hook(before, prepend=True))
        self._handles.append(module.register_forward_hook(after))
