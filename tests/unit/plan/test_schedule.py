"""Time read from a schedule: loops, overlap, and networks that are busy."""

import dataclasses

import pytest

from glamcli.config.chips import OTHER_KERNELS, load_chips
from glamcli.errors import PlanError
from glamcli.plan import schedule, words
from glamcli.plan.collectives import collectives
from glamcli.plan.hlo import Module
from glamcli.plan.network import Network
from glamcli.plan.topology import parse_target

SHAPE = {"slice": 1, "stage": 1, "data": 1, "expert": 1, "model": 4}
CYCLES = 'backend_config={"window_config":{"estimated_cycles":"1500000000"}}'  # one second on v5e
BYTES = 45_000_000_000  # one second of one v5e link
PAIRS = "source_target_pairs={{0,1},{1,2},{2,3},{3,0}}"
BACK = "source_target_pairs={{1,0},{2,1},{3,2},{0,3}}"


def program(*lines: str, extra: str = "") -> Module:
    body = "".join(f"  %{line}\n" for line in lines)
    return Module(f"{extra}ENTRY %main (p: f32[8]) -> f32[8] {{\n{body}}}\n")


def permute(name: str, pairs: str = PAIRS) -> str:
    kind = f"u8[{BYTES}]"
    return (
        f"{name} = ({kind}, {kind}) collective-permute-start(%p), channel_id=1{name[-1]}, {pairs}"
    )


def wait(name: str) -> str:
    return f"{name}d = u8[{BYTES}] collective-permute-done(%{name})"


def work(name: str) -> str:
    return f'{name} = f32[8] multiply(%p, %p), metadata={{op_name="a/ffn/b"}}, {CYCLES}'


@pytest.fixture
def network() -> Network:
    return Network(parse_target("v5e-4", load_chips()), None, SHAPE)


def seconds(module: Module, network: Network) -> tuple[float, float]:
    """(computing, waiting)"""
    time = schedule.step_time(module, network)
    return round(time.compute, 3), round(sum(time.exposed.values()), 3)


def test_computing_hides_what_is_sent_meanwhile(network):
    assert seconds(program(work("w1")), network) == (1.0, 0.0)
    assert seconds(program(permute("s1"), wait("s1"), work("w1")), network) == (1.0, 1.0)
    assert seconds(program(permute("s1"), work("w1"), wait("s1")), network) == (1.0, 0.0)
    half = program(permute("s1"), permute("s2"), work("w1"), wait("s1"), wait("s2"))
    assert seconds(half, network) == (1.0, 1.0)  # one after the other, the same way around
    both = program(permute("s1"), permute("s2", BACK), work("w1"), wait("s1"), wait("s2"))
    assert seconds(both, network) == (1.0, 0.0)  # links work in both directions


def test_what_is_updated_on_its_way_is_awaited_at_its_end(network):
    start = permute("s1")
    update = f"u1 = u8[{BYTES}] async-update(%s1)"
    end = f"d1 = u8[{BYTES}] async-done(%u1)"
    assert seconds(program(start, work("w1"), update, end), network) == (1.0, 0.0)
    assert seconds(program(start, update, end, work("w1")), network) == (1.0, 1.0)


def test_loops_count_as_often_as_they_run(network):
    extra = (
        "%body (p: f32[8]) -> f32[8] {\n  %" + work("w1") + "\n}\n"
        "%cond (p: f32[8]) -> pred[] {\n  %c = s32[] constant(5)\n"
        "  %l = pred[] compare(%i, %c), direction=LT\n}\n"
    )
    module = program("l = f32[8] while(%p), condition=%cond, body=%body", extra=extra)
    assert seconds(module, network) == (5.0, 0.0)
    assert schedule.step_time(module, network).scopes == {"ffn": pytest.approx(5.0)}


def test_a_reduction_moves_twice_what_a_gathering_does(network):
    def line(kind: str) -> Module:
        return program(f"r = u8[{BYTES}] {kind}(%p), channel_id=1, replica_groups={{{{0,1,2,3}}}}")

    (gather,) = collectives(line("all-gather"), SHAPE)
    (reduce,) = collectives(line("all-reduce"), SHAPE)
    once = schedule.transfer_seconds(gather, network)
    assert schedule.transfer_seconds(reduce, network) == pytest.approx(2 * once)
    # Two lines of two chips each way: three quarters of the bytes over two links.
    assert once == pytest.approx(0.75 / 2, rel=1e-3)


