"""The counts against formulas, and against the figures of the paper and of other counters."""

import pytest

import mlfast
from mlfast import cli
from mlfast.models.macs import PAPER_ROWS, PaperRow, count, paper_line

V2S, TRESNET = "tf_efficientnetv2_s.in21k", "tresnet_v2_l"


def ml_decoder_macs(tokens, channels, num_classes, groups):
    per_token = channels * 768 + 2 * 768**2
    per_query = 2 * 768**2 + 2 * 768 * 2048 + 2 * tokens * 768
    return tokens * per_token + groups * per_query + groups * -(-num_classes // groups) * 768


def test_efficientnet_and_what_ml_decoder_adds():
    plain, decoder = (count(V2S, head, 80, 448) for head in ("gap", "ml_decoder"))
    added = decoder.macs - plain.macs + 80 * 1280  # the plain head's own
    assert added == ml_decoder_macs(14 * 14, 1280, 80, 80)
    assert added / 1e9 == pytest.approx(0.79, abs=0.005)  # not the paper's 12.28 - 10.83 = 1.45
    # Other counters of the same model: ptflops 10.83, fvcore 11.48.
    assert plain.macs / 1e9 == pytest.approx(11.38, abs=0.005)
    # 26.80 M parameters in the released model: with frozen queries, and a bias beside the cosine.
    assert (decoder.parameters + 80 * 768 + 80) / 1e6 == pytest.approx(26.80, abs=0.005)


def test_tresnet_is_as_the_paper_prints_it():
    for row in PAPER_ROWS:
        if (row.backbone, row.head, row.num_classes) == (TRESNET, "ml_decoder", 80):
            cost = count(row.backbone, row.head, row.num_classes, row.image_size)
            assert cost.macs / 1e9 == pytest.approx(row.printed, abs=0.005)
            assert (cost.parameters + 80 * 768 + 80) / 1e6 == pytest.approx(51.34, abs=0.005)


def test_other_heads_by_their_formulas():
    gap, q2l, csra = (count("test_efficientnet", head, 10, 64).macs for head in ("gap", "q2l", "csra"))
    n, d, k = 4, 256, 10
    assert csra - gap == (n - 1) * k * d
    encoder = n * (4 * d**2 + 8 * d**2) + 2 * n**2 * d
    decoder = k * 4 * d**2 + 2 * k**2 * d + k * 2 * d**2 + n * 2 * d**2 + 2 * k * n * d + k * 8 * d**2
    assert q2l - gap == encoder + 2 * decoder


def test_rows_can_be_built_by_name():
    assert len(set(PAPER_ROWS)) == len(PAPER_ROWS) >= 12
    assert {row.head for row in PAPER_ROWS} == {"gap", "ml_decoder"}


def test_info(capsys):
    assert cli.main(["info", "--backbone", "test_resnet", "--head", "csra", "--num-classes", "10"]) == 0
    cost = count("test_resnet", "csra", 10, 448)
    assert capsys.readouterr().out == f"{cost.parameters / 1e6:.2f} M parameters, {cost.macs / 1e9:.2f} GMACs\n"
    model = mlfast.create_model("test_resnet", 10, head="csra")
    assert cost.parameters == sum(p.numel() for p in model.parameters())


def test_info_of_the_paper_prints_every_row(capsys, monkeypatch):
    rows = (PaperRow("VOC", "test_resnet", "gap", 20, 64, 1.5), PaperRow("VOC", "test_vit", "ml_decoder", 20, 160, 2.5))
    monkeypatch.setattr("mlfast.models.macs.PAPER_ROWS", rows)
    assert cli.main(["info", "--paper"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == paper_line() and len(lines) == 4
    assert lines[1].split()[:5] == ["VOC", "test_resnet", "gap", "20", "64"] and lines[1].endswith("1.50")
    assert len({len(line) for line in lines[:3]}) == 1


def test_info_names_what_is_wrong(capsys):
    assert cli.main(["info", "--backbone", "resnet51"]) == 2
    assert "mlfast info: unknown backbone 'resnet51'; did you mean" in capsys.readouterr().err
