"""A few operations on every number of some tensors, as one kernel on a GPU."""

import warnings
from collections.abc import Callable
from functools import wraps

import torch
from torch import Tensor

from ia2mini.errors import out_of_memory


def fused(function: Callable) -> Callable:
    """`function` as one kernel on a GPU, through torch.compile; as it is on a CPU, or where no compiler works."""
    kernel = None

    @wraps(function)
    def call(*tensors: Tensor) -> Tensor:
        nonlocal kernel
        compiler_failed = kernel is function
        if not tensors[0].is_cuda or compiler_failed:
            return function(*tensors)
        # only now: the compiler alone takes seconds to import
        kernel = kernel or torch.compile(function, dynamic=True)
        try:
            return kernel(*tensors)
        except Exception as error:  # a missing compiler raises various exceptions
            if out_of_memory(error):
                raise
            result = function(*tensors)  # raises too if the compiler was not the cause
            warnings.warn(f"{function.__name__} runs unfused: {type(error).__name__}", stacklevel=2)
            kernel = function
            return result

    return call
