"""On a CUDA device: models whose small operations are kernels of their own. ``make test-gpu``."""

import pytest
import torch

from pacellm.model.fused import fuse, unfuse
from tests.models import tiny

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("joins", [True, False])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "phi3", "smollm3"])
def test_a_fused_model_computes_the_same(family, joins):
    module = tiny(family, dtype=torch.bfloat16).cuda()
    ids = torch.arange(3, 80, device="cuda")[None]
    expected = module(ids).logits.float()
    found = fuse(module, joins=joins)
    layers = module.config.num_hidden_layers
    assert found["ffns"] == joins * layers
    assert found["norms"] > layers
    assert family == "smollm3" or found["rotary"] == layers
    for _ in range(2):  # what was put together stays so
        similar = torch.nn.functional.cosine_similarity(module(ids).logits.float(), expected, dim=-1)
        assert float(similar.min()) > 0.995
        assert fuse(module, joins=joins) == found
    unfuse(module)
    torch.testing.assert_close(module(ids).logits.float(), expected, rtol=0.02, atol=0.02)
