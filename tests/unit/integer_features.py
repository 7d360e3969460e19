"""Random integer features for the tests of the selection's choices."""

import torch
from hypothesis import strategies as st

# (seed, candidates, features, coarse)
CASES = st.tuples(st.integers(0, 10_000), st.integers(1, 14), st.integers(1, 4), st.booleans())


def features_of(seed: int, n: int, m: int, coarse: bool) -> torch.Tensor:
    """Random int16 features; coarse: few values, which makes many ties."""
    generator = torch.Generator().manual_seed(seed)
    limit = 2 if coarse else 32767
    return torch.randint(-limit, limit + 1, (n, m), generator=generator, dtype=torch.int16)
