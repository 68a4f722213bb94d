"""What is read from the text of a compiled module: its operations, and its collectives; on eight virtual devices."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from asymvq_jax.plan.counting import collectives, in_scope, instructions, operation

MESH = {"data": 2, "fsdp": 4, "tensor": 1}


def _compiled_text(function, *arguments) -> str:
    """The module of a function of (8, 8) arrays on the mesh, each argument a PartitionSpec."""
    mesh = jax.make_mesh(tuple(MESH.values()), tuple(MESH), axis_types=(AxisType.Auto,) * 3)
    shapes = [jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=NamedSharding(mesh, spec)) for spec in arguments[:-1]]
    return jax.jit(function, out_shardings=NamedSharding(mesh, arguments[-1])).lower(*shapes).compile().as_text()


P = PartitionSpec
BOTH = ("data", "fsdp")


@pytest.mark.parametrize(
    ("function", "specs", "expected"),
    [
        (lambda x: x * 2, (P("fsdp"), P()), ("all-gather", ("fsdp",), 256)),
        (lambda x: x * 2, (P("data"), P()), ("all-gather", ("data",), 256)),
        (lambda x, y: x @ y, (P(None, "data"), P("data"), P()), ("all-reduce", ("data",), 256)),
        (lambda x, y: x @ y, (P(None, BOTH), P(BOTH), P()), ("all-reduce", BOTH, 256)),
        (lambda x: x * 2, (P("fsdp"), P(None, "fsdp")), ("all-to-all", ("fsdp",), 64)),
    ],
)  # fmt: skip
def test_collectives_of_compiled_functions(function, specs, expected):
    found = collectives(_compiled_text(function, *specs), MESH)
    assert [(c.kind, c.axes, c.bytes) for c in found] == [expected]


def test_collectives_in_a_loop_count_as_often_as_it_runs():
    def function(x, y):
        return jax.lax.scan(lambda total, _: (jnp.sin(total @ y), None), x, None, length=5)[0]

    found = collectives(_compiled_text(function, P(None, "data"), P("data"), P(None, "data")), MESH)
    assert sum(c.count for c in found if c.axes == ("data",)) == 5


MODULE = """HloModule m
%body (p: f32[4]) -> f32[4] {{
  %x = {line}
}}
%condition (p: f32[4]) -> pred[] {{
  %n = s32[]{{:T(128)}} constant(3)
}}
ENTRY %main (p: f32[4]) -> f32[4] {{
  %w = f32[4]{{0}} {caller}, body=%body, condition=%condition
}}
"""


@pytest.mark.parametrize(
    ("line", "axes", "size"),
    [
        ("f32[4]{0:T(128)S(1)} all-reduce(%p), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add", "fsdp", 16),
        ("bf16[4]{0} all-reduce(%p), replica_groups=[4,2]<=[2,4]T(1,0), to_apply=%add", "data", 8),
        ("(f32[4]{0}, /*index=1*/u32[2]{0}) all-reduce(%p, %q), replica_groups={}, to_apply=%add", "data fsdp", 24),
        ("f32[4]{0} all-reduce(%p), replica_groups=[1,8]<=[8], to_apply=%add", "data fsdp", 16),
        ("pred[4]{0} all-gather(%p), replica_groups=mesh['a'=2,'b'=4] {'a'}, dimensions={0}", "data", 4),
        ("f32[4]{0} all-gather(%p), replica_groups=mesh['a'=8] {'a':(2)4}, dimensions={0}", "fsdp", 16),
        ("f32[4]{0} all-gather(%p), replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'a'}", "fsdp", 16),
        ("f32[4]{0} all-gather(%p), replica_groups=mesh['a'=2], device_ids=(4,0) {'a'}, dimensions={0}", "data", 16),
        ("(f32[1]{0}, f32[4]{0}) all-gather-start(%p), replica_groups=[2,4]<=[8], dimensions={0}", "fsdp", 16),
        ("f32[1]{0} reduce-scatter(%p), replica_groups=[2,4]<=[8], to_apply=%add", "fsdp", 16),
        ("(f32[4], f32[4], u32[], u32[]) collective-permute-start(%p), source_target_pairs={{0,4},{4,0}}", "data", 16),
        ("f32[4]{0} collective-permute(%p), source_target_pairs={{0,1},{1,2}}", "fsdp", 16),
    ],
)
def test_groups_and_sizes(line, axes, size):
    (found,) = collectives(MODULE.format(line=line, caller="call(%p)"), MESH)
    assert (found.axes, found.bytes) == (tuple(axes.split()), size)


def test_a_tpus_reduce_scatter_is_a_fusion_of_an_all_reduce():
    line = "f32[8]{0} all-reduce(%p), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add"
    module = MODULE.replace("%body", "%all-reduce-scatter.1")
    (found,) = collectives(module.format(line=line, caller="call(%p)"), MESH)
    assert (found.kind, found.axes, found.bytes) == ("reduce-scatter", ("fsdp",), 32)


@pytest.mark.parametrize(
    ("caller", "count"),
    [
        ('while(%p), backend_config={"known_trip_count":{"n":"6"}}', 6),
        ("while(%p)", 3),
        ("async-done(%p)", 0),
    ],
)
def test_how_often_a_computation_runs(caller, count):
    line = "f32[4]{0} all-reduce(%p), replica_groups={}, to_apply=%add"
    found = collectives(MODULE.format(line=line, caller=caller), MESH)
    assert sum(c.count for c in found) == count


def test_operations_have_a_name_and_what_they_do():
    @jax.jit
    def function(x):
        with jax.named_scope("attention"):
            return jnp.sin(x @ x)

    text = function.lower(jax.ShapeDtypeStruct((8, 8), jnp.float32)).compile().as_text()
    lines = [line for _, line in instructions(text) if in_scope(line, "attention")]
    assert {"dot", "sine"} <= {operation(line)[1] for line in lines}
    assert not any(in_scope(line, "tent") for line in lines)
    line = '  ROOT %gemm.1 = (f32[8,8]{1,0}, s8[64]{0}) custom-call(%a, %b), custom_call_target="__cublas$GEMM"'
    assert operation(line) == ("gemm.1", "__cublas$gemm")
    assert operation("}") is None
