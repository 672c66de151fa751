"""The gate of CUDA sources reads what ptxas says and judges it by the table."""

from __future__ import annotations

from dataclasses import asdict

from scripts.check_cuda import Usage, misses, parse

SAID = """
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z1aPf' for 'sm_90a'
ptxas info    : Function properties for _Z1aPf
    16 bytes stack frame, 12 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 16 bytes cumulative stack size, 2048 bytes smem, 400 bytes cmem[0]
ptxas info    : Compile time = 12.034 ms
ptxas info    : Compiling entry function '_Z1bPf' for 'sm_90a'
ptxas info    : Function properties for _Z1bPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 32 registers, used 0 barriers, 360 bytes cmem[0]
"""
USED = Usage(registers=32, spill_bytes=0, shared_bytes=1024)


def test_parse_reads_registers_spills_and_shared_memory() -> None:
    assert parse(SAID) == {"_Z1aPf": Usage(255, 20, 2048), "_Z1bPf": Usage(32, 0, 0)}


def test_names_do_not_depend_on_where_the_source_lies() -> None:
    inside = "44_GLOBAL__N__ff31ba2a_11_rms_norm_cu_df177af4"
    name = f"_ZN8llmserve4cuda{inside}8rms_normIfLi8ELb1EEEvNS0_11RmsNormArgsE"
    (found,) = parse(SAID.replace("_Z1aPf", name).split("ptxas info    : Compile time")[0])
    assert found == "_ZN8llmserve4cuda8rms_normIfLi8ELb1EEEvNS0_11RmsNormArgsE"


def test_a_kernel_may_take_less_than_the_table_says_but_not_more() -> None:
    table = {"a.cu sm_80": {"k": asdict(USED)}}
    assert misses(table, {"a.cu sm_80": {"k": USED}}, same_compiler=True) == []
    assert misses(table, {"a.cu sm_80": {"k": Usage(31, 0, 512)}}, same_compiler=True) == []
    for usage in (Usage(33, 0, 1024), Usage(32, 4, 1024), Usage(32, 0, 1025)):
        assert len(misses(table, {"a.cu sm_80": {"k": usage}}, same_compiler=True)) == 1


def test_another_compiler_is_judged_by_spills_alone() -> None:
    table = {"a.cu sm_80": {"k": asdict(USED)}}
    assert misses(table, {"a.cu sm_80": {"k": Usage(40, 0, 2048)}}, same_compiler=False) == []
    assert len(misses(table, {"a.cu sm_80": {"k": Usage(32, 4, 1024)}}, same_compiler=False)) == 1


def test_kernels_and_files_that_came_or_went_are_told() -> None:
    table = {"a.cu sm_80": {"k": asdict(USED)}, "gone.cu sm_80": {}}
    found = misses(table, {"a.cu sm_80": {"other": USED}}, same_compiler=True)
    assert len(found) == 3
