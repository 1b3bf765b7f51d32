"""Faults visible in PTX, found in small texts; `test_compile` plants them in real kernels."""

from __future__ import annotations

from tools import ptx


def trade(increase: int, decrease: int, threads: int = 384) -> str:
    return (
        f".maxntid {threads}, 1, 1\nsetmaxnreg.inc.sync.aligned.u32 {increase};\n"
        f"setmaxnreg.dec.sync.aligned.u32 {decrease};\n"
    )


def test_a_trade_of_registers_must_not_ask_for_more_than_the_launch_had() -> None:
    for increase, decrease, threads, registers in ((232, 40, 384, 168), (240, 24, 384, 168), (152, 56, 512, 128)):
        assert ptx.register_fault(trade(increase, decrease, threads), registers) is None
    fault = ptx.register_fault(trade(232, 48), 168)
    assert fault is not None
    assert "2 x 232 + 48 = 512" in fault
    assert ptx.register_fault(trade(160, 56, 512), 128) is not None
    # The warpgroup that gives nothing back keeps what it started with.
    assert ptx.register_fault(".maxntid 384\nsetmaxnreg.inc.sync.aligned.u32 176;", 168) is not None
    assert ptx.register_fault(".maxntid 384, 1, 1", 168) is None
    assert ptx.register_fault("setmaxnreg.inc.sync.aligned.u32 232;", 168) is not None


def test_a_store_that_nothing_cuts_off_must_be_known() -> None:
    plain = "@%p3 cp.async.bulk.global.shared::cta.bulk_group [%rd4], [%rd5], %r2;\n"
    mapped = "cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%rd9], [%rd5];\n"
    assert ptx.count_plain_stores(plain + mapped + plain) == 2
    assert ptx.store_fault("fp8_matmul/64", 0) is None
    assert ptx.store_fault("fp8_matmul/64", 1) is not None
    assert ptx.store_fault("norm_quantise/64", 1) is None
    assert ptx.store_fault("norm_quantise/64", 2) is not None
    # Rows that are not a whole number of tiles need a separate store.
    assert ptx.store_fault("swiglu_quantise/77x5120", 2) is None
    assert ptx.store_fault("swiglu_quantise/77x5120", 1) is not None


def test_the_longest_product_loop_is_read() -> None:
    text = """
$L__BB0_1:
    add.s32 %r1, %r1, 1;
    @%p1 bra $L__BB0_1;
$L__BB0_2:
    mov.b32 %r2, 0;
$L__BB0_3:
    // a comment
    ld.shared.v4.b32 {%r3, %r4, %r5, %r6}, [%rd1];
    st.shared.b16 [%rd2], %rs1;
    ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r7, %r8, %r9, %r10}, [%r11];
    bar.sync 1, 128;
    mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r12], %r13;
    wgmma.mma_async.sync.aligned.m64n64k32.f32.e4m3.e4m3 {%f1}, %rd3, %rd4, p, 1, 1;
    @%p3 bra $L__BB0_3;
    @%p4 bra $L__BB0_2;
"""
    assert ptx.read_loop(text) == ptx.Loop(instructions=7, barriers=1, shared_bytes=16 + 2 + 16)
    # With a product of another kind around it, an iteration is one of the loop that has both.
    other = "    wgmma.mma_async.sync.aligned.m64n256k16.f32.f16.f16 {%f2}, %rd3, %rd4, p, 1, 1;\n"
    both = text.replace("    @%p4", other + "    @%p4")
    assert ptx.read_loop(both).instructions == 7 + 3
    assert ptx.read_loop("wgmma.mma_async;") == ptx.Loop()
