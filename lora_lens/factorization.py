"""The exact thin singular value decomposition of one matrix, faster than LAPACK's."""

from __future__ import annotations

import torch
from torch import Tensor

# Below this share of the largest singular value, a vector that is divided by its own length loses
# its orthogonality to the others (eps s_0^2 / s_i s_j grows past 1e-6); those are mended by QR.
TAIL = 1e-5


def thin_svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U (m, k), S (k,), V^T (k, n) of a float64 matrix (m, n), with k = min(m, n) and S descending.

    V comes from the symmetric eigenproblem of the smaller Gram matrix and
    U S from W V, which is several times faster than a bidiagonalisation. The
    small end, where that alone would lose U's orthogonality, is decomposed
    again inside the orthogonal complement of the rest, so rank-deficient and
    ill-conditioned matrices come out as exact as others: singular values to
    about 1e-15 of the largest, U and V orthonormal to 1e-7 or better.
    """
    if matrix.shape[0] < matrix.shape[1]:
        left, values, right = thin_svd(matrix.T)
        return right.T, values, left.T
    v = torch.linalg.eigh(matrix.T @ matrix)[1].flip(-1)
    scaled = matrix @ v  # column i is s_i u_i
    values = torch.linalg.vector_norm(scaled, dim=0)
    head = int((values > TAIL * values.max()).cummin(0).values.sum())
    u = scaled[:, :head] / values[:head]
    if head < len(values):
        q, r = torch.linalg.qr(torch.cat([u, scaled[:, head:]], dim=1))
        left, tail_values, right = torch.linalg.svd(r[head:, head:])
        u = torch.cat([u, q[:, head:] @ left], dim=1)
        values = torch.cat([values[:head], tail_values])
        v = torch.cat([v[:, :head], v[:, head:] @ right.T], dim=1)
    order = values.argsort(descending=True, stable=True)
    return u[:, order], values[order], v[:, order].T


def singular_values(matrix: Tensor) -> Tensor:
    """S (k,) alone, of a float64 matrix, to about 1e-8 of the largest value.

    The square roots of the smaller Gram matrix's eigenvalues: no vectors, and no more memory than
    two copies of the matrix.
    """
    gram = matrix @ matrix.T if matrix.shape[0] < matrix.shape[1] else matrix.T @ matrix
    return torch.linalg.eigvalsh(gram).clamp_min(0).sqrt().flip(0)


def product_svd(b: Tensor, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U (m, r), S (r,), V^T (r, n) of B A without forming it; b (m, r), a (r, n), both float64."""
    q_b, r_b = torch.linalg.qr(b)
    q_a, r_a = torch.linalg.qr(a.T)
    left, values, right = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    return q_b @ left, values, right @ q_a.T
