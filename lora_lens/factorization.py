"""The exact thin singular value decomposition of one matrix, faster than LAPACK's.

On the CPU the symmetric eigenproblem goes to the LAPACK that numpy and scipy bring, which is faster
than torch's on some processors and frees the GIL; on an accelerator everything stays there.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy.linalg import lapack
from torch import Tensor

# Below this share of the largest singular value, a vector that is divided by its own length loses
# its orthogonality to the others (eps s_0^2 / s_i s_j grows past 1e-6); those are mended by QR.
TAIL = 1e-5
ORTHONORMAL = 3e-6  # how far from it float32 vectors of a few components may be
BLOCK = 2**20  # matrix entries that are converted to float64 at a time

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
    v = _eigenvectors(_gram(matrix)).flip(-1)
    left, values = _normed_product(matrix, v)
    if not (values > TAIL * values.max()).all():
        left, values, v = _with_exact_tail(matrix.double(), v)
    order = values.argsort(descending=True, stable=True)
    if (values.diff() > 0).any():  # neighbours that rounding has swapped
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


def some_components(matrix: Tensor, components: Tensor) -> Factors:
    """U_c (m, c), S (k,) and V_c^T (c, n): all singular values, and the vectors of c components.

    For a share of the components in a share of the time: the Gram matrix is
    reduced to a tridiagonal one, only the wanted eigenvectors of that are
    computed, by inverse iteration (LAPACK's stein), and only those are
    transformed back. Where that is not orthonormal to 1e-6, for components far
    below the largest or among many equal ones, all are computed after all.

    Args:
        matrix: (m, n), any floating dtype.
        components: (c,) indices, ascending, counted from the largest singular value.

    Returns:
        Dtypes and device as of :func:`thin_svd`.
    """
    if matrix.shape[0] < matrix.shape[1]:
        left, values, right = some_components(matrix.T, components)
        return right.T, values, left.T
    if matrix.device.type == "cpu" and (found := _by_inverse_iteration(matrix, components)):
        return found
    left, values, right = thin_svd(matrix)
    return left[:, components], values, right[components]


def singular_values(matrix: Tensor) -> Tensor:
    """S (k,) alone in float64, to about 1e-8 of the largest value.

    The square roots of the smaller Gram matrix's eigenvalues: no vectors, and
    no copy of the matrix in float64.
    """
    gram = _gram(matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T)
    on_cpu = gram.device.type == "cpu"
    squares = torch.from_numpy(np.linalg.eigvalsh(gram.numpy())) if on_cpu else torch.linalg.eigvalsh(gram)
    return squares.clamp_min(0).sqrt().flip(0)


def product_svd(b: Tensor, a: Tensor) -> Factors:
    """U (m, r), S (r,), V^T (r, n) of B A without forming it; b (m, r), a (r, n), both float64."""
    q_b, r_b = torch.linalg.qr(b)
    q_a, r_a = torch.linalg.qr(a.T)
    left, values, right = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    return q_b @ left, values, right @ q_a.T


def _gram(matrix: Tensor) -> Tensor:
    """W^T W (n, n) in float64 of a tall matrix (m, n)."""
    total = None
    for block in _blocks(matrix):
        product = _own_product(block.double())
        total = product if total is None else total.add_(product)
    return total


def _own_product(block: Tensor) -> Tensor:
    if block.device.type != "cpu":
        return block.T @ block
    array = block.numpy()
    return torch.from_numpy(array.T @ array)  # numpy sees the symmetry and computes one half


def _eigenvectors(gram: Tensor) -> Tensor:
    """The columns, eigenvalues ascending."""
    if gram.device.type != "cpu":
        return torch.linalg.eigh(gram)[1]
    return torch.from_numpy(np.linalg.eigh(gram.numpy())[1])


def _by_inverse_iteration(matrix: Tensor, components: Tensor) -> Factors | None:
    k = matrix.shape[1]
    if k < 3 or not len(components):
        return None
    picked = k - 1 - components.flip(0).numpy()  # LAPACK counts from the smallest
    reflectors, diagonal, beside, tau, _ = lapack.dsytrd(
        _gram(matrix).numpy().T, lower=1, lwork=64 * k, overwrite_a=1
    )
    squares, failed = lapack.dsterf(diagonal, beside)
    if failed:
        return None
    whole = np.ones(k, np.int32), np.full(k, k, np.int32)  # one block that ends at k
    vectors, failed = lapack.dstein(diagonal, beside, squares[picked], *whole)
    if failed:
        return None
    vectors[1:], *_ = lapack.dormqr("L", "N", reflectors[1:, :-1], tau, vectors[1:], 64 * k)
    v = torch.from_numpy(vectors).flip(-1)  # (n, c)
    values = torch.from_numpy(squares).clamp_min(0).sqrt().flip(0)
    if not values[components].min() > TAIL * values[0]:
        return None
    left, _ = _normed_product(matrix, v)
    eye = torch.eye(len(components))
    worst = max((basis.T @ basis - eye).abs().max() for basis in (left, v.float()))
    return (left, values, v.T.float()) if worst <= ORTHONORMAL else None


def _normed_product(matrix: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """W V with columns of length one (m, c), float32, and the lengths they had (c,), float64."""
    product = torch.empty(matrix.shape[0], v.shape[1], device=matrix.device)
    squares = v.new_zeros(v.shape[1])
    for block, rows in zip(_blocks(matrix), _blocks(matrix, product), strict=True):
        exact = block.double() @ v
        squares += exact.square().sum(0)
        rows.copy_(exact)
    norms = squares.sqrt()
    return product.div_(norms), norms


def _blocks(matrix: Tensor, like: Tensor | None = None) -> tuple[Tensor, ...]:
    """Rows of the matrix, few enough for a float64 copy to be small and enough for fast products."""
    columns = matrix.shape[1]
    return (matrix if like is None else like).split(max(BLOCK // columns, columns // 2, 1))
