import json

import pytest

from benchmarks import profile_model


@pytest.mark.parametrize(
    "kernel, group",
    [
        ("gemv_kernel", "GEMMs"),
        ("nvjet_sm90_tst_128x8_64x12_2x1_v_bz_TNT", "GEMMs"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma", "attention"),
        ("attend_kernel", "attention"),
        ("ragged_offsets_kernel", "attention"),
        ("void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<c10::BFloat16>", "norms"),
        ("void at::native::(anonymous namespace)::CatArrayBatchedCopy", "positions and cache"),
        ("Memset (Device)", "rest"),
    ],
)
def test_kernels_are_grouped_by_what_they_do(kernel, group):
    assert profile_model.group_of(kernel) == group


def test_the_command_on_a_cpu(tmp_path, capsys):
    file = tmp_path / "x.json"
    assert profile_model.main(["--model", "tiny", "-p", "9", "--json", str(file)]) == 0
    names = ["engine: prefill", "engine: decode step", "sdpa: prefill", "sdpa: decode step"]
    rows = json.loads(file.read_text())["rows"]
    assert [row["name"] for row in rows] == names
    assert all(row["measured_us"] > 0 for row in rows)
    out = capsys.readouterr().out
    assert all(name in out for name in names)


@pytest.mark.gpu
def test_kernels_on_a_gpu():
    prefill, step = profile_model.profile_engine(profile_model.load("tiny", "fastattn"), 3000)
    assert prefill["groups_us"]["attention"] > 0
    assert {"attend_kernel", "gemv_kernel", "rotary_kernel"} <= {kernel["kernel"] for kernel in step["kernels"]}
    assert sum(step["groups_us"].values()) == pytest.approx(sum(kernel["us"] for kernel in step["kernels"]))
