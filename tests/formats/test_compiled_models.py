"""Models in every format under torch.compile and torch.export: whole graphs, which compute what eager ones
do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from transformers import StaticCache

from llmcompress.algorithms.codebook import Palette
from llmcompress.algorithms.sparsegpt import keep_mask
from llmcompress.formats import codebook, integer_embedding, integer_linear, low_rank, sparse
from llmcompress.formats.codebook import CodebookLayout, CodebookWeight
from llmcompress.formats.four_bit import FourBitLinear
from llmcompress.formats.integer import IntegerLayout
from llmcompress.formats.integer_linear import IntegerLinear
from llmcompress.formats.low_rank import FactoredLayout, FactoredWeight
from llmcompress.formats.sparse import SparseLayout, SparseWeight
from llmcompress.kernels import operators
from tests.formats.test_few_tokens import of_four_bits, of_ggml, of_integers
from tests.models import noise, pico

Make = Callable[[int, int, Tensor | None], nn.Module]
PROMPT, ROOM = 12, 24  # more tokens than the kernels of few take; of the cache


def of_codebook(entries: int) -> Make:
    def make(R: int, C: int, bias: Tensor | None) -> nn.Module:
        index = torch.randint(entries, (R, C), generator=torch.Generator().manual_seed(0))
        layout = CodebookLayout(entries, 1, "float16")
        levels = layout.snap(noise(R, entries, seed=1).sort(-1).values)
        return codebook.linear(CodebookWeight.of(Palette(index, levels, 1), layout), bias)

    return make


def of_sparse(R: int, C: int, bias: Tensor | None) -> nn.Module:
    W_RC = noise(R, C)
    layout = SparseLayout("2:4", "float32")
    return sparse.linear(SparseWeight.of(W_RC, keep_mask(W_RC.abs(), (2, 4)), layout), bias)


def of_low_rank(R: int, C: int, bias: Tensor | None) -> nn.Module:
    weight = FactoredWeight(FactoredLayout("basis", 8), left_RK=noise(R, 8), right_KC=noise(8, C, seed=1))
    return low_rank.linear(weight, bias)


# each format, and the operator that its linears are under torch.compile
FORMATS: dict[str, tuple[Make, str | None]] = {
    "w8a8": (of_integers(IntegerLayout("w8a8")), "integer_linear"),
    "w8a8, static": (of_integers(IntegerLayout("w8a8", "static")), "integer_linear"),
    "w8a16": (of_integers(IntegerLayout("w8a16", "none")), "integer_linear"),
    "w8a16, rounded": (of_integers(IntegerLayout("w8a16")), "integer_linear"),
    "w4a16": (of_integers(IntegerLayout("w4a16", "none", 32)), "integer_linear"),
    "w4a8": (of_integers(IntegerLayout("w4a8", group_size=32)), "integer_linear"),
    "w4a4": (of_integers(IntegerLayout("w4a4", group_size=32)), "integer_linear"),
    "codebook of 4": (of_codebook(4), "codebook_linear"),
    "codebook of 8": (of_codebook(8), "codebook_linear"),
    "codebook of 16": (of_codebook(16), "codebook_linear"),
    "q4_0": (of_ggml("q4_0"), "ggml_linear"),
    "iq4_nl": (of_ggml("iq4_nl"), "ggml_linear"),
    "nf4": (of_four_bits("nf4", False), "four_bit_linear"),
    "fp4, nested": (of_four_bits("fp4", True), "four_bit_linear"),
    "sparse": (of_sparse, None),
    "low rank": (of_low_rank, None),
}
every_format = pytest.mark.parametrize("name", FORMATS)


def model_of(make: Make, *, narrow: bool = False) -> Any:
    """A Llama of one layer whose linears are of a format. With `narrow`, a second layer has a smaller
    feed-forward part."""
    model: Any = pico("llama", num_hidden_layers=2 if narrow else 1, attention_bias=True)
    for number, layer in enumerate(model.model.layers):
        for name, linear in list(layer.named_modules()):
            if isinstance(linear, nn.Linear):
                R, C = linear.out_features, linear.in_features
                if narrow and number == 1:
                    R, C = (192 if one == 320 else one for one in (R, C))
                made = make(R, C, None if linear.bias is None else linear.bias[:R])
                if isinstance(made, FourBitLinear):
                    made.kernel = ()  # bitsandbytes' kernel for many tokens, which rounds to bfloat16
                layer.set_submodule(name, made)
    return model


class Graphs:
    """A compiler that runs graphs as they are, and keeps what it was given."""

    def __init__(self) -> None:
        self.graphs: list[torch.fx.GraphModule] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: Any) -> Any:
        """Compile by aot_eager, which traces operators by their fake kernels."""
        self.graphs.append(graph)
        aot: Any = torch._dynamo.lookup_backend("aot_eager")
        return aot(graph, inputs)

    def operators(self) -> list[list[str]]:
        """Our operators that each graph calls."""
        return [
            [
                str(node.target).split(".")[1]
                for node in graph.graph.nodes
                if str(node.target).startswith(operators.NAMESPACE)
            ]
            for graph in self.graphs
        ]


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def written(model: Any, forward: Callable[..., Any]) -> list[Tensor]:
    """The logits of a prompt and of two tokens after it, with a static cache."""
    ids = torch.arange(PROMPT + 2)[None] + 5
    cache = StaticCache(config=model.config, max_cache_len=ROOM)
    found = []
    with torch.no_grad():
        for start, end in ((0, PROMPT), (PROMPT, PROMPT + 1), (PROMPT + 1, PROMPT + 2)):
            places = torch.arange(start, end)[None]
            out = forward(input_ids=ids[:, start:end], past_key_values=cache, position_ids=places)
            found.append(out.logits)
    return found


def close(found: list[Tensor], exact: list[Tensor]) -> bool:
    """Whether logits agree. Norms and attention may be computed in another order by a compiler, and a token
    at the edge of two codes is then rounded to the other."""
    return all(
        float((one - other).norm() / other.norm()) < 1e-5 for one, other in zip(found, exact, strict=True)
    )


@pytest.mark.slow(keep=2)
@every_format
def test_a_model_is_one_graph_and_computes_what_the_eager_one_does(name: str) -> None:
    make, operator = FORMATS[name]
    model, graphs = model_of(make), Graphs()
    exact = written(model, model)
    compiled: Any = torch.compile(model, fullgraph=True, backend=graphs)
    assert close(written(model, compiled), exact)
    assert len(graphs.graphs) == 2, "one for the prompt and one for a token"
    assert graphs.operators() == 2 * [[operator] * 7 if operator else []]


@every_format
def test_an_exported_model_computes_the_same(name: str) -> None:
    """For any number of tokens, few or many, and it stays the same program."""
    make, operator = FORMATS[name]
    model = model_of(make)

    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: Tensor) -> Tensor:
            logits: Tensor = self.model(input_ids=ids, use_cache=False).logits
            return logits

    reads, ids = Reads(), torch.arange(PROMPT)[None] + 5
    tokens = torch.export.Dim("tokens", min=2, max=64)
    with torch.no_grad():
        program = torch.export.export(reads, (ids,), dynamic_shapes={"ids": {1: tokens}})
        for count in (3, PROMPT):
            assert close([program.module()(ids[:, :count])], [reads(ids[:, :count])])
    targets = [str(node.target) for node in program.graph.nodes]
    assert sum(operators.NAMESPACE in target for target in targets) == (7 if operator else 0)


@pytest.mark.slow
def test_layers_of_different_widths_are_one_graph() -> None:
    model, graphs = model_of(FORMATS["w8a8"][0], narrow=True), Graphs()
    exact = written(model, model)
    compiled: Any = torch.compile(model, fullgraph=True, backend=graphs)
    assert close(written(model, compiled), exact)
    assert graphs.operators() == 2 * [14 * ["integer_linear"]]


@pytest.mark.slow
def test_an_int8_embedding_and_its_tied_head_are_in_the_graph() -> None:
    model, graphs = model_of(FORMATS["w8a8"][0]), Graphs()
    head = cast(IntegerLinear, of_integers(IntegerLayout("w8a16", "none"))(160, 64, None))
    weight = integer_linear.weight_of(head)
    model.model.embed_tokens = integer_embedding.embedding("embedding", model.model.embed_tokens, weight)
    integer_embedding.share(head, model.model.embed_tokens)
    model.lm_head = head
    exact = written(model, model)
    compiled: Any = torch.compile(model, fullgraph=True, backend=graphs)
    assert close(written(model, compiled), exact)
    assert graphs.operators() == 2 * [8 * ["integer_linear"]]


@pytest.mark.parametrize("name", [name for name, (_, operator) in FORMATS.items() if operator])
@pytest.mark.parametrize("dtype", operators.DTYPES)
def test_operators_keep_the_rules_of_torch(name: str, dtype: torch.dtype) -> None:
    """Their fake kernels have the shapes and types of the real ones, and they return new tensors."""
    module, calls = FORMATS[name][0](32, 64, noise(32)), list[Any]()

    class Noting(torch.fx.Interpreter):
        def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
            if operators.NAMESPACE in str(target):
                calls.append((target, args))
            return super().call_function(target, args, kwargs)

    for tokens in (1, 5, 40):
        x = noise(1, tokens, 64).to(dtype)
        with torch.no_grad():
            exact = module(x)
            torch._dynamo.reset()
            compiled: Any = torch.compile(
                module, fullgraph=True, backend=lambda graph, _: Noting(graph).run, dynamic=False
            )
            found = compiled(x)
            assert torch.equal(found, exact) or tokens == 40, "the same function"
            func, args = calls.pop()
            torch.library.opcheck(func, args, test_utils=("test_schema", "test_faketensor"))
