"""Forward hooks over a model, as a context manager: who is running, and what it returned.

Only forward hooks and tensor hooks are used. Full backward hooks wrap every output in an autograd function of
their own, which breaks on in-place ops, skips nested outputs and costs five times as much.

One hook that torch calls after every module serves them all: hooking hundreds of modules one by one costs
more than the hooks do. Only a module with forward hooks of the user's own gets one of its own, to run after
theirs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.jit import ScriptModule
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.hooks import RemovableHandle

from gradflow.recording.layout import ModelLayout

OnOutput = Callable[[str, nn.Module, Any], None]
"""Called with the fully qualified name, the module and what its forward returned."""


class ModuleHooks:
    """Keeps the stack of running modules and passes each output on.

    TorchScript modules take no hooks and are not seen.

    Args:
        layout: The model's.
        on_output: Called after each forward of each module.
    """

    def __init__(self, layout: ModelLayout, on_output: OnOutput) -> None:
        self.running: list[str] = []
        """Fully qualified names of the modules that are running, outermost first."""
        self.scopes: list[int] = []
        """A serial number for each of those calls."""
        self._serial = 0
        self._names = layout.names
        self._stacked = layout.stacked_modules
        self._on_output = on_output
        self._own = frozenset(module for module in self._names if module._forward_hooks)
        self._others = {module: name for module, name in self._names.items() if module not in self._own}
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> ModuleHooks:
        try:
            self._handles.append(register_module_forward_hook(self._after_any))
            for module in self._stacked | self._own:
                self._register(module)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.running.clear()
        self.scopes.clear()

    def _register(self, module: nn.Module) -> None:
        if isinstance(module, ScriptModule):
            return
        if module in self._stacked:
            self._handles.append(module.register_forward_pre_hook(self._before, prepend=True))
        if module in self._own:
            self._handles.append(module.register_forward_hook(self._after))

    def _before(self, module: nn.Module, args: Any) -> None:
        self._serial += 1
        self.scopes.append(self._serial)
        self.running.append(self._names[module])

    def _after_any(self, module: nn.Module, args: Any, output: Any) -> None:
        name = self._others.get(module)
        if name is not None:
            self._leave(name, module, output)

    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        self._leave(self._names[module], module, output)

    def _leave(self, name: str, module: nn.Module, output: Any) -> None:
        if module in self._stacked:
            # A forward that raised and was caught left its name, and those inside it, behind.
            while self.running and self.running.pop() != name:
                pass
            del self.scopes[len(self.running) :]
        self._on_output(name, module, output)