PEAK_FLOPS = 197_000_000_000_000  # one second of a v5e at its peak


def kernel(name: str, flops: int, size: int) -> str:
    cost = f'{{"flops":"{flops}","transcendentals":"0","bytes_accessed":"{size}"}}'
    config = f'backend_config={{"custom_call_config":{{"body":"TUzv","cost_estimate":{cost}}}}}'
    scope = f'metadata={{op_name="jit(f)/attention/{name}/pallas_call"}}'
    return f'k1 = f32[8] custom-call(%p), custom_call_target="tpu_custom_call", {scope}, {config}'


@pytest.mark.parametrize("share", [None, 0.25, 1.0])
def test_a_kernel_is_never_faster_than_its_operations_at_the_peak(network, share):
    table = {} if share is None else {"mine": share}
    chip = dataclasses.replace(network.chip, kernels=table)
    network = Network(dataclasses.replace(network.target, chip=chip), None, SHAPE)
    time = schedule.step_time(program(kernel("mine", PEAK_FLOPS, 1)), network)
    assert time.compute == pytest.approx(1 / (share or OTHER_KERNELS))
    assert time.compute >= 1
    assert time.kernels == {"mine": time.compute}
    assert time.scopes == {"attention": time.compute}
    bytes_alone = schedule.step_time(program(kernel("mine", 1, 2 * 819_000_000_000)), network)
    assert bytes_alone.compute == pytest.approx(2)


def test_a_fusion_around_a_kernel_takes_as_long_as_the_longer_of_both(network):
    name = "transpose(jvp(mine))"
    inner = "%f (p: f32[8]) -> f32[8] {\n  %" + kernel(name, 2 * PEAK_FLOPS, 1) + "\n}\n"
    fused = program(f"f1 = f32[8] fusion(%p), kind=kCustom, calls=%f, {CYCLES}", extra=inner)
    assert seconds(fused, network) == (4.0, 0.0)
    assert schedule.step_time(fused, network).kernels == {"mine": pytest.approx(4.0)}


def test_a_kernel_that_does_not_state_its_cost_is_not_priced_and_named(network):
    bare = kernel("quiet", 0, 0).partition(", backend_config")[0]
    time = schedule.step_time(program(bare, work("w1")), network)
    assert time.compute == pytest.approx(1)
    assert time.unpriced == {"quiet": 1}
    assert list(words.kernel_words(time, network.target)) == [
        "not priced, because they do not state their cost: quiet (1 a step)"
    ]


def test_an_absurd_estimate_is_refused_with_the_name_of_the_operation(network):
    line = work("w1").replace('"1500000000"', f'"{2**63 - 1}"')
    with pytest.raises(PlanError, match="no usable estimate of `a/ffn/b`") as caught:
        schedule.step_time(program(line), network)
    assert "9,223,372,036,854,775,807 cycles of `w1`" in caught.value.what


SLICES = """ENTRY %main (p: f32[8]) -> f32[8] {
  %send = (f32[8,128]{1,0}, u32[], token[]) send(%p, %t), channel_id=3, is_host_transfer=true, \
frontend_attributes={_xla_host_transfer_rendezvous="all-reduce.1_0",\
_xla_megascale_transfer_type="ALL_REDUCE"}
  %recv = (f32[8,128]{1,0}, u32[], token[]) recv(%t), channel_id=2, is_host_transfer=true, \
frontend_attributes={_xla_host_transfer_rendezvous="all-reduce.1_0",\
_xla_megascale_transfer_type="ALL_REDUCE"}
  %recv-done = (f32[8,128]{1,0}, token[]) recv-done(%recv), channel_id=2, is_host_transfer=true
}
"""


def test_transfers_between_slices_are_collectives_over_slice():
    shape = SHAPE | {"slice": 2, "model": 4}
    (found,) = collectives(SLICES, shape)
    assert (found.kind, found.axes, found.group, found.bytes) == ("all-reduce", ("slice",), 2, 4096)
    network = Network(parse_target("2xv5e-4", load_chips()), None, shape)
    time = schedule.step_time(Module(SLICES), network)
    assert time.exposed["slice"] == pytest.approx(4096 / 3.125e9 + 2e-5)
