"""Whose fault it is that a model's code raises: the model's, which is refused then, or the machine's."""

from __future__ import annotations

import errno
import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from tandem.errors import ModelRefused, TandemError
from tandem.out_of_memory import is_out_of_memory

log = logging.getLogger(__name__)

# torch has no class of its own for these.
_WORDS_OF_THE_MACHINE = ("CUDA error", "CUBLAS_STATUS", "cuDNN error")
_CODES_OF_THE_MACHINE = {errno.ENOMEM, errno.ENOSPC, errno.EIO, errno.EMFILE, errno.ENFILE}


def of_the_machine(error: Exception) -> bool:
    """Whether an error in a model's code says nothing about the model: out of memory, a full disk, a broken library.

    A package that is not installed is another matter: the model asks for it.
    """
    if isinstance(error, ImportError):
        # Python names what it could not import; transformers, which wants a package, does not.
        return error.name is not None and not isinstance(error, ModuleNotFoundError)
    if isinstance(error, OSError):
        return error.errno in _CODES_OF_THE_MACHINE
    told = isinstance(error, RuntimeError) and any(words in str(error) for words in _WORDS_OF_THE_MACHINE)
    return told or is_out_of_memory(error) or isinstance(error, torch.AcceleratorError)


@contextmanager
def refusing(what: str) -> Iterator[None]:
    """What a model's own code raises inside becomes ModelRefused, whatever it is; the machine's failures pass."""
    try:
        yield
    except TandemError:
        raise
    except Exception as error:
        if of_the_machine(error):
            raise
        log.debug("%s fails", what, exc_info=True)
        raise ModelRefused(f"{what} fails: {in_words(error)}") from error


def in_words(error: Exception) -> str:
    """One line. The class of an error that is not meant for people says more than a bare key or index."""
    first, *others = [line.strip() for line in str(error).strip().split("\n")]
    line = f"{first} {others[0]}" if others and first.endswith(":") else first
    return line if line and isinstance(error, OSError | ValueError | ImportError) else f"{type(error).__name__}: {line}"
