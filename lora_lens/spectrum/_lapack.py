"""The symmetric eigenproblem of a Gram matrix by BLAS and LAPACK: in place, and outside Python's lock.

numpy computes all eigenvectors or none and copies its input; scipy's own wrappers hold Python's
global lock, so that threads wait for each other. scipy publishes its BLAS and LAPACK to compiled code
as well (the functions of ``scipy.linalg.cython_lapack``), and what ctypes calls runs outside the lock.
"""

from __future__ import annotations

import ctypes
import mmap
import threading
from collections.abc import Callable
from functools import lru_cache
from types import ModuleType

import numpy as np
from scipy.linalg import cython_blas, cython_lapack

KEPT = 2**25  # bytes
BLOCKING = 64  # columns that LAPACK treats together when the workspace is large enough

_kept = threading.local()


def scratch(role: str, size: int) -> np.ndarray:
    """Float64 numbers of any value, (size,), in memory of its own.

    On the heap, the results that outlive it would lie between its pieces, and
    a long run would grow with every matrix. Up to 32 MiB are
    kept until the thread ends: the next call for the same ``role`` gets them.
    """
    held = getattr(_kept, role, None)
    if held is None or held.size < size:
        held = _mapped(size)
        if held.nbytes <= KEPT:
            setattr(_kept, role, held)
    return held[:size]


def add_gram(block: np.ndarray, total: np.ndarray) -> None:
    """Add X^T X of a block X (rows, n), in C or Fortran order, to the upper triangle of ``total`` (n, n)."""
    rows, n = block.shape
    layout = (b"N", n, rows, 1.0, block, n) if block.flags.c_contiguous else (b"T", n, rows, 1.0, block, rows)
    _call(cython_blas, "dsyrk", b"L", *layout, 1.0, total, n)


def eigenvalues(matrix: np.ndarray) -> np.ndarray:
    """Ascending, (n,), of a symmetric matrix (n, n) given by its upper triangle; overwritten.

    Householder reduction to a tridiagonal matrix (sytrd), whose eigenvalues
    come from QR without vectors (sterf): Anderson et al. 1999, "LAPACK users'
    guide", section 2.4.4.

    Raises:
        numpy.linalg.LinAlgError: the iteration does not converge.
    """
    return _eigenvalues_of_tridiagonal(*_tridiagonal(matrix)[:2])


def some_eigenvectors(
    matrix: np.ndarray, pick: Callable[[np.ndarray], np.ndarray]
) -> tuple[np.ndarray, np.ndarray] | None:
    """All eigenvalues (n,), ascending, and the eigenvectors (c, n) of those that ``pick`` chooses.

    As :func:`eigenvalues`, then the wanted eigenvectors by inverse iteration
    (stein), transformed back (ormtr). Among many nearly equal eigenvalues
    inverse iteration can fail, so ask whether the vectors are orthonormal.

    Args:
        matrix: (n, n), n >= 2, as for :func:`eigenvalues`.
        pick: given the eigenvalues, returns indices (c,), ascending.

    Returns:
        None where inverse iteration does not converge.
    """
    n = len(matrix)
    diagonal, beside, scales, room = _tridiagonal(matrix)
    values = _eigenvalues_of_tridiagonal(diagonal.copy(), beside.copy())
    wanted = values[pick(values)]
    c = len(wanted)
    vectors = np.empty((c, n))
    if c == 0:
        return values, vectors
    block, end = np.ones(n, np.intc), np.full(n, n, np.intc)  # one block, the whole matrix
    spare, failed = np.empty((2, n), np.intc)
    if _run("dstein", n, diagonal, beside, c, wanted, block, end, vectors, n, room, spare, failed):
        return None
    _run("dormtr", b"L", b"L", b"N", n, c, matrix, n, scales, vectors, n, room, room.size)
    return values, vectors


def _mapped(size: int) -> np.ndarray:
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    memory = mmap.mmap(-1, max(8 * size, 1), **private)
    return np.frombuffer(memory, count=size)


def _tridiagonal(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Diagonal, off-diagonal, scales of the reflectors that ``matrix`` now holds, and workspace to reuse."""
    n = len(matrix)
    diagonal, beside, scales = np.empty((3, n))
    room = np.empty(BLOCKING * (n + BLOCKING + 1))
    _run("dsytrd", b"L", n, matrix, n, diagonal, beside, scales, room, room.size)
    return diagonal, beside, scales, room


def _eigenvalues_of_tridiagonal(diagonal: np.ndarray, beside: np.ndarray) -> np.ndarray:
    if _run("dsterf", len(diagonal), diagonal, beside):
        raise np.linalg.LinAlgError("the eigenvalues do not converge")
    return diagonal


def _run(name: str, *arguments: bytes | int | np.ndarray) -> int:
    """Returns LAPACK's ``info``: 0 for success."""
    info = np.zeros(1, np.intc)
    _call(cython_lapack, name, *arguments, info)
    return int(info[0])


def _call(library: ModuleType, name: str, *arguments: bytes | int | float | np.ndarray) -> None:
    """Fortran takes everything by reference; a C-ordered (rows, columns) array is its transpose there."""
    _routine(library, name, len(arguments))(*map(_reference, arguments))


def _reference(argument: bytes | int | float | np.ndarray) -> object:
    if isinstance(argument, np.ndarray):
        return ctypes.c_void_p(argument.ctypes.data)
    if isinstance(argument, bytes):
        return ctypes.byref(ctypes.c_char(argument))
    return ctypes.byref(ctypes.c_int(argument) if isinstance(argument, int) else ctypes.c_double(argument))


@lru_cache
def _routine(library: ModuleType, name: str, arguments: int) -> Callable[..., None]:
    capsule = library.__pyx_capi__[name]
    # Prototypes of our own: the functions that ctypes.pythonapi hands out are the whole process's.
    name_of = ctypes.PYFUNCTYPE(ctypes.c_char_p, ctypes.py_object)(("PyCapsule_GetName", ctypes.pythonapi))
    pointer_of = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
        ("PyCapsule_GetPointer", ctypes.pythonapi)
    )
    address = pointer_of(capsule, name_of(capsule))
    return ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * arguments)(address)
