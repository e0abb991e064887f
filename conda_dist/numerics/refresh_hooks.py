"""Functions of the user's that are called when a matrix has been decomposed."""

from collections import OrderedDict
from collections.abc import Callable

from torch.utils.hooks import RemovableHandle

_hooks: OrderedDict[int, Callable[[str], None]] = OrderedDict()  # a dict has no weak references


def register_refresh_hook(hook: Callable[[str], None]) -> RemovableHandle:
    """Registers a function that is called whenever a step has decomposed a matrix on this rank.

    The first refresh of a large model may take minutes. With this hook a trainer can show that it
    goes on, and tell its watchdog. The hook is for all optimizers of this process.

    Args:
        hook: called in the thread of the step, with the fully qualified name of the parameter; once
            for each matrix, also of those that were decomposed together. What it raises is raised
            by the step, on all ranks. With bases from gradients that is true of a parameter's first
            step and of those that are due to refresh; in other steps, as when a failed refresh is
            tried again, it is raised on this rank alone, and others may wait for it.

    Returns:
        A handle, whose ``remove()`` removes the hook; also a context manager.
    """
    handle = RemovableHandle(_hooks)
    _hooks[handle.id] = hook
    return handle


def call_refresh_hooks(name: str) -> None:
    """Calls all hooks with the name of a parameter."""
    for hook in tuple(_hooks.values()):
        hook(name)
