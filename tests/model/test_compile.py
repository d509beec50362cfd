import pytest
import torch
from backbones import KINDS, batch_of, learned, policy_on
from robots import HEADS
from torch._dynamo.utils import counters

from vla import InputError
from vla.config import LoraConfig, LossConfig

QWEN = ("qwen2_5_vl", "qwen3_vl")  # whose image encoders cut the images apart, by lengths that only the device knows


@pytest.fixture(autouse=True)
def fresh():
    torch.compiler.reset()
    counters.clear()


def assert_compiled_equals_eager(batch, eager, compiled, fullgraph=True):
    compiled.compile(backend="aot_eager", fullgraph=fullgraph)  # the graphs, but nothing fused
    expected = learned(eager, batch)
    for name, found in learned(compiled, batch).items():
        torch.testing.assert_close(found, expected[name], rtol=1e-4, atol=1e-5, msg=name)
    first = counters["stats"]["unique_graphs"]
    assert first
    learned(compiled, batch)
    assert counters["stats"]["unique_graphs"] == first  # nothing is compiled a second time
    assert compiled.state_dict().keys() == eager.state_dict().keys()
    return first


@pytest.mark.parametrize("head", HEADS)
def test_compiled_policy_equals_eager_one(head):
    options = HEADS[head] | {"max_tokens": 36, "loss": LossConfig(lm=0.1)}
    eager, compiled = (policy_on({}, **options) for _ in range(2))
    assert_compiled_equals_eager(batch_of(eager), eager, compiled)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        *((kind, {}) for kind in KINDS),
        *((kind, {"gradient_checkpointing": True}) for kind in ("smolvlm", "qwen3_vl", "siglip2")),
        ("smolvlm", {"lora": LoraConfig(rank=2)}),
    ],
)
def test_compiled_pretrained_policy_equals_eager_one(originals, kind, options):
    eager, compiled = (policy_on(originals(kind), **options) for _ in range(2))
    assert_compiled_equals_eager(batch_of(eager), eager, compiled, fullgraph=kind not in QWEN)


def test_layers_of_a_kind_are_compiled_once():
    graphs = []
    for layers in (2, 5):
        fresh.__wrapped__()
        eager, compiled = (policy_on({}, max_tokens=36, language_layers=layers, head_layers=layers) for _ in range(2))
        graphs.append(assert_compiled_equals_eager(batch_of(eager), eager, compiled))
    assert graphs[0] == graphs[1]


def test_policy_that_is_not_on_a_gpu_is_not_captured():
    with pytest.raises(InputError, match=r"on the device cpu; policy.to\('cuda'\) before"):
        policy_on({}, max_tokens=36).capture()
