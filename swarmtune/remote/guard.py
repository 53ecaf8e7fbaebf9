"""Gradients as they were: a backward that fails half-way must not leave half of its gradients behind."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn


class GradientGuard:
    """Remembers the gradients of what learns when a backward begins, and puts them back when the body's part of it fails.

    Parameters behind the body (a head, a norm) have theirs before the body is asked for its own, so an error there would leave a step half-applied.
    """

    def __init__(self, learnable: Callable[[], Iterable[nn.Parameter]]) -> None:
        self._learnable = learnable
        self._graph: int | None = None
        self._before: list[tuple[nn.Parameter, Tensor | None]] = []

    def watch(self, module: nn.Module, arguments: Any, output: Any) -> None:
        """A forward hook of the model: whichever output a backward begins at, it is noticed."""
        if isinstance(output, Tensor):
            if output.requires_grad:
                output.register_hook(self._begin)
        elif isinstance(output, dict | tuple | list):
            for part in output.values() if isinstance(output, dict) else output:
                self.watch(module, arguments, part)

    def _begin(self, gradient: Tensor) -> None:
        graph = torch._C._current_graph_task_id()
        if graph != self._graph:  # of several outputs in one backward, the first counts
            self._graph = graph
            self._before = [(parameter, None if parameter.grad is None else parameter.grad.clone()) for parameter in self._learnable()]

    def restore(self) -> None:
        """Put back what was there before the backward that is under way."""
        if self._graph is not None and torch._C._current_graph_task_id() == self._graph:
            for parameter, gradient in self._before:
                parameter.grad = gradient
        self.forget()

    def forget(self) -> None:
        """Let go of the copies."""
        self._before, self._graph = [], None
