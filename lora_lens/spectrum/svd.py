"""The exact thin singular value decomposition of one matrix, faster than LAPACK's.

On the CPU the symmetric eigenproblem goes to the LAPACK that numpy and scipy bring, which is faster
than torch's on some processors and frees the GIL; on an accelerator everything stays there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import reduce

import numpy as np
import torch
from torch import Tensor

from lora_lens.spectrum import _lapack as lapack

# Below this share of the largest singular value, a vector that is divided by its own length loses
# its orthogonality to the others (eps s_0^2 / s_i s_j grows past 1e-6); QR makes those orthogonal again.
TAIL = 1e-5
ORTHONORMAL = 3e-6  # how far from it float32 vectors of a few components may be
BLOCK = 2**18  # matrix entries that are converted to float64 at a time

Factors = tuple[Tensor, Tensor, Tensor]


def thin_svd(matrix: Tensor) -> Factors:
    """U (m, k), S (k,), V^T (k, n) of a matrix (m, n) of any floating dtype, k = min(m, n), S descending.

    V comes from the symmetric eigenproblem of the smaller Gram matrix and
    U S from W V, which is several times faster than a bidiagonalisation. The
    small end, where that alone would lose U's orthogonality, is decomposed
    again inside the orthogonal complement of the rest, so rank-deficient and
    ill-conditioned matrices come out as exact as others: singular values to
    about 1e-15 of the largest, U and V orthonormal to 1e-6 or better.

    Returns:
        S in float64, U and V^T in float32, on the matrix's device.
    """
    if matrix.shape[0] < matrix.shape[1]:
        left, values, right = thin_svd(matrix.T)
        return right.T, values, left.T
    v = _eigenvectors(matrix).flip(-1)
    left, values = _normed_product(matrix, v)
    if not (values > TAIL * values.max()).all():
        left, values, v = _with_exact_tail(matrix.double(), v)
    if (values.diff() > 0).any():  # neighbours that rounding has swapped
        order = values.argsort(descending=True, stable=True)
        left, values, v = left[:, order], values[order], v[:, order]
    return left.float(), values, v.T.float()


def _with_exact_tail(matrix: Tensor, v: Tensor) -> Factors:
    """U (m, k), S (k,) and V (n, k) in float64, nearly sorted."""
    scaled = matrix @ v  # column i is s_i u_i
    values = torch.linalg.vector_norm(scaled, dim=0)
    head = int((values > TAIL * values.max()).cummin(0).values.sum())
    u = scaled[:, :head] / values[:head]
    q, r = torch.linalg.qr(torch.cat([u, scaled[:, head:]], dim=1))
    left, tail_values, right = torch.linalg.svd(r[head:, head:])
    u = torch.cat([u, q[:, head:] @ left], dim=1)
    v = torch.cat([v[:, :head], v[:, head:] @ right.T], dim=1)
    return u, torch.cat([values[:head], tail_values]), v


def some_components(matrix: Tensor, choose: Callable[[Tensor], Tensor]) -> tuple[Factors, Tensor]:
    """U_c (m, c), S (k,) and V_c^T (c, n): all singular values, and the vectors of c components; and these.

    For a share of the components in a share of the time: the Gram matrix is
    reduced to a tridiagonal one, only the wanted eigenvectors of that are
    computed, by inverse iteration (LAPACK's stein), and only those are
    transformed back. Where that is not orthonormal to 3e-6, for components far
    below the largest or among many equal ones, all are computed after all.

    Args:
        matrix: (m, n), any floating dtype.
        choose: given the singular values (k,), descending, float64, on the CPU, returns the indices
            (c,) of the components, ascending; may be called twice.

    Returns:
        The factors, of dtypes and device as of :func:`thin_svd`, and the indices.
    """
    if matrix.shape[0] < matrix.shape[1]:
        (left, values, right), components = some_components(matrix.T, choose)
        return (right.T, values, left.T), components
    reducible = matrix.device.type == "cpu" and matrix.shape[1] > 1
    if reducible and (found := _by_inverse_iteration(matrix, choose)):
        return found
    left, values, right = thin_svd(matrix)
    components = choose(values.cpu())
    return (left[:, components], values, right[components]), components


def singular_values(matrix: Tensor) -> Tensor:
    """S (k,) alone in float64, to about 1e-8 of the largest value.

    The square roots of the smaller Gram matrix's eigenvalues: no vectors, and
    no copy of the matrix in float64.
    """
    tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T
    if tall.device.type == "cpu":
        squares = torch.from_numpy(lapack.eigenvalues(_gram(tall)))
    else:
        squares = torch.linalg.eigvalsh(_gram_there(tall))
    return squares.clamp_min(0).sqrt().flip(0)


def product_svd(b: Tensor, a: Tensor) -> Factors:
    """U (m, r), S (r,), V^T (r, n) of B A without forming it; b (m, r), a (r, n), both float64."""
    q_b, r_b = torch.linalg.qr(b)
    q_a, r_a = torch.linalg.qr(a.T)
    left, values, right = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    return q_b @ left, values, right @ q_a.T


def product_norm(b: Tensor, a: Tensor) -> Tensor:
    """The Frobenius norm of B A without forming it, in float64; b (m, r), a (r, n)."""
    b, a = b.double(), a.double()
    return ((b.T @ b) * (a @ a.T)).sum().clamp_min(0).sqrt()


def _gram(matrix: Tensor) -> np.ndarray:
    """The upper triangle of W^T W (n, n), float64, of a tall matrix on the CPU; until the next call."""
    n = matrix.shape[1]
    total = lapack.scratch("gram", n * n).reshape(n, n)
    total.fill(0)
    for exact in _exact_blocks(matrix):
        lapack.add_gram(exact.numpy(), total)
    return total


def _gram_there(matrix: Tensor) -> Tensor:
    """W^T W on the matrix's accelerator."""
    return reduce(torch.add, (block.T @ block for block in _exact_blocks(matrix)))


def _eigenvectors(matrix: Tensor) -> Tensor:
    """Of W^T W, as columns, eigenvalues ascending."""
    if matrix.device.type != "cpu":
        vectors: Tensor = torch.linalg.eigh(_gram_there(matrix)).eigenvectors
        return vectors
    return torch.from_numpy(np.linalg.eigh(_gram(matrix), UPLO="U")[1])


def _by_inverse_iteration(
    matrix: Tensor, choose: Callable[[Tensor], Tensor]
) -> tuple[Factors, Tensor] | None:
    k = matrix.shape[1]
    components = torch.empty(0, dtype=torch.long)

    def pick(squares: np.ndarray) -> np.ndarray:
        nonlocal components
        components = choose(_roots(squares))
        return k - 1 - components.flip(0).numpy()  # LAPACK counts from the smallest

    found = lapack.some_eigenvectors(_gram(matrix), pick)
    if found is None:
        return None
    values = _roots(found[0])
    if not (values[components] > TAIL * values[0]).all():
        return None
    v = torch.from_numpy(found[1]).flip(0).T  # (n, c)
    left, _ = _normed_product(matrix, v)
    right = v.float()
    eye = torch.eye(len(components), dtype=torch.float32)
    if not all(((basis.T @ basis - eye).abs() <= ORTHONORMAL).all() for basis in (left, right)):
        return None
    return (left, values, right.T), components


def _roots(squares: np.ndarray) -> Tensor:
    return torch.from_numpy(squares).clamp_min(0).sqrt().flip(0)


def _normed_product(matrix: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """W V with columns of length one (m, c), float32, and the lengths they had (c,), float64."""
    product = torch.empty(matrix.shape[0], v.shape[1], dtype=torch.float32, device=matrix.device)
    squares = v.new_zeros(v.shape[1])
    for exact, rows in zip(_exact_blocks(matrix), _blocks(product, matrix.shape[1]), strict=True):
        part = _product(exact, v)
        squares += part.square().sum(0)
        rows.copy_(part)
    norms = squares.sqrt()
    return product.div_(norms), norms


def _product(a: Tensor, b: Tensor) -> Tensor:
    """By numpy on the CPU: two libraries' threads, taking turns, would wait for each other."""
    return a @ b if a.device.type != "cpu" else torch.from_numpy(a.numpy() @ b.numpy())


def _exact_blocks(matrix: Tensor) -> Iterator[Tensor]:
    """Rows in float64, in the order of memory that the matrix has; on the CPU each until the next."""
    for block in _blocks(matrix, matrix.shape[1]):
        if block.device.type != "cpu":
            yield block.double()
            continue
        room = torch.from_numpy(lapack.scratch("block", block.numel()))
        by_columns = block.stride(0) < block.stride(1)
        exact = room.view(*reversed(block.shape)).T if by_columns else room.view(block.shape)
        yield exact.copy_(block)


def _blocks(matrix: Tensor, columns: int) -> tuple[Tensor, ...]:
    """Rows, few enough for a float64 copy to be small and enough for fast products."""
    return torch.split(matrix, max(BLOCK // columns, columns // 2, 1))
