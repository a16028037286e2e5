"""Imports the installed module, says what it is, and runs each op and a training step. Exit code 0 if all is well.

Not a pytest file: `make other-torch` runs it in an environment that has nothing but torch and the wheel.
"""

from __future__ import annotations

import torch

import specnorm_ext


def main() -> None:
    for key, value in specnorm_ext.build_info().items():
        print(f"  {key:18} {value}")
    torch.manual_seed(0)
    ops = torch.ops.specnorm_ext
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        weights = [torch.randn(m, n).to(dtype) for m, n in ((40, 90), (90, 40), (1, 7))]
        pairs = [specnorm_ext.functional.init_uv(w) for w in weights]
        u, v = [p[0] for p in pairs], [p[1] for p in pairs]
        version = v[0]._version
        sigma = ops.power_iteration_(weights, u, v, 300)
        assert v[0]._version > version
        expected = torch.stack([torch.linalg.matrix_norm(w.double(), 2) for w in weights])
        error = (sigma / expected - 1).abs().max().item()
        assert error < 1e-3, (dtype, error)
        bilinear = ops.sigma(weights, u, v)
        assert torch.allclose(bilinear, sigma, rtol=1e-5), (bilinear, sigma)
        normalized = ops.normalize(weights, u, v, sigma)
        assert torch.allclose(normalized[0].float(), (weights[0] / sigma[0]).float(), rtol=1e-2)
        print(f"  {dtype}: sigma within {error:.1e} of the SVD")
    layer = specnorm_ext.spectral_norm(torch.nn.Linear(30, 20))
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    for _ in range(5):
        layer(torch.randn(8, 30)).square().sum().backward()
        optimizer.step()
    assert abs(torch.linalg.matrix_norm(layer.eval().weight, 2).item() - 1) < 0.1
    refused = ""
    try:
        ops.power_iteration_([torch.randn(3, 4)], [torch.randn(3)], [torch.randn(5)])
    except ValueError as error:
        refused = str(error)
    assert refused.startswith("power_iteration_: expected v[0]"), refused
    print(
        f"ok: built with torch {specnorm_ext.build_info()['torch_built_with']}, ran on {torch.__version__}"
    )


if __name__ == "__main__":
    main()
