"""The spectral norms of a model and of a checkpoint, each converged to a tolerance.

    python examples/norms_of_a_model.py

On a file the command line does the same, with a picture: specnorm-ext report model.safetensors --plot norms.png
"""

from __future__ import annotations

import torch
from torch import nn

import specnorm_ext


def main() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    # All matrices in one call an iteration; each leaves once it has converged.
    norms = specnorm_ext.spectral_norms(model, tol=1e-3)
    for name, e in norms.items():
        print(
            f"{name:40} {e.value:7.4f}   at least {e.lower:7.4f}   {e.n_reads:3} reads of the matrix"
        )
    truth = {
        n: torch.linalg.matrix_norm(x, 2) for n, x in model.state_dict().items() if x.dim() == 2
    }
    error = max(abs(norms[name].value / s.item() - 1) for name, s in truth.items())
    print(f"largest relative error against the SVD: {error:.1e}")
    assert error < 1e-3

    # A state dict, as torch.load or safetensors give it, goes the same way; so does a list of tensors.
    state = model.state_dict()
    largest = max(specnorm_ext.spectral_norms(state).items(), key=lambda item: item[1].value)
    print(f"largest of the state dict: {largest[0]}, {largest[1].value:.4f}")
    (one,) = specnorm_ext.spectral_norms([torch.diag(torch.tensor([3.0, 2.0, 1.0]))])
    print(f"of a matrix: {one.value:.4f}")


if __name__ == "__main__":
    main()
