"""Each operator's derivative against torch's autograd, with broadcasts that are only known when the graph runs."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper

from aggregation.errors import ConfigError
from edgeadapt.bases.traininggraph import GRADIENT
from edgeadapt.formats.layout import Floats
from export.onnx import derivatives
from export.onnx.derivatives import differentiate
from tests.support import refused

X, Y, ROW = (2, 3, 4), (3, 1), (4,)
F = torch.nn.functional
Function = Callable[..., torch.Tensor]
CASES: list[tuple[str, Sequence[tuple[int, ...]], Function]] = [
    ("y = Add(a, b)", (X, Y), torch.add),
    ("y = Sub(a, b)", (X, ROW), torch.sub),
    ("y = Sub(b, a)", (X, Y), lambda a, b: b - a),
    ("y = Mul(a, b)", (X, Y), torch.mul),
    ("y = Mul(a, a)", (X,), torch.square),
    ("y = Div(a, b)", (X, ROW), torch.div),
    ("y = Div(b, a)", (X, Y), lambda a, b: b / a),
    ("y = MatMul(a, b)", (X, (4, 5)), torch.matmul),
    ("y = MatMul(a, b)", ((5, 2, 3, 4), (5, 2, 4, 3)), torch.matmul),
    ("y = MatMul(a, b)", ((1, 3, 4), (5, 4, 2)), torch.matmul),
    ("y = MatMul(a, b)", ((3, 4), (5, 4, 2)), torch.matmul),
    ("y = MatMul(a, b)", ((3, 4), (4, 2)), torch.matmul),
    ("y = Gemm(a, b, c)", ((3, 4), (4, 2), (2,)), lambda a, b, c: a @ b + c),
    ("y = Gemm<transB=1>(a, b, c)", ((3, 4), (2, 4), (2,)), lambda a, b, c: a @ b.T + c),
    ("c = Greater(a, b) y = Where(c, a, b)", (X, Y), torch.maximum),
    ("y = Clip(a, low, high)", (X,), lambda a: a.clamp(-0.5, 0.7)),
    ("y = Pow(a, two)", (X,), lambda a: a**2),
    ("y = Pow(a, three)", (X,), lambda a: a**3),
    ("y = ReduceSum<keepdims=0>(a, middle)", (X,), lambda a: a.sum(1)),
    ("y = ReduceSum<keepdims=1>(a, middle)", (X,), lambda a: a.sum(1, keepdim=True)),
    ("y = ReduceSum<keepdims=0>(a)", (X,), torch.sum),
    ("y = ReduceMean<keepdims=0>(a, middle)", (X,), lambda a: a.mean(1)),
    ("y = ReduceL2<keepdims=1>(a, last)", (X,), lambda a: a.norm(dim=-1, keepdim=True)),
    ("y = ReduceL2<keepdims=0>(a, last)", (X,), lambda a: a.norm(dim=-1)),
    ("y = Softmax<axis=-1>(a)", (X,), lambda a: a.softmax(-1)),
    ("y = Softmax<axis=1>(a)", (X,), lambda a: a.softmax(1)),
    ("y = LogSoftmax<axis=-1>(a)", (X,), lambda a: a.log_softmax(-1)),
    (
        "y = LayerNormalization<axis=-1, epsilon=1e-5>(a, b, c)",
        (X, ROW, ROW),
        lambda a, b, c: F.layer_norm(a, ROW, b, c),
    ),
    ("y = Reshape(a, pair)", (X,), lambda a: a.reshape(4, 6)),
    ("y = Flatten<axis=2>(a)", (X,), lambda a: a.flatten(0, 1)),
    ("y = Unsqueeze(a, middle)", (X,), lambda a: a.unsqueeze(1)),
    ("y = Squeeze(a, last)", ((2, 1),), lambda a: a.squeeze(-1)),
    ("y = Expand(a, triple)", (Y,), lambda a: a.expand(2, 3, 4)),
    ("y = Transpose<perm=[2, 0, 1]>(a)", (X,), lambda a: a.permute(2, 0, 1)),
    ("y = Transpose(a)", (X,), lambda a: a.permute(2, 1, 0)),
    ("y = Gather<axis=1>(a, first)", (X,), lambda a: a[:, 0]),
    ("y = Gather<axis=-1>(a, first)", (X,), lambda a: a[..., 0]),
    ("y = Gather<axis=-2>(a, middle)", (X,), lambda a: a[..., 1:2, :]),
    ("y = Gather<axis=0>(a, rows)", (X,), lambda a: a[[1, 0, 1]]),
    (
        "y = GatherElements<axis=-1>(a, columns)",
        ((3, 4),),
        lambda a: a.gather(-1, torch.tensor([[3, 3], [0, 1], [2, 0]])),
    ),
    ("y = GatherND(a, places)", (X,), lambda a: a[[1, 0, 1], [2, 0, 2]]),
    ("y = Slice(a, middle, two_rows, middle)", (X,), lambda a: a[:, 1:2]),
    ("y = Slice(a, backwards, beyond, ends, ones)", (X,), lambda a: a[:, -2:, -9:]),
    ("y = Slice(a, middle, beyond_one, last)", (X,), lambda a: a[..., 1:]),
    ("y = Concat<axis=1>(a, b)", (X, (2, 5, 4)), lambda a, b: torch.cat([a, b], 1)),
    ("y = Concat<axis=-1>(b, a, a)", (X, (2, 3, 1)), lambda a, b: torch.cat([b, a, a], -1)),
    ("y = Pad(a, ends, two, middle)", (X,), lambda a: F.pad(a, (0, 0, 1, 2), value=2.0)),
    ('y = Gelu<approximate="none">(a)', (X,), F.gelu),
    ('y = Gelu<approximate="tanh">(a)', (X,), lambda a: F.gelu(a, approximate="tanh")),
    ("y = Identity(a)", (X,), torch.clone),
    ("y = Neg(a)", (X,), torch.neg),
    ("y = Exp(a)", (X,), torch.exp),
    ("e = Exp(a) y = Log(e)", (X,), torch.clone),
    ("e = Exp(a) y = Sqrt(e)", (X,), lambda a: a.exp().sqrt()),
    ("y = Reciprocal(a)", (X,), torch.reciprocal),
    ("y = Tanh(a)", (X,), torch.tanh),
    ("y = Sigmoid(a)", (X,), torch.sigmoid),
    ("y = Relu(a)", (X,), torch.relu),
]
CONSTANTS = (
    "int64[1] middle = {1}, int64[2] ends = {1, 2}, int64[1] last = {-1}, int64[2] pair = {4, 6}, "
    "int64[3] triple = {2, 3, 4}, int64[3] rows = {1, 0, 1}, int64[1] two_rows = {2}, int64[1] beyond_one = {99}, "
    "int64[2] backwards = {-2, -9}, int64[2] beyond = {99, 99}, int64[2] ones = {1, 1}, "
    "int64[3,2] columns = {3, 3, 0, 1, 2, 0}, int64[3,2] places = {1, 2, 0, 0, 1, 2}, "
    "int64 first = {0}, float two = {2.0}, float three = {3.0}, float low = {-0.5}, float high = {0.7}"
)


def graph_of(body: str, shapes: Sequence[tuple[int, ...]], *, known: bool) -> onnx.ModelProto:
    """A graph of the inputs a, b, c that returns the sum of y, weighted so that its elements differ."""
    model = onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["" : 20]> g (float[N] a) => (float total) <{CONSTANTS}> '
        f"{{ {body} s = Sin(y) total = ReduceSum<keepdims=0>(s) }}"
    )
    del model.graph.input[:]
    for name, shape in zip("abc", shapes, strict=False):
        stated = list(shape) if known else [f"{name}{axis}" for axis in range(len(shape))]
        model.graph.input.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, stated))
    return model


def sin(to: Any, node: onnx.NodeProto, gradient: str, _: set[int]) -> dict[int, str]:
    return {0: to.add("Mul", gradient, to.add("Cos", node.input[0]))}


@pytest.fixture(autouse=True)
def with_sines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(derivatives, "RULES", derivatives.RULES | {"Sin": sin})


def found_by(model: onnx.ModelProto, values: dict[str, Floats]) -> dict[str, Floats]:
    made = differentiate(model, "total", list(values))
    onnx.checker.check_model(made)
    session = ort.InferenceSession(made.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [f"{name}{GRADIENT}" for name in values]
    return dict(zip(values, session.run(names, values), strict=True))


@pytest.mark.parametrize("known", [True, False], ids=["shapes known", "shapes symbolic"])
@pytest.mark.parametrize(("body", "shapes", "function"), CASES, ids=[case[0] for case in CASES])
def test_a_derivative_is_torchs(body: str, shapes: Sequence[tuple[int, ...]], function: Function, known: bool) -> None:
    rng = np.random.default_rng(1)
    values = {n: rng.standard_normal(s).astype(np.float32) for n, s in zip("abc", shapes, strict=False)}
    tensors = {name: torch.from_numpy(value).requires_grad_() for name, value in values.items()}
    expected = torch.autograd.grad(function(*tensors.values()).sin().sum(), list(tensors.values()))
    found = found_by(graph_of(body, shapes, known=known), values)
    for name, wanted in zip(values, expected, strict=True):
        assert found[name].shape == values[name].shape
        np.testing.assert_allclose(found[name], wanted.numpy(), rtol=2e-5, atol=2e-5)


def test_every_rule_has_a_case() -> None:
    used = {kind for kind in derivatives.RULES if any(f"{kind}(" in c[0] or f"{kind}<" in c[0] for c in CASES)}
    assert used == set(derivatives.RULES) - {"Sin"}


def test_the_gradient_of_a_norm_at_zero_is_zero_as_torch_has_it() -> None:
    values = {"a": np.zeros((2, 3), np.float32)}
    found = found_by(graph_of("y = ReduceL2<keepdims=0>(a, last)", [(2, 3)], known=False), values)
    assert not found["a"].any()


def test_a_value_that_is_read_twice_adds_both_gradients() -> None:
    found = found_by(
        graph_of("t = Tanh(a) u = Mul(t, a) y = Add(u, t)", [X], known=False), {"a": np.ones(X, np.float32)}
    )
    a = torch.ones(X, requires_grad=True)
    wanted = torch.autograd.grad((a.tanh() * a + a.tanh()).sin().sum(), a)[0]
    np.testing.assert_allclose(found["a"], wanted, rtol=1e-5)


@pytest.mark.parametrize(
    ("body", "about"),
    [
        ("y = Softplus(a)", "Softplus"),
        ("y = Gather<axis=1>(a, pair)", "Gather"),
        ("y = Slice(a, middle, ends, ends, ends)", "Slice"),
        ('y = Pad<mode="edge">(a, ends, two, middle)', "Pad"),
        ("y = Pow(two, a)", "Pow"),
        ("y = Gemm<alpha=2.0>(a, a)", "Gemm"),
        ("r = ReduceSum<keepdims=0>(a, last) y = MatMul(a, r)", "MatMul"),
    ],
)
def test_what_has_no_derivative_is_refused_by_name(body: str, about: str) -> None:
    with refused(ConfigError, about):
        differentiate(graph_of(body, [(3, 3)], known=True), "total", ["a"])


@pytest.mark.parametrize("body", ["z = Shape(a) y = Cast<to=1>(z)", "z = Sub(two, low) y = Neg(z)"])
def test_an_input_without_influence_is_refused(body: str) -> None:
    with refused(ConfigError, "a"):
        differentiate(graph_of(body, [(3, 3)], known=True), "total", ["a"])
